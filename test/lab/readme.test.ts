/**
 * README.md and the pages that it links: all that they say to type is typed
 * here, as it stands there. What can't be has a stand-in that says so.
 */

import { spawnSync } from "node:child_process";
import {
  appendFileSync,
  copyFileSync,
  cpSync,
  existsSync,
  globSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { createServer } from "node:https";
import type { Server } from "node:https";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { loadCommands } from "../../plugins/_commands.ts";
import {
  build,
  buildLog,
  CERTIFICATE,
  down,
  inHost,
  lab,
  makeWork,
  onTerminal,
  ROOT,
  root,
  start,
  until,
  up,
  watch,
  within,
} from "./lab.ts";
import { addressOf } from "./relay.ts";

const test = suite("README");
const COMMANDS = await loadCommands();

/** What is there to read, in this order; plugins/README.md has its own tests. */
const PAGES = ["README.md"]
  .concat(["settings", "operation", "security", "measurements", "development"]
    .map((name) => `plugins/${name}.md`))
  .map((file) => readFileSync(ROOT + file, "utf8")).join("\n");
const NODE = `${ROOT}node_modules/node/bin/node`;
const DENO = globSync(`${ROOT}node_modules/@deno/*/deno`)[0]!;

/** Who reads it, and the machine that is to build. */
const HOST = "novice";
const MACHINE = "w1.example.org";

/** The lab's name of that. */
const MACHINE_HOST = "distant";

// ---------------------------------------------------------------------------
// What is there to type
// ---------------------------------------------------------------------------

/** The fenced blocks of a language. */
function fenced(language: string): string[] {
  const pattern = new RegExp(`^\`\`\`${language}\\n([^]*?)^\`\`\`$`, "gm");
  return [...PAGES.matchAll(pattern)].map(([, text]) => text!);
}

/** The commands of a block: a script, or one a line. */
function commandsOf(block: string): string[] {
  if (block.startsWith("set -e\n")) return [block.trim()];
  return block.replace(/\\\n\s*/g, "")
    .split("\n")
    .map((line) => line.replace(/(^|\s+)# .*$/, "").trim())
    .filter((line) => line !== "");
}

/** All commands in blocks, in the order of the pages. */
function allCommands(): string[] {
  const text = PAGES.replace(/^```(\w*)\n([^]*?)^```$/gm, (_, kind, block) => {
    return kind === "sh" ? block.replace(/^/gm, "    ") : "";
  });
  const blocks = [...text.matchAll(/(?:^ {4}.*\n)+/gm)].map(([block]) =>
    block.replace(/^ {4}/gm, "")
  );
  return [...new Set(blocks.flatMap(commandsOf))];
}

// ---------------------------------------------------------------------------
// Who types it
// ---------------------------------------------------------------------------

const release = mkdtempSync(`${tmpdir()}/offload-release-`);
const repository = mkdtempSync(`${tmpdir()}/offload-repository-`);
let server: Server;
let url = "";
let derivation = "";

/** Writes a command down in the host, to be run by its shell. */
function scriptOf(command: string, directory = "/root"): string {
  const file = `${root(HOST)}/tmp/typed.sh`;
  writeFileSync(file, `cd ${directory}\n${command}\n`);
  return "/tmp/typed.sh";
}

/** Runs a command in the host; it must succeed. Returns what it printed. */
async function typed(
  command: string,
  directory?: string,
  ...environment: readonly string[]
): Promise<string> {
  const script = scriptOf(command, directory);
  const words = ["env", ...environment, "sh", script];
  const running = watch(start(HOST, ...words));
  const { status } = await within(command, running.ended, 120_000);
  assert.is(status, 0, running.text());
  return running.text();
}

/** Demands that another suite runs a program. */
function assertRunElsewhere(program: string, suite: string): void {
  const text = readFileSync(`${ROOT}test/lab/${suite}`, "utf8");
  assert.match(text, program, `test/lab/${suite} does not run ${program}`);
}

/** Demands that a build is offloaded to the machine. */
function assertOffloads(derivation: string): void {
  const { status, stderr } = build(HOST, derivation);
  assert.is(status, 0, stderr);
  assert.match(stderr, `offloading build of ${derivation} to '${MACHINE}'`);
  assert.match(buildLog(MACHINE_HOST, derivation) ?? "no log", "built ");
}

/** Types a command that asks whether a host key is right. */
async function typeTrust(command: string): Promise<void> {
  const login = "ssh-add -q /tmp/administrator";
  const script = scriptOf(`${login}\n${command}`);
  const asked = onTerminal(HOST, ["ssh-agent", "sh", script]);
  await until("the question", () => /\(yes or no\)\? /.test(asked.text()));
  asked.child.stdin!.write("yes\r");
  const { status, stdout } = await within("trust", asked.ended);
  assert.is(status, 0, stdout);
}

/** The machine's load is that of all hosts here. */
function ignoreLoad(): void {
  const file = `${root(HOST)}/etc/guix/machines.scm`;
  const text = readFileSync(file, "utf8");
  const name = `(name "${MACHINE}")`;
  assert.match(text, `(name "${MACHINE}")`);
  writeFileSync(file, text.replace(name, `${name} (overload-threshold #f)`));
}

/** What stands in for the administrator, by command, in this order. */
const TYPED: Readonly<
  Record<string, (command: string) => Promise<void> | void>
> = {
  // Out here, where git is.
  'git clone "$REPOSITORY" /opt/offload': (command) => {
    commitCheckout();
    const clone = `${release}/clone`;
    const line = command.replace("/opt/offload", clone);
    const env = { ...process.env, REPOSITORY: repository };
    const result = spawnSync("sh", ["-c", line], { env, encoding: "utf8" });
    assert.is(result.status, 0, result.stderr);
    cpSync(clone, `${root(HOST)}/opt/offload`, { recursive: true });
  },
  "cd /opt/offload": async (command) => {
    await typed(`${command} && test -x scripts/install.sh`);
  },
  // It would take the libraries from under the tests; test.sh ran it first.
  "npm ci": () => {
    const text = readFileSync(`${ROOT}scripts/test.sh`, "utf8");
    assert.match(text, /^npm ci /m);
    const link = `${root(HOST)}/opt/offload/node_modules`;
    symlinkSync("/offload/node_modules", link);
  },
  "scripts/install.sh": async (command) => {
    const runtime = "OFFLOAD_RUNTIME=/offload/node_modules/node/bin/node";
    const text = await typed(command, "/opt/offload", runtime);
    assert.match(text, "installed /usr/local/bin/offload");
  },
  'curl --proto =https -fsSL "$URL/install.sh" | sh -s -- --from "$URL"':
    async (command) => {
      copyFileSync(NODE, `${root(HOST)}/usr/local/bin/node`);
      copyFileSync(CERTIFICATE, `${root(HOST)}/root/server.pem`);
      const trusted = "CURL_CA_BUNDLE=/root/server.pem";
      await typed(command, "/root", `URL=${url}`, trusted);
      lab("daemon", HOST, "GUIX=/usr/local/lib/offload/guix");
    },
  "offload trust root@w1.example.org --file /etc/guix/machines.scm": async (
    command,
  ) => {
    await typeTrust(command);
    ignoreLoad();
    assertOffloads(derivation);
  },
  "offload test": async (command) => {
    assert.match(await typed(command), `${MACHINE}:22`);
  },
  "mkdir -p /etc/guix/offload": async (command) => {
    await typed(command);
  },
  "touch /etc/guix/offload/off": async (command) => {
    await typed(command);
    const [other] = makeWork(HOST, "--name=off");
    const { status, stderr } = build(HOST, other!);
    assert.is(status, 0, stderr);
    assert.match(stderr, "'guix offload' takes over");
    assert.match(stderr, `offloading '${other}' to '${MACHINE}'`);
    assert.match(await typed("offload status"), "'guix offload' serves");
  },
  "rm /etc/guix/offload/off": async (command) => {
    await typed(command);
    const [other] = makeWork(HOST, "--name=on");
    assertOffloads(other!);
  },
  // The pipeline: of two machines, one is down.
  [commandsOf(fenced("sh").find((it) => it.startsWith("set -e")) ?? "")[0]!]:
    async (command) => {
      const directory = `${root(HOST)}/tmp/ci`;
      mkdirSync(directory);
      const file = `${root(HOST)}/etc/guix/machines.scm`;
      const machine = /\(build-machine[^]*\)\n?\)/.exec(
        readFileSync(file, "utf8"),
      )![0].replace(/\)\s*$/, "");
      const laptop = machine.replace(MACHINE, "laptop");
      const text = `(list ${machine} ${laptop})\n`;
      writeFileSync(`${directory}/machines.scm`, text);
      // Nobody has that address, whatever else runs on this machine.
      const address = addressOf(MACHINE_HOST).replace(/\d+$/, "78");
      appendFileSync(`${root(HOST)}/etc/hosts`, `${address} laptop\n`);
      const printed = await typed(command, "/tmp/ci");
      assert.match(printed, "laptop is down");
      for (const name of ["offload", "laptop"]) {
        assert.match(readFileSync(`${directory}/${name}.xml`, "utf8"), "<test");
      }
    },
  "sh /usr/local/lib/offload/install.sh --uninstall": async (command) => {
    lab("daemon", HOST);
    await typed(command);
    assert.not(existsSync(`${root(HOST)}/usr/local/bin/offload`));
  },
  "sh scripts/demo.sh": () =>
    assertRunElsewhere("/scripts/demo.sh", "demo.test.ts"),
  // It runs this suite.
  "sh scripts/test.sh": () => {
    assert.ok(existsSync(`${ROOT}scripts/test.sh`));
  },
  // This host has no systemd: its daemon gets what the unit would set.
  "systemctl edit guix-daemon": () => {
    const [unit] = fenced("ini");
    assert.match(unit!, /^\[Service\]\nEnvironment=GUIX=\/opt\/offload\//);
    lab("daemon", HOST, /GUIX=.*/.exec(unit!)![0]);
  },
  "systemctl restart guix-daemon": () => {
    const [other] = makeWork(HOST, "--name=other");
    assertOffloads(other!);
  },
};

/** Makes a repository of the checkout as it is, whether or not it is one. */
function commitCheckout(): void {
  const author = ["-c", "user.name=test", "-c", "user.email=test@localhost"];
  git("init", "--quiet");
  git("add", "--all");
  git(...author, "commit", "--quiet", "--message=test");
}

/** Runs git on that repository, with the files of the checkout. */
function git(...args: readonly string[]): void {
  const places = [`--git-dir=${repository}/.git`, `--work-tree=${ROOT}`];
  const result = spawnSync("git", [...places, ...args], { encoding: "utf8" });
  assert.is(result.status, 0, result.stderr);
}

/** Lets the administrator log in to the machine. */
function administrate(): void {
  const key = "/tmp/administrator";
  inHost(HOST, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key);
  const directory = `${root(MACHINE_HOST)}/root/.ssh`;
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  copyFileSync(`${root(HOST)}${key}.pub`, `${directory}/authorized_keys`);
}

test.before(async () => {
  const env = { ...process.env, OFFLOAD_RUNTIME: NODE };
  const made = spawnSync(`${ROOT}scripts/release`, [release], { env });
  assert.is(made.status, 0, made.stderr.toString());
  const pem = readFileSync(CERTIFICATE);
  server = createServer({ key: pem, cert: pem }, (request, response) => {
    response.end(readFileSync(release + request.url));
  });
  await new Promise<void>((resolve) => {
    server.listen(0, "127.0.0.1", resolve);
  });
  url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  up(`${HOST}:master:stranger`, `${MACHINE_HOST}:stranger`);
  const address = inHost(HOST, "getent", "hosts", MACHINE_HOST).split(" ")[0];
  appendFileSync(`${root(HOST)}/etc/hosts`, `${address} ${MACHINE}\n`);
  rmSync(`${root(HOST)}/etc/guix/machines.scm`);
  administrate();
  [derivation] = makeWork(HOST) as [string];
});

test.after(() => {
  server.close();
  rmSync(release, { recursive: true });
  rmSync(repository, { recursive: true });
  down(HOST, MACHINE_HOST);
});

test("all commands of the pages are typed here", () => {
  const commands = allCommands();
  const missing = commands.filter((command) => !(command in TYPED));
  assert.equal(missing, [], "no test types them: add them to TYPED");
  const gone = Object.keys(TYPED).filter((it) => !commands.includes(it));
  assert.equal(gone, [], "they are on no page any more");
});

test("plugins/README.md checks a plugin against the types", () => {
  const page = readFileSync(`${ROOT}plugins/README.md`, "utf8");
  const [, command] = /^ {4}(deno check .*)$/m.exec(page)!;
  const [, example] = /^```ts\n(\/\/ roomy\.ts\n[^]*?)^```$/m.exec(page)!;
  const file = `${release}/roomy.ts`;
  writeFileSync(file, example!.replace("/usr/local/lib/offload", release));
  const args = command!.replace("/etc/guix/offload/roomy.ts", file)
    .split(" ").slice(1);
  const result = spawnSync(DENO, args, { encoding: "utf8" });
  assert.is(result.status, 0, result.stderr);
});

test("the pages name programs and commands that are there", () => {
  const spans = [
    ...PAGES.replace(/^```[^]*?^```$/gm, "")
      .matchAll(/`([^`\n]+)`/g),
  ].map(([, text]) => text!);
  for (const span of spans) {
    const [, file] = /^(?:sh )?(scripts\/[a-z./]+)/.exec(span) ?? [];
    if (file) assert.ok(statSync(ROOT + file), file);
    const [, name] = /^offload ([a-z]\S*)/.exec(span) ?? [];
    if (name === undefined) continue;
    assert.ok(COMMANDS.some((command) => command.name === name), span);
  }
});

for (const [command, type] of Object.entries(TYPED)) {
  test(command.replaceAll("\n", "; "), () => type(command));
}

test.run();

/**
 * scripts/install.sh, as an administrator runs it on a machine with one
 * runtime and no checkout: the one line, a real build, and the way back.
 */

import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  appendFileSync,
  chmodSync,
  copyFileSync,
  cpSync,
  existsSync,
  globSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { createServer as createHttpServer } from "node:http";
import { createServer } from "node:https";
import type { Server } from "node:https";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertOffloaded,
  assertStoreIsSound,
  build,
  CERTIFICATE,
  down,
  inHost,
  lab,
  makeWork,
  onTerminal,
  ROOT,
  root,
  run,
  start,
  STATE,
  until,
  up,
  useMachines,
  watch,
  within,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";
import { loadCommands } from "../../plugins/_commands.ts";

const test = suite("install");
const COMMANDS = await loadCommands();

/** The runtimes' programs: each host gets a copy of one. */
const PROGRAMS: Readonly<Record<Runtime, string>> = {
  node: `${ROOT}node_modules/node/bin/node`,
  deno: globSync(`${ROOT}node_modules/@deno/*/deno`)[0]!,
};

const LIBRARY = "/usr/local/lib/offload";
const SHIM = `${LIBRARY}/guix`;

/** On the hosts, what is no file that an administrator would know. */
const NOT_COMPARED = ["dev", "gnu", "offload", "proc", "run", "sys", "tmp"]
  .concat("var/guix", "var/log", "root/release");

const release = mkdtempSync(`${tmpdir()}/offload-release-`);
let server: Server;
let url = "";
let redirection = "";
const derivations: Record<string, string[]> = {};

/** The hosts, and the account that guix-daemon runs as there. */
const HOSTS = { fresh: "root", ufresh: "guix-daemon" } as const;

test.before(async () => {
  const env = { ...process.env, OFFLOAD_RUNTIME: PROGRAMS.node };
  const made = spawnSync(`${ROOT}scripts/bundle`, [release], { env });
  assert.is(made.status, 0, made.stderr.toString());
  const pem = readFileSync(CERTIFICATE);
  server = createServer({ key: pem, cert: pem }, (request, response) => {
    const [, path] = /^\/plain(\/.*)$/.exec(request.url!) ?? [];
    if (path) {
      response.writeHead(302, { location: redirection + path }).end();
      return;
    }
    const file = release + request.url;
    if (!existsSync(file)) response.writeHead(404).end();
    else response.end(readFileSync(file));
  });
  await new Promise<void>((resolve) => {
    server.listen(0, "127.0.0.1", resolve);
  });
  url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  up("fresh:master", "ufresh:master:unprivileged", "w1");
  for (const host of Object.keys(HOSTS)) {
    useMachines(host, ["w1"]);
    derivations[host] = makeWork(host, "--count=4");
  }
});

test.after(() => {
  server.close();
  rmSync(release, { recursive: true });
  down(...Object.keys(HOSTS));
});

// ---------------------------------------------------------------------------
// What the tests do and see
// ---------------------------------------------------------------------------

/** Leaves a host with one runtime and no checkout. */
function makeFresh(host: string, runtime: Runtime | undefined): void {
  if (existsSync(`${root(host)}/offload/mod.ts`)) {
    inHost(host, "umount", "/offload");
  }
  for (const [name, program] of Object.entries(PROGRAMS)) {
    const file = `${root(host)}/usr/local/bin/${name}`;
    if (name !== runtime) rmSync(file, { force: true });
    else if (!existsSync(file)) copyFileSync(program, file);
  }
}

/** All of a host that installing could have changed: mode, owner, content. */
function listing(host: string): Record<string, string> {
  const entries: Record<string, string> = {};
  const visit = (name: string) => {
    const file = `${root(host)}/${name}`;
    const { mode, uid, gid, size, mtimeMs } = lstatSync(file);
    const kind = mode & 0o170000;
    const isSystem = name.startsWith("usr/") && !name.startsWith("usr/local/");
    const content = kind === 0o120000
      ? readlinkSync(file)
      : kind !== 0o100000
      ? ""
      : isSystem || size > 8 << 20
      ? `${size} ${mtimeMs}`
      : createHash("sha256").update(readFileSync(file)).digest("hex");
    entries[name] = `${mode.toString(8)} ${uid}:${gid} ${content}`;
    if (kind !== 0o040000 || NOT_COMPARED.includes(name)) return;
    for (const child of readdirSync(file)) {
      visit(name === "" ? child : `${name}/${child}`);
    }
  };
  visit("");
  return entries;
}

/** What differs between two listings. */
function changes(
  before: Record<string, string>,
  after: Record<string, string>,
): string[] {
  return [...new Set([...Object.keys(before), ...Object.keys(after)])]
    .filter((name) => before[name] !== after[name]).sort();
}

/** Runs the one line in a host, as a shell has it. */
async function pipe(
  host: string,
  shell: string,
  options: string,
): Promise<Result> {
  copyFileSync(CERTIFICATE, `${root(host)}/tmp/server.pem`);
  const line = "export CURL_CA_BUNDLE=/tmp/server.pem; " +
    `curl -fsSL ${url}/install.sh | ${shell} -s -- --from ${url} ${options}`;
  // This process serves the files meanwhile.
  const running = watch(start(host, "sh", "-c", line));
  return await within("install.sh", running.ended, 120_000);
}

/** Runs install.sh of a copy of the release in a host. */
function install(host: string, ...options: readonly string[]): Result {
  return run(host, "sh", "/root/release/install.sh", ...options);
}

/** Puts a copy of the release in a host. */
function copyRelease(host: string): string {
  const directory = `${root(host)}/root/release`;
  rmSync(directory, { recursive: true, force: true });
  cpSync(release, directory, { recursive: true });
  return directory;
}

/** Changes the release in a host, as the next version would. */
function nextVersion(directory: string): void {
  appendFileSync(`${directory}/offload.mjs`, "// the next version\n");
  const names = readFileSync(`${directory}/SHA256SUMS`, "utf8")
    .matchAll(/^\S+ {2}(.*)$/gm);
  const sums = [...names].map(([, name]) => {
    const content = readFileSync(`${directory}/${name}`);
    return `${createHash("sha256").update(content).digest("hex")}  ${name}\n`;
  });
  writeFileSync(`${directory}/SHA256SUMS`, sums.join(""));
}

/** Demands that a command failed with these words and changed nothing. */
function assertRefused(
  host: string,
  before: Record<string, string>,
  result: Result,
  words: RegExp,
): void {
  assert.match(result.stderr, words);
  assert.match(result.stderr, /^offload: error: .+\nhint: .+$/m);
  assert.is(result.status, 1);
  assert.equal(changes(before, listing(host)), []);
}

// ---------------------------------------------------------------------------
// There and back
// ---------------------------------------------------------------------------

/** Has the store be writable for the daemon alone, as Guix's units do. */
function restartDaemon(host: string, ...variables: readonly string[]): void {
  if (host !== "ufresh") {
    lab("daemon", host, ...variables);
    return;
  }
  run(host, "umount", "/gnu/store");
  lab("daemon", host, ...variables);
  inHost(host, "mount", "--bind", "/gnu/store", "/gnu/store");
  inHost(host, "mount", "-o", "remount,bind,ro", "/gnu/store");
}

for (const [host, account] of Object.entries(HOSTS)) {
  for (const runtime of ["node", "deno"] as const) {
    test(`${account}'s daemon goes over and back with ${runtime}`, async () => {
      makeFresh(host, runtime);
      restartDaemon(host);
      const before = listing(host);
      const shell = runtime === "node" ? "sh" : "busybox sh";
      const installed = await pipe(host, shell, "--yes");
      assert.is(installed.status, 0, installed.stderr);
      assert.match(
        installed.stdout,
        `using /usr/local/bin/${runtime}, to run Offload as ${account}\n`,
      );
      const printed = /^ +env (GUIX=\S+) guix-daemon .*--no-substitutes$/m
        .exec(installed.stdout)!;
      assert.is(printed[1], `GUIX=${SHIM}`);

      restartDaemon(host, printed[1]!);
      const derivation = derivations[host]!.pop()!;
      assertOffloaded(derivation, build(host, derivation), ["w1"]);
      if (host === "fresh") assertStoreIsSound(host);

      const uninstall = () =>
        run(host, "sh", `${LIBRARY}/install.sh`, "--uninstall");
      const during = listing(host);
      assertRefused(host, during, uninstall(), /still uses Offload/);
      restartDaemon(host);
      const gone = uninstall();
      assert.is(gone.status, 0, gone.stderr);
      assert.equal(changes(before, listing(host)), []);
      const state = root(host) + STATE;
      const left = existsSync(state) ? readdirSync(state) : [];
      assert.equal(left.filter((name) => !/:\d+$/.test(name)), []);
      assert.match(uninstall().stderr, "install.sh"); // it is gone as well
    });
  }
}

test("the manual page tells of all commands, in good form", () => {
  copyRelease("fresh");
  const page = "/root/release/offload.1";
  const { stdout, stderr } = run("fresh", "mandoc", "-T", "lint", page);
  const faults = (stdout + stderr).split("\n")
    .filter((line) => line && !line.includes("outdated mandoc.db"));
  assert.equal(faults, []);
  const text = inHost("fresh", "mandoc", "-T", "utf8", page)
    .replace(/.[\b]/g, "").replace(/\s+/g, " ");
  for (const { name, summary, options } of COMMANDS) {
    assert.match(text, `offload ${name}`);
    assert.match(text, `${summary}.`);
    for (const [usage, meaning] of options) {
      assert.match(text, ` ${usage} ${meaning}.`);
    }
  }
});

test("offload test finds what the daemon's account can't use, and mends it", () => {
  const host = "ufresh";
  makeFresh(host, "node");
  copyRelease(host);
  const at = root(host);
  const key = "/etc/guix/other_key";
  copyFileSync(`${at}/root/.ssh/id_ed25519`, at + key);
  chmodSync(at + key, 0o640);
  mkdirSync(`${at}/etc/guix/offload`, { mode: 0o700 });
  rmSync(at + STATE, { recursive: true, force: true });
  mkdirSync(at + STATE);
  useMachines(host, ["w1"], (text) => text.replace(/"[^"]*_key"/, `"${key}"`));
  const offloadTest = () => run(host, "/root/release/offload", "test");
  try {
    const faulty = offloadTest();
    assert.is(faulty.status, 1, faulty.stderr);
    assert.match(faulty.stdout, `can't read '${key}'`);
    assert.match(faulty.stdout, "can't read '/etc/guix/offload'");
    assert.match(faulty.stdout, "can't write to '/var/guix/offload'");
    assert.match(faulty.stdout, `may use the SSH private key '${key}'`);
    const remedies = [...faulty.stdout.matchAll(/hint: run '(.*?)'/g)];
    for (const [, command] of remedies) inHost(host, "sh", "-c", command!);
    const mended = offloadTest();
    assert.is(mended.status, 0, mended.stdout);
    assert.not.match(mended.stdout, "installation");
    // Where root's keys usually are.
    useMachines(host, ["w1"], (text) => {
      return text.replace(/"[^"]*_key"/, '"/root/.ssh/id_ed25519"');
    });
    const closed = offloadTest();
    assert.is(closed.status, 1);
    assert.match(closed.stdout, "can't read '/root/.ssh/id_ed25519'");
  } finally {
    useMachines(host, ["w1"]);
    rmSync(at + key);
    rmSync(`${at}/etc/guix/offload`, { recursive: true });
    rmSync(at + STATE, { recursive: true });
  }
});

// ---------------------------------------------------------------------------
// What may go wrong
// ---------------------------------------------------------------------------

test("nothing changes where a dry run says what would", () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  const before = listing("fresh");
  const { status, stdout, stderr } = install("fresh", "--dry-run");
  assert.is(status, 0, stderr);
  assert.match(stdout, `would install ${LIBRARY}/offload.mjs\n`);
  assert.equal(changes(before, listing("fresh")), []);
});

test("an upgrade replaces what changed, and running it again nothing", () => {
  makeFresh("fresh", "node");
  const directory = copyRelease("fresh");
  const before = listing("fresh");
  assert.is(install("fresh").status, 0);
  const first = listing("fresh");
  const again = install("fresh");
  assert.is(again.status, 0);
  assert.not.match(again.stdout, "installed");
  assert.equal(changes(first, listing("fresh")), []);
  nextVersion(directory);
  const upgraded = install("fresh");
  assert.is(upgraded.status, 0, upgraded.stderr);
  assert.equal(upgraded.stdout.match(/^installed .*/gm), [
    `installed ${LIBRARY}/offload.mjs`,
  ]);
  const [file] = changes(first, listing("fresh"));
  assert.is(`/${file}`, `${LIBRARY}/offload.mjs`);
  const during = listing("fresh");
  const uninstall = ["fresh", `${LIBRARY}/install.sh`, "--uninstall"] as const;
  const would = run(...uninstall, "--dry-run");
  assert.is(would.status, 0, would.stderr);
  assert.match(would.stdout, `would remove ${LIBRARY}/offload.mjs\n`);
  assert.equal(changes(during, listing("fresh")), []);
  const removed = run(...uninstall);
  assert.is(removed.status, 0, removed.stderr);
  assert.equal(changes(before, listing("fresh")), []);
});

test("a damaged or incomplete release is refused", async () => {
  makeFresh("fresh", "node");
  const before = listing("fresh");
  const file = `${release}/guix`;
  const content = readFileSync(file);
  appendFileSync(file, "# damaged\n");
  const damaged = await pipe("fresh", "sh", "--yes");
  writeFileSync(file, content);
  assertRefused(
    "fresh",
    before,
    damaged,
    /'http.*\/guix' has a wrong checksum/,
  );
  const directory = copyRelease("fresh");
  const sums = readFileSync(`${directory}/SHA256SUMS`, "utf8");
  writeFileSync(`${directory}/SHA256SUMS`, sums.replace(/^.*guix\n/m, ""));
  assertRefused("fresh", before, install("fresh"), /lacks guix/);
  rmSync(`${directory}/guix`);
  writeFileSync(`${directory}/SHA256SUMS`, sums);
  assertRefused("fresh", before, install("fresh"), /failed to read .*guix'/);
  const nowhere = run("fresh", "sh", "-c", "sh -s <root/release/install.sh");
  assertRefused("fresh", before, nowhere, /expected --from/);
});

test("without a runtime that guix-daemon can use, it says what is missing", () => {
  makeFresh("fresh", undefined);
  copyRelease("fresh");
  const before = listing("fresh");
  const none = install("fresh");
  assertRefused("fresh", before, none, /neither Node 22\.18 nor Deno 2\.7\.14/);
  makeFresh("ufresh", "node");
  copyRelease("ufresh");
  const program = `${root("ufresh")}/root/release/node`;
  copyFileSync(PROGRAMS.node, program);
  chmodSync(`${root("ufresh")}/root`, 0o700);
  const private_ = listing("ufresh");
  const result = run(
    "ufresh",
    ...["env", "OFFLOAD_RUNTIME=/root/release/node"],
    ...["sh", "/root/release/install.sh"],
  );
  assertRefused(
    "ufresh",
    private_,
    result,
    /'guix-daemon', which guix-daemon runs as, can't run '\/root\/release\/node'/,
  );
});

test("a file of somebody else's is left alone", () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  const file = `${root("fresh")}/usr/local/bin/offload`;
  writeFileSync(file, "something else\n");
  const before = listing("fresh");
  assertRefused("fresh", before, install("fresh"), /not Offload's/);
  rmSync(file);
});

test("what fails half-way leaves all as it was", () => {
  makeFresh("fresh", "node");
  const directory = copyRelease("fresh");
  const failing = (before: Record<string, string>) => {
    const bin = "/usr/local/bin";
    inHost("fresh", "mount", "--bind", bin, bin);
    inHost("fresh", "mount", "-o", "remount,bind,ro", bin);
    const { status, stdout, stderr } = install("fresh", "--yes");
    inHost("fresh", "umount", bin);
    assert.match(stdout, `installed ${LIBRARY}/offload.mjs`);
    assert.match(stderr, "offload: nothing was changed\n");
    assert.ok(status !== 0);
    assert.equal(changes(before, listing("fresh")), []);
  };
  failing(listing("fresh"));
  const before = listing("fresh");
  assert.is(install("fresh").status, 0);
  // An upgrade that must make the command anew.
  nextVersion(directory);
  rmSync(`${root("fresh")}/usr/local/bin/offload`);
  failing(listing("fresh"));
  assert.is(run("fresh", `${LIBRARY}/install.sh`, "--uninstall").status, 0);
  assert.equal(changes(before, listing("fresh")), []);
});

/** Ends who calls it for the fifth time, at once. */
const DEADLY_MV = `#!/bin/sh
echo >>/tmp/moves
[ $(wc -l </tmp/moves) -lt 5 ] || kill -9 $PPID
exec /bin/mv "$@"
`;

test("what is killed half-way can be finished, or taken away", () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  const before = listing("fresh");
  const mv = `${root("fresh")}/usr/local/sbin/mv`;
  for (const way of ["finished", "taken away"]) {
    writeFileSync(mv, DEADLY_MV, { mode: 0o755 });
    assert.ok(install("fresh").status !== 0);
    rmSync(mv);
    rmSync(`${root("fresh")}/tmp/moves`);
    assert.ok(changes(before, listing("fresh")).length > 5);
    if (way === "finished") assert.is(install("fresh").status, 0);
    const script = "/root/release/install.sh";
    const { status, stderr } = run("fresh", "sh", script, "--uninstall");
    assert.is(status, 0, stderr);
    assert.equal(changes(before, listing("fresh")), []);
  }
});

// ---------------------------------------------------------------------------
// What starts guix-daemon
// ---------------------------------------------------------------------------

/** Prints the environment that Guix System would give its daemon. */
const SYSTEM_SCRIPT = (services: string) => `
(use-modules (gnu services) (gnu services base) (srfi srfi-1))
(define config
  (service-value (find (lambda (service)
                         (eq? (service-kind service) guix-service-type))
                       ${services})))
(display ((@@ (gnu services base) guix-configuration-environment) config))
`;

/** Runs a program called guix-daemon, as an account, under an odd name. */
const PRETEND = `
cp /usr/bin/sleep /tmp/guix-daemon
exec setpriv --reuid="$1" --clear-groups bash -c '
    exec -a "guix-daemon; curl x | sh \u001b[31m" /tmp/guix-daemon 1000'`;

test("only root's or the store owner's guix-daemon is one, and quoted", async () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  const printed = () => {
    const { status, stdout, stderr } = install("fresh", "--dry-run");
    assert.is(status, 0, stderr);
    return /^ {4}env GUIX=\S+ (.*)$/m.exec(stdout)![1];
  };
  const pretend = (user: string) =>
    watch(start("fresh", "sh", "-c", PRETEND, "sh", user));
  const isThere = (uid: number) =>
    readdirSync(`${root("fresh")}/proc`).some((pid) => {
      const directory = `${root("fresh")}/proc/${pid}`;
      return /^\d+$/.test(pid) &&
        statSync(directory, { throwIfNoEntry: false })?.uid === uid &&
        readFileSync(`${directory}/cmdline`, "utf8").includes("curl x");
    });
  const daemon = inHost("fresh", "cat", "/run/guix-daemon.pid").trim();
  inHost("fresh", "kill", "-KILL", daemon);
  const others = pretend("65534");
  // A child that nobody has waited for.
  const zombie =
    "if (!fork) { $0 = 'guix-daemon'; exit } print 'up'; sleep 1000";
  const parent = watch(start("fresh", "perl", "-e", `$| = 1; ${zombie}`));
  try {
    await until("they run", () => isThere(65534) && parent.text() === "up");
    assert.is(printed(), "guix-daemon --build-users-group=guixbuild");
    const odd = pretend("0");
    await until("it runs", () => isThere(0));
    assert.is(printed(), "'guix-daemon; curl x | sh ?[31m' 1000");
    inHost("fresh", "pkill", "-x", "guix-daemon");
    await within("their end", Promise.all([others.ended, odd.ended]));
  } finally {
    parent.child.kill();
    restartDaemon("fresh");
  }
});

test("a release comes by https, or with its checksum", async () => {
  makeFresh("fresh", "node");
  const before = listing("fresh");
  const sums = readFileSync(`${release}/SHA256SUMS`);
  const sum = createHash("sha256").update(sums).digest("hex");
  const plain = createHttpServer((request, response) => {
    response.end(readFileSync(release + request.url));
  });
  await new Promise<void>((done) => plain.listen(0, "127.0.0.1", done));
  const from = `http://127.0.0.1:${(plain.address() as AddressInfo).port}`;
  // The other server sends all that is asked for below /plain there.
  redirection = from;
  copyRelease("fresh");
  const attempt = async (...options: readonly string[]) => {
    const script = "export CURL_CA_BUNDLE=/tmp/server.pem; " +
      `exec sh /root/release/install.sh --dry-run ${options.join(" ")}`;
    copyFileSync(CERTIFICATE, `${root("fresh")}/tmp/server.pem`);
    const running = watch(start("fresh", "sh", "-c", script));
    return await within("install.sh", running.ended, 120_000);
  };
  const refuses = async (words: RegExp, ...options: readonly string[]) =>
    assertRefused("fresh", before, await attempt(...options), words);
  try {
    await refuses(/ is not https: anybody/, "--from", from);
    await refuses(/failed to fetch 'https:/, "--from", `${url}/plain`);
    const wrong = sum.replace(/^./, (it) => it === "0" ? "1" : "0");
    await refuses(/not [0-9a-f]{64}$/m, "--from", from, "--sha256", wrong);
    for (const place of [from, `${url}/plain`, "/root/release"]) {
      const good = await attempt("--from", place, "--sha256", sum);
      assert.is(good.status, 0, good.stderr);
    }
    assert.equal(changes(before, listing("fresh")), []);
  } finally {
    plain.close();
  }
});

test("without systemd it prints the lines to add, for each init system", () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  const at = root("fresh");
  const printed = () => {
    const { status, stdout, stderr } = install("fresh", "--dry-run");
    assert.is(status, 0, stderr);
    assert.match(stdout, `\n    env GUIX=${SHIM} guix-daemon --build-users-`);
    return stdout;
  };
  assert.match(printed(), "/etc/init.d/guix-daemon");
  assert.match(printed(), `\n    export GUIX=${SHIM}\n`);
  mkdirSync(`${at}/run/openrc`);
  assert.match(printed(), "/etc/conf.d/guix-daemon");
  assert.match(printed(), `\n    export GUIX=${SHIM}\n`);
  mkdirSync(`${at}/run/current-system/profile`, { recursive: true });
  try {
    const services = /^ {4}\(modify-services[^]*?\n\n/m.exec(printed())![0];
    writeFileSync(`${at}/tmp/system.scm`, SYSTEM_SCRIPT(services));
    const text = inHost("fresh", "guix", "repl", "--", "/tmp/system.scm");
    assert.is(text, `(GUIX=${SHIM})`);
  } finally {
    rmSync(`${at}/run/openrc`, { recursive: true });
    rmSync(`${at}/run/current-system`, { recursive: true });
  }
});

/** Records how it is called; `restart` fails where a file says so. */
const SYSTEMCTL = `#!/bin/sh
echo "$*" >>/tmp/systemctl.log
[ "$1" != restart ] || [ ! -e /tmp/restart-fails ]
`;

test("under systemd, a drop-in switches the daemon, which --yes restarts", async () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  const at = root("fresh");
  mkdirSync(`${at}/run/systemd/system`, { recursive: true });
  writeFileSync(`${at}/usr/local/sbin/systemctl`, SYSTEMCTL, { mode: 0o755 });
  const calls = () => {
    const text = readFileSync(`${at}/tmp/systemctl.log`, "utf8");
    writeFileSync(`${at}/tmp/systemctl.log`, "");
    return text.split("\n").filter((line) => line && !line.startsWith("cat"));
  };
  const dropIn = `${at}/etc/systemd/system/guix-daemon.service.d/offload.conf`;
  const [reload, restart] = ["daemon-reload", "restart guix-daemon.service"];
  try {
    const before = listing("fresh");

    writeFileSync(`${at}/tmp/restart-fails`, "");
    const failed = install("fresh", "--yes");
    assertRefused("fresh", before, failed, /does not start again/);
    assert.equal(calls(), [reload, restart, reload, restart]);
    rmSync(`${at}/tmp/restart-fails`);

    // Nobody can be asked.
    const asked = install("fresh");
    assert.is(asked.status, 0, asked.stderr);
    assert.match(
      asked.stdout,
      "next start on: systemctl restart guix-daemon\n",
    );
    assert.is(
      readFileSync(dropIn, "utf8"),
      `[Service]\nEnvironment=GUIX=${SHIM}\n`,
    );
    assert.equal(calls(), [reload]);
    for (const [answer, made] of [["n", [reload]], ["y", [reload, restart]]]) {
      const command = ["sh", "/root/release/install.sh"];
      const terminal = onTerminal("fresh", command);
      await until("the question", () => /\[y\/N\] /.test(terminal.text()));
      terminal.child.stdin!.write(`${answer}\r`);
      const { status, stdout } = await within("the end", terminal.ended);
      assert.is(status, 0, stdout);
      assert.equal(calls(), made);
    }
    const restarted = install("fresh", "--yes");
    assert.match(restarted.stdout, "restarted guix-daemon\n");
    assert.equal(calls(), [reload, restart]);

    lab("daemon", "fresh", `GUIX=${SHIM}`); // what systemctl did not do
    assert.match(install("fresh", "--yes").stdout, "uses Offload already\n");
    assert.equal(calls(), [reload]);
    const during = listing("fresh");
    const uninstall = (...options: readonly string[]) =>
      run("fresh", `${LIBRARY}/install.sh`, "--uninstall", ...options);
    assertRefused("fresh", during, uninstall(), /still uses Offload/);
    assert.equal(calls(), [reload, reload]);
    const removed = uninstall("--yes");
    assert.is(removed.status, 0, removed.stderr);
    assert.equal(calls(), [reload, restart]);
    assert.equal(changes(before, listing("fresh")), []);
  } finally {
    rmSync(`${at}/run/systemd`, { recursive: true });
    rmSync(`${at}/usr/local/sbin/systemctl`);
    lab("daemon", "fresh");
  }
});

test.run();

/**
 * The first steps of somebody who has a machine with Guix and README.md: each
 * command says which one comes next, and that one is then typed.
 */

import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  build,
  buildLog,
  down,
  inHost,
  lab,
  makeWork,
  root,
  run,
  up,
} from "./lab.ts";
import type { Result } from "./lab.ts";
import {
  changes,
  endRelease,
  LIBRARY,
  listing,
  makeFresh,
  pipe,
  serveRelease,
  SHIM,
} from "./release.ts";

/** The hosts, and the account that guix-daemon runs as there. */
const NOVICES = { novice: "root", unovice: "guix-daemon" } as const;

/** The machine that is to build. */
const MACHINE = "distant";

const FILE = "/etc/guix/machines.scm";
const KEY = "/etc/guix/offload_key";

/** Somebody who has an account here, and no more. */
const USER = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]
  .concat("env", "HOME=/home/ada");

const work: Record<string, string[]> = {};
let fingerprint = "";

/** Makes a bare machine of a host: Guix, a runtime, and a user. */
function strip(host: string): void {
  work[host] = makeWork(host, "--count=3");
  makeFresh(host, "node");
  const at = root(host);
  for (const file of [FILE, "/root/.ssh", KEY, "/etc/guix/acl"]) {
    rmSync(at + file, { recursive: true, force: true });
  }
  inHost(host, "useradd", "--create-home", "--uid", "1234", "ada");
  const key = "/tmp/administrator";
  inHost(host, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key);
  const directory = `${root(MACHINE)}/root/.ssh`;
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  const known = readFileSync(`${at}${key}.pub`);
  appendFileSync(`${directory}/authorized_keys`, known);
}

/** Types a command, with an agent that may log in to the machine. */
function type(host: string, command: string): Result {
  const line = `ssh-add -q /tmp/administrator && ${command}`;
  return run(host, "ssh-agent", "sh", "-c", line);
}

/** The command that is to be typed next, of what was told. */
function nextOf({ stdout, stderr }: Result): string {
  const [, command] = /hint: run '(.*?)'/.exec(stdout + stderr) ?? [];
  assert.ok(command, `no hint names a command: ${stdout}${stderr}`);
  return command!;
}

/** Types what `offload test` says until all is well, at most so often. */
function follow(host: string, most: number): string[] {
  const typed: string[] = [];
  for (;;) {
    const tested = run(host, "offload", "test");
    if (tested.status === 0) return typed;
    assert.ok(typed.length < most, `${typed}\n${tested.stdout}`);
    const command = nextOf(tested);
    typed.push(command);
    const { status, stdout, stderr } = type(host, command);
    assert.is(status, 0, `${command}: ${stdout}${stderr}`);
  }
}

/** Demands that a build goes to the machine. */
function assertOffloads(derivation: string, result: Result): void {
  assert.is(result.status, 0, result.stderr);
  assert.match(
    result.stderr,
    `offloading build of ${derivation} to '${MACHINE}'`,
  );
  assert.match(buildLog(MACHINE, derivation) ?? "no log", "built ");
}

const test = suite("first steps");

test.before(async () => {
  await serveRelease();
  up("novice:master:stranger", "unovice:master:stranger:unprivileged");
  up(`${MACHINE}:stranger`);
  const listed = inHost(
    ...[MACHINE, "ssh-keygen", "-l", "-f"] as const,
    "/etc/ssh/ssh_host_ed25519_key.pub",
  );
  fingerprint = listed.split(" ")[1]!;
  Object.keys(NOVICES).forEach(strip);
});

test.after(() => {
  endRelease();
  down(...Object.keys(NOVICES), MACHINE);
});

/** What comes first where no machine is listed. */
const TRUST = `offload trust root@HOST --file ${FILE}`;

for (const [host, account] of Object.entries(NOVICES)) {
  const at = () => root(host);
  const asUser = (...command: string[]) => run(host, ...USER, ...command);
  let before: Record<string, string> = {};

  test(`${account}: the one line says what comes next`, async () => {
    before = listing(host);
    const { status, stdout, stderr } = await pipe(host, "sh", "--yes");
    assert.is(status, 0, stderr);
    assert.match(
      stdout,
      `using /usr/local/bin/node, to run Offload as ${account}`,
    );
    const switching = /^ +env GUIX=(\S+) guix-daemon /m.exec(stdout);
    assert.is(switching?.[1], SHIM);
    assert.match(stdout, `\n    ${TRUST}\n`);
    lab("daemon", host, `GUIX=${SHIM}`);
  });

  test(`${account}: with no machine, each command says how to get one`, () => {
    const [derivation] = work[host]!;
    const commands: [args: string[], status: number][] = [
      [[], 2],
      [["test"], 2],
      [["status"], 0],
      [["machines"], 0],
      [["explain", derivation!], 1],
    ];
    for (const text of [undefined, "(list)\n", "", ";; (none) yet\n"]) {
      if (text !== undefined) writeFileSync(at() + FILE, text);
      for (const [args, expected] of commands) {
        const result = run(host, "offload", ...args);
        const what = `${args} of ${JSON.stringify(text)}: ${result.stderr}`;
        assert.is(nextOf(result), TRUST, what);
        assert.is(nextOf(asUser("offload", ...args)), `sudo ${TRUST}`, what);
        // An empty file is an error, as it is for `guix offload`.
        const isError = text !== undefined && !text.startsWith("(");
        const failed = isError && args.length > 0 ? 1 : expected;
        assert.is(result.status, failed, what);
      }
    }
  });

  test(`${account}: who may not do it is told so before anything is done`, () => {
    const command = `offload trust root@${MACHINE} --file ${FILE}`;
    const refused = asUser(...command.split(" "));
    assert.is(refused.status, 1);
    assert.match(refused.stderr, "this account may not change '/etc/guix'");
    assert.is(nextOf(refused), `sudo ${command}`);
    const agent = "SSH_AUTH_SOCK=/tmp/agent";
    const withAgent = asUser("env", agent, ...command.split(" "));
    const keeping = `sudo --preserve-env=SSH_AUTH_SOCK ${command}`;
    assert.is(nextOf(withAgent), keeping);
    assert.not(existsSync(at() + KEY));
    const serving = asUser("offload", "serve");
    assert.match(
      serving.stderr,
      "run this as the account that guix-daemon runs",
    );
    const incomplete = run(host, "offload", "trust", MACHINE);
    assert.is(incomplete.status, 2);
    assert.is(nextOf(incomplete), `offload trust root@${MACHINE}`);
  });

  test(`${account}: trust does it all, whatever is missing`, () => {
    const known = `--fingerprint ${fingerprint}`;
    const alone = type(host, `offload trust root@${MACHINE} ${known}`);
    assert.is(alone.status, 0, alone.stderr);
    assert.match(alone.stderr, `trust root@${MACHINE} --file ${FILE}', which`);
    const command = TRUST.replace("HOST", MACHINE);
    const added = type(host, `${command} ${known}`);
    assert.is(added.status, 0, added.stderr);
    const text = readFileSync(at() + FILE, "utf8");
    assert.match(text, /^;; \(none\) yet\n\(list\n \(build-machine/);
    // All hosts here have the load of one.
    const name = `(name "${MACHINE}")`;
    const calm = text.replace(name, `${name} (overload-threshold #f)`);
    writeFileSync(at() + FILE, calm);
    assert.is(nextOf(run(host, "offload")), "offload test");
    assert.equal(follow(host, 0), []);
    assertOffloads(work[host]![0]!, build(host, work[host]![0]!));
    const user = asUser("guix", "build", "--max-jobs=0", work[host]![1]!);
    assertOffloads(work[host]![1]!, user);
    const explained = run(host, "offload", "explain", work[host]![2]!);
    assert.match(explained.stdout, /takes it/);
    assert.is(run(host, "offload", "status").status, 0);
  });

  test(`${account}: a user is told who can ask the machines`, () => {
    const hint = "run it as root, or as the account that guix-daemon runs as";
    for (const args of [["test"], ["status"], ["explain", work[host]![2]!]]) {
      const { status, stdout, stderr } = asUser("offload", ...args);
      assert.is(status, 1, args[0]);
      assert.match(stdout + stderr, `hint: ${hint}`, args[0]);
    }
  });

  test(`${account}: what is lost is found by test, and mended by its hint`, () => {
    const losses = [
      [KEY, `${KEY}.pub`],
      ["/etc/guix/acl"],
      ["/etc/guix/signing-key.pub", "/etc/guix/signing-key.sec"],
    ];
    const hint = `offload trust root@${MACHINE}:22 ` +
      `--fingerprint ${fingerprint} --identity ${KEY}`;
    const other = ["explain", work[host]![2]!];
    for (const files of losses) {
      for (const file of files) rmSync(at() + file);
      if (files.includes(KEY)) {
        for (const args of [["status"], other]) {
          inHost(host, "rm", "-rf", "/var/guix/offload");
          const result = run(host, "offload", ...args);
          assert.is(result.status, 1, result.stdout + result.stderr);
          assert.match(result.stderr, "hint: 'offload test' says what to do");
        }
      }
      assert.equal(follow(host, 1), [hint]);
    }
    lab("daemon", host, `GUIX=${SHIM}`); // no login is kept
    assertOffloads(work[host]![2]!, build(host, work[host]![2]!));
  });

  test(`${account}: and back`, () => {
    lab("daemon", host);
    const script = `${LIBRARY}/install.sh`;
    const { status, stderr } = run(host, "sh", script, "--uninstall");
    assert.is(status, 0, stderr);
    const left = changes(before, listing(host))
      .filter((name) => !/^(etc\/guix|root\/\.ssh)(\/|$)/.test(name));
    assert.equal(left, []);
  });
}

test.run();

/**
 * scripts/install.sh, as an administrator runs it on a machine with one
 * runtime and no checkout: the one line, a real build, and the way back.
 */

import { createHash } from "node:crypto";
import {
  appendFileSync,
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { createServer as createHttpServer } from "node:http";
import type { AddressInfo } from "node:net";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { loadCommands } from "../../plugins/_commands.ts";
import {
  assertOffloaded,
  assertStoreIsSound,
  build,
  CERTIFICATE,
  down,
  inHost,
  makeWork,
  OBSERVATIONS,
  onTerminal,
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
import {
  assertRefused,
  changes,
  copyRelease,
  endRelease,
  HOSTS,
  install,
  LIBRARY,
  listing,
  makeFresh,
  nextVersion,
  pipe,
  PROGRAMS,
  release,
  restartDaemon,
  served,
  serveRelease,
  SHIM,
} from "./release.ts";

const test = suite("install");
const COMMANDS = await loadCommands();

const derivations: Record<string, string[]> = {};

test.before(async () => {
  await serveRelease();
  up("fresh:master", "ufresh:master:unprivileged", "w1");
  for (const host of Object.keys(HOSTS)) {
    useMachines(host, ["w1"]);
    derivations[host] = makeWork(host, "--count=5");
  }
});

test.after(() => {
  endRelease();
  down(...Object.keys(HOSTS));
});

// ---------------------------------------------------------------------------
// There and back
// ---------------------------------------------------------------------------

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

test("the state goes with the last installation of it", () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  restartDaemon("fresh");
  const before = listing("fresh");
  const noted = root("fresh") + OBSERVATIONS;
  const uninstall = (prefix: string) => {
    const script = `${prefix}/lib/offload/install.sh`;
    return inHost("fresh", "sh", script, "--uninstall");
  };
  for (const prefix of ["/usr/local", "/opt/other"]) {
    assert.is(install("fresh", "--prefix", prefix).status, 0);
  }
  run("fresh", "offload", "status");
  // No guix-daemon uses either.
  const other = "/opt/other/lib/offload/guix";
  const said = uninstall("/usr/local");
  assert.match(said, `left '${STATE}', which '${other}' uses\n`);
  assert.ok(existsSync(noted));
  assert.match(uninstall("/opt/other"), `removed ${OBSERVATIONS}\n`);
  assert.not(existsSync(noted));
  assert.equal(changes(before, listing("fresh")), []);
  // One that guix-daemon has from elsewhere, as from Guix.
  assert.is(install("fresh").status, 0);
  run("fresh", "offload", "status");
  restartDaemon("fresh", "GUIX=/root/release/guix");
  assert.match(uninstall("/usr/local"), "which '/root/release/guix' uses\n");
  assert.ok(existsSync(noted));
  restartDaemon("fresh");
  assert.equal(changes(before, listing("fresh")), []);
});

test("shells and editors find what is there for them", async () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  assert.is(install("fresh").status, 0);
  const share = "/usr/local/share";
  const complete = (shell: string, script: string) =>
    inHost("fresh", shell, "-c", script).trim().split(/\s+/).sort();
  const bash = `. ${share}/bash-completion/completions/offload
    COMP_WORDS=(offload sta); COMP_CWORD=1; _offload; echo "\${COMPREPLY[@]}"`;
  assert.equal(complete("bash", bash), ["status"]);
  // These find them by themselves.
  const fish = "complete -C 'offload sta' | string replace -r '\\t.*' ''";
  assert.equal(complete("fish", fish), ["status"]);
  const zsh = onTerminal("fresh", ["zsh", "-f", "-i"]);
  const type = (keys: string) => zsh.child.stdin!.write(keys);
  type("offload() { print -r -- GOT $@ }; PROMPT='> '\r");
  type(`fpath=(${share}/zsh/site-functions $fpath)\r`);
  type("autoload -Uz compinit; compinit -u -D; print READY\r");
  await until("zsh", () => /^READY/m.test(zsh.text()));
  type("offload stat");
  await until("its echo", () => zsh.text().endsWith("offload stat"));
  type("\t\r");
  await until("the word", () => /^GOT status *\r?$/m.test(zsh.text()));
  type("exit\r");
  await within("the end of zsh", zsh.ended);
  inHost("fresh", "sh", `${LIBRARY}/install.sh`, "--uninstall");
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

test("what another installation uses is left to it", () => {
  makeFresh("fresh", "node");
  copyRelease("fresh");
  const before = listing("fresh");
  const other = "/opt/other/lib/offload";
  for (const prefix of ["/usr/local", "/opt/other"]) {
    const { status, stderr } = install("fresh", "--prefix", prefix);
    assert.is(status, 0, stderr);
  }
  restartDaemon("fresh", `GUIX=${other}/guix`);
  const derivation = derivations.fresh!.pop()!;
  assertOffloaded(derivation, build("fresh", derivation), ["w1"]);
  const first = run("fresh", "sh", `${LIBRARY}/install.sh`, "--uninstall");
  assert.is(first.status, 0, first.stderr);
  assert.match(first.stdout, `left '${STATE}', which '${other}/guix' uses\n`);
  assert.ok(existsSync(root("fresh") + OBSERVATIONS));
  restartDaemon("fresh");
  const second = run("fresh", "sh", `${other}/install.sh`, "--uninstall");
  assert.is(second.status, 0, second.stderr);
  assert.not.match(second.stdout, "which");
  assert.not.ok(existsSync(root("fresh") + OBSERVATIONS));
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
  assertRefused("fresh", before, none, /neither Node 22\.14 nor Deno 2\.7\.14/);
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
  served.redirection = from;
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
    await refuses(/failed to fetch 'https:/, "--from", `${served.url}/plain`);
    const wrong = sum.replace(/^./, (it) => it === "0" ? "1" : "0");
    await refuses(/not [0-9a-f]{64}$/m, "--from", from, "--sha256", wrong);
    for (const place of [from, `${served.url}/plain`, "/root/release"]) {
      const good = await attempt("--from", place, "--sha256", sum);
      assert.is(good.status, 0, good.stderr);
    }
    assert.equal(changes(before, listing("fresh")), []);
  } finally {
    plain.close();
  }
});

test.run();

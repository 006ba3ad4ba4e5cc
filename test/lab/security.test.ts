/** What plugins/security.md says of accounts and permissions. */

import { readFileSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertOffloaded,
  build,
  forget,
  inHost,
  lab,
  makeWork,
  ROOT,
  root,
  run,
  RUNTIMES,
  start,
  until,
  up,
  useMachines,
  useOffload,
  watch,
} from "./lab.ts";
import type { Runtime } from "./lab.ts";

const page = readFileSync(`${ROOT}plugins/security.md`, "utf8");

/** The options that it puts before a key in authorized_keys. */
const [, options] = /^(restrict,\S+) ssh-ed25519 /m.exec(page) ?? [];

/** What it adds to sshd_config. */
const [, configuration] = /^(Match User offload\n(?: +\S.*\n)+)/m
  .exec(page) ?? [];

const CLIENT = ["ssh", "-n", "-F", "none", "-i", "/root/.ssh/id_ed25519"]
  .concat(...["BatchMode=yes", "StrictHostKeyChecking=no", "ConnectTimeout=20"]
    .map((option) => ["-o", option]))
  .concat("-o", "UserKnownHostsFile=/dev/null")
  .concat("-o", "ExitOnForwardFailure=yes");

/** Greets at a socket that anybody may use, but not as a guix-daemon. */
const LISTEN = `
use IO::Socket::UNIX;
unlink "/tmp/other";
my $socket = IO::Socket::UNIX->new(Local => "/tmp/other", Listen => 5);
chmod 0666, "/tmp/other";
$| = 1;
print "ready\\n";
alarm 100;
while (my $client = $socket->accept) { print $client "hello" x 100 }`;

for (const runtime of RUNTIMES) {
  suiteUnder(runtime, "authorized_keys", () => makeAccount(options!));
  suiteUnder(runtime, "sshd_config", () => {
    makeAccount("");
    const file = `${root("w1")}/etc/ssh/sshd_config.d/offload.conf`;
    writeFileSync(file, configuration!);
    lab("sshd", "w1");
  });
}

permissions();

/** Makes the account `offload` on w1, with head's key behind these options. */
function makeAccount(options: string): void {
  const script = `
    id offload 2>/dev/null || useradd --create-home --password '*' offload
    mkdir -p /home/offload/.ssh
    chown offload /home/offload/.ssh
    rm -f /etc/ssh/sshd_config.d/offload.conf`;
  inHost("w1", "sh", "-c", script);
  const key = inHost("head", "cat", "/root/.ssh/id_ed25519.pub");
  const file = `${root("w1")}/home/offload/.ssh/authorized_keys`;
  writeFileSync(file, `${options} ${key}`);
  lab("sshd", "w1");
}

function suiteUnder(
  runtime: Runtime,
  where: string,
  restrict: () => void,
): void {
  const test = suite(`an account restricted in ${where}, under ${runtime}`);

  test.before(() => {
    up("head", "w1");
    useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1");
    restrict();
    useMachines(
      "head",
      ["w1"],
      (text) => text.replace('(user "root")', '(user "offload")'),
    );
  });
  test.after(() => {
    inHost("w1", "rm", "-f", "/etc/ssh/sshd_config.d/offload.conf");
    lab("sshd", "w1");
    up("head", "w1");
  });

  test("it builds, with inputs of any size", () => {
    useMachines(
      "head",
      ["w1"],
      (text) => text.replace('(user "root")', '(user "offload")'),
    );
    const sizes = [64, 30 * 2 ** 20]; // the latter worth `guix archive`
    for (const size of sizes) {
      const input = ["--inputs=2", `--input-size=${size}`, "--references=2"];
      const [derivation] = makeWork("head", ...input);
      assertOffloaded(derivation!, build("head", derivation!), ["w1"]);
    }
  });

  test("it does nothing else", () => {
    const client = (...args: string[]) =>
      run("head", "timeout", "20", ...CLIENT, ...args);
    const shell = client("offload@w1", "echo a; echo b");
    assert.is(shell.stdout, "");
    assert.is.not(shell.status, 0);
    assert.match(client("-tt", "offload@w1").stderr, "PTY allocation request");
    const forward = client("-W", "127.0.0.1:22", "offload@w1");
    assert.match(forward.stderr, "stdio forwarding failed");
    const listen = client("-N", "-R", "7777:127.0.0.1:22", "offload@w1");
    assert.match(listen.stderr, "remote port forwarding failed");
    assert.match(client("-N", "-w", "0:0", "offload@w1").stderr, /tunnel/i);
    assert.is(client("-s", "offload@w1", "sftp").stdout, "");
  });

  test("it reaches no other socket", async () => {
    const listener = watch(start("w1", "perl", "-e", LISTEN));
    await until("a socket", () => /ready/.test(listener.text()));
    for (const user of ["root", "offload"]) {
      useMachines(
        "head",
        ["w1"],
        (text) =>
          text.replace('"root")', `"${user}") (daemon-socket "/tmp/other")`),
      );
      const [derivation] = makeWork("head");
      // No daemon greets, so nothing is accepted: it is built on head.
      const client = ["guix", "build", "--max-jobs=1", derivation!];
      const { stderr } = run("head", ...client);
      const isRefused = /Channel open failure/.test(stderr);
      assert.is(isRefused, user === "offload", stderr);
    }
    listener.child.kill(); // it would end by itself
  });

  if (where === "sshd_config") {
    test("it can't listen on a socket either", () => {
      const listen = ["-N", "-R", "/tmp/evil:127.0.0.1:22", "offload@w1"];
      const { stderr } = run("head", "timeout", "20", ...CLIENT, ...listen);
      assert.match(stderr, "remote port forwarding failed");
    });
  }

  test.run();
}

/** Deno opens descriptors for those that may do anything. */
function permissions(): void {
  const test = suite("permissions of Deno");

  test("anything less than all is not enough, and fails no build", () => {
    up("head", "w1");
    useMachines("head", ["w1"]);
    forget("head");
    const [derivation] = makeWork("head");
    const kinds = ["read", "write", "net", "env", "sys", "run", "ffi"];
    const flags = kinds.map((kind) => `--allow-${kind}`).join(" ");
    const deno = "/offload/node_modules/@deno/*/deno";
    const request = `1 x86_64-linux ${derivation} `;
    const script = `echo '${request}' | exec timeout 60 ${deno} run ` +
      `--no-prompt ${flags} /offload/mod.ts x86_64-linux 3600 true 86400`;
    const { status, stdout, stderr } = run("head", "sh", "-c", script);
    assert.is(stdout, "# decline\n", stderr);
    assert.is(status, 0, stderr);
    assert.match(stderr, "run again with the --allow-all flag");
  });

  test.run();
}

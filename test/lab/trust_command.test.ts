/** `offload trust`: two hosts that know nothing of each other. */

import { readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertOffloaded,
  build,
  down,
  inHost,
  lab,
  makeWork,
  offloadCommand,
  onTerminal,
  root,
  run,
  RUNTIMES,
  until,
  up,
  useOffload,
  within,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";

const MACHINES = "/etc/guix/machines.scm";
const PASSWORD = "lab: a 'password'";

/** Removes what a host keeps between itself and others. */
function makeStranger(host: string): void {
  const files = [
    ...["/etc/guix/acl", MACHINES, "/etc/guix/signing-key.pub"],
    ...["/etc/guix/signing-key.sec", "/root/.ssh", "/etc/guix/offload_key"],
  ];
  for (const file of files) {
    rmSync(root(host) + file, { recursive: true, force: true });
  }
}

/** Restarts the sshd of s1, which is not to refuse whom it often refused. */
function startSshd(...options: readonly string[]): void {
  const all = ["PerSourcePenalties=no", ...options];
  lab("sshd", "s1", ...all.flatMap((option) => ["-o", option]));
}

/** The fingerprint of a host's key. */
function fingerprintOf(host: string, type = "ed25519"): string {
  const file = `/etc/ssh/ssh_host_${type}_key.pub`;
  return inHost(host, "ssh-keygen", "-l", "-f", file).split(" ")[1]!;
}

/** Lets an administrator of a master log in to a machine, by an agent. */
function administrate(master: string, machine: string, user = "root"): void {
  const key = "/tmp/administrator";
  rmSync(root(master) + key, { force: true });
  inHost(master, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key);
  const home = user === "root" ? "/root" : `/home/${user}`;
  inHost(machine, "mkdir", "-p", `${home}/.ssh`);
  const file = `${home}/.ssh/authorized_keys`;
  // Without a newline at the end, which must not spoil what is added.
  const line = readFileSync(`${root(master)}${key}.pub`, "utf8").trim();
  writeFileSync(root(machine) + file, line);
  inHost(machine, "chown", "-R", user, `${home}/.ssh`);
}

/** Has a master's hook overlook the load of a machine: all hosts share it. */
function ignoreLoad(master: string): void {
  const file = root(master) + MACHINES;
  const text = readFileSync(file, "utf8");
  const fields = '(name "s1")\n (overload-threshold #f)';
  writeFileSync(file, text.replace('(name "s1")', fields));
}

/** What trust may have changed, by file name. */
function stateOf(...hosts: readonly string[]): Record<string, string> {
  const files = ["/etc/guix/acl", MACHINES, "/root/.ssh/authorized_keys"];
  return Object.fromEntries(hosts.flatMap((host) =>
    files.map((file) => [
      host + file,
      run(host, "sh", "-c", `stat -c '%U %a' ${file} && cat ${file}`).stdout,
    ])
  ));
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`offload trust under ${runtime}`);
  const command = (...args: string[]) =>
    offloadCommand(runtime, "trust", ...args);

  /** Runs it on a master with the administrator's key in an agent. */
  const trust = (master: string, ...args: readonly string[]): Result =>
    run(
      master,
      ...["ssh-agent", "sh", "-c", 'ssh-add -q /tmp/administrator; exec "$@"'],
      ...["sh", ...command(...args)],
    );

  test.before(() => {
    down("m1", "s1", "u1");
    up("m1:master:stranger", "s1:stranger", "u1:master:unprivileged:stranger");
  });
  test.before.each(() => {
    startSshd();
    for (const host of ["m1", "s1"]) makeStranger(host);
  });
  test.after(() => down("m1", "s1", "u1"));

  test("it and nothing else leads to an offloaded build", () => {
    administrate("m1", "s1");
    const fingerprint = ["--fingerprint", fingerprintOf("s1")];
    const args = ["root@s1", "--file", MACHINES, ...fingerprint];
    const { status, stderr } = trust("m1", ...args);
    assert.is(status, 0, stderr);
    assert.is(stderr.match(/^ {2}to undo: /gm)?.length, 7, stderr);
    ignoreLoad("m1");
    useOffload("m1", runtime);
    const [derivation] = makeWork("m1");
    assertOffloaded(derivation!, build("m1", derivation!), ["s1"]);
    const state = stateOf("m1", "s1");
    const again = run("m1", ...command("root@s1", "--file", MACHINES));
    assert.is(again.status, 0, again.stderr);
    assert.not.match(again.stderr, "to undo");
    assert.equal(stateOf("m1", "s1"), state);
    const sshKey = statSync(`${root("m1")}/etc/guix/offload_key`);
    assert.is(sshKey.mode & 0o777, 0o600);
  });

  test("an identity is what it logs in with, whatever the file has", () => {
    administrate("m1", "s1");
    const fingerprint = ["--fingerprint", fingerprintOf("s1")];
    const args = ["root@s1", "--file", MACHINES];
    const first = trust("m1", ...args, ...fingerprint);
    assert.is(first.status, 0, first.stderr);
    assert.not.match(first.stderr, "will log in with");
    const text = readFileSync(root("m1") + MACHINES, "utf8");
    const other = "/etc/guix/other_key";
    rmSync(root("m1") + other, { force: true });
    const second = trust("m1", ...args, "--identity", other);
    assert.is(second.status, 0, second.stderr);
    const made = `made the SSH key '${other}'`;
    assert.ok(second.stderr.includes(made), second.stderr);
    const told = `warning: '${MACHINES}' has 's1:22' with the SSH key ` +
      "'/etc/guix/offload_key', and guix-daemon will log in with that\n" +
      `hint: change its private-key there to "${other}"`;
    assert.ok(second.stderr.includes(told), second.stderr);
    assert.is(readFileSync(root("m1") + MACHINES, "utf8"), text);
    const ssh = ["ssh", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"];
    const unasked = ["-o", "StrictHostKeyChecking=no", "-i", other];
    inHost("m1", ...ssh, ...unasked, "root@s1", "true");
    // With the file's own key there is nothing to tell.
    const own = ["--identity", "/etc/guix/offload_key"];
    const third = trust("m1", ...args, ...own);
    assert.is(third.status, 0, third.stderr);
    assert.not.match(third.stderr, "will log in with");
    rmSync(root("m1") + other);
  });

  test("it asks on the terminal: host key, then password", async () => {
    const allowed = ["PermitRootLogin=yes", "PasswordAuthentication=yes"];
    startSshd(...allowed);
    const set = "printf 'root:%s\\n' \"$1\" | chpasswd";
    inHost("s1", "sh", "-c", set, "sh", PASSWORD);
    const asked = onTerminal("m1", command("root@s1"));
    await until("the question", () => /\(yes or no\)\? /.test(asked.text()));
    assert.ok(asked.text().includes(fingerprintOf("s1")));
    asked.child.stdin!.write("yes\r");
    await until(
      "another",
      () => asked.text().includes("Password of root@s1: "),
    );
    asked.child.stdin!.write("wrong\r");
    const twice = /Password of root@s1: [^]*Password of root@s1: /;
    await until("another try", () => twice.test(asked.text()));
    asked.child.stdin!.write(`${PASSWORD}\r`);
    const { status, stdout } = await within("the end", asked.ended);
    assert.is(status, 0, stdout);
    assert.not.match(stdout, PASSWORD);
    assert.match(stdout, /\(build-machine\r\n {2}\(name "s1"\)\r\n/);
    const hostKey = readFileSync(
      `${root("s1")}/etc/ssh/ssh_host_ed25519_key.pub`,
      "utf8",
    );
    const [type, key] = hostKey.split(" ");
    assert.match(stdout, `(host-key "${type} ${key}")`);
  });

  test("without a yes nothing is changed", async () => {
    administrate("m1", "s1");
    const state = stateOf("m1", "s1");
    const refused = onTerminal("m1", command("root@s1"));
    await until("the question", () => /\(yes or no\)\? /.test(refused.text()));
    refused.child.stdin!.write("no\r");
    const { status, stdout } = await within("the end", refused.ended);
    assert.is(status, 1);
    assert.match(stdout, "error: the host key of 's1' is not trusted");
    const unasked = run("m1", "setsid", "-w", ...command("root@s1"));
    assert.is(unasked.status, 1);
    const hint = `pass --fingerprint ${fingerprintOf("s1")} if it is right`;
    assert.ok(unasked.stderr.includes(hint), unasked.stderr);
    const wrong = trust("m1", "root@s1", "--fingerprint", "SHA256:none");
    assert.is(wrong.status, 1);
    assert.match(
      wrong.stderr,
      "no host key of 's1' has the fingerprint SHA256:n",
    );
    assert.equal(stateOf("m1", "s1"), state);
    assert.is(run("m1", "ls", "/etc/guix/signing-key.sec").status, 2);
    const fingerprint = ["--fingerprint", fingerprintOf("s1")];
    const login = command("root@s1", ...fingerprint);
    const locked = run("m1", "setsid", "-w", ...login);
    assert.is(locked.status, 1);
    assert.match(locked.stderr, "error: there is no terminal to ask for an");
    assert.match(locked.stderr, "add a key that may log in to the SSH agent");
    startSshd("PasswordAuthentication=no");
    const refusal = run("m1", ...login);
    assert.is(refusal.status, 1);
    assert.match(refusal.stderr, "failed to log in to 's1' as 'root'");
  });

  test("on Guix System it prints what to declare", () => {
    administrate("m1", "s1");
    // A file of the store, as the system's generation has it.
    const written = `${root("m1")}/tmp/machines.scm`;
    writeFileSync(written, "(list)\n");
    const added = inHost("m1", "guix", "download", "/tmp/machines.scm");
    const [item] = added.split("\n");
    inHost("m1", "ln", "-sfn", item!, MACHINES);
    const { status, stdout, stderr } = trust(
      ...["m1", "root@s1", "--file", MACHINES] as const,
      ...["--fingerprint", fingerprintOf("s1")],
    );
    assert.is(status, 0, stderr);
    assert.match(stdout, /^#~\(build-machine\n {4}\(name "s1"\)\n/);
    assert.match(
      stderr,
      "is made from your 'operating-system'\nhint: add what",
    );
    assert.is(inHost("m1", "readlink", MACHINES), `${item}\n`);
    rmSync(root("m1") + MACHINES);
  });

  test("a key of another type is pinned by its fingerprint", () => {
    administrate("m1", "s1");
    const fingerprint = fingerprintOf("s1", "ecdsa");
    const { status, stdout, stderr } = trust(
      ...["m1", "root@s1", "--fingerprint", fingerprint] as const,
    );
    assert.is(status, 0, stderr);
    assert.match(stdout, '(host-key "ecdsa-sha2-nistp256 ');
  });

  test("an account without rights is told what root must do", () => {
    inHost(
      "s1",
      "sh",
      "-c",
      "id builder || useradd -m -s /bin/sh -p '*' builder",
    );
    inHost("s1", "guix", "archive", "--generate-key");
    administrate("m1", "s1", "builder");
    const { status, stdout, stderr } = trust(
      ...["m1", "builder@s1", "--fingerprint", fingerprintOf("s1")] as const,
    );
    assert.is(status, 1);
    const key = readFileSync(`${root("m1")}/etc/guix/signing-key.pub`, "utf8");
    const line = key.replace(/\s+/g, " ").trim();
    const hint = `echo '${line}' | guix archive --authorize`;
    assert.ok(stderr.includes(`run there, as root: ${hint}`), stderr);
    assert.match(stdout, /^s1:22: import: failed: unauthorized/m);
  });

  test("the keys are the unprivileged daemon's to read", () => {
    makeStranger("u1");
    administrate("u1", "s1");
    const fingerprint = ["--fingerprint", fingerprintOf("s1")];
    const args = ["root@s1", "--file", MACHINES, ...fingerprint];
    const { status, stderr } = trust("u1", ...args);
    assert.is(status, 0, stderr);
    const owner = inHost("u1", "stat", "-c", "%U %a", "/etc/guix/offload_key");
    assert.is(owner, "guix-daemon 600\n");
    ignoreLoad("u1");
    useOffload("u1", runtime);
    const [derivation] = makeWork("u1");
    assertOffloaded(derivation!, build("u1", derivation!), ["s1"]);
  });

  test.run();
}

RUNTIMES.forEach(suiteUnder);

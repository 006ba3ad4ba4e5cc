/** Machine files: what we make of them, beside what the real Guix does. */

import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { conformInLab } from "../lab_machine_file.ts";
import { closure, startHook } from "./hook.ts";
import {
  assertOffloaded,
  build,
  forget,
  inHost,
  LAB,
  lab,
  makeWork,
  offloadCommand,
  outputsOf,
  root,
  run,
  RUNTIMES,
  start,
  up,
  useMachines,
  useOffload,
  watch,
  within,
} from "./lab.ts";
import { addressOf } from "./relay.ts";

const COMMANDS = {
  node: [
    "/offload/node_modules/node/bin/node",
    "--disable-warning=ExperimentalWarning",
  ],
  deno: ["sh", "-c", '/offload/node_modules/@deno/*/deno run -A "$@"', "deno"],
};

/** What is the same as long as nothing changes that is compared. */
const STABLE = [
  "(map 1+ '(1 2))",
  '(call-with-input-file "/etc/passwd" read-line)',
  '(and=> (getenv "HOME") string-length)',
  "(gethostname)",
  '(file-exists? "/nonexistent")',
  '((@ (srfi srfi-1) delete-duplicates) (string-split "a b" #\\space))',
];

/** What asks the time, chance, processes, the network and the like. */
const VOLATILE = [
  "(current-time)",
  "((@ (srfi srfi-19) current-date))",
  "(times)",
  "(random 10)",
  "(getpid)",
  "(socket PF_UNIX SOCK_STREAM 0)",
  "(@@ (ice-9 ports) open-file)",
  '(false-if-exception (getaddrinfo "localhost"))',
  '(getpwnam "root")',
  '((@ (ice-9 popen) open-input-pipe) "echo")',
  '(stat:mtime (stat "/etc"))',
  '((@ (ice-9 ftw) scandir) "/tmp")',
  '((@ (guix build utils) find-files) "/tmp/volatile")',
  "(@ (system foreign) %null-pointer)",
  "((@ (ice-9 threads) current-processor-count))",
  "(eval '(current-time) (current-module))",
  "(module-ref (resolve-module '(guile)) 'current-time)",
  "(let-syntax ((dice (lambda (x) (datum->syntax x (random 10))))) (dice))",
  "(let () (define-syntax me (lambda (x) (datum->syntax x (getpid)))) (me))",
  '(begin (use-modules (rnrs io ports)) (open-file-input-port "/etc/hosts"))',
  '(readlink "/proc/self/exe")',
  '(load-extension "libguile-ssh" "init_version")',
];

for (const runtime of RUNTIMES) {
  const test = suite(`machine files under ${runtime}`);

  test.before(() => up("head", "w1", "w2"));

  test("the corpus is read as the real Guix reads it", () => {
    const command = [...COMMANDS[runtime], "/offload/test/lab_machine_file.ts"];
    assert.equal(conformInLab(LAB, command), []);
  });

  test("one that needs Guile is used all the same", () => {
    useOffload("head", runtime);
    useMachines("head", ["w2"], (text) =>
      `(use-modules (ice-9 match))
(match (list ${text}) ((machines) machines))`);
    const [derivation] = makeWork("head");
    assertOffloaded(derivation!, build("head", derivation!), ["w2"]);
    const shim = ["env", `OFFLOAD_RUNTIME=${runtime}`, "/offload/scripts/guix"];
    const machines = run("head", ...shim, "offload", "machines", "--json");
    assert.is(machines.status, 0, machines.stderr);
    assert.equal(
      JSON.parse(machines.stdout).map(({ name }: { name: string }) => name),
      ["w2"],
    );
  });

  test("every value with which the reference works builds", async () => {
    const address = addressOf("w1");
    const odd = (text: string, name: string) =>
      text.replace('"w1"', `"${name}"`)
        .replace(/\(systems .*\)/, '(systems \'(linux "x86_64-linux" #f))')
        .replace(
          /\(user .*\)/, // the reference prefers NAME's to #f
          `(user ${name.includes("@") ? '"root"' : "#f"}) (compression #f)`,
        )
        .replace(/\(overload-threshold .*\)/, "(overload-threshold 1.8)")
        .replace(
          /\(parallel-builds \d+\)/,
          `(parallel-builds 2.0) (speed -1) (compression-level #f)
           (features '("kvm" big))
           (daemon-socket "unix:///var/guix/daemon-socket/socket")`,
        );
    const never = (text: string) =>
      text.replace(/\(parallel-builds \d+\)/, "(parallel-builds 0) (speed 9)");
    const load = `${root("w1")}/tmp/load`;
    writeFileSync(load, "9999.00 9999.00 9999.00 1/1 1\n"); // 1, normalized
    inHost("w1", "mount", "--bind", "/tmp/load", "/proc/loadavg");
    try {
      const text = lab("machines", "head", "w1").trim().slice(0, -1);
      const entry = /\(build-machine[^]*\)/.exec(text)![0];
      const names = ["nobody@w1", `[::ffff:${address}]`];
      for (const [index, name] of names.entries()) {
        const list = `(list ${odd(entry, name)} ${never(entry)})`;
        const file = `${root("head")}/etc/guix/machines.scm`;
        writeFileSync(file, index === 0 ? list : `(let loop () ${list})`);
        forget("head");
        const [derivation] = makeWork("head");
        const output = outputsOf("head", derivation!).out!;
        const hook = startHook("head", { runtime, wantsLocal: true });
        assert.is(await hook.ask(derivation!), "accept", hook.text());
        hook.work(closure("head", derivation!), [output]);
        hook.close();
        const { status, stderr } = await within("the end", hook.ended);
        assert.is(status, 0, stderr);
        assert.match(stderr, `offloading '${derivation}' to '${name}'`);
        const reference = startHook("head", { wantsLocal: true });
        const answer = await reference.ask(derivation!);
        reference.close();
        assert.is(answer, "accept", reference.text());
      }
    } finally {
      inHost("w1", "umount", "/proc/loadavg");
    }
  });

  test("what Guile's outcome may depend on is compared, or it is volatile", () => {
    const key = '(host-key "ssh-ed25519 AAAA")';
    const fields = `(systems '("x86_64-linux")) (user "u") ${key}`;
    const directory = `${root("head")}/tmp/volatile`;
    rmSync(directory, { recursive: true, force: true });
    mkdirSync(directory);
    const names = [...STABLE, ...VOLATILE].map((expression, index) => {
      const name = `/tmp/volatile/${String(index).padStart(2, "0")}.scm`;
      writeFileSync(
        root("head") + name,
        `(use-modules (ice-9 match) (ice-9 rdelim))
        (define (value) ${expression})
        (match (object->string (value))
          (text (list (build-machine (name text) ${fields}))))`,
      );
      return name;
    });
    const command = [...COMMANDS[runtime], "/offload/test/lab_guile.ts"];
    const found = JSON.parse(inHost("head", ...command, ...names));
    assert.equal(
      names.map((name) => found[name]),
      [...STABLE.map(() => false), ...VOLATILE.map(() => true)],
    );
  });

  test("one that asks the world is asked again after seconds", async () => {
    const address = addressOf("head");
    let [answer, asked] = ["w1", 0];
    const server = createServer((client) => {
      client.on("error", () => {});
      client.end(`${answer}\n`);
      asked++;
    });
    await new Promise<void>((resolve) => server.listen(8383, address, resolve));
    const names = async () => {
      const command = offloadCommand(runtime, "machines", "--json");
      const { stdout } = await watch(start("head", ...command)).ended;
      return JSON.parse(stdout).map(({ name }: { name: string }) => name);
    };
    try {
      useMachines("head", ["w1"], (text) =>
        `(use-modules (ice-9 rdelim))
(define name
  (let ((port (socket PF_INET SOCK_STREAM 0)))
    (connect port AF_INET (inet-pton AF_INET "${address}") 8383)
    (read-line port)))
${text.replace('(name "w1")', "(name name)")}`);
      assert.equal(await names(), ["w1"]);
      answer = "w2";
      let seen = "";
      while (seen !== "w2") [seen] = await names();
      assert.ok(asked >= 2);
    } finally {
      server.close();
    }
  });

  test("one that is broken makes the hook decline, and says where", async () => {
    const [derivation] = makeWork("head");
    const broken: Record<string, RegExp> = {
      "(list (build-machine": /machines\.scm:1:\d+: unexpected end of input/,
      "(list (build-machine (nam 1)))": /machines\.scm:1:\d+: .*nam/,
      "(list (frobnicate))": /machines\.scm:1:\d+: .*frobnicate/,
      '"none"': /did not return a list of build machines/,
    };
    for (const [text, message] of Object.entries(broken)) {
      writeFileSync(`${root("head")}/etc/guix/machines.scm`, text);
      const hook = startHook("head", { runtime, wantsLocal: true });
      assert.is(await hook.ask(derivation!), "decline");
      assert.is(await hook.ask(derivation!, "riscv64-none"), "postpone");
      hook.close();
      const { status, stderr } = await within("the end", hook.ended);
      assert.is(status, 0);
      assert.match(stderr, message);
    }
  });

  test.after(() => void lab("up", "head"));
  test.run();
}

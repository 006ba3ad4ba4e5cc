/** What an administrator runs: `offload test`, `status`, help, completion. */

import {
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  buildCommand,
  down,
  forget,
  inHost,
  lab,
  makeWork,
  offloadCommand,
  onTerminal,
  ROOT,
  root,
  run,
  RUNTIMES,
  start,
  storeNames,
  trustOnly,
  until,
  up,
  useMachines,
  useOffload,
  watch,
  within,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";

/** Machines that something is wrong with, and two that are fine. */
const MACHINES = ["w1", "w2", "w3", "w4", "w5"];

/** The machine file of all of them. */
const FAULTY = "/tmp/faulty.scm";

/** Ports of w1, each with something wrong. */
const PORTS = { dead: 2201, silent: 2202, otherKey: 2203, noKey: 2204 };

/** Seconds that a machine is given here: only the silent one takes them. */
const TIMEOUT = 30;

/** Starts another sshd on w1. */
function startSshd(port: number, ...options: readonly string[]): void {
  const pidFile = `/run/sshd-${port}.pid`;
  const own = [`PidFile=${pidFile}`, "PerSourcePenalties=no"]
    .flatMap((option) => ["-o", option]);
  inHost("w1", "/usr/sbin/sshd", "-p", String(port), ...own, ...options);
  inHost("w1", "sh", "-c", `until [ -s ${pidFile} ]; do sleep 0.02; done`);
}

/** Has an sshd of w1 take connections, and say nothing. */
function startSilentSshd(): void {
  const pidFile = `/run/sshd-${PORTS.silent}.pid`;
  inHost("w1", "rm", "-f", pidFile);
  startSshd(PORTS.silent);
  inHost("w1", "sh", "-c", `kill -STOP $(cat ${pidFile})`);
}

/** Ends it, and so the connections to it. */
function killSilentSshd(): void {
  const pidFile = `/run/sshd-${PORTS.silent}.pid`;
  inHost("w1", "sh", "-c", `kill -KILL $(cat ${pidFile})`);
}

/** Brings up the hosts, and breaks what is to be broken. */
function setUp(): void {
  down("w1", "w3", "w4", "w5");
  up("head", ...MACHINES);
  startSilentSshd();
  const key = "/etc/ssh/other_key";
  inHost("w1", "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key);
  startSshd(PORTS.otherKey, "-h", key);
  startSshd(PORTS.noKey, "-o", "AuthorizedKeysFile=none");
  trustOnly("w3", []);
  trustOnly("head", ["w1", "w2", "w3", "w5"]);
  inHost("w5", "sh", "-c", "kill $(cat /run/guix-daemon.pid)");
  const ports = Object.values(PORTS);
  const machines = ["w1", "w1", "w1", "w1", ...MACHINES];
  const text = lab("machines", "head", ...machines)
    .replaceAll('(name "w1")', (name) => {
      const port = ports.shift();
      return port === undefined ? name : `${name} (port ${port})`;
    });
  writeFileSync(root("head") + FAULTY, text);
}

/** The machine file of two good machines. */
function writeGoodMachines(): string {
  writeFileSync(
    `${root("head")}/tmp/good.scm`,
    lab("machines", "head", "w1", "w2"),
  );
  return "/tmp/good.scm";
}

/** Replaces what differs from run to run. */
function normalize(text: string): string {
  return text
    .replace(/SHA256:[\w+\/]{43}/g, "SHA256:FINGERPRINT")
    .replace(/AAAA[\w+\/]{60,}=*/g, "KEY")
    .replace(/#[0-9A-F]{64}#/g, "#Q#")
    .replace(/\/[a-z0-9]{32}-/g, "/HASH-")
    .replace(/\b\d+\.\d\d s/g, "N s")
    .replace(/\b\d+ GiB/g, "N GiB")
    .replace(/time="[\d.]+"/g, 'time="N"')
    .replace(/latency: [\d.]+ ms/g, "latency: N ms")
    .replace(/load: [\d.]+/g, "load: N")
    .replace(/kernel: .*/g, "kernel: K")
    .replace(/architecture: .*/g, "architecture: A");
}

/** Demands that a text is, but for what differs, what it was once. */
function assertSnapshot(name: string, text: string): void {
  const file = `${ROOT}test/data/commands/${name}`;
  const expected = existsSync(file) ? readFileSync(file, "utf8") : "";
  assert.snapshot(normalize(text), expected);
}

/** Runs commands on head at the same time. */
async function runAtOnce(
  ...commands: readonly (readonly string[])[]
): Promise<Result[]> {
  const running = commands.map((command) => watch(start("head", ...command)));
  const ended = running.map(({ ended }) => within("the end", ended));
  return await Promise.all(ended);
}

/** What `guix offload` says of the two good machines, asked once. */
const reference = { test: "", status: "" };

function askReference(): void {
  for (const command of ["test", "status"] as const) {
    const file = writeGoodMachines();
    const result = run("head", "guix", "offload", command, file);
    assert.is(result.status, 0, result.stderr);
    reference[command] = result.stdout;
  }
}

/** Reads the fields in the format of `guix offload status`. */
function fieldsOf(text: string): Record<string, Record<string, string>> {
  const machines: Record<string, Record<string, string>> = {};
  let fields: Record<string, string> = {};
  for (const line of text.trimEnd().split("\n")) {
    const [, name, value] = /^ {2}(.*?): (.*)$/.exec(line) ?? [];
    if (name === undefined) machines[line] = fields = {};
    else fields[name] = value!;
  }
  return machines;
}

/** Demands that two texts have the same number, or nearly so. */
function assertClose(a: string, b: string, most: number): void {
  const difference = Math.abs(parseFloat(a) - parseFloat(b));
  assert.ok(difference <= most, `'${a}' and '${b}'`);
  assert.is(a.replace(/^[\d.-]+/, ""), b.replace(/^[\d.-]+/, ""));
}

/** The files of a host that changed since its /tmp/stamp did. */
function changedFiles(host: string): string[] {
  const places = ["/etc", "/gnu", "/home", "/root", "/tmp", "/var", "/run"]
    .filter((place) => existsSync(root(host) + place));
  const own =
    /^\/gnu\/store\/.links|^\/var\/guix\/(db|temproots)\/|^\/var\/log\/|-cache\//;
  const condition = ["-xdev", "-cnewer", "/tmp/stamp", "!", "-type", "d"];
  return inHost(host, "find", ...places, ...condition).trim().split("\n")
    .filter((file) => file !== "" && !own.test(file))
    .map((file) => file.replace(/^\/gnu\/store\/\w+-/, "")).sort();
}

/** A line that was drawn alone, and then erased. */
function barOf(text: string): RegExp {
  return RegExp(`\\r\\x1b\\[K${text}\\r\\x1b\\[K`);
}

/** What is left on a terminal of what was erased line by line. */
function whatIsLeft(text: string): string {
  return text.split("\n").map((line) => line.split("\r\x1b[K").at(-1))
    .join("\n");
}

function suiteUnder(runtime: Runtime, isFirst: boolean): void {
  const test = suite(`commands under ${runtime}`);
  const command = (...args: string[]) => offloadCommand(runtime, ...args);

  const writeCompletion = (shell: string) => {
    const { stdout } = run("head", ...command("completion", shell));
    writeFileSync(`${root("head")}/tmp/completion.${shell}`, stdout);
  };

  test.before(() => {
    if (!isFirst) return;
    setUp();
    forget("head"); // what other suites saw fail
    askReference();
  });

  test("test and status tell each machine's own trouble", async () => {
    const limit = `--timeout=${TIMEOUT}`;
    const begun = Date.now();
    const [tested, json, status] = await runAtOnce(
      command("test", FAULTY, limit, "--junit", "/tmp/offload.xml"),
      command("test", FAULTY, limit, "--json"),
      command("status", FAULTY, limit),
    );
    const seconds = (Date.now() - begun) / 1000;
    // What the silent one takes, the others take beside it.
    assert.ok(seconds < 2 * TIMEOUT, `${seconds} s`);
    for (const result of [tested!, json!, status!]) {
      assert.is(result.status, 1, result.stderr);
    }
    assertSnapshot("test.txt", tested!.stdout);
    assertSnapshot("status.txt", status!.stdout);
    const xml = readFileSync(`${root("head")}/tmp/offload.xml`, "utf8");
    assertSnapshot("junit.txt", xml);
    assertReports(JSON.parse(json!.stdout));
    assert.match(tested!.stderr, /^w3:22: import: failed: unauthorized/m);
  });

  test("test and guix offload test agree on good machines", () => {
    for (const host of ["head", "w2"]) inHost(host, "touch", "/tmp/stamp");
    const file = writeGoodMachines();
    const items = storeNames("w2").length;
    const result = run("head", ...command("test", file, "^w2$"));
    assert.is(result.status, 0, result.stdout);
    assert.match(result.stdout, /^w2:22\tok\t8\/8\t[\d.]+ s\t$/m);
    assert.not.match(result.stdout, "w1");
    assert.is(storeNames("w2").length, items + 2);
    assert.equal(changedFiles("head"), ["/tmp/good.scm", "export-test"]);
    assert.equal(changedFiles("w2"), ["export-test", "import-test"]);
  });

  test("status and guix offload status agree field by field", () => {
    const result = run("head", ...command("status", writeGoodMachines()));
    assert.is(result.status, 0, result.stderr);
    const [ours, theirs] = [result.stdout, reference.status].map(fieldsOf);
    assert.equal(Object.keys(ours!), ["w1", "w2"]);
    for (const [name, fields] of Object.entries(theirs!)) {
      const own = ours![name]!;
      assert.is(Object.keys(fields).length, 6);
      assert.equal(Object.keys(own).slice(0, 6), Object.keys(fields));
      for (const field of ["kernel", "architecture", "host name"]) {
        assert.is(own[field], fields[field]);
      }
      assertClose(own["normalized load"]!, fields["normalized load"]!, 0.5);
      assertClose(own["free disk space"]!, fields["free disk space"]!, 3);
      assertClose(own["time difference"]!, fields["time difference"]!, 1);
    }
  });

  test("status tells what is being built, since when", async () => {
    useOffload("head", runtime);
    useMachines("head", ["w2"]);
    const begun = Date.now();
    const [derivation] = makeWork("head", "--seconds=60");
    const build = watch(start("head", ...buildCommand([derivation!])));
    await until(
      "the build",
      () => build.text().includes("offloading build of"),
    );
    const json = run("head", ...command("status", "--json"));
    const [{ slots, builds }] = JSON.parse(json.stdout);
    assert.is(slots, 2);
    assert.is(builds.length, 1);
    assert.is(builds[0].derivation, derivation);
    const since = Date.parse(builds[0].since);
    assert.ok(since >= begun && since <= Date.now(), builds[0].since);
    const { stdout } = run("head", ...command("status"));
    assert.match(stdout, "  slots: 1 of 2 taken\n  building work for ");
    build.child.kill();
    await within("the end of the build", build.ended);
    // The daemon has yet to end the hook.
    const free = () => run("head", ...command("status")).stdout;
    await until("free slots", () => /^ {2}slots: 0 of 2 taken$/m.test(free()));
  });

  test("an account that may run nothing is reported as it is", () => {
    const file = `${root("w2")}/root/.ssh/authorized_keys`;
    const keys = readFileSync(file, "utf8");
    const options = 'restrict,port-forwarding,command="/bin/false" ';
    writeFileSync(file, keys.replace(/^ssh-/gm, `${options}$&`));
    const result = run("head", ...command("test", writeGoodMachines(), "w2"));
    const status = run("head", ...command("status", "/tmp/good.scm", "w2"));
    writeFileSync(file, keys);
    assert.is(result.status, 0, result.stdout);
    assert.match(result.stdout, /^w2:22\twarning\t6\/8\t.*\tguix$/m);
    assert.match(result.stdout, "w2:22: guix: warning: failed to run 'guix");
    assert.is(status.status, 0);
    assert.match(
      status.stdout,
      /^w2\n {2}latency: .*\n {2}slots: 0 of 2 taken/,
    );
  });

  test("what plugins/operation.md says of CI works", () => {
    const [, script] = /\n## CI\n[^]*?\n```sh\n([^]*?)```/.exec(
      readFileSync(`${ROOT}plugins/operation.md`, "utf8"),
    ) ?? [];
    const text = lab("machines", "head", "w1", "w2", "w2");
    const runScript = (machines: string) => {
      const directory = `${root("head")}/tmp/ci`;
      rmSync(directory, { recursive: true, force: true });
      mkdirSync(directory);
      writeFileSync(`${directory}/machines.scm`, machines);
      const offload = `exec ${command('"$@"').join(" ")}`;
      const program = `${directory}/offload`;
      writeFileSync(program, `#!/bin/sh\n${offload}\n`, { mode: 0o755 });
      return run("head", "sh", "-c", `cd /tmp/ci; PATH=.:$PATH\n${script}`);
    };
    const down = text.replace(/"w2"/, '"laptop"');
    const result = runScript(down);
    assert.is(result.status, 0, result.stdout + result.stderr);
    assert.match(result.stdout, /^laptop is down$/m);
    const xml = readFileSync(`${root("head")}/tmp/ci/offload.xml`, "utf8");
    assert.match(xml, '<testsuite name="w2:22" tests="8" failures="0"');
    assert.not.match(xml, "laptop");
    const broken = runScript(down.replace(/"w2"/, '"gone"'));
    assert.is(broken.status, 1);
  });

  test("a test of no machine is no pass", () => {
    const [file, report] = ["/tmp/none.scm", "/tmp/none.xml"];
    writeFileSync(root("head") + file, "(list)\n");
    const { status, stdout, stderr } = run(
      "head",
      ...offloadCommand(runtime, "test", file, "--junit", report),
    );
    assert.is(status, 2, stderr);
    assert.match(stdout, "no machine is listed, and so none was tested");
    assert.match(readFileSync(root("head") + report, "utf8"), 'failures="1"');
  });

  test("there are tables and colours on a terminal only", async () => {
    const status = command("status", writeGoodMachines());
    const shown = await within("the end", onTerminal("head", status).ended);
    const text = shown.stdout.replaceAll("\x1b", "ESC");
    assert.match(text, /ESC\[1mmachine +slots +load /);
    assert.match(text, /^w1:22 +ESC\[32mupESC\[0m +0\/2 /m);
    const plain = onTerminal("head", ["env", "NO_COLOR=1", ...status]).ended;
    const { stdout } = await within("the end", plain);
    assert.not.match(stdout.replaceAll("\x1b", "ESC"), /ESC\[\d+m/);
    assert.match(stdout, /^w1:22 +up +0\/2 /m);
  });

  test("what comes from outside is cleaned, what is ours coloured", async () => {
    const file = "/tmp/odd.scm";
    const text = lab("machines", "head", "w1", "w2", "w2")
      .replace('(name "w2")', '(name "odd\\x1b[35m") (speed 9.)');
    writeFileSync(root("head") + file, text);
    useMachines("head", ["w1", "w2"], () => text);
    const [derivation] = makeWork("head");
    const trust = ["trust", "root@w1", "--file", "/etc/guix/machines.scm"];
    const painted: [args: string[], word: RegExp][] = [
      [["test", file], /: connect: ESC\[32mokESC\[0m/],
      [["test", file], /connect: ESC\[31mfailedESC\[0m: failed to connect/],
      [["status", file], /ESC\[32mupESC\[0m [^]*ESC\[31mdownESC\[0m/],
      [["explain", derivation!], /ESC\[1mmachine +free slots/m],
      [["machines", file], /ESC\[1mmachine +systems/m],
      [trust, /w1:22: import: ESC\[32mokESC\[0m/],
    ];
    const shown = painted.map(([args]) => onTerminal("head", command(...args)));
    for (const [index, { ended }] of shown.entries()) {
      const { stdout } = await within("the end", ended);
      const visible = stdout.replaceAll("\x1b", "ESC");
      assert.match(visible, painted[index]![1]);
      assert.not.match(
        visible,
        /\?\[(3[123]|[01])m|ESC\[35m/,
        painted[index]![0].join(" "),
      );
    }
  });

  test("each stream is asked by itself whether it has colours", async () => {
    const redirected = async (redirection: string) => {
      const line = `exec "$@" ${redirection}/tmp/redirected`;
      const words = command("test", writeGoodMachines());
      const args = ["sh", "-c", line, "sh", ...words];
      const { stdout } = await within(
        "the end",
        onTerminal("head", args).ended,
      );
      const there = readFileSync(`${root("head")}/tmp/redirected`, "utf8");
      return [stdout, there].map((it) => it.replaceAll("\x1b", "ESC"));
    };
    const [steps, plainTable] = await redirected(">");
    assert.match(steps!, /w1:22: import: ESC\[32mokESC\[0m/);
    assert.match(plainTable!, /^w1:22\tok\t/m);
    const [table, plainSteps] = await redirected("2>");
    assert.match(table!, /^w1:22 +ESC\[32mokESC\[0m/m);
    assert.match(plainSteps!, /^w1:22: import: ok: /m);
    assert.not.match(plainTable! + plainSteps!, /ESC|\?\[/);
  });

  test("a bar shows on a terminal how many have answered", async () => {
    const file = "/tmp/waiting.scm";
    const text = lab("machines", "head", "w1", "w2")
      .replace('(name "w1")', `$& (port ${PORTS.silent})`);
    writeFileSync(root("head") + file, text);
    const ask = (name: string) => command(name, file, "--timeout=100");
    const json = ["sh", "-c", `exec "$@" >/tmp/status.json`, "sh"]
      .concat(ask("status"), "--json");
    const shown = [
      onTerminal("head", ask("status")),
      onTerminal("head", ask("test")),
      onTerminal("head", ask("status"), 15),
      onTerminal("head", json),
      onTerminal("head", ["env", "TERM=dumb", ...ask("status")]),
      watch(start("head", ...ask("status"))),
    ];
    const bars = [
      /asking machines 1\/2 ▕█{20} {20}▏/,
      /testing machines 1\/2 ▕█{20} {20}▏/,
      /asking machine/,
      /asking machines 1\/2 ▕█{20} {20}▏/,
    ];
    await until(
      "bars",
      () => bars.every((bar, index) => bar.test(shown[index]!.text())),
    );
    killSilentSshd();
    const ends = shown.map(({ ended }) => within("the end", ended));
    const [status, test, narrow, toFile, ...others] = await Promise.all(ends);
    [status, test, narrow, toFile].forEach((it, index) =>
      assert.match(it!.stdout, barOf(bars[index]!.source))
    );
    for (const { stdout } of [status!, test!, narrow!, toFile!]) {
      const left = whatIsLeft(stdout);
      assert.not.match(left, /▕|(asking|testing) machine/);
      assert.match(left, "build machines...");
    }
    // A step that is told meanwhile is not written into the bar.
    assert.match(whatIsLeft(test!.stdout), /^w1:2202: host key: .*failed/m);
    const written = `${root("head")}/tmp/status.json`;
    const statuses = JSON.parse(readFileSync(written, "utf8"));
    assert.is(statuses.length, 2);
    for (const { stdout, stderr } of others) {
      assert.match(stdout, /up|w2/);
      assert.not.match(stdout + stderr, /▕|asking machines/);
      assert.not.ok((stdout + stderr).includes("\x1b[K"));
    }
    startSilentSshd();
  });

  test("status --watch draws until interrupted", async () => {
    const status = command("status", writeGoodMachines(), "--watch");
    const watching = onTerminal("head", status);
    const drawn = () => watching.text().split("\x1b[H").length - 1;
    await until("two drawings", () => drawn() >= 2);
    assert.match(watching.text(), "\x1b[32mup\x1b[0m");
    watching.child.stdin!.write("\x03");
    const { status: code } = await within("the end", watching.ended);
    assert.is(code, 0, watching.text());
  });

  test("completion works in bash and fish", () => {
    const scripts = {
      bash: `. /tmp/completion.bash
        COMP_WORDS=(offload "$@"); COMP_CWORD=$#
        _offload; echo "\${COMPREPLY[@]}"`,
      fish: `source /tmp/completion.fish
        complete -C "offload $argv" | string replace -r '\\t.*' ''`,
    };
    for (const [shell, script] of Object.entries(scripts)) {
      writeCompletion(shell);
      const complete = (...words: string[]) => {
        const names = shell === "fish" ? words : [shell, ...words];
        const result = run("head", shell, "-c", script, ...names);
        return result.stdout.trim().split(/\s+/).sort();
      };
      assert.equal(complete("sta"), ["status"], shell);
      assert.equal(complete("completion", "z"), ["zsh"], shell);
      assert.equal(complete("test", "--j"), ["--json", "--junit"], shell);
    }
  });

  test("completion works in zsh", async () => {
    writeCompletion("zsh");
    const { child, text, ended } = onTerminal("head", ["zsh", "-f", "-i"]);
    const type = (keys: string) => child.stdin!.write(keys);
    type("offload() { print -r -- GOT $@ }; PROMPT='> '\r");
    type("source /tmp/completion.zsh; print READY\r");
    await until("zsh", () => /^READY/m.test(text()));
    for (const words of ["status", "completion zsh", "test --junit"]) {
      const begun = `offload ${words.slice(0, -2)}`;
      type(begun);
      // What comes with a Tab at once is not completed.
      await until("its echo", () => text().endsWith(begun));
      type("\t\r");
      const completed = RegExp(`^GOT ${words} *\r?$`, "m");
      await until(words, () => completed.test(text()));
    }
    type("exit\r");
    await within("the end of zsh", ended);
  });

  test.after(() => {
    if (!isFirst) down("w1", "w3", "w4", "w5");
  });
  test.run();
}

/** What `offload test --json` says of a machine, as far as it matters. */
interface Report {
  readonly machine: string;
  readonly outcome: string;
  readonly seconds: number;
  readonly steps: readonly {
    readonly name: string;
    readonly outcome: string;
    readonly hint?: string;
  }[];
}

/** Demands that each machine failed at its own step, in time. */
function assertReports(reports: readonly Report[]): void {
  const failed = reports.map(({ machine, steps }) => [
    machine,
    ...steps.filter(({ outcome }) => outcome === "failed")
      .map(({ name }) => name),
  ]);
  assert.equal(failed, [
    ["w1:2201", "connect"],
    ["w1:2202", "host key"],
    ["w1:2203", "host key"],
    ["w1:2204", "authentication"],
    ["w1:22"],
    ["w2:22"],
    ["w3:22", "import"],
    ["w4:22", "export"],
    ["w5:22", "daemon"],
  ]);
  for (const { machine, seconds, steps } of reports) {
    assert.ok(seconds < 2 * TIMEOUT, `${machine}: ${seconds} s`);
    assert.is(steps.length, 8);
    for (const { outcome, hint } of steps) {
      if (outcome === "failed") assert.ok(hint);
    }
  }
}

RUNTIMES.forEach((runtime, index) => suiteUnder(runtime, index === 0));

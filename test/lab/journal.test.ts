/** What is kept of builds, and what is made of it: news, numbers, a look. */

import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { residentStatus } from "./hook.ts";
import {
  ACQUAINTED,
  assertOffloaded,
  buildCommand,
  builds,
  buildWork,
  inHost,
  LAB,
  makeWork,
  meetMachines,
  OBSERVATIONS,
  offloadCommand,
  onDatabase,
  oneSlot,
  onTerminal,
  PLUGINS,
  root,
  run,
  RUNTIMES,
  start,
  STATE,
  until,
  useMachines,
  useOffload,
  usePlugins,
  watch,
  within,
  withSlots,
  writePlugin,
} from "./lab.ts";
import type { Runtime } from "./lab.ts";
import { withoutSite } from "./suites.ts";

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** Prefers w1, and fails there, with a message that is odd. */
const FAILS_ON_W1 = `export default {
  name: "odd",
  score: ({ machine }) => machine.name === "w1" ? 100 : 0,
  admit({ name }) {
    if (name === "w1") throw new Error("<b>\\x1b[2J\\n" + "x".repeat(5000));
  },
};`;

/** Writes down what it is told, once it may. */
const TELLS = `import { appendFileSync, existsSync } from "node:fs";
export default {
  name: "tells",
  async ended(build) {
    while (!existsSync("/tmp/may-tell")) {
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    appendFileSync("/tmp/told", JSON.stringify(build) + "\\n");
    if (build.outcome === "failed") throw new Error("cannot tell");
  },
};`;

/** A row: `null` is what a build did not come to. */
type Row = Readonly<Record<string, string | number | null>>;

/** The rows of a table of the journal, the oldest first. */
function journalRows(table: "journal" | "absence" = "journal"): Row[] {
  return onDatabase(OBSERVATIONS, `SELECT * FROM ${table} ORDER BY rowid`);
}

/** How many builds it has. */
function countRows(): number {
  try {
    return journalRows().length;
  } catch {
    return 0; // none was ever built
  }
}

/** The numbers in a text of metrics, by all that stands before them. */
function numbersIn(text: string): Map<string, number> {
  const lines = text.split("\n").filter((line) => /^[^#]/.test(line));
  return new Map(lines.map((line): [string, number] => {
    const [, name, value] = /^(.*) (\S+)$/.exec(line)!;
    return [name!, Number(value)];
  }));
}

/** The sum of those whose name begins and goes on so. */
function sumOf(text: string, name: string, label = ""): number {
  return [...numbersIn(text)]
    .filter(([it]) => it.startsWith(`${name}{`) && it.includes(label))
    .reduce((sum, [, value]) => sum + value, 0);
}

/** Demands that promtool finds nothing wrong. */
function assertWellFormed(text: string): void {
  const { status, stdout, stderr } = spawnSync(
    LAB,
    ["promtool", "check", "metrics"],
    { input: text, encoding: "utf8" },
  );
  assert.is(status, 0, stdout + stderr);
  assert.is(stdout + stderr, "");
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`the journal under ${runtime}`);

  withoutSite(test, runtime);

  test("a build is kept with its times, items and bytes", async () => {
    const begin = Date.now();
    const options = ["--inputs=3", "--seconds=1", "--output-size=5000"];
    const [derivation, result] = buildWork("--name=kept-1", ...options);
    const machine = assertOffloaded(derivation, result, ["w1", "w2"]);
    await until("the journal", () => countRows() === 1);
    const [row] = journalRows();
    assert.is(row!.derivation, derivation);
    assert.is(row!.machine, `${machine}:22`);
    assert.is(row!.outcome, "built");
    assert.is(row!.earlier, "[]");
    const { asked, accepted, began, connected, sent, built, retrieved, ended } =
      row!;
    const times = [asked, accepted, began, connected, sent, built, retrieved]
      .concat(ended).map(Number);
    assert.equal(times, times.toSorted((a, b) => a - b));
    assert.ok(times[0]! >= begin && times.at(-1)! <= Date.now());
    assert.ok(times[5]! - times[4]! >= 1000, `${times}`);
    assert.ok(Number(row!.items) >= 3, `${row!.items}`);
    assert.ok(Number(row!.bytesSent) > 0, `${row!.bytesSent}`);
    assert.ok(Number(row!.bytesRetrieved) > 5000, `${row!.bytesRetrieved}`);
  });

  test("a build that fails is kept as that, whatever it is called", async () => {
    const name = "n".repeat(200);
    const [derivation, result] = buildWork("--fail", `--name=${name}`);
    assert.is.not(result.status, 0);
    await until("the journal", () => countRows() === 1);
    const [row] = journalRows();
    assert.is(row!.derivation, derivation);
    assert.is(row!.outcome, "failed");
    assert.is(row!.built, null);
    assert.match(String(row!.problem), "failed: build of");
  });

  test("a build that is done elsewhere is kept with both attempts", async () => {
    writePlugin("odd.mjs", FAILS_ON_W1);
    const [derivation, result] = buildWork();
    assertOffloaded(derivation, result, ["w2"]);
    await until("the journal", () => countRows() === 1);
    const [row] = journalRows();
    assert.is(row!.machine, "w2:22");
    assert.is(row!.outcome, "built");
    const [attempt, ...more] = JSON.parse(String(row!.earlier));
    assert.equal(more, []);
    assert.is(attempt.machine, "w1:22");
    assert.ok(attempt.began <= attempt.ended && attempt.ended <= row!.began!);
    assert.match(attempt.problem, /^plugin 'odd': admit: <b> ?\[2J x/);
    assert.not.match(attempt.problem, /\p{Cc}/u);
    const [absence] = journalRows("absence");
    assert.is(absence!.machine, "w1:22");
  });

  test("a build that is called off is kept as that", async () => {
    // guix-daemon kills a hook of its own with all that it has started.
    useOffload("head", runtime, "OFFLOAD_RESIDENT=true");
    buildWork();
    await until("the process that stays", () => !!residentStatus("head"));
    const [derivation] = makeWork("head", "--seconds=600");
    const client = watch(start("head", ...buildCommand([derivation!])));
    await until("the build", () => builds("w1") + builds("w2") === 1);
    run("head", "sh", "-c", "kill -INT $(pgrep -f 'guix build')");
    await within("the client's end", client.ended);
    await until("the journal", () => countRows() === 2);
    const [, row] = journalRows();
    assert.is(row!.outcome, "interrupted");
    assert.is(row!.built, null);
    await until("its end", () => builds("w1") + builds("w2") === 0);
    useOffload("head", runtime);
  });

  test("a build whose hook is killed is kept, once somebody finds that", async () => {
    useOffload("head", runtime, "OFFLOAD_RESIDENT=false");
    const [derivation] = makeWork("head", "--seconds=600");
    const client = watch(start("head", ...buildCommand([derivation!])));
    await until("the build", () => builds("w1") + builds("w2") === 1);
    await until(
      "what it told",
      () => onDatabase(OBSERVATIONS, "SELECT * FROM course").length === 1,
    );
    run("head", "sh", "-c", "kill -INT $(pgrep -f 'guix build')");
    await within("the client's end", client.ended);
    await until("its end", () => builds("w1") + builds("w2") === 0);
    const [next, result] = buildWork();
    assertOffloaded(next, result, ["w1", "w2"]);
    await until("the journal", () => countRows() === 2);
    const [killed, row] = journalRows();
    assert.is(killed!.derivation, derivation);
    assert.is(killed!.outcome, "interrupted");
    assert.is(killed!.problem, "its hook was killed");
    assert.ok(Number(killed!.sent) >= Number(killed!.connected));
    assert.ok(Number(killed!.ended) - Number(killed!.began) >= 900);
    assert.is(killed!.built, null);
    assert.is(row!.outcome, "built");
    useOffload("head", runtime);
  });

  test("why machines take nothing is kept, by one of all processes", async () => {
    useMachines("head", ["w1", "w2", "w2"], (text) => {
      const [head, w1, w2, other] = text.split(/(?=\(build-machine)/);
      const busy = w2!.replace(/threshold #f/, "threshold 0.");
      const drained = other!.replace(/"w2"/, '"away"');
      return `${head}${withSlots(8)(w1!)}${busy}${drained}`;
    });
    writePlugin("drain", "away # <i>2");
    usePlugins("head", runtime, { drain: {} }, ACQUAINTED);
    const work = makeWork("head", "--count=8", "--seconds=1");
    const command = buildCommand(work);
    const { status, stderr } = run("head", ...command);
    assert.is(status, 0, stderr);
    await until("the reasons", () => journalRows("absence").length >= 2);
    const reasons = journalRows("absence")
      .map(({ machine, problem }) => `${machine}: ${problem}`);
    assert.equal(reasons.sort(), [
      `away:22: drained by '${PLUGINS}/drain': <i>2`,
      "w2:22: overloaded",
    ]);
    useOffload("head", runtime);
  });

  test("plugins are told, and nothing waits for them", async () => {
    const files = ["may-tell", "told"].map((it) => `${root("head")}/tmp/${it}`);
    files.forEach((file) => rmSync(file, { force: true }));
    const [mayTell, told] = files as [string, string];
    writePlugin("tells.mjs", TELLS);
    useOffload("head", runtime);
    const derivations = ["--name=a", "--name=b"].map((name) => {
      const [derivation, result] = buildWork(name);
      assertOffloaded(derivation, result, ["w1", "w2"]);
      return derivation;
    });
    const [failing] = buildWork("--fail");
    assert.not.ok(existsSync(told), "the builds are over");
    writeFileSync(mayTell, "");
    const lines = () =>
      existsSync(told) ? readFileSync(told, "utf8").trim().split("\n") : [];
    await until("the news", () => lines().length === 3);
    const news = lines().map((line) => JSON.parse(line));
    assert.equal(
      news.map(({ derivation }) => derivation).sort(),
      [...derivations, failing].sort(),
    );
    const failed = news.find(({ outcome }) => outcome === "failed");
    assert.is(failed.derivation, failing);
    const logs = ["resident.log", "ended.log"]
      .map((name) => `${root("head")}${STATE}/${name}`);
    const warning = "warning: plugin 'tells': ended: cannot tell";
    await until(
      "the warning",
      () =>
        logs.some((log) =>
          existsSync(log) && readFileSync(log, "utf8").includes(warning)
        ),
    );
    const again = run("head", ...offloadCommand(runtime, "ended", failing));
    assert.is(again.status, 1, again.stderr);
    assert.match(again.stderr, warning);
    assert.is(lines().length, 4);
    const none = run("head", ...offloadCommand(runtime, "ended", "/no.drv"));
    assert.match(none.stderr, "the journal has no '/no.drv'");
  });

  test("numbers are those of the builds, by 8 processes at once", async () => {
    const file = "/tmp/offload.prom";
    rmSync(root("head") + file, { force: true });
    useMachines("head", ["w1", "w2"], withSlots(4));
    usePlugins("head", runtime, { metrics: { file } }, ACQUAINTED);
    await meetMachines(runtime);
    const good = makeWork("head", "--count=24", "--output-size=1000");
    const bad = makeWork("head", "--count=8", "--fail");
    const results = await Promise.all(
      [...bad.map((it) => [it]), good].map((work) => {
        const command = buildCommand(work);
        return within("the builds", watch(start("head", ...command)).ended);
      }),
    );
    assert.is(results.at(-1)!.status, 0, results.at(-1)!.stderr);
    await until("the journal", () => countRows() === 32);
    const { stdout } = run(
      "head",
      ...offloadCommand(runtime, "metrics", "--text"),
    );
    assertWellFormed(stdout);
    const counted = (text: string) =>
      ["built", "failed"].map((it) =>
        sumOf(text, "offload_builds_total", `outcome="${it}"`)
      );
    assert.equal(counted(stdout), [24, 8]);
    const rows = journalRows();
    const sum = (name: string) =>
      rows.reduce((sum, row) => sum + Number(row[name] ?? 0), 0);
    for (const machine of ["w1:22", "w2:22"]) {
      const own = rows.filter((row) => row.machine === machine);
      const label = `machine="${machine}"`;
      assert.is(sumOf(stdout, "offload_builds_total", label), own.length);
    }
    for (const way of ["Sent", "Retrieved"]) {
      const name = `offload_${way.toLowerCase()}_bytes_total`;
      assert.is(sumOf(stdout, name), sum(`bytes${way}`), name);
    }
    const building = 'phase="building"';
    assert.is(sumOf(stdout, "offload_phase_seconds_count", building), 32);
    const seconds = rows.reduce(
      (sum, { sent, built, ended }) =>
        sum + Number(built ?? ended) - Number(sent),
      0,
    ) / 1000;
    const told = sumOf(stdout, "offload_phase_seconds_sum", building);
    assert.ok(Math.abs(told - seconds) < 0.01, `${told}, ${seconds}`);
    assert.is(sumOf(stdout, "offload_slots{".slice(0, -1)), 8);
    const text = () =>
      existsSync(root("head") + file)
        ? readFileSync(root("head") + file, "utf8")
        : "";
    await until("the file", () => `${counted(text())}` === "24,8");
    assertWellFormed(text());
    const open = inHost("head", ...offloadCommand(runtime, "metrics"));
    assert.match(open, /^# EOF$/m);
    useOffload("head", runtime);
  });

  test("status --watch shows what builds are at, and which ones wait", async () => {
    useMachines("head", ["w1"], oneSlot);
    const before = buildWork("--name=usual-1", "--seconds=1");
    assertOffloaded(...before, ["w1"]);
    const work = ["usual-1", "later-1"].map((name) =>
      makeWork("head", `--name=${name}`, "--seconds=600")[0]!
    );
    const clients = work.map((it) =>
      watch(start("head", ...buildCommand([it])))
    );
    await until("a build", () => builds("w1") === 1);
    const command = offloadCommand(runtime, "status", "--watch");
    const shown = onTerminal("head", command);
    const lines = watch(start("head", ...command, "--json"));
    const building = /^(usual|later)-1 +w1:22\/0 +building +\d+ s/m;
    const waiting = /^(usual|later)-1 +waits for a free slot +\d+ s/m;
    await until(
      "both",
      () => building.test(shown.text()) && waiting.test(shown.text()),
    );
    const last = () => JSON.parse(lines.text().match(/^\{.*\}$/gm)!.at(-1)!);
    await until("JSON", () =>
      /^\{/m.test(lines.text()) &&
      last().machines[0].builds[0]?.phase === "building" &&
      last().waiting.length === 1);
    const [{ builds: [it] }] = last().machines;
    assert.is(it.slot, 0);
    const isUsual = /-usual-1.drv$/.test(it.derivation);
    assert.ok(
      isUsual ? it.usual >= 0.9 : it.usual === undefined,
      `${it.usual}`,
    );
    shown.child.stdin!.write("\x03");
    lines.child.kill();
    run("head", "sh", "-c", "kill -INT $(pgrep -f 'guix build')");
    for (const { ended } of clients) await within("the client's end", ended);
    await until("its end", () => builds("w1") === 0);
    const after = () =>
      inHost("head", ...offloadCommand(runtime, "status", "--json"));
    await until("free slots", () => JSON.parse(after())[0].builds.length === 0);
  });

  test.run();
}

/** Why machines take nothing: what is seen of that, and kept. */

import { DatabaseSync } from "node:sqlite";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { acquireBuildSlot, machineId } from "../mod.ts";
import type { Context, Machine, Plugin, Slot } from "../mod.ts";
import { lookAtMachines } from "../plugins/_idle.ts";
import { journalOf, readJournal } from "../plugins/_journal.ts";
import { SharedObservations } from "../plugins/_observations.ts";
import { machine, makeContext, request } from "./context.ts";
import { HOSTILE } from "./day.ts";
import { ROOT, run, runtimes, until } from "./helpers.ts";

const test = suite("idle");

/** A context, its journal, and the file of both. */
function makeJournal(parts: Partial<Context> = {}) {
  const { context, warnings } = makeContext(parts);
  const file = `${context.stateDirectory}/observations.sqlite`;
  return { context, warnings, file, journal: journalOf(context)! };
}

/** Executes SQL on a database. */
function execute(file: string, sql: string) {
  const database = new DatabaseSync(file);
  const rows = database.prepare(sql).all();
  database.close();
  return rows;
}

/** Excludes a machine of that name. */
function excluding(name: string, why: string): Plugin {
  return {
    name: "excluding",
    exclude: (machine) =>
      machine.name === name ? { why, isBusy: false } : undefined,
  };
}

/** All absences, without what is not the same each time. */
function absences(context: Context) {
  const { absences } = readJournal(context, 0, Date.now() + 1e9);
  return absences.map(({ machine, problem }) => [machine, problem]);
}

/** What `lookAtMachines()` says of one, of which something was seen. */
async function lookAt(
  fields: Partial<Machine>,
  see: (machine: Machine, context: Context) => void = () => {},
  plugins: readonly Plugin[] = [],
) {
  const { context } = makeContext({ plugins });
  const it = machine({ name: "w1", ...fields });
  see(it, context);
  const reasons = await lookAtMachines([it], request(), context);
  return reasons.has("w1:22") ? reasons.get("w1:22") : "left out";
}

test("lookAtMachines() says why a machine takes nothing", async () => {
  const says = (facts: object) => (it: Machine, { observations }: Context) =>
    observations.saveFacts(machineId(it), { time: Date.now(), ...facts });
  assert.is(await lookAt({}), undefined, "nobody has asked it");
  assert.is(await lookAt({}, says({ load: 0, cores: 1 })), undefined);
  assert.is(await lookAt({}, says({ load: 9, cores: 1 })), "overloaded");
  const store = { bytes: 1000, inodes: 1e6 };
  assert.is(await lookAt({}, says({ store })), "low on disk space");
  const none = await lookAt({ parallelBuilds: 0 });
  assert.is(none, "its parallel-builds is 0");
  const why = "drained by '/x': disk 2\nof 3";
  const drained = await lookAt({}, undefined, [excluding("w1", why)]);
  assert.is(drained, "drained by '/x': disk 2 of 3");
  const vetoing = { name: "vetoing", score: () => -Infinity };
  const vetoed = await lookAt({}, says({}), [vetoing]);
  assert.is(vetoed, "vetoed by plugin 'vetoing'");
  const other = await lookAt({ systems: ["sparc"] }, says({}), [vetoing]);
  assert.is(other, undefined, "the build is not for it");
  let slot: Slot | undefined;
  const full = await lookAt({}, (it, { stateDirectory }) => {
    slot = acquireBuildSlot(it, stateDirectory);
  });
  assert.is(full, "all its slots are taken");
  slot!.release();
  const failed = await lookAt({}, (it, { observations, settings }) => {
    observations.saveFailure(it, "gone", settings);
  });
  assert.is(failed, "left out");
});

test("a machine that has just begun a build takes something", async () => {
  const use = ({ observations }: Context, time: number, stateFile: string) => {
    observations.useSlot("w1:22", { file: "/0", inode: "" }, "/x.drv");
    execute(stateFile, `UPDATE used SET time = ${time}`);
  };
  for (const [ago, why] of [[1000, undefined], [60_000, "off"]] as const) {
    const { context, file } = makeJournal({
      plugins: [excluding("w1", "off")],
    });
    use(context, Date.now() - ago, file);
    const reasons = await lookAtMachines(
      [machine({ name: "w1" })],
      request(),
      context,
    );
    assert.is(reasons.get("w1:22"), why);
  }
});

test("what lasts from look to look is one time, and ends when it is over", () => {
  const { context, journal, file } = makeJournal();
  const look = (why: string | undefined, before = 0) =>
    journal.saveReasons(
      new Map([["w1:22", why], ["w2:22", undefined]]),
      before,
    );
  const shift = (ms: number) =>
    execute(
      file,
      `UPDATE absence SET start = start - ${ms}, until = until - ${ms}`,
    );
  const ends = () =>
    readJournal(context, 0, Date.now() + 1e9).absences
      .map(({ until }) => Math.round((until - Date.now()) / 1000));
  const start = Date.now();
  look("drained");
  assert.equal(ends(), [30]);
  shift(15_000);
  look("drained", start - 15_000);
  assert.equal(ends(), [30], "it goes on");
  look(undefined, start);
  assert.equal(ends(), [0], "it is over");
  look("drained", Date.now());
  assert.equal(ends(), [0, 30], "it was over");
  look("overloaded", Date.now());
  assert.equal(absences(context).map(([, why]) => why), [
    ...["drained", "drained", "overloaded"],
  ]);
  assert.equal(ends(), [0, 0, 30]);
  shift(40_000);
  look("overloaded", Date.now() - 50_000);
  assert.equal(ends(), [-40, -40, -10, 30], "nobody has looked for long");
});

test("what a build has cut short goes on, if the next look sees it", () => {
  const { context, journal } = makeJournal();
  const before = Date.now() - 1;
  const look = () => journal.saveReasons(new Map([["w1:22", "off"]]), before);
  look();
  context.observations.saveBuild(machine({ name: "w1" }), "hello", 1, []);
  assert.ok(readJournal(context, 0, 9e14).absences[0]!.until <= Date.now());
  look();
  assert.is(absences(context).length, 1);
  assert.ok(readJournal(context, 0, 9e14).absences[0]!.until > Date.now());
});

test("that a machine is left alone is the reason while it is", () => {
  const { context, journal } = makeJournal();
  const { observations, settings } = context;
  const w1 = machine({ name: "w1" });
  journal.saveReasons(new Map([["w1:22", "off"]]), 0);
  observations.saveFailure(w1, "gone", settings);
  journal.saveReasons(new Map(), 0);
  const [off, gone] = readJournal(context, 0, Date.now() + 1e9).absences;
  assert.is(off!.problem, "off");
  assert.ok(off!.until <= gone!.from);
  assert.ok(gone!.until > Date.now() + 5000);
});

test("a look that sees nothing new writes nothing", () => {
  const { journal, file } = makeJournal();
  const reasons = new Map(
    Array.from({ length: 100 }, (_, index) => [
      `w${index}:22`,
      index % 2 === 0 ? "drained" : undefined,
    ]),
  );
  journal.saveReasons(reasons, 0);
  const database = new DatabaseSync(file);
  const version = () =>
    database.prepare("PRAGMA data_version").all()[0]!.data_version;
  const before = version();
  for (let count = 0; count < 10; count++) journal.saveReasons(reasons, 0);
  assert.is(version(), before);
  database.close();
});

test("of all processes one looks, and once in a while", async () => {
  const { context, journal } = makeJournal({
    plugins: [excluding("w1", "off")],
  });
  const { stateDirectory } = context;
  const kinds = ["node", "deno", "node", "deno"] as const;
  const results = await Promise.all(kinds.map((kind, index) => {
    const [runtime, ...options] = runtimes[kind];
    const script = `${ROOT}/test/fixtures/journal.ts`;
    const args = [stateDirectory, `w${index}`, "0", "w1"];
    return run(runtime, [...options, script, ...args]);
  }));
  results.forEach(({ stdout }) => assert.is(`${stdout}`, "done\n"));
  assert.equal(absences(context), [["w1:22", "its parallel-builds is 0"]]);
  journal.watch([machine({ name: "w1" })], request(), context); // has been looked at
  const others = new SharedObservations(stateDirectory, context.log);
  const before = others.journal.read(0, 9e14).absences;
  execute(`${stateDirectory}/observations.sqlite`, "UPDATE look SET time = 0");
  others.journal.watch([machine({ name: "w1" })], request(), context);
  await until("a look", () => absences(context).length === 2);
  assert.is(before.length, 1);
  assert.equal(absences(context)[1], ["w1:22", "off"]);
});

test("its bounds are kept, and hostile reasons do nothing", () => {
  const { context, journal, file } = makeJournal();
  HOSTILE.forEach((why, index) => {
    const odd = `${why}\0${"long ".repeat(10_000)}`;
    const reasons = new Map([[`w${index}:22`, odd]]);
    journal.saveReasons(reasons, Date.now());
    journal.saveReasons(reasons, 0);
  });
  const kept = absences(context);
  assert.is(kept.length, HOSTILE.length);
  for (const [, why] of kept) {
    assert.ok(why!.length <= 1000);
    assert.not.match(why!, /\p{Cc}/u);
  }
  execute(file, "UPDATE absence SET rowid = rowid + 100000");
  execute(
    file,
    "INSERT INTO absence (rowid, machine, start, until, problem) " +
      "VALUES (1, 'old:22', 1, 2, '')",
  );
  journal.saveReasons(new Map([["new:22", "off"]]), Date.now());
  assert.not.ok(absences(context).some(([name]) => name === "old:22"));
  assert.ok(absences(context).some(([name]) => name === "new:22"));
});

test("what is damaged is replaced, with a word", () => {
  for (
    const damage of [
      "INSERT INTO absence VALUES ('w1:22', 0, 9e14, x'ff')",
      "INSERT INTO absence VALUES (x'ff', 0, 9e14, '')",
      "DROP TABLE absence",
    ]
  ) {
    const { context, journal, file, warnings } = makeJournal();
    journal.saveReasons(new Map([["w1:22", "off"]]), 0);
    execute(file, damage);
    journal.saveReasons(new Map([["w1:22", "off"]]), 0);
    assert.is(warnings.length, 1, damage);
    assert.match(warnings[0]!, "replacing the damaged");
    assert.equal(absences(context), [["w1:22", "off"]]);
  }
});

test.run();

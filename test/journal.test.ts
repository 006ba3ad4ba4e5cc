/** The journal: what is kept of builds, and for how long. */

import { readdirSync } from "node:fs";
import { DatabaseSync } from "node:sqlite";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import type { Course } from "../mod.ts";
import { noteExpectation } from "../plugins/_expectation.ts";
import { journalOf, readJournal } from "../plugins/_journal.ts";
import { SharedObservations } from "../plugins/_observations.ts";
import { candidate, machine, makeContext } from "./context.ts";
import { ROOT, run, runtimes, until } from "./helpers.ts";
import { makeEntry } from "./journal.ts";

const test = suite("journal");

/** A context, its journal, and what other processes see of that. */
function makeJournal() {
  const { context, warnings } = makeContext();
  const { stateDirectory, log } = context;
  const others = new SharedObservations(stateDirectory, log);
  return {
    context,
    warnings,
    journal: journalOf(context)!,
    others: { observations: others },
    file: `${stateDirectory}/observations.sqlite`,
  };
}

/** Executes SQL on a database. */
function execute(file: string, sql: string): void {
  const database = new DatabaseSync(file);
  database.exec(sql);
  database.close();
}

/** Names that are odd, as derivations, machines and errors may be. */
const ODD = [
  "<b onload=alert(1)>&amp;",
  `'"; DROP TABLE journal; --`,
  "\x1b[2J\x07\r\nend",
  "ü".repeat(200),
];

test("what is noted of a build is read as it was", () => {
  const { context, journal, others } = makeJournal();
  const attempt = {
    ...{ machine: "w2:22", slot: 1, began: 1, ended: 2, problem: "gone" },
  };
  const builds = [
    makeEntry({ expected: 7.5 }),
    makeEntry({ earlier: [attempt, attempt], name: "again-1" }),
  ];
  const { built: _, retrieved: __, ...begun } = makeEntry();
  const failed = { ...begun, outcome: "failed", problem: "exit 1" } as const;
  builds.push(failed);
  builds.forEach((build) => journal.save(build, context.settings));
  const { entries, absences } = readJournal(others, 0);
  assert.equal(entries, builds);
  assert.equal(absences, []);
  const { ended } = failed;
  assert.equal(readJournal(others, ended + 9e5, ended + 1e6).entries, []);
});

test("odd names, and messages of any length, are kept as one line", () => {
  const { context, journal, others } = makeJournal();
  for (const odd of ODD) {
    const problem = `${odd}\0${"long ".repeat(10_000)}`;
    const attempt = { machine: odd, slot: 0, began: 1, ended: 2, problem };
    const build = makeEntry({
      ...{ name: odd, machine: odd, earlier: [attempt], problem },
      outcome: "lost",
    });
    const saved = journal.save(build, context.settings);
    const { entries } = readJournal(others, 0);
    assert.equal(entries.at(-1), saved);
    assert.is(saved.machine, odd);
    const [{ problem: first }] = saved.earlier as [typeof attempt];
    for (const message of [saved.problem!, first]) {
      assert.ok(message.length <= 1000);
      assert.not.match(message, /\p{Cc}/u);
    }
  }
});

test("it has bounds: builds, and days", () => {
  const { context, journal, others } = makeJournal();
  const settings = {
    ...context.settings,
    ...{ journalBuilds: 250, journalLifetime: 60 },
  };
  const now = Date.now();
  const save = (count: number, ended: number) => {
    for (let number = 0; number < count; number++) {
      journal.save(makeEntry({ ended }), settings);
    }
  };
  const ends = () =>
    readJournal(others, 0, now + 1e9).entries.map(({ ended }) => ended - now);
  save(1000, now);
  assert.is(ends().length, 250);
  save(200, now - 61_000);
  assert.equal(new Set(ends()), new Set([0]), "what is too old is gone");
  save(100, now + 60_000); // before the clock was set back
  assert.equal(new Set(ends()), new Set([0]), "what is too new is as well");
  assert.ok(ends().length <= 250);
});

test("what is damaged is replaced, with a word", () => {
  const damages = [
    "UPDATE journal SET outcome = 'perhaps'",
    "UPDATE journal SET connected = 'never'",
    "UPDATE journal SET asked = 9e15",
    "UPDATE journal SET derivation = x'00ff'",
    "UPDATE journal SET earlier = '[1]'",
    "UPDATE journal SET earlier = '[{}'",
    "UPDATE journal SET items = 'many'",
    "INSERT INTO absence VALUES ('w1:22', 0, 9e14, x'ff')",
    "DROP TABLE journal",
    `DROP TABLE absence; CREATE TABLE absence (machine, start, until, problem);
      INSERT INTO absence VALUES (NULL, 0, 9e14, '')`,
  ];
  for (const damage of damages) {
    const { context, journal, file, warnings } = makeJournal();
    journal.save(makeEntry(), context.settings);
    execute(file, `PRAGMA ignore_check_constraints = 1; ${damage}`);
    assert.equal(readJournal(context, 0, 1e15), { entries: [], absences: [] });
    assert.is(warnings.length, 1, damage);
    assert.match(warnings[0]!, "replacing the damaged");
    journal.save(makeEntry(), context.settings);
    assert.is(readJournal(context, 0).entries.length, 1);
  }
  for (const table of ["course", "waiting"] as const) {
    const { context, journal, file, warnings } = makeJournal();
    journal.save(makeEntry(), context.settings);
    const row = table === "course"
      ? "('0', 0, '{}')"
      : "('', 0, 'now', '', 0, '', '', '')";
    execute(file, `INSERT INTO ${table} VALUES ${row}`);
    if (table === "course") journal.courses();
    else {
      journal.saveWait("", "busy");
      journal.waiting();
      journal.save(makeEntry({ derivation: "" }), context.settings);
    }
    assert.is(warnings.length, table === "course" ? 1 : 0, table);
  }
});

test("the most urgent of the builds that wait are told, who waits gains", () => {
  const { context, journal, file } = makeJournal();
  const urgent = () => journal.urgent().map(({ derivation }) => derivation);
  const order = { rank: 5, system: "x86_64-linux", features: ["kvm", "a"] };
  journal.saveWait("/a.drv", "busy", order);
  journal.saveWait("/b.drv", "it is patient", { rank: 7, machine: "w1:22" });
  journal.saveWait("/c.drv", "busy"); // nobody has said how urgent it is
  assert.equal(urgent(), ["/b.drv", "/a.drv"]);
  const [b, a] = journal.urgent();
  assert.is(b!.machine, "w1:22");
  assert.equal([a!.rank, a!.system, a!.features, a!.machine], [
    ...[5, "x86_64-linux", ["kvm", "a"], undefined],
  ]);
  const since = Date.now() - 30_000;
  execute(
    file,
    `UPDATE waiting SET since = ${since} WHERE derivation = '/a.drv'`,
  );
  assert.equal(urgent(), ["/a.drv", "/b.drv"]);
  assert.is(Math.round(journal.waited("/a.drv")), 30);
  assert.is(journal.waited("/d.drv"), 0);
  // It has a slot, and is built.
  const slot = { file: "/w1:22/0", inode: "1" };
  context.observations.useSlot("w1:22", slot, "/a.drv");
  assert.equal(urgent(), ["/b.drv"]);
  execute(file, `UPDATE waiting SET seen = ${Date.now() - 16_000}`);
  assert.equal(urgent(), []);
});

test("the pace is that of the last minute", () => {
  const { context, journal } = makeJournal();
  assert.is(journal.pace(), 0);
  const now = Date.now();
  for (const ago of [1, 10, 59, 70]) {
    const ended = now - ago * 1000;
    journal.save(makeEntry({ ended }), context.settings);
  }
  assert.is(journal.pace(), 3 / 60);
});

test("processes that note builds at once lose none", async () => {
  const { context: { stateDirectory }, others, warnings } = makeJournal();
  const kinds = ["node", "deno", "node", "deno"] as const;
  const prefixes = kinds.map((kind, index) => `${kind}${index}`);
  const results = await Promise.all(kinds.map((kind, index) => {
    const [runtime, ...options] = runtimes[kind];
    const script = `${ROOT}/test/fixtures/journal.ts`;
    const args = [stateDirectory, prefixes[index]!, "150"];
    return run(runtime, [...options, script, ...args]);
  }));
  results.forEach(({ stdout }) => assert.is(`${stdout}`, "done\n"));
  const { entries } = readJournal(others, 0);
  assert.is(new Set(entries.map(({ name }) => name)).size, 600);
  assert.equal(warnings, []);
  const files = readdirSync(stateDirectory);
  assert.equal(files, ["observations.sqlite"]);
});

test("a build is asked for when it was for the first time", () => {
  const { context: { settings }, journal, others, file } = makeJournal();
  const build = makeEntry();
  const { derivation, asked } = build;
  const saved = () => readJournal(others, 0).entries.at(-1)!.asked;
  journal.saveWait(derivation, "busy");
  const earlier = asked - 20_000;
  const seen = `UPDATE waiting SET since = ${earlier}, seen = `;
  execute(file, seen + (asked - 5000));
  journal.saveWait("/other.drv", "unreachable");
  journal.save(build, settings);
  assert.is(saved(), earlier);
  const [other, ...more] = journal.waiting();
  assert.equal(more, []);
  assert.is(other!.derivation, "/other.drv");
  journal.save(build, settings);
  assert.is(saved(), asked, "it waits no more");
  journal.saveWait(derivation, "busy");
  execute(file, seen + (asked - 3_600_000));
  assert.equal(journal.waiting().map((it) => it.derivation), []);
  journal.save(build, settings);
  assert.is(saved(), asked, "that was another time");
});

test("a build whose hook was killed is kept, as far as that has told", () => {
  const { context, journal, others, file } = makeJournal();
  const { settings } = context;
  const entries = () => readJournal(others, 0).entries;
  const now = Date.now();
  const path = (name: string) => `/gnu/store/${"0".repeat(32)}-${name}.drv`;
  const derivation = path("one");
  const use = { file: "/x/w1:22/3", derivation, inode: "", time: now - 5000 };
  journal.saveKilled(use, settings);
  const times = { asked: use.time, accepted: use.time, began: use.time };
  const killed = { outcome: "interrupted", problem: "its hook was killed" };
  const [silent, ...none] = entries();
  assert.equal(none, []);
  assert.equal(silent, {
    ...{ derivation, name: "one", machine: "w1:22", slot: 3, earlier: [] },
    ...{ ...times, ended: use.time, ...killed },
  });
  journal.saveKilled(use, settings);
  assert.is(entries().length, 1, "it is noted already");
  // Another one, which has told something, and waits once more.
  const course = { machine: "w1:22", slot: 3, began: now - 4000, moved: 7 };
  const told = { ...course, connected: now - 3000, total: 9 };
  execute(
    file,
    `INSERT INTO course VALUES
    ('${use.file}', ${now - 1000}, '${JSON.stringify(told)}')`,
  );
  const other = { ...use, derivation: path("two") };
  journal.saveWait(other.derivation, "busy");
  journal.saveKilled(other, settings);
  const [, second] = entries();
  assert.is(second!.name, "two");
  assert.equal(
    [second!.asked, second!.began, second!.connected, second!.ended],
    [now - 4000, now - 4000, now - 3000, now - 1000],
  );
  assert.is(second!.sent, undefined);
  assert.is(journal.waiting().length, 1, "that is of the next try");
  assert.is(journal.courses().size, 0);
  const counted = journal.counts().find(({ name }) => name === "builds")!;
  assert.equal([counted.label, counted.value], ["interrupted", 2]);
});

test("who waits since when is told as long as it is heard of", () => {
  const { journal, file } = makeJournal();
  const now = Date.now();
  journal.saveWait("/a.drv", "busy");
  execute(file, `UPDATE waiting SET since = ${now - 50_000}`);
  journal.saveWait("/b.drv", "busy");
  journal.saveWait("/a.drv", "unreachable");
  assert.equal(
    journal.waiting().map(({ derivation, why }) => [derivation, why]),
    [["/a.drv", "unreachable"], ["/b.drv", "busy"]],
  );
  assert.is(journal.waiting()[0]!.since, now - 50_000);
  execute(file, `UPDATE waiting SET seen = ${now - 20_000}`);
  assert.equal(journal.waiting(), []);
});

test("builds that are under way tell how far they are, and nothing at once", async () => {
  const { journal, others: { observations } } = makeJournal();
  const course: Course = { machine: "w1:22", slot: 2, began: 1, moved: 0 };
  const end = journal.follow({ file: "/2" }, course);
  const told = () => {
    const { time, ...course } = observations.journal.courses().get("/2") ?? {};
    assert.ok(time === undefined || Math.abs(Date.now() - time) < 60_000);
    return time && course;
  };
  assert.is(told(), undefined);
  await until("it is told", () => told() !== undefined);
  assert.equal(told(), course);
  Object.assign(course, { connected: 2, moved: 5, total: 10 });
  await until("it is told again", () => (told() as Course).moved === 5);
  assert.equal(told(), course);
  end();
  assert.is(told(), undefined);
});

test("a build tells how long it was expected to take where it has a slot", () => {
  const { journal } = makeJournal();
  const course: Course = { machine: "w1:22", slot: 2, began: 1, moved: 0 };
  const at = candidate();
  journal.follow({ file: "/2" }, course, at)();
  assert.is(course.expected, undefined, "nothing was");
  const expectation = { wait: 100, transfer: 2, build: 30, total: 132 };
  noteExpectation(at, expectation);
  journal.follow({ file: "/2" }, course, at)();
  assert.is(course.expected, 32, "what runs there takes another slot");
});

test("it has when machines were left alone", () => {
  const { context, others } = makeJournal();
  const { observations, settings } = context;
  const [w1, w2] = ["w1", "w2"].map((name) => machine({ name }));
  const absences = () => readJournal(others, 0, Date.now() + 1e6).absences;
  observations.saveFailure(w1!, "it is gone\n", settings);
  observations.saveFailure(w1!, "part of the same", settings);
  observations.saveFailure(w2!, "no answer yet", settings);
  const [first, second, ...more] = absences();
  assert.equal(more, []);
  assert.is(first!.machine, "w1:22");
  assert.is(first!.problem, "it is gone");
  assert.is(first!.until - first!.from >= 9000, true);
  observations.saveBuild(machine({ name: "w1" }), "hello", 1, []);
  observations.saveFacts("w2:22", { time: Date.now() });
  assert.ok(absences()[0]!.until <= Date.now(), "a build did well there");
  assert.ok(absences()[1]!.until <= Date.now(), "its answer came late");
  assert.is(second!.machine, "w2:22");
  const later = Date.now() + 1;
  assert.equal(readJournal(others, later, later).absences, []);
});

test.run();

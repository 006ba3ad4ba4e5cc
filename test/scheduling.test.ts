/** Scheduling, as far as it needs no machine: facts, observations, choice. */

import {
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname } from "node:path";
import { execFileSync } from "node:child_process";
import { randomUUID } from "node:crypto";
import { DatabaseSync } from "node:sqlite";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  acquireBuildSlot,
  chooseBuildMachine,
  normalizedLoad,
} from "../mod.ts";
import type { Context, Machine, Plugin } from "../mod.ts";
import { SharedObservations } from "../plugins/_observations.ts";
import { machine, makeContext, request } from "./context.ts";
import { processorTime, until } from "./helpers.ts";
import { parseFacts } from "../plugins/_remote.ts";
import { readDerivation } from "../plugins/explain.ts";

const test = suite("scheduling");
const MEBIBYTE = 2 ** 20;

const guix: Plugin = {
  name: "by-speed",
  score: ({ machine }) => machine.speed,
};

/** Notes facts of a machine as if it had just said them. */
function know(context: Context, { name, port }: Machine, facts = {}): void {
  context.observations.saveFacts(`${name}:${port}`, {
    time: Date.now(),
    load: 0,
    cores: 4,
    store: { bytes: 1024 * MEBIBYTE, inodes: 1000 },
    ...facts,
  });
}

/** Chooses among machines that said this of themselves. */
async function choose(
  machines: readonly Machine[],
  facts: Readonly<Record<string, object>> = {},
  parts: Partial<Context> = {},
) {
  const { context } = makeContext({ plugins: [guix], ...parts });
  for (const each of machines) know(context, each, facts[each.name]);
  const choice = await chooseBuildMachine(machines, request(), context);
  if (typeof choice === "string") return choice;
  choice.slot.release();
  return choice.prospect.machine.name;
}

test("parseFacts() reads what the probe prints", () => {
  const time = 1_700_000_000_000;
  const facts = parseFacts(
    [
      "uname Linux w1 6.1.0 x86_64",
      "cores 8",
      "load 2.00 1.00 0.50 1/234 5678",
      "memory MemAvailable:    2048 kB",
      "cpu-stall some avg10=12.50 avg60=1.00 avg300=0.10 total=1",
      "io-stall some avg10=0.00 avg60=0.00 avg300=0.00 total=1",
      "memory-stall some avg10=1.25 avg60=0.00 avg300=0.00 total=1",
      "store-bytes /dev/vda1 1000 400 600 40% /",
      "store-inodes /dev/vda1 100 40 60 40% /",
      "clock 1700000002.500000000",
    ].join("\n"),
    time,
    1.5,
  );
  assert.is(facts.load, 2);
  assert.is(facts.cores, 8);
  assert.is(normalizedLoad(facts), 0.25);
  assert.is(facts.memory, 2048 * 1024);
  assert.equal(facts.store, { bytes: 600 * 1024, inodes: 60 });
  assert.is(facts.build, undefined);
  assert.equal(facts.pressure, { cpu: 12.5, io: 0, memory: 1.25 });
  assert.is(facts.clock, 2.5);
  assert.is(facts.uname, "Linux w1 6.1.0 x86_64");
});

test("parseFacts() takes no clock for late whose answer was", () => {
  const clockAt = (took: number) =>
    parseFacts("clock 1699999998", 1_700_000_000_000, 1, took).clock;
  assert.equal([0, 500, 2000, 9000].map(clockAt), [-2, -1.5, 0, 0]);
});

test("parseFacts() leaves out what was not said", () => {
  const said = "This account is not available.\nmemory-stall\n";
  const facts = parseFacts(said, 1, 1);
  assert.is(facts.pressure, undefined);
  assert.is(facts.load, undefined);
  assert.is(facts.store, undefined);
  assert.is(normalizedLoad(facts), undefined);
});

test("normalizedLoad() is 1 at most", () => {
  assert.is(normalizedLoad({ time: 0, load: 9, cores: 2 }), 1);
});

test("readDerivation() finds system, features, preference", () => {
  const text = 'Derive([("out","/gnu/store/x-a(b)","","")],[],' +
    '["/gnu/store/y"],"aarch64-linux","/bin/sh",["-c","echo \\"(hi)\\"\\n"],' +
    '[("out","/gnu/store/x"),("requiredSystemFeatures","kvm big")])';
  const read = { system: "aarch64-linux", features: ["kvm", "big"] };
  assert.equal(readDerivation(text), { ...read, prefersLocal: false });
  for (const value of ["1", "0", "true", ""]) {
    const prefers = `("preferLocalBuild","${value}"),("required`;
    const { prefersLocal } = readDerivation(
      text.replace('("required', prefers),
    );
    assert.is(prefersLocal, value === "1");
  }
});

test("parseFacts() knows file systems without a number of inodes", () => {
  const text = "store-bytes /dev/vda1 9 1 8 1% /\n" +
    "store-inodes /dev/vda1 0 0 0 - /\n";
  const facts = parseFacts(text, 0, 0);
  assert.is(facts.store?.inodes, Infinity);
  const { context: { observations } } = makeContext({ plugins: [guix] });
  observations.saveFacts("some:22", facts);
  const record = observations.machines("some:22").get("some:22");
  assert.is(record?.facts?.store?.inodes, Infinity);
});

test("chooseBuildMachine() takes the one with the highest score", async () => {
  const machines = ["a", "b", "c"].map((name, speed) =>
    machine({ name, speed: speed + 1 })
  );
  assert.is(await choose(machines), "c");
});

test("chooseBuildMachine() minds load and disk space", async () => {
  const machines = [
    machine({ name: "loaded", speed: 4 }),
    machine({ name: "full", speed: 3 }),
    machine({ name: "good", speed: 1 }),
  ];
  const facts = {
    loaded: { load: 3.2 }, // of 4 cores: 0.8, the threshold
    full: { store: { bytes: 100 * MEBIBYTE - 1, inodes: 9 } },
  };
  assert.is(await choose(machines, facts), "good");
  assert.is(await choose(machines.slice(0, 2), facts), "busy");
  const heedless = machine({ ...machines[0], overloadThreshold: false });
  assert.is(await choose([heedless], facts), "loaded");
  const lower = { loaded: { load: 3.19 } };
  assert.is(await choose([machines[0]!], lower), "loaded");
});

test("chooseBuildMachine() obeys a veto", async () => {
  const veto: Plugin = {
    name: "veto",
    score: ({ machine }) => machine.name === "b" ? -Infinity : undefined,
  };
  const machines = [machine({ name: "a" }), machine({ name: "b", speed: 9 })];
  assert.is(await choose(machines, {}, { plugins: [veto, guix] }), "a");
});

test("chooseBuildMachine() goes on to the next with a free slot", async () => {
  const { context } = makeContext({ plugins: [guix] });
  const fast = machine({ name: "fast", speed: 2 });
  const machines = [fast, machine({ name: "slow" })];
  for (const each of machines) know(context, each);
  const held = acquireBuildSlot(fast, context.stateDirectory)!;
  const choice = await chooseBuildMachine(machines, request(), context);
  assert.is.not(typeof choice, "string");
  if (typeof choice !== "string") {
    assert.is(choice.prospect.machine.name, "slow");
    choice.slot.release();
  }
  held.release();
});

test("chooseBuildMachine() takes a slot in memory where there is no other", async () => {
  const file = `${makeContext().context.stateDirectory}/file`;
  writeFileSync(file, ""); // where a directory must be
  const { context, warnings } = makeContext({
    ...{ plugins: [guix], stateDirectory: file },
  });
  // All of this account have the same memory.
  const broken = machine({ name: randomUUID(), parallelBuilds: 1 });
  know(context, broken);
  const choose = () => chooseBuildMachine([broken], request(), context);
  const choice = await choose();
  if (typeof choice === "string") throw new Error(choice);
  assert.match(warnings.splice(0).join(), "failed to lock a build slot");
  assert.is(await choose(), "busy");
  choice.slot.release();
  rmSync(dirname(choice.slot.file), { recursive: true });
});

test("chooseBuildMachine() waits for a slot, once in vain", async () => {
  const { context } = makeContext({ plugins: [guix] });
  const settings = { ...context.settings, decisionTimeout: 2 };
  const patient = { ...context, settings };
  const only = machine({ name: "only" });
  know(context, only);
  const held = acquireBuildSlot(only, context.stateDirectory)!;
  const timed = async () => {
    const start = performance.now();
    const choice = await chooseBuildMachine([only], request(), patient);
    return [choice, performance.now() - start] as const;
  };
  const [first, waited] = await timed();
  assert.is(first, "busy");
  assert.ok(waited >= 1990, `${waited} ms`); // timers may be a bit early
  const [second, atOnce] = await timed();
  assert.is(second, "busy");
  assert.ok(atOnce < waited / 2, `${atOnce} ms`);
  context.observations.releaseSlot(held.file, request().derivation);
  setTimeout(() => held.release(), 100);
  const [third] = await timed();
  assert.is.not(typeof third, "string");
  if (typeof third !== "string") third.slot.release();
});

test("chooseBuildMachine() leaves alone what failed", async () => {
  const { context } = makeContext({ plugins: [guix] });
  const machines = [machine({ name: "a", speed: 2 }), machine({ name: "b" })];
  for (const each of machines) know(context, each);
  const { observations, settings } = context;
  observations.saveFailure(machines[0]!, "it is gone", settings);
  const choice = await chooseBuildMachine(machines, request(), context);
  assert.is(typeof choice === "string" || choice.prospect.machine.name, "b");
  observations.saveFailure(machines[1]!, "this too", settings);
  assert.is(
    await chooseBuildMachine(machines, request(), context),
    "unreachable",
  );
});

test("chooseBuildMachine() takes no longer a machine in a large farm", async () => {
  /** Milliseconds of processor time that a choice takes, the best of five. */
  const timeChoice = async (count: number) => {
    const { context } = makeContext({ plugins: [guix] });
    const machines = [...Array(count).keys()].map((i) =>
      machine({ name: `m${i}`, speed: i % 10, parallelBuilds: 4 })
    );
    for (const each of machines) know(context, each);
    let best = Infinity;
    for (let i = 0; i < 5; i++) {
      const start = processorTime();
      const choice = await chooseBuildMachine(machines, request(), context);
      best = Math.min(best, processorTime() - start);
      assert.is(typeof choice === "string" || choice.prospect.machine.speed, 9);
      if (typeof choice !== "string") choice.slot.release();
    }
    return best;
  };
  const hundred = await timeChoice(100);
  const thousand = await timeChoice(1000);
  // It would take 100 times as long to look at each machine for each machine.
  assert.ok(thousand < 50 * hundred, `${hundred} ms, ${thousand} ms`);
});

test("Observations double the time for which a machine is left alone", async () => {
  const { context } = makeContext();
  const settings = { ...context.settings, backoff: 0.001, backoffLimit: 0.003 };
  const { observations } = context;
  const each = machine();
  const left = () => {
    const record = observations.machines().get("machine:22")!;
    return [record.failures, record.until - Date.now()] as const;
  };
  for (let failures = 1; failures <= 3; failures++) {
    observations.saveFailure(each, "gone", settings);
    const [count, remaining] = left();
    assert.is(count, failures);
    assert.ok(remaining <= 3);
    await until("it is over", () => left()[1] < 0);
  }
  const long = { ...settings, backoff: 100, backoffLimit: 100 };
  observations.saveFailure(each, "gone", long);
  observations.saveFailure(each, "gone", long); // part of the same failure
  assert.is(left()[0], 4);
  observations.saveBuild(machine({ name: "machine" }), "hello", 1, []);
  assert.equal(left()[0], 0);
  assert.ok(left()[1] <= 0);
});

test("Observations of before the clock was set back are void", async () => {
  const { context } = makeContext({ plugins: [guix] });
  const { observations, settings } = context;
  const only = machine({ name: "a" });
  const hour = { ...settings, backoff: 3600, backoffLimit: 3600 };
  observations.saveFailure(only, "of the future", hour);
  know(context, only);
  const choice = await chooseBuildMachine([only], request(), context);
  assert.is.not(typeof choice, "string");
  if (typeof choice !== "string") choice.slot.release();
  observations.saveFailure(only, "of the present", settings);
  const record = observations.machines().get("a:22")!;
  assert.is(record.problem, "of the present");
  assert.ok(record.until <= Date.now() + 1000 * settings.backoffLimit);
});

test("Observations forget a failure of other fields", async () => {
  const { context } = makeContext({ plugins: [guix] });
  const wrong = machine({ name: "a", user: "nobody" });
  const right = machine({ name: "a" });
  context.observations.saveFailure(wrong, "no such user", context.settings);
  know(context, right);
  const choice = await chooseBuildMachine([right], request(), context);
  assert.is.not(choice, "unreachable");
});

test("Observations remember builds and what machines hold", () => {
  const { observations } = makeContext().context;
  observations.saveBuild(machine({ name: "a" }), "hello-2.12", 3, [
    "/gnu/store/x",
  ]);
  observations.saveBuild(machine({ name: "b" }), "hello-2.12", 5, [
    "/gnu/store/y",
  ]);
  assert.equal(
    observations.history("hello-2.12").map((build) => ({ ...build })),
    [{ machine: "b:22", seconds: 5, speed: 0.6 ** 0.2 }, {
      ...{ machine: "a:22", seconds: 3, speed: 1 },
    }],
  );
  const paths = ["/gnu/store/x", "/gnu/store/z"];
  assert.equal(observations.held("a:22", paths), ["/gnu/store/x"]);
  assert.equal(observations.held("b:22", paths), []);
});

test("Observations keep so many rows and no more, the latest", () => {
  const { observations, stateDirectory } = makeContext().context;
  observations.saveBuild(machine({ name: "a" }), "first", 1, [
    "/gnu/store/first",
  ]);
  const database = new DatabaseSync(`${stateDirectory}/observations.sqlite`);
  const rows = (table: string) =>
    database.prepare(`SELECT count(*) AS rows FROM ${table}`).get()!.rows;
  const numbers = (last: number) =>
    `WITH RECURSIVE number(n) AS
       (VALUES (2) UNION ALL SELECT n + 1 FROM number WHERE n < ${last})`;
  database.exec(`BEGIN;
      ${
    numbers(199_999)
  } INSERT INTO build SELECT n, 'a:22', 1, 1, 0 FROM number;
      INSERT INTO own SELECT name, 1, 0 FROM build;
      INSERT INTO used SELECT name, 0 FROM build;
      INSERT INTO machine (id) SELECT name FROM build;
      COMMIT`);
  observations.saveBuild(machine({ name: "a" }), "last", 1, []);
  assert.is(rows("build"), 100_000);
  for (const table of ["own", "used", "machine"]) assert.is(rows(table), 0);
});

test("Observations know what machines held of late, of so many items", () => {
  const { observations, stateDirectory } = makeContext().context;
  const item = (number: number) =>
    `/gnu/store/${number.toString(36).padStart(9, "0").padEnd(32, "0")}-item`;
  const items = (build: number) =>
    Array.from({ length: 100_000 }, (_, it) => item(build * 100_000 + it));
  const note = (...builds: readonly number[]) => {
    for (const build of builds) {
      observations.saveBuild(machine({ name: "a" }), "some", 1, items(build));
    }
  };
  const asked = [0, 250_000, 599_999].map(item);
  const held = () => observations.held("a:22", asked);
  note(0, 1, 2);
  assert.equal(held(), asked.slice(0, 2));
  note(2, 2, 3); // what is used goes on to be known, and counts once
  assert.equal(held(), asked.slice(0, 2));
  note(4, 5);
  assert.equal(held(), asked.slice(1));
  const database = new DatabaseSync(`${stateDirectory}/observations.sqlite`);
  database.exec("UPDATE noted SET since = 1e14"); // a clock that stepped back
  observations.saveBuild(machine({ name: "a" }), "some", 1, [item(1_000_000)]);
  const [noted] = database.prepare("SELECT * FROM noted").all();
  assert.ok(Number(noted!.since) <= Date.now());
  assert.equal(held(), asked.slice(2));
  database.close();
});

test("Observations are claimed by one process at a time", () => {
  const { context } = makeContext();
  const { observations, log, stateDirectory } = context;
  const other = new SharedObservations(stateDirectory, log);
  assert.ok(observations.claim("a:22", 60));
  assert.not(other.claim("a:22", 60));
  assert.ok(other.claim("a:22", 0 - 1), "one that took too long is void");
  know(context, machine({ name: "a" }));
  assert.ok(other.claim("a:22", 60), "once it is answered");
});

test("Observations survive a database that is none", () => {
  const directory = mkdtempSync(`${tmpdir()}/offload-`);
  writeFileSync(`${directory}/observations.sqlite`, "garbage ".repeat(1000));
  const { context } = makeContext();
  const observations = new SharedObservations(directory, context.log);
  observations.saveBuild(machine({ name: "a" }), "hello", 3, []);
  assert.is(observations.history("hello").length, 1);
  rmSync(directory, { recursive: true });
});

/** Ways to damage a database while it is open, and after. */
const DAMAGE: Readonly<Record<string, (file: string) => void>> = {
  "pages behind the first": (file) => {
    const text = readFileSync(file);
    writeFileSync(file, text.fill("garbage ", 4096), { flag: "r+" });
  },
  "its end is cut off": (file) => truncateSync(file, 5000),
  "all is cut off": (file) => truncateSync(file, 0),
  "it is something else": (file) => writeFileSync(file, "garbage".repeat(999)),
  "a value is cut": (file) => execute(file, "UPDATE machine SET facts = '{'"),
  "a table is gone": (file) => execute(file, "DROP TABLE machine"),
  "facts are of another kind": (file) =>
    execute(file, `UPDATE machine SET facts = '{"uname": [], "store": 1}'`),
  "facts are none": (file) => execute(file, "UPDATE machine SET facts = '7'"),
  "a time is none": (file) => execute(file, "UPDATE machine SET until = 1e300"),
  "a number is a text": (file) =>
    execute(file, "UPDATE machine SET failures = 'often'"),
  "a view stands in for a table": (file) =>
    execute(
      file,
      `ALTER TABLE machine RENAME TO other;
       CREATE VIEW machine AS SELECT * FROM other`,
    ),
  "something is to be run": (file) =>
    execute(
      file,
      `CREATE TRIGGER more AFTER UPDATE ON machine
       BEGIN INSERT INTO build VALUES ('x', 'x', 1, 1, 1); END`,
    ),
  "it is removed": (file) => rmSync(file),
  "its directory is removed": (file) => rmSync(dirname(file), REMOVE),
};

const REMOVE = { recursive: true, force: true } as const;

function execute(file: string, sql: string): void {
  const database = new DatabaseSync(file);
  database.exec(sql);
  database.close();
}

for (const [what, damage] of Object.entries(DAMAGE)) {
  test(`Observations heal where ${what}`, () => {
    const { context, warnings } = makeContext();
    const { observations, log, stateDirectory, settings } = context;
    const file = `${stateDirectory}/observations.sqlite`;
    const other = new SharedObservations(stateDirectory, log);
    for (const it of [observations, other]) {
      it.saveFailure(machine({ name: "a" }), "gone", settings);
    }
    know(context, machine({ name: "a" }));
    damage(file);
    // What was open may have parts of it in memory.
    for (
      const it of [observations, new SharedObservations(stateDirectory, log)]
    ) {
      it.machines();
      it.machines("a:22");
    }
    assert.ok(observations.claim("a:22", 60), "unknown means: ask");
    // All of them see the new one, and it is sound.
    assert.not(other.claim("a:22", 60));
    know(context, machine({ name: "b" }));
    assert.ok(other.machines().get("b:22")?.facts);
    observations.saveBuild(machine({ name: "b" }), "hello", 3, [
      "/gnu/store/x",
    ]);
    assert.equal(other.held("b:22", ["/gnu/store/x"]), ["/gnu/store/x"]);
    const told = /^replacing the damaged '.*\/observations.sqlite': ./;
    const isSaid = !/removed/.test(what);
    assert.is(warnings.length, isSaid ? 1 : 0, warnings.join("\n"));
    if (isSaid) assert.match(warnings[0]!, told);
  });
}

test("Observations are replaced once, not by all who find them damaged", () => {
  const { context, warnings } = makeContext();
  const { log, stateDirectory } = context;
  const all = Array.from(
    { length: 5 },
    () => new SharedObservations(stateDirectory, log),
  );
  all.forEach((it, index) =>
    it.saveBuild(machine({ name: "a" }), `b${index}`, 1, [])
  );
  DAMAGE["it is something else"]!(`${stateDirectory}/observations.sqlite`);
  all.forEach((it, index) =>
    it.saveBuild(machine({ name: "a" }), `c${index}`, 1, [])
  );
  for (const it of all) {
    all.forEach((_, index) => assert.is(it.history(`c${index}`).length, 1));
  }
  assert.is(warnings.length, 1, warnings.join("\n"));
});

test("Observations of slots that are of another kind are damage", () => {
  const { context, warnings } = makeContext();
  const { observations, stateDirectory } = context;
  const file = `${stateDirectory}/observations.sqlite`;
  for (
    const [index, values] of [
      "x'01', '/x.drv', 0, ''",
      "'/0', '/x.drv', 1e300, ''",
    ]
      .entries()
  ) {
    observations.slots();
    execute(file, `INSERT INTO slot VALUES (${values})`);
    const another = new SharedObservations(stateDirectory, context.log);
    assert.equal(another.slots(), []);
    assert.is(warnings.length, index + 1);
  }
});

test("Observations keep in mind whose slots are while the file is locked", async () => {
  const { context: { observations, stateDirectory, log } } = makeContext();
  const slots = () => new SharedObservations(stateDirectory, log).slots();
  const slot = { file: `${stateDirectory}/0`, inode: "1:2" };
  observations.useSlot("a:22", { ...slot, file: "/gone" }, "/gone.drv");
  const locked = new DatabaseSync(`${stateDirectory}/observations.sqlite`);
  locked.exec("BEGIN EXCLUSIVE");
  observations.useSlot("a:22", slot, "/a.drv");
  observations.releaseSlot("/gone", "/gone.drv");
  assert.is(observations.slots().length, 1, "it is in memory");
  locked.close();
  assert.equal(slots().map(({ file }) => file), ["/gone"]);
  await until("they are written", () => {
    observations.slots();
    return slots().length === 1 && slots()[0]!.file === slot.file;
  });
});

test("a machine that several builds speak against comes last", async () => {
  const machines = [machine({ name: "a", speed: 9 }), machine({ name: "b" })];
  const { context } = makeContext({ plugins: [guix] });
  const { observations, stateDirectory } = context;
  const choose = async () => {
    machines.forEach((it) => know(context, it));
    const choice = await chooseBuildMachine(machines, request(), context);
    if (typeof choice === "string") return choice;
    choice.slot.release();
    return choice.prospect.machine.name;
  };
  observations.saveDoubt("a:22", "/x.drv");
  observations.saveDoubt("a:22", "/x.drv");
  assert.is(await choose(), "a", "one build is not enough");
  observations.saveDoubt("a:22", "/y.drv");
  assert.is(await choose(), "b");
  const slot = acquireBuildSlot(machines[1]!, stateDirectory)!;
  assert.is(await choose(), "a", "there is no other");
  slot.release();
  observations.saveBuild(machine({ name: "a" }), "hello", 1, []);
  assert.is(await choose(), "a");
});

test("Observations remove what is in the way", () => {
  const { context: { observations, stateDirectory, log }, warnings } =
    makeContext();
  const file = `${stateDirectory}/observations.sqlite`;
  for (
    const make of [
      () => execFileSync("mkfifo", [file]),
      () => mkdirSync(`${file}/more`, { recursive: true }),
    ]
  ) {
    observations.saveBuild(machine({ name: "a" }), "hello", 3, []);
    rmSync(file);
    make();
    observations.saveBuild(machine({ name: "a" }), "hello", 3, []);
    const another = new SharedObservations(stateDirectory, log);
    assert.is(another.history("hello").length, 1);
  }
  assert.equal(warnings, []);
});

test("Observations are in memory where the file is locked", () => {
  const { context, warnings } = makeContext();
  const { observations, stateDirectory } = context;
  know(context, machine({ name: "a" }));
  const file = `${stateDirectory}/observations.sqlite`;
  const locked = new DatabaseSync(file);
  locked.exec("BEGIN EXCLUSIVE");
  assert.ok(observations.claim("a:22", 60), "it can't be asked");
  observations.saveBuild(machine({ name: "a" }), "hello", 3, []);
  assert.is(observations.history("hello").length, 1);
  assert.equal(warnings, []);
  locked.close();
});

test.run();

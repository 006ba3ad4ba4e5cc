/** `offload report`: figures, tables, the page and trace events. */

import { mkdirSync, readFileSync } from "node:fs";
import { performance } from "node:perf_hooks";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import type { Absence } from "../plugins/_absences.ts";
import { median } from "../plugins/_expectation.ts";
import type { JournalEntry } from "../plugins/_journal.ts";
import { SharedObservations } from "../plugins/_observations.ts";
import { phaseSeconds, phaseTimes } from "../plugins/_phases.ts";
import { capacities, countFigures } from "../plugins/_report_figures.ts";
import { makePage, pageData } from "../plugins/_report_page.ts";
import { makeTrace } from "../plugins/_report_trace.ts";
import { formatJson } from "../plugins/_screen.ts";
import { formatReport, parseTime, reportToJson } from "../plugins/report.ts";
import { makeContext } from "./context.ts";
import { at, HOSTILE, makeDay, MORNING, morningBuild, screen } from "./day.ts";
import { ownRuntime, ROOT, run, settled, throws } from "./helpers.ts";
import { conforms } from "./schema.ts";

const test = suite("report");

const SECOND = 1000;
const HOUR = 3600 * SECOND;
const SPAN = { since: MORNING, until: MORNING + HOUR };

// ---------------------------------------------------------------------------
// Figures
// ---------------------------------------------------------------------------

/** A build that w1 has failed once, at 10 to 20 s, and w2 has built. */
const RETRIED = morningBuild({
  name: "twice-1",
  machine: "w2:22",
  slot: 1,
  earlier: [{
    machine: "w1:22",
    slot: 0,
    began: at(10),
    ended: at(20),
    problem: "connection reset by peer",
  }],
  asked: at(8),
  accepted: at(10),
  began: at(24),
  connected: at(25),
  sent: at(30),
  built: at(90),
  retrieved: at(98),
  ended: at(100),
  bytesSent: 5000,
  bytesRetrieved: 70,
});

/** Others: from 0 to 60 s, 200 to 230 s, 300 to 310 s. */
const BUILDS: readonly JournalEntry[] = [
  morningBuild(),
  RETRIED,
  morningBuild({
    name: "broken-1",
    asked: at(200),
    accepted: at(201),
    began: at(201),
    connected: at(203),
    sent: at(206),
    built: undefined,
    retrieved: undefined,
    ended: at(230),
    bytesRetrieved: undefined,
    outcome: "failed",
    problem: "build failed",
  } as unknown as Partial<JournalEntry>),
  morningBuild({
    name: "gone-1",
    slot: 1,
    asked: at(300),
    accepted: at(301),
    began: at(301),
    connected: undefined,
    sent: undefined,
    built: undefined,
    retrieved: undefined,
    ended: at(310),
    bytesSent: undefined,
    bytesRetrieved: undefined,
    outcome: "lost",
    problem: "connection refused",
  } as unknown as Partial<JournalEntry>),
];

const ABSENCES: readonly Absence[] = [
  { machine: "w1:22", from: at(20), until: at(30), problem: "reset" },
  { machine: "w1:22", from: at(310), until: at(320), problem: "refused" },
  { machine: "w1:22", from: at(3590), until: at(3620), problem: "refused" },
  {
    machine: "w3:22",
    from: at(-50),
    until: at(3),
    problem: "no route to host",
  },
];

const LISTED = [
  { machine: "w0:22", slots: 4 },
  { machine: "w1:22", slots: 2 },
];

const MACHINES = capacities(LISTED, BUILDS, ABSENCES);
const FIGURES = countFigures(BUILDS, ABSENCES, MACHINES, SPAN);

test("median() is in the middle", () => {
  assert.is(median([]), undefined);
  assert.is(median([3]), 3);
  assert.is(median([10, 1, 2]), 2);
  assert.is(median([10, 1, 2, 4]), 3);
});

test("phaseSeconds() adds up to what a build took", () => {
  assert.equal(phaseSeconds(morningBuild()), {
    "waiting": 1,
    "failed attempts": 0,
    "connecting": 1,
    "sending": 3,
    "building": 50,
    "retrieving": 5,
  });
  assert.equal(phaseSeconds(RETRIED), {
    "waiting": 2,
    "failed attempts": 14,
    "connecting": 1,
    "sending": 5,
    "building": 60,
    "retrieving": 10,
  });
  const [, , failed, lost] = BUILDS.map(phaseSeconds);
  assert.is(failed!.building, 24);
  assert.is(failed!.retrieving, 0);
  assert.is(lost!.connecting, 9);
  assert.is(lost!.sending, 0);
});

test("phaseTimes() never goes back, whatever clocks did", () => {
  const odd = morningBuild({
    accepted: MORNING - 5000,
    connected: MORNING + HOUR,
    sent: MORNING - HOUR,
  });
  const times = phaseTimes(odd);
  assert.equal(times, times.toSorted((a, b) => a - b));
  assert.is(times.at(-1), odd.ended);
  const backwards = phaseTimes(morningBuild({ ended: MORNING - 1 }));
  assert.equal([...new Set(backwards)], [MORNING]);
});

test("capacities() has what is listed, and what was used or left alone", () => {
  assert.equal(MACHINES, [
    { machine: "w0:22", slots: 4 },
    { machine: "w1:22", slots: 2 },
    { machine: "w2:22", slots: 2 },
    { machine: "w3:22", slots: 1 },
  ]);
});

test("countFigures() counts as one does by hand", () => {
  assert.equal(FIGURES.outcomes, {
    "built": 2,
    "failed": 1,
    "timed-out": 0,
    "lost": 1,
    "interrupted": 0,
  });
  assert.equal(FIGURES.phases, {
    "waiting": 1 + 2 + 1 + 1,
    "failed attempts": 14,
    "connecting": 1 + 1 + 2 + 9,
    "sending": 3 + 5 + 3,
    "building": 50 + 60 + 24,
    "retrieving": 5 + 10,
  });
  const [w0, w1, w2, w3] = FIGURES.machines;
  assert.equal(w0, {
    ...{ machine: "w0:22", slots: 4, builds: 0, failed: 0, lost: 0, used: 0 },
    ...{ overhead: undefined, bytesSent: 0, bytesRetrieved: 0, idle: [] },
    foresight: undefined,
  });
  assert.equal(w1, {
    ...{ machine: "w1:22", slots: 2, builds: 3, failed: 1, lost: 2 },
    // The first, the attempt, the failed and the lost one.
    used: (59 + 10 + 29 + 9) / (2 * 3600),
    overhead: 1 + 3 + 5,
    bytesSent: 2 * 12_345,
    bytesRetrieved: 23_456,
    idle: [
      { why: "refused", times: 2, seconds: 20 },
      { why: "reset", times: 1, seconds: 10 },
    ],
    foresight: undefined,
  });
  assert.is(w2!.used, 76 / (2 * 3600));
  assert.equal([w2!.builds, w2!.lost, w2!.overhead], [1, 0, 16]);
  assert.equal(w3!.idle, [
    { why: "no route to host", times: 1, seconds: 3 },
  ]);
});

test("countFigures() finds the longest and the unluckiest builds", () => {
  const { longest, unluckiest } = FIGURES;
  assert.equal(
    longest.map(({ name, seconds }) => [name, seconds]),
    [["twice-1", 92], ["hello-2.12", 60], ["broken-1", 30], ["gone-1", 10]],
  );
  assert.equal(
    unluckiest.map(({ name, attempts, problem }) => [name, attempts, problem]),
    [
      ["twice-1", 2, "connection reset by peer"],
      ["gone-1", 1, "connection refused"],
    ],
  );
});

test("a share is that of the time that was asked for", () => {
  const span = { since: at(30), until: at(50) };
  const { machines } = countFigures(BUILDS, ABSENCES, MACHINES, span);
  assert.equal(machines.map(({ used }) => used), [0, 0.5, 0.5, 0]);
});

// ---------------------------------------------------------------------------
// What is printed
// ---------------------------------------------------------------------------

test("formatReport() shows tables, with tabs where nobody looks", () => {
  const tables = formatReport(FIGURES, screen()).split("\n\n");
  assert.is(tables.length, 5);
  assert.match(
    tables[0]!,
    /^4 builds from .* to .*, 2 built, 1 failed, 1 lost$/,
  );
  const [heading, , w1] = tables[1]!.split("\n").map((it) => it.split("\t"));
  assert.equal(
    Object.fromEntries(heading!.map((name, i) => [name, w1![i]])),
    {
      ...{ machine: "w1:22", slots: "2", builds: "3", failed: "1", lost: "2" },
      ...{ used: "1 %", overhead: "9.0 s", sent: "24 KiB" },
      ...{ retrieved: "23 KiB", "took nothing": "20 s: refused; 10 s: reset" },
    },
  );
  assert.match(tables[2]!, "\nbuilding\t2 min\t70 %\n");
  assert.match(
    tables[3]!,
    "\ntwice-1\t92 s\tw2:22\t2\tbuilt\tconnection reset",
  );
  assert.match(
    tables[4]!,
    "\ngone-1\t10 s\tw1:22\t1\tlost\tconnection refused",
  );
  const shown = formatReport(FIGURES, screen(true));
  assert.match(shown, /^w1:22 +2 +3 +1 +2 +1 % +9\.0 s +24 KiB +23 KiB /m);
});

test("formatReport() has something to say of nothing", () => {
  const none = countFigures([], [], [], SPAN);
  assert.match(formatReport(none, screen()), /^0 builds from /);
  assert.not.match(formatReport(none, screen()), /NaN|undefined|longest/);
  assert.not.match(makePage([], [], none), /NaN|undefined<|>undefined/);
});

test("reportToJson() has times as ISO 8601 has them, and figures", () => {
  const { since, machines } = JSON.parse(JSON.stringify(reportToJson(FIGURES)));
  assert.is(since, "2026-11-24T06:00:00.000Z");
  assert.is(machines[1].overhead, 9);
});

test("parseTime() reads how long ago it was, and dates", () => {
  const now = Date.now();
  for (
    const [text, seconds] of [
      ...[["45s", 45], ["90min", 5400], ["24h", 86_400]] as const,
      ...[["1.5d", 129_600], ["2w", 1_209_600], ["0s", 0]] as const,
    ]
  ) assert.is(parseTime(text, now), now - seconds * SECOND, text);
  const morning = new Date(2026, 10, 24).getTime();
  assert.is(parseTime("2026-11-24", now), morning);
  assert.is(parseTime("2026-11-24 18:00", now), morning + 18 * HOUR);
  assert.is(
    parseTime("2026-11-24T18:00:30", now),
    morning + 18 * HOUR + 30_000,
  );
  assert.is(parseTime("2026-11-24T06:00Z", now), MORNING);
  assert.is(parseTime("2026-11-24T08:00+02:00", now), MORNING);
  for (
    const text of ["", "24", "h", "-1h", "1 h", "yesterday", "2026-13-01"]
      .concat("2026-11-24T", "11/24/2026", "1e3s")
  ) throws(() => parseTime(text, now), /^invalid time '.*': expected how/);
});

// ---------------------------------------------------------------------------
// Trace events
// ---------------------------------------------------------------------------

const SCHEMA = JSON.parse(
  readFileSync(`${ROOT}/test/data/trace.schema.json`, "utf8"),
);

/** Those that last, by their tracks. */
function tracks(trace: ReturnType<typeof makeTrace>) {
  const lasting = trace.traceEvents.filter(({ ph }) => ph === "X");
  return Map.groupBy(lasting, ({ pid, tid }) => `${pid} ${tid}`);
}

test("makeTrace() makes events that are as their schema says", () => {
  const trace = makeTrace(BUILDS, ABSENCES, MACHINES);
  assert.ok(conforms(JSON.parse(JSON.stringify(trace)), SCHEMA));
  for (
    const change of [{ ph: "Y" }, { ts: "0" }, { dur: -1 }, { pid: 0 }, {
      x: 1,
    }]
  ) {
    const traceEvents = trace.traceEvents.map((it) => ({ ...it, ...change }));
    assert.not.ok(conforms({ ...trace, traceEvents }, SCHEMA), `${change}`);
  }
});

test("makeTrace() has a track for each slot, with what happened there", () => {
  const trace = makeTrace(BUILDS, ABSENCES, MACHINES);
  const names = trace.traceEvents.filter(({ name }) => name === "thread_name")
    .map(({ pid, tid, args }) => `${pid} ${tid} ${args!.name}`);
  assert.equal(names.slice(0, 8), [
    ...["1 0 took nothing", "1 1 slot 0", "1 2 slot 1", "1 3 slot 2"],
    ...["1 4 slot 3", "2 0 took nothing", "2 1 slot 0", "2 2 slot 1"],
  ]);
  const at2 = tracks(trace).get("3 2")!.map(({ name, dur }) => [name, dur]);
  assert.equal(at2, [
    ...[["twice-1", 76e6], ["connecting", 1e6], ["sending", 5e6]],
    ...[["building", 60e6], ["retrieving", 10e6]],
  ]);
  const [attempt] = tracks(trace).get("2 1")!.filter(({ cat }) =>
    cat === "build,attempt"
  );
  assert.equal([attempt!.ts, attempt!.dur], [at(10) * 1000, 10e6]);
  assert.is(tracks(trace).get("2 0")!.length, 3);
});

test("what happens on a track of a trace lies beside or within another", () => {
  const { entries, absences } = makeDay(1000, 5, 3);
  const machines = capacities([], entries, absences);
  for (const events of tracks(makeTrace(entries, [], machines)).values()) {
    const open: number[] = [];
    events.sort((a, b) => a.ts - b.ts || b.dur! - a.dur!);
    for (const { ts, dur = 0 } of events) {
      while (open.length > 0 && open.at(-1)! <= ts + 1) open.pop();
      assert.ok(ts + dur <= (open.at(-1) ?? Infinity) + 1);
      open.push(ts + dur);
    }
  }
});

// ---------------------------------------------------------------------------
// The page
// ---------------------------------------------------------------------------

/** What the page's script gets. */
function dataOf(page: string) {
  const [, text] = /id="data">([^]*?)<\/script>/.exec(page)!;
  return JSON.parse(text!);
}

test("makePage() hands all builds on to the script", () => {
  const page = makePage(BUILDS, ABSENCES, FIGURES);
  const data = dataOf(page);
  assert.equal(
    data,
    JSON.parse(JSON.stringify(pageData(BUILDS, ABSENCES, FIGURES))),
  );
  assert.is(data.builds.length, BUILDS.length);
  assert.equal(
    data.builds[1].times,
    [8, 10, 24, 25, 30, 90, 100].map((it) => it * SECOND),
  );
  assert.is(data.machines[data.builds[1].earlier[0].machine].name, "w1:22");
});

test("the page's script is whole, and asks for nothing of a module", () => {
  const page = makePage([], [], FIGURES);
  const [, script] = /<script>([^]*?)<\/script>/.exec(page)!;
  new Function(script!); // it can be read
  for (const file of ["_report_draw.ts", "_report_view.ts"]) {
    const source = readFileSync(`${ROOT}/plugins/${file}`, "utf8");
    const values = [...source.matchAll(/^import (?!type)[^;]* from "(.*)";$/gm)]
      .map(([, from]) => from!);
    const allowed = ["./_report_draw.ts", "./_screen.ts"];
    assert.ok(values.every((from) => allowed.includes(from)), `${values}`);
    assert.not.match(
      source,
      /^(async )?function |^(export )?(const|let|class) /m,
    );
    for (const [, name] of source.matchAll(/^export function (\w+)/gm)) {
      assert.match(script!, RegExp(`function ${name}\\s*\\(`));
    }
  }
});

test("the page allows no other script, and fetches nothing", () => {
  const page = makePage(BUILDS, ABSENCES, FIGURES);
  assert.match(
    page,
    /content="default-src 'none'; img-src data:; script-src 'sha256-/,
  );
  const addresses = [...page.matchAll(/(?:src|href|action)="([^"]*)"/g)]
    .map(([, address]) => address);
  assert.equal(addresses, ["data:,"]);
  assert.not.match(page, /@import|url\(| style="| on\w+="/);
});

test("makePage() is quick, and small, with 10,000 builds", () => {
  const { entries, absences } = makeDay(10_000, 12, 4);
  const machines = capacities([], entries, absences);
  const start = performance.now();
  const figures = countFigures(entries, absences, machines, SPAN);
  const page = makePage(entries, absences, figures);
  const seconds = (performance.now() - start) / 1000;
  assert.ok(page.length < 4_000_000, `${page.length} characters`);
  assert.ok(seconds < 5, `${seconds} s`);
});

// ---------------------------------------------------------------------------
// What is hostile
// ---------------------------------------------------------------------------

/** Builds, machines and errors of a hostile name. */
function hostile(text: string) {
  const attempt = { machine: `${text}:1`, slot: 0, began: at(2), ended: at(3) };
  const entries = [
    morningBuild({
      name: text,
      derivation: `/gnu/store/${"0".repeat(32)}-${text}.drv`,
      machine: `${text}:22`,
      earlier: [{ ...attempt, problem: text }],
      outcome: "lost",
      problem: text,
    }),
  ];
  const absences = [
    { machine: `${text}:22`, from: at(70), until: at(80), problem: text },
  ];
  const machines = capacities([], entries, absences);
  return { entries, absences, machines };
}

/** What controls a terminal, but for what parts lines and cells. */
// deno-lint-ignore no-control-regex
const CONTROLS = /[\x00-\x08\x0b-\x1f\x7f-\x9f]/;

for (const [index, text] of HOSTILE.entries()) {
  test(`a hostile name does nothing: ${index}`, () => {
    const { entries, absences, machines } = hostile(text);
    const figures = countFigures(entries, absences, machines, SPAN);
    assert.is(figures.machines.length, 2);
    for (const isTerminal of [false, true]) {
      const tables = formatReport(figures, screen(isTerminal));
      assert.not.match(tables, CONTROLS);
      const lines = tables.split("\n\n").map((it) => it.split("\n").length);
      assert.equal(lines, [1, 3, 7, 2, 2]);
    }
    const json = formatJson(reportToJson(figures), 2);
    assert.not.match(json, CONTROLS);
    assert.is(JSON.parse(json).longest[0].name, text);
    const trace = makeTrace(entries, absences, machines);
    assert.ok(conforms(JSON.parse(JSON.stringify(trace)), SCHEMA));
    const shown = trace.traceEvents
      .flatMap(({ name, args = {} }) => [name, ...Object.values(args)]);
    assert.not.match(shown.join(""), CONTROLS);
    const page = makePage(entries, absences, figures);
    // Of markup there is what there is with names that are none.
    const tags = (page: string) =>
      page.match(/<[/!]?[a-z]+/gi)!.filter((it) => it !== "<script").join();
    const plain = hostile("plain");
    const other = makePage(
      plain.entries,
      plain.absences,
      countFigures(plain.entries, plain.absences, plain.machines, SPAN),
    );
    const [before] = page.split('<script>"use strict"');
    const [otherBefore] = other.split('<script>"use strict"');
    assert.is(tags(before!), tags(otherBefore!));
    assert.is(page.match(/<script/g)!.length, 2);
    assert.is(dataOf(page).builds[0].name, text);
    assert.not.match(before!, CONTROLS);
  });
}

// ---------------------------------------------------------------------------
// The command
// ---------------------------------------------------------------------------

/** Runs it, with a state that has these builds. */
async function report(
  entries: readonly JournalEntry[],
  ...args: readonly string[]
) {
  const { context: { log, settings, stateDirectory } } = makeContext();
  mkdirSync(`${stateDirectory}/offload`, { mode: 0o700 });
  const { journal } = new SharedObservations(`${stateDirectory}/offload`, log);
  for (const each of entries) journal.save(each, settings);
  const [program, ...options] = ownRuntime;
  const words = [...options, `${ROOT}/mod.ts`, "report", ...args];
  const env = {
    ...process.env,
    OFFLOAD_PLUGINS: "/nonexistent",
    GUIX_CONFIGURATION_DIRECTORY: "/nonexistent",
    GUIX_STATE_DIRECTORY: stateDirectory,
  };
  const cwd = stateDirectory;
  const { stdout, ...rest } = await settled(run(program, words, { env, cwd }));
  return { ...rest, stdout: stdout.toString(), cwd };
}

/** A build that has ended some seconds ago. */
function ended(seconds: number, name: string): JournalEntry {
  const by = Date.now() - MORNING - 60_000 - seconds * SECOND;
  const moved = Object.entries(morningBuild({ name })).map((
    [key, value],
  ) => [
    key,
    typeof value === "number" && value >= MORNING ? value + by : value,
  ]);
  return Object.fromEntries(moved);
}

test("offload report tells of the last day, or of another time", async () => {
  const builds = [ended(3 * 86_400, "old-1"), ended(7200, "new-1")];
  const day = await report(builds);
  assert.is(day.code, 0, day.stderr);
  assert.match(day.stdout, /^1 build from /);
  assert.match(day.stdout, "\nnew-1\t");
  assert.not.match(day.stdout, "old-1");
  const week = JSON.parse(
    (await report(builds, "--since=7d", "--json")).stdout,
  );
  assert.is(week.outcomes.built, 2);
  const older = await report(builds, "--since", "1w", "--until", "1d");
  assert.match(older.stdout, "\nold-1\t");
  assert.not.match(older.stdout, "new-1");
});

test("offload report writes the page and the trace", async () => {
  const args = ["--html", "page.html", "--trace=trace.json"];
  const { code, stderr, cwd } = await report([ended(60, "new-1")], ...args);
  assert.is(code, 0, stderr);
  assert.match(stderr, "wrote 'page.html'");
  assert.match(stderr, "wrote 'trace.json'");
  const page = readFileSync(`${cwd}/page.html`, "utf8");
  assert.is(dataOf(page).builds[0].name, "new-1");
  const trace = JSON.parse(readFileSync(`${cwd}/trace.json`, "utf8"));
  assert.ok(conforms(trace, SCHEMA));
});

test("offload report says what is wrong with its arguments", async () => {
  for (
    const [args, code, message] of [
      [["--since=soon"], 2, /invalid time 'soon': expected how long ago/],
      [["--since=1h", "--until=2h"], 2, /'1h' does not come before '2h'/],
      [["--html=/nonexistent/x"], 1, /'\/nonexistent\/x': no such file/],
      [["x"], 2, /wrong number of arguments|Unused args/],
    ] as const
  ) {
    const result = await report([], ...args);
    assert.is(result.code, code, result.stderr);
    assert.match(result.stderr, message);
  }
});

test.run();

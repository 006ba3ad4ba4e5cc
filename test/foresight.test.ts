/** What `offload report` says of how well builds were foreseen. */

import { suite } from "uvu";
import * as assert from "uvu/assert";
import type { JournalEntry } from "../plugins/_journal.ts";
import { countFigures } from "../plugins/_report_figures.ts";
import { makePage } from "../plugins/_report_page.ts";
import { formatReport, reportToJson } from "../plugins/report.ts";
import { at, MORNING, morningBuild, screen } from "./day.ts";

const test = suite("foresight");

/** A build of 59 s, after one more for its answer. */
function build(
  name: string,
  expected: number,
  more: Partial<JournalEntry> = {},
): JournalEntry {
  return morningBuild({ name, expected, ...more });
}

const BUILDS: readonly JournalEntry[] = [
  build("usual-1", 50),
  // What is close is up to twice as long, or half.
  build("late-1", 29.5),
  build("later-1", 29),
  build("soon-1", 119, { machine: "w2:22" }),
  // It is the last attempt of which that was expected: 76 s.
  build("twice-1", 20, {
    machine: "w2:22",
    earlier: [{
      ...{ machine: "w1:22", slot: 0, began: at(1), ended: at(20) },
      problem: "connection reset by peer",
    }],
    began: at(24),
    ended: at(100),
  }),
  // Of these there is nothing to say.
  build("failed-1", 5, { outcome: "failed" }),
  build("odd-1", 0),
  morningBuild({ name: "new-1" }),
];

const MACHINES = ["w0:22", "w1:22", "w2:22"].map((machine) => (
  { machine, slots: 2 }
));
const SPAN = { since: MORNING, until: at(3600) };
const FIGURES = countFigures(BUILDS, [], MACHINES, SPAN);

test("countFigures() tells how well builds that were done were foreseen", () => {
  const [w0, w1, w2] = FIGURES.machines.map((it) => it.foresight);
  assert.is(w0, undefined);
  assert.equal(w1, { builds: 3, ratio: 2, close: 2 / 3 });
  assert.equal(w2, { builds: 2, ratio: (3.8 + 59 / 119) / 2, close: 0 });
  assert.equal(FIGURES.foresight, { builds: 5, ratio: 2, close: 0.4 });
});

test("countFigures() finds the builds that were foreseen the worst", () => {
  assert.equal(
    FIGURES.surprises.map(({ name, machine, expected, seconds }) =>
      `${name} ${machine} ${expected} ${seconds}`
    ),
    ["soon-1 w2:22 119 59", "twice-1 w2:22 20 76", "later-1 w1:22 29 59"],
  );
});

test("what was expected is in the tables, in JSON and in the page", () => {
  const tables = formatReport(FIGURES, screen()).split("\n\n");
  assert.equal(tables.at(-2)!.split("\n"), [
    "foreseen\tbuilds\ttook / expected\twithin a factor of 2",
    "all machines\t5\t2.00\t40 %",
    "w1:22\t3\t2.00\t67 %",
    "w2:22\t2\t2.15\t0 %",
  ]);
  assert.match(tables.at(-1)!, "\ntwice-1\t20 s\t76 s\tw2:22\n");
  const json = JSON.parse(JSON.stringify(reportToJson(FIGURES)));
  assert.is(json.foresight.close, 0.4);
  assert.is(json.surprises.length, 3);
  const page = makePage(BUILDS, [], FIGURES);
  assert.match(page, /scope="row">w2:22<\/th><td [^>]*>2<\/td><td [^>]*>2.15</);
  assert.match(page, /"name":"twice-1"[^}]*"expected":20/);
});

test("where nothing was expected, there is no table of it", () => {
  const builds = [morningBuild()];
  const figures = countFigures(builds, [], MACHINES, SPAN);
  assert.not.match(formatReport(figures, screen()), "foreseen");
  assert.match(makePage(builds, [], figures), "Nothing was expected");
});

test.run();

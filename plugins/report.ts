/**
 * `offload report`: shows what machines did.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { DAY, listMachines, machineId } from "../mod.ts";
import type {
  CommandOptions,
  CommandResult,
  Context,
  Plugin,
  Screen,
} from "../mod.ts";
import { replaceFile } from "./_authorization.ts";
import { usageError } from "./_commands.ts";
import { warnOfLack, warnOfState } from "./_first_steps.ts";
import { readJournal } from "./_journal.ts";
import { hasErrors, JSON_OPTION } from "./_machines.ts";
import { PHASES } from "./_phases.ts";
import {
  capacities,
  countFigures,
  FORESIGHT,
  foresightRows,
} from "./_report_figures.ts";
import type {
  BuildFigures,
  Figures,
  MachineFigures,
  Span,
  Surprise,
} from "./_report_figures.ts";
import {
  formatJson,
  formatShare,
  formatSize,
  formatTable,
  formatTime,
  formatTook,
} from "./_screen.ts";

/** Seconds of what spans of time are told in. */
const UNITS: Readonly<Record<string, number>> = {
  s: 1,
  min: 60,
  h: 3600,
  d: DAY,
  w: 7 * DAY,
};

/** What is told where no other time is. */
const USUALLY = "24h";

/** A day, or a time of one, here unless it says where. */
const DATE =
  /^\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:Z|[+-]\d\d:\d\d)?)?$/;

/** Reads a time: a date, or how long ago; in milliseconds since 1970. */
export function parseTime(text: string, now: number): number {
  const [, number, unit] = /^(\d+(?:\.\d+)?)(s|min|h|d|w)$/.exec(text) ?? [];
  if (unit !== undefined) return now - Number(number) * UNITS[unit]! * 1000;
  // Without a time of day, JavaScript would take it for one of Greenwich.
  const full = text.length === 10 ? `${text}T00:00` : text.replace(" ", "T");
  const time = DATE.test(text) ? Date.parse(full) : NaN;
  if (!Number.isNaN(time)) return time;
  throw usageError(
    `invalid time '${text}': expected how long ago, such as 90min, 24h or 7d, ` +
      "or a date, such as 2026-11-24 or 2026-11-24T18:00",
  );
}

/** The span of time that a report is about. */
function spanOf({ since = USUALLY, until = "0s" }: CommandOptions): Span {
  const now = Date.now();
  const span = {
    since: parseTime(String(since), now),
    until: parseTime(String(until), now),
  };
  if (span.since < span.until) return span;
  throw usageError(`the time '${since}' does not come before '${until}'`);
}

/** What a cell says of nothing. */
const NOTHING = "-";

/** A table of machines. */
function machineTable(
  machines: readonly MachineFigures[],
  screen: Screen,
): string {
  const rows = machines.map((it) => [
    it.machine,
    String(it.slots),
    String(it.builds),
    String(it.failed),
    String(it.lost),
    formatShare(it.used),
    it.overhead === undefined ? NOTHING : formatTook(it.overhead),
    formatSize(it.bytesSent),
    formatSize(it.bytesRetrieved),
    it.idle.map(({ why, seconds }) => `${formatTook(seconds)}: ${why}`)
      .join("; ") || NOTHING,
  ]);
  const heading = "machine,slots,builds,failed,lost,used,overhead,sent," +
    "retrieved,took nothing";
  return formatTable([heading.split(","), ...rows], screen);
}

/** A table of builds that are worth a look. */
function buildTable(
  what: string,
  builds: readonly BuildFigures[],
  screen: Screen,
): string {
  const rows = builds.map((it) => [
    it.name,
    formatTook(it.seconds),
    it.machine,
    String(it.attempts),
    it.outcome,
    it.problem ?? NOTHING,
  ]);
  const heading = [what, "took", "machine", "attempts", "outcome", "problem"];
  return formatTable([heading, ...rows], screen);
}

/** Where the time of all builds went. */
function phaseTable({ phases }: Figures, screen: Screen): string {
  const all = PHASES.reduce((sum, phase) => sum + phases[phase], 0);
  const rows = PHASES.map((phase) => [
    phase,
    formatTook(phases[phase]),
    all === 0 ? NOTHING : formatShare(phases[phase] / all),
  ]);
  return formatTable([["phase", "all builds", "share"], ...rows], screen);
}

/** A table of builds that were not foreseen. */
function surpriseTable(
  surprises: readonly Surprise[],
  screen: Screen,
): string {
  const rows = surprises.map((it) => [
    it.name,
    formatTook(it.expected),
    formatTook(it.seconds),
    it.machine,
  ]);
  const heading = ["least expected build", "expected", "took", "machine"];
  return formatTable([heading, ...rows], screen);
}

/** How many builds there were, and what came of them. */
function formatCounts({ outcomes, since, until }: Figures): string {
  const all = Object.values(outcomes).reduce((sum, count) => sum + count, 0);
  const counts = Object.entries(outcomes).filter(([, count]) => count > 0)
    .map(([outcome, count]) => `${count} ${outcome}`);
  const [from, to] = [since, until].map(formatTime);
  const builds = all === 1 ? "1 build" : `${all} builds`;
  return [`${builds} from ${from} to ${to}`, ...counts].join(", ");
}

/** All that there is to say, in tables. */
export function formatReport(figures: Figures, screen: Screen): string {
  const { foresight, longest, machines, surprises, unluckiest } = figures;
  const rows = foresightRows(figures);
  return [
    formatCounts(figures),
    machineTable(machines, screen),
    phaseTable(figures, screen),
    ...(longest.length > 0
      ? [buildTable("longest build", longest, screen)]
      : []),
    ...(unluckiest.length > 0
      ? [buildTable("unluckiest build", unluckiest, screen)]
      : []),
    ...(foresight
      ? [formatTable([["foreseen", ...FORESIGHT], ...rows], screen)]
      : []),
    ...(surprises.length > 0 ? [surpriseTable(surprises, screen)] : []),
  ].join("\n\n");
}

/** The same for programs: times as ISO 8601 has them, seconds and bytes. */
export function reportToJson({ since, until, ...figures }: Figures): object {
  const [from, to] = [since, until].map((time) => new Date(time).toISOString());
  return { since: from, until: to, ...figures };
}

/** Writes a file at once, and says so. */
function writeReport(file: string, text: string, context: Context): void {
  replaceFile(file, Buffer.from(text), context);
  context.log.info(`wrote '${file}'`);
}

/** `offload report`. */
async function reportCommand(
  options: CommandOptions,
  context: Context,
  screen: Screen,
): Promise<CommandResult> {
  const span = spanOf(options);
  warnOfState("no builds are known", context);
  const known = await listMachines(context);
  await warnOfLack(known, context);
  const listed = known.map((machine) => (
    { machine: machineId(machine), slots: machine.parallelBuilds }
  ));
  const { entries, absences } = readJournal(context, span.since, span.until);
  const machines = capacities(listed, entries, absences);
  const figures = countFigures(entries, absences, machines, span);
  if (options.html !== undefined) {
    const { makePage } = await import("./_report_page.ts");
    const page = makePage(entries, absences, figures);
    writeReport(String(options.html), page, context);
  }
  if (options.trace !== undefined) {
    const { makeTrace } = await import("./_report_trace.ts");
    const trace = JSON.stringify(makeTrace(entries, absences, machines));
    writeReport(String(options.trace), trace, context);
  }
  const output = options.json
    ? formatJson(reportToJson(figures), 2)
    : formatReport(figures, screen);
  return { output, exitCode: hasErrors(context) ? 1 : 0 };
}

const plugin = {
  name: "report",
  command: {
    order: 3,
    usage: "",
    summary: "Show what machines did",
    description: [
      "It tells of the builds that ended in the last 24 hours, or in another " +
      "time: what each machine did, how much of the time its slots were in use, " +
      "how long a build took there beside the build itself (the median), how " +
      "many builds failed by themselves and how many attempts the machine " +
      "lost, for how long it took nothing and why; where the time of all builds " +
      "went; which builds took the longest, or were failed by machines; and, of " +
      "those whose machine was chosen by what was expected, how well that was " +
      "foreseen: what they took there by what was expected (the median), and " +
      "which were the furthest off.",
      "TIME is how long ago, such as 90min, 24h, 7d or 2w, or a date, such as " +
      "2026-11-24 or 2026-11-24T18:00.",
      "The page that --html writes needs no other file, and fetches nothing. " +
      "What --trace writes can be opened in Perfetto or chrome://tracing.",
    ],
    options: [
      ["--since TIME", "Begin there, not 24 hours ago"],
      ["--until TIME", "End there, not now"],
      JSON_OPTION,
      ["--html FILE", "Write a page with a timeline"],
      ["--trace FILE", "Write trace events"],
    ],
    examples: [
      ["offload report", "shows what machines did in the last day"],
      ["offload report --since 7d --html report.html", "draws a week"],
    ],
    run: async (_args, options, makeContext, screen) =>
      reportCommand(options, await makeContext(), screen),
  },
} satisfies Plugin;

export default plugin as Plugin;

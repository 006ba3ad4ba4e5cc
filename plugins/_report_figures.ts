/**
 * What `offload report` makes of the journal: figures of the machines, of the
 * builds, and of where their time went.
 *
 * @module
 */

import type { Absence } from "./_absences.ts";
import { median } from "./_expectation.ts";
import { OUTCOMES } from "./_journal.ts";
import type { Attempt, JournalEntry } from "./_journal.ts";
import { PHASES, phaseSeconds, phaseTimes } from "./_phases.ts";
import type { Phase } from "./_phases.ts";
import { formatShare } from "./_screen.ts";

/** How a build can end. */
export type Outcome = JournalEntry["outcome"];

/** A span of time, in milliseconds since 1970. */
export interface Span {
  /** Its beginning. */
  readonly since: number;
  /** Its end. */
  readonly until: number;
}

/** A machine, and how many builds it may do at a time. */
export interface Capacity {
  /** NAME:PORT. */
  readonly machine: string;
  /** At least 1. */
  readonly slots: number;
}

/** Why a machine took nothing, and for how long. */
export interface Idleness {
  /** In one line. */
  readonly why: string;
  /** How often. */
  readonly times: number;
  /** Seconds, of all these times. */
  readonly seconds: number;
}

/** How well it was foreseen how long builds take. */
export interface Foresight {
  /** Builds that were done, and of which that was expected. */
  readonly builds: number;
  /** Median of the seconds that they took by those that were expected. */
  readonly ratio: number;
  /** Share of those that took from half to twice as long, 0 to 1. */
  readonly close: number;
}

/** What a machine did. */
export interface MachineFigures extends Capacity {
  /** Builds that ended there, whatever came of them. */
  readonly builds: number;
  /** Those that failed or took too long, by no fault of the machine. */
  readonly failed: number;
  /** Attempts that the machine failed. */
  readonly lost: number;
  /** Share of the time of all its slots in which they were taken, 0 to 1. */
  readonly used: number;
  /** Median of the seconds that a build took beside the build itself. */
  readonly overhead: number | undefined;
  /** Bytes that were sent there for builds. */
  readonly bytesSent: number;
  /** Bytes that came from there. */
  readonly bytesRetrieved: number;
  /** Why it took nothing, what lasted longest first. */
  readonly idle: readonly Idleness[];
  /** How well builds there were foreseen, where something was expected. */
  readonly foresight: Foresight | undefined;
}

/** A build that is worth a look. */
export interface BuildFigures {
  /** Of the derivation, without hash and `.drv`. */
  readonly name: string;
  /** The store's path. */
  readonly derivation: string;
  /** The last one that it was tried on, NAME:PORT. */
  readonly machine: string;
  /** From the request to the end. */
  readonly seconds: number;
  /** How often it was tried. */
  readonly attempts: number;
  /** How it ended. */
  readonly outcome: Outcome;
  /** What went wrong last, in one line. */
  readonly problem: string | undefined;
}

/** A build that took another time than was expected. */
export interface Surprise
  extends Pick<BuildFigures, "name" | "derivation" | "machine"> {
  /** So many seconds were expected of the machine that did it. */
  readonly expected: number;
  /** And so many it took there. */
  readonly seconds: number;
}

/** All that is known of a span of time. */
export interface Figures extends Span {
  /** Builds by how they ended. */
  readonly outcomes: Readonly<Record<Outcome, number>>;
  /** Seconds of all builds together. */
  readonly phases: Readonly<Record<Phase, number>>;
  /** Those of the list, and others that had builds. */
  readonly machines: readonly MachineFigures[];
  /** Those that took the longest. */
  readonly longest: readonly BuildFigures[];
  /** Those that machines failed, the most often first. */
  readonly unluckiest: readonly BuildFigures[];
  /** How well builds were foreseen, where something was expected of them. */
  readonly foresight: Foresight | undefined;
  /** Those that were not, the most seconds off first. */
  readonly surprises: readonly Surprise[];
}

/** How many builds are worth a look, of each kind. */
const WORTH_A_LOOK = 5;

/** How many times as long, or as short, as expected is still close to that. */
const CLOSE = 2;

/** All attempts of a build, the last one included. */
export function attemptsOf(entry: JournalEntry): Attempt[] {
  const { machine, slot, problem = "" } = entry;
  const times = phaseTimes(entry);
  const began = times[PHASES.indexOf("connecting")]!;
  const ended = times.at(-1)!;
  return [...entry.earlier, { machine, slot, began, ended, problem }];
}

/** Seconds of a build's last attempt that were not the build itself. */
function overheadOf(entry: JournalEntry): number {
  const { connecting, sending, retrieving } = phaseSeconds(entry);
  return connecting + sending + retrieving;
}

/** The builds of which something was expected, and what they took instead. */
function findSurprises(entries: readonly JournalEntry[]): Surprise[] {
  return entries.flatMap((entry) => {
    const { name, derivation, machine, expected = 0, outcome } = entry;
    if (outcome !== "built" || expected <= 0) return [];
    const { began, ended } = attemptsOf(entry).at(-1)!;
    const seconds = (ended - began) / 1000;
    return [{ name, derivation, machine, expected, seconds }];
  });
}

function isClose({ expected, seconds }: Surprise): boolean {
  return seconds <= expected * CLOSE && seconds >= expected / CLOSE;
}

/** How well builds were foreseen, where something was expected of some. */
function foresightOf(entries: readonly JournalEntry[]): Foresight | undefined {
  const all = findSurprises(entries);
  const ratio = median(all.map(({ expected, seconds }) => seconds / expected));
  if (ratio === undefined) return undefined;
  const close = all.filter(isClose).length / all.length;
  return { builds: all.length, ratio, close };
}

/** The columns of a table of that. */
export const FORESIGHT = ["builds", "took / expected", "within a factor of 2"];

/** Its rows: of all builds, and of those of each machine. */
export function foresightRows(
  { foresight, machines }: Pick<Figures, "foresight" | "machines">,
): string[][] {
  const all = { machine: "all machines", foresight };
  return [all, ...machines].flatMap(({ machine, foresight }) => {
    if (foresight === undefined) return [];
    const { builds, ratio, close } = foresight;
    return [[machine, `${builds}`, ratio.toFixed(2), formatShare(close)]];
  });
}

/** Those that were not, the most seconds off first. */
function worstSurprises(entries: readonly JournalEntry[]): Surprise[] {
  const off = ({ expected, seconds }: Surprise) => Math.abs(seconds - expected);
  return findSurprises(entries).filter((it) => !isClose(it))
    .sort((a, b) => off(b) - off(a)).slice(0, WORTH_A_LOOK);
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}

/** Milliseconds of a time that are within a span. */
function overlap(from: number, to: number, { since, until }: Span): number {
  return Math.max(0, Math.min(to, until) - Math.max(from, since));
}

/** Puts together what belongs to the same. */
function groupBy<T>(
  items: readonly T[],
  keyOf: (item: T) => string,
): Map<string, T[]> {
  const groups = new Map<string, T[]>();
  for (const item of items) {
    const group = groups.get(keyOf(item));
    if (group === undefined) groups.set(keyOf(item), [item]);
    else group.push(item);
  }
  return groups;
}

/** Why a machine took nothing within a span. */
function reasonsOf(absences: readonly Absence[], span: Span): Idleness[] {
  return [...groupBy(absences, ({ problem }) => problem)]
    .map(([why, times]) => ({
      why,
      times: times.length,
      seconds: sum(times.map((it) => overlap(it.from, it.until, span))) / 1000,
    }))
    .filter(({ seconds }) => seconds > 0)
    .sort((a, b) => b.seconds - a.seconds);
}

/** What a machine did, of its builds and of attempts there. */
function machineFigures(
  { machine, slots }: Capacity,
  builds: readonly JournalEntry[],
  attempts: readonly Attempt[],
  absences: readonly Absence[],
  span: Span,
): MachineFigures {
  const count = (...outcomes: readonly Outcome[]) =>
    builds.filter(({ outcome }) => outcomes.includes(outcome)).length;
  const total = (key: "bytesSent" | "bytesRetrieved") =>
    sum(builds.map((it) => it[key] ?? 0));
  const built = builds.filter(({ outcome }) => outcome === "built");
  const taken = attempts.map((it) => overlap(it.began, it.ended, span));
  const all = slots * (span.until - span.since);
  return {
    machine,
    slots,
    builds: builds.length,
    failed: count("failed", "timed-out"),
    lost: attempts.length - builds.length + count("lost"),
    used: Math.min(1, sum(taken) / all),
    overhead: median(built.map(overheadOf)),
    bytesSent: total("bytesSent"),
    bytesRetrieved: total("bytesRetrieved"),
    idle: reasonsOf(absences, span),
    foresight: foresightOf(builds),
  };
}

/** The listed machines, with the slots that were used, then other ones. */
export function capacities(
  listed: readonly Capacity[],
  entries: readonly JournalEntry[],
  absences: readonly Absence[] = [],
): Capacity[] {
  const slots = new Map(listed.map((it) => [it.machine, it.slots] as const));
  const note = (machine: string, least: number) =>
    slots.set(machine, Math.max(least, slots.get(machine) ?? 1));
  for (const entry of entries) {
    for (const { machine, slot } of attemptsOf(entry)) note(machine, slot + 1);
  }
  for (const { machine } of absences) note(machine, 1);
  return [...slots].map(([machine, slots]) => ({ machine, slots }));
}

function buildFigures(entry: JournalEntry): BuildFigures {
  const { name, derivation, machine, earlier, outcome } = entry;
  const times = phaseTimes(entry);
  return {
    name,
    derivation,
    machine,
    seconds: (times.at(-1)! - times[0]!) / 1000,
    attempts: earlier.length + 1,
    outcome,
    problem: entry.problem ?? earlier.at(-1)?.problem,
  };
}

/** How often machines failed a build. */
function misfortune({ attempts, outcome }: BuildFigures): number {
  return attempts - (outcome === "lost" ? 0 : 1);
}

/** The builds that are worth a look. */
function remarkable(entries: readonly JournalEntry[]) {
  const builds = entries.map(buildFigures)
    .sort((a, b) => b.seconds - a.seconds);
  const unlucky = builds.filter((it) => misfortune(it) > 0)
    .sort((a, b) => misfortune(b) - misfortune(a));
  return {
    longest: builds.slice(0, WORTH_A_LOOK),
    unluckiest: unlucky.slice(0, WORTH_A_LOOK),
  };
}

/** Builds by how they ended, of which there may be none. */
function countOutcomes(
  entries: readonly JournalEntry[],
): Record<Outcome, number> {
  const counts = OUTCOMES.map((outcome) =>
    [outcome, entries.filter((it) => it.outcome === outcome).length] as const
  );
  return Object.fromEntries(counts) as Record<Outcome, number>;
}

/** Seconds of all builds by phase. */
function sumPhases(entries: readonly JournalEntry[]): Record<Phase, number> {
  const each = entries.map(phaseSeconds);
  const sums = PHASES.map((phase) =>
    [phase, sum(each.map((seconds) => seconds[phase]))] as const
  );
  return Object.fromEntries(sums) as Record<Phase, number>;
}

/** Counts what happened in a span of time. */
export function countFigures(
  entries: readonly JournalEntry[],
  absences: readonly Absence[],
  machines: readonly Capacity[],
  span: Span,
): Figures {
  const builds = groupBy(entries, ({ machine }) => machine);
  const attempts = groupBy(entries.flatMap(attemptsOf), (it) => it.machine);
  const idle = groupBy(absences, ({ machine }) => machine);
  return {
    ...span,
    outcomes: countOutcomes(entries),
    phases: sumPhases(entries),
    machines: machines.map((capacity) => {
      const of = <T>(groups: Map<string, T[]>) =>
        groups.get(capacity.machine) ?? [];
      return machineFigures(
        capacity,
        of(builds),
        of(attempts),
        of(idle),
        span,
      );
    }),
    ...remarkable(entries),
    foresight: foresightOf(entries),
    surprises: worstSurprises(entries),
  };
}

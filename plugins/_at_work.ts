/**
 * Builds that are under way: how far they are, for how long still, and which
 * ones wait.
 *
 * @module
 */

import { derivationName, machineId, mebibytes, takenSlots } from "../mod.ts";
import type {
  Context,
  Machine,
  PastBuild,
  Screen,
  WaitingBuild,
} from "../mod.ts";
import { median } from "./_expectation.ts";
import { journalOf } from "./_journal.ts";
import type { ToldCourse } from "./_journal.ts";
import { formatDuration, formatTable, inOneLine } from "./_screen.ts";

/** A build in a slot; what another program does there is not known. */
export interface Work {
  /** File name of its derivation. */
  readonly derivation?: string | undefined;
  /** When it got the slot. */
  readonly since?: string | undefined;
  /** The number of the slot. */
  readonly slot?: number;
  /** What it is at, as far as it has told. */
  readonly phase?:
    | "connecting"
    | "waiting to send"
    | "sending"
    | "building"
    | "retrieving";
  /** How many bytes have moved of those that move. */
  readonly moved?: number;
  /** How many there are, where that is known. */
  readonly total?: number | undefined;
  /** How many move a second. */
  readonly rate?: number;
  /** For how many seconds it is being built. */
  readonly building?: number;
  /** How long that took before, in seconds. */
  readonly usual?: number | undefined;
}

/** How many earlier builds say how long one takes. */
const EARLIER = 10;

/** How long builds of a name took, on that machine where there were some. */
function usualTime(
  builds: readonly PastBuild[],
  id: string,
): number | undefined {
  const there = builds.filter(({ machine }) => machine === id);
  const counted = (there.length > 0 ? there : builds).slice(0, EARLIER);
  return median(counted.map(({ seconds }) => seconds));
}

/** What a build is at, and since when. */
function phaseOf(
  { began, connected, sent, built, total }: ToldCourse,
): readonly [phase: NonNullable<Work["phase"]>, begin: number] {
  if (built !== undefined) return ["retrieving", built];
  if (sent !== undefined) return ["building", sent];
  if (connected === undefined) return ["connecting", began];
  return [total === undefined ? "waiting to send" : "sending", connected];
}

/** How far a build is, by what it has told. */
function describeCourse(told: ToldCourse): Work {
  const { moved, slot, time, total } = told;
  const [phase, begin] = phaseOf(told);
  const work = { slot, phase };
  if (phase === "building") {
    return { ...work, building: Math.max(0, Date.now() - begin) / 1000 };
  }
  if (phase !== "sending" && phase !== "retrieving") return work;
  const rate = 1000 * moved / Math.max(1, time - begin);
  return { ...work, moved, total, rate };
}

/** What is done in a machine's slots: who holds none is not there. */
export function findWork(machine: Machine, context: Context): Work[] {
  const { observations, stateDirectory } = context;
  const taken = takenSlots(machine, stateDirectory);
  if (taken.length === 0) return [];
  const used = observations.slots();
  const courses = journalOf(context)?.courses();
  return taken.map((file): Work => {
    const use = used.find((it) => it.file === file);
    if (use === undefined) return {};
    const { derivation, time } = use;
    const told = courses?.get(file);
    const past = observations.history(derivationName(derivation));
    return {
      derivation,
      since: new Date(time).toISOString(),
      usual: usualTime(past, machineId(machine)),
      // Else that is of one that had the slot before, and was killed.
      ...(told && told.time >= time && describeCourse(told)),
    };
  });
}

/** Builds that wait: those that have a slot by now do not. */
export function findWaiting(
  work: readonly Work[],
  context: Context,
): WaitingBuild[] {
  const waiting = journalOf(context)?.waiting() ?? [];
  return waiting.filter(({ derivation }) =>
    !work.some((it) => it.derivation === derivation)
  );
}

/** For how long until now. */
function formatSince(time: number): string {
  return formatDuration(Math.max(0, Date.now() - time) / 1000);
}

/** How many bytes have moved, and how fast. */
function formatMoved({ moved, total, rate }: Work): string | undefined {
  if (moved === undefined) return undefined;
  const of = total === undefined ? "" : ` of ${mebibytes(total)}`;
  return `${mebibytes(moved)}${of} MiB, ${mebibytes(rate ?? 0)} MiB/s`;
}

/** For how long it is built still, as far as can be told. */
function formatLeft({ building = 0, usual }: Work): string | undefined {
  if (usual === undefined) return undefined;
  const left = usual - building;
  const time = formatDuration(Math.abs(left));
  return left >= 0 ? `about ${time} left` : `${time} longer than usual`;
}

/** Says of a build in a line what there is to say. */
export function describeBuild(work: Work): string {
  const { derivation, phase, since } = work;
  if (derivation === undefined) return "a build of another program's";
  const details = [
    phase === "building" ? undefined : phase,
    formatMoved(work),
    formatLeft(work),
  ].filter((it) => it !== undefined).join(", ");
  const name = inOneLine(derivationName(derivation));
  return `building ${name} for ${formatSince(Date.parse(since!))}` +
    (details && ` (${details})`);
}

/** What a build waits for. */
function describeWait({ why }: WaitingBuild): string {
  if (why === "busy") return "waits for a free slot";
  return why === "unreachable" ? "waits for a machine" : `waits: ${why}`;
}

/** Says in a line each which builds wait, and what for. */
export function describeWaiting(waiting: readonly WaitingBuild[]): string[] {
  return waiting.map((it) => {
    const name = inOneLine(derivationName(it.derivation));
    return `${name} ${describeWait(it)} for ${formatSince(it.since)}`;
  });
}

/** How many characters of a name are shown in a table. */
const LONGEST_NAME = 40;

/** The name of a build, where there is not much room. */
function shortName(derivation: string): string {
  const name = derivationName(derivation);
  if (name.length <= LONGEST_NAME) return name;
  return `${name.slice(0, LONGEST_NAME - 3)}...`;
}

/** How wide a bar is. */
const BAR = 14;

/** A bar of how far a build is in what it is at, if that can be told. */
function barOf(work: Work, screen: Screen): string {
  const { building = 0, moved, phase, total, usual } = work;
  if (moved !== undefined && total) return screen.bar(moved / total, BAR);
  if (phase !== "building" || !usual) return "";
  return screen.bar(building / usual, BAR);
}

/** A table of builds: those at work by machine, and those that wait. */
export function formatWork(
  work: ReadonlyMap<string, readonly Work[]>,
  waiting: readonly WaitingBuild[],
  lines: number,
  screen: Screen,
): string {
  const builds = [...work].flatMap(([machine, builds]) =>
    builds.map((it) => {
      const { derivation, phase, since, slot } = it;
      return [
        derivation === undefined ? "another's" : shortName(derivation),
        slot === undefined ? machine : `${machine}/${slot}`,
        phase ?? "",
        since === undefined ? "" : formatSince(Date.parse(since)),
        barOf(it, screen),
        formatMoved(it) ?? formatLeft(it) ?? "",
      ];
    })
  );
  const waits = waiting.map((it) => {
    const time = formatSince(it.since);
    return [shortName(it.derivation), "", describeWait(it), time, "", ""];
  });
  const rows = [...builds, ...waits];
  if (rows.length === 0) return "";
  const header = ["build", "machine", "at", "for", "", ""];
  const shown = rows.length > lines ? rows.slice(0, lines - 1) : rows;
  const more = rows.length - shown.length;
  if (more > 0) shown.push([`and ${more} more`, "", "", "", "", ""]);
  return formatTable([header, ...shown], screen);
}

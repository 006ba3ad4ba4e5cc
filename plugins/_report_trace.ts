/**
 * What `offload report --trace` writes: trace events, which Perfetto and
 * chrome://tracing show. A machine is a process there, and a slot a thread.
 *
 * @module
 */

import type { Absence } from "./_absences.ts";
import type { JournalEntry } from "./_journal.ts";
import { PHASES, phaseTimes } from "./_phases.ts";
import type { Capacity } from "./_report_figures.ts";
import { inOneLine } from "./_screen.ts";

/** An event, in the format of Chromium's traces; times are microseconds. */
export interface TraceEvent {
  /** What is shown of it. */
  readonly name: string;
  /** Kinds, with commas between them. */
  readonly cat?: string;
  /** X: it lasts `dur`; b and e: it begins and ends; M: it names a track. */
  readonly ph: "X" | "b" | "e" | "M";
  /** When, since 1970. */
  readonly ts: number;
  /** How long. */
  readonly dur?: number;
  /** The machine's place in the list, from 1. */
  readonly pid: number;
  /** The slot, from 1; 0: the machine itself. */
  readonly tid: number;
  /** Of what begins and ends: what belongs together. */
  readonly id?: string;
  /** What else there is to know. */
  readonly args?: Readonly<Record<string, string | number>>;
}

/** A file of them. */
export interface Trace {
  /** In no order that matters. */
  readonly traceEvents: readonly TraceEvent[];
  /** Unit to show times in. */
  readonly displayTimeUnit: "ms";
}

/** Names a track, and says where it stands. */
function nameTrack(
  kind: "process" | "thread",
  name: string,
  place: number,
  track: Pick<TraceEvent, "pid" | "tid">,
): TraceEvent[] {
  const event = { ph: "M", ts: 0, ...track } as const;
  return [
    { ...event, name: `${kind}_name`, args: { name } },
    { ...event, name: `${kind}_sort_index`, args: { sort_index: place } },
  ];
}

/** The tracks of a machine: itself, and each slot. */
function nameMachine(
  { machine, slots }: Capacity,
  index: number,
): TraceEvent[] {
  const pid = index + 1;
  const names = Array.from({ length: slots }, (_, slot) => `slot ${slot}`);
  return [
    ...nameTrack("process", inOneLine(machine), index, { pid, tid: 0 }),
    ...["took nothing", ...names].flatMap((name, tid) =>
      nameTrack("thread", name, tid, { pid, tid })
    ),
  ];
}

/** Something that lasts, from and to milliseconds. */
function lasting(
  [name, cat]: readonly [name: string, cat: string],
  [from, to]: readonly [from: number, to: number],
  track: Pick<TraceEvent, "pid" | "tid">,
  args: TraceEvent["args"] = {},
): TraceEvent {
  const [ts, dur] = [from * 1000, Math.max(0, to - from) * 1000];
  return { name: inOneLine(name), cat, ph: "X", ts, dur, ...track, args };
}

/** What there is to know of a build, where it is known. */
function argumentsOf(entry: JournalEntry): Record<string, string | number> {
  const { derivation, outcome, problem, earlier } = entry;
  const { items, bytesSent, bytesRetrieved } = entry;
  const known = Object.entries({
    derivation: inOneLine(derivation),
    outcome,
    problem: problem === undefined ? undefined : inOneLine(problem),
    attempts: earlier.length + 1,
    items,
    bytesSent,
    bytesRetrieved,
  }).filter((pair): pair is [string, string | number] => pair[1] !== undefined);
  return Object.fromEntries(known);
}

/** A build: its attempts, the phases of the last one, and its waiting. */
function traceBuild(
  entry: JournalEntry,
  trackOf: (machine: string, slot: number) => Pick<TraceEvent, "pid" | "tid">,
  id: string,
): TraceEvent[] {
  const { name, machine, slot, earlier, outcome } = entry;
  const times = phaseTimes(entry);
  const track = trackOf(machine, slot);
  const began = PHASES.indexOf("connecting");
  const phases = PHASES.slice(began).flatMap((phase, index) => {
    const [from, to] = times.slice(began + index);
    return to! > from! ? [lasting([phase, "phase"], [from!, to!], track)] : [];
  });
  // Several may wait at a time, which no thread does.
  const waiting = { name: inOneLine(name), cat: "waiting", id, ...track };
  return [
    { ...waiting, ph: "b", ts: times[0]! * 1000 },
    { ...waiting, ph: "e", ts: times[1]! * 1000 },
    ...earlier.map(({ machine, slot, began, ended, problem }) => {
      const args = { problem: inOneLine(problem) };
      const track = trackOf(machine, slot);
      return lasting([name, "build,attempt"], [began, ended], track, args);
    }),
    lasting(
      [name, `build,${outcome}`],
      [times[began]!, times.at(-1)!],
      track,
      argumentsOf(entry),
    ),
    ...phases,
  ];
}

/** Makes a trace of what happened on machines. */
export function makeTrace(
  entries: readonly JournalEntry[],
  absences: readonly Absence[],
  machines: readonly Capacity[],
): Trace {
  const pids = new Map(machines.map((it, index) => [it.machine, index + 1]));
  const trackOf = (machine: string, slot: number) => (
    { pid: pids.get(machine)!, tid: slot + 1 }
  );
  return {
    traceEvents: [
      ...machines.flatMap(nameMachine),
      ...absences.map(({ machine, from, until, problem }) =>
        lasting([problem, "took nothing"], [from, until], trackOf(machine, -1))
      ),
      ...entries.flatMap((entry, index) =>
        traceBuild(entry, trackOf, String(index))
      ),
    ],
    displayTimeUnit: "ms",
  };
}

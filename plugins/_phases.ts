/**
 * What a build goes through, and for how long.
 *
 * @module
 */

import type { JournalEntry } from "../mod.ts";

/** What a build does, one after another. */
export const PHASES = [
  "waiting",
  "failed attempts",
  "connecting",
  "sending",
  "building",
  "retrieving",
] as const;

/** One of them. */
export type Phase = typeof PHASES[number];

/**
 * The times between which the phases of a build lie: its beginning, and the end
 * of each, none before the one before, whatever clocks did.
 */
export function phaseTimes(entry: JournalEntry): number[] {
  const { asked, accepted, earlier, connected, sent, built, ended } = entry;
  const last = earlier.at(-1);
  const began = last === undefined ? accepted : entry.began ?? last.ended;
  const times = [asked, accepted, began, connected, sent, built, ended];
  let latest = asked;
  return times.map((time = ended) => {
    latest = Math.max(latest, Math.min(time, ended));
    return latest;
  });
}

/** Seconds that each phase of a build took. */
export function phaseSeconds(entry: JournalEntry): Record<Phase, number> {
  const times = phaseTimes(entry);
  const seconds = PHASES.map((phase, index) =>
    [phase, (times[index + 1]! - times[index]!) / 1000] as const
  );
  return Object.fromEntries(seconds) as Record<Phase, number>;
}

/** The same of those that it came to the end of. What failed was built. */
export function finishedPhases(
  entry: JournalEntry,
): Partial<Record<Phase, number>> {
  const { connected, sent, built, retrieved, earlier, outcome } = entry;
  const hasFailed = outcome === "failed" || outcome === "timed-out";
  const isFinished: Readonly<Record<Phase, boolean>> = {
    "waiting": true,
    "failed attempts": earlier.length > 0,
    "connecting": connected !== undefined,
    "sending": sent !== undefined,
    "building": built !== undefined || hasFailed && sent !== undefined,
    "retrieving": retrieved !== undefined,
  };
  const seconds = phaseSeconds(entry);
  return Object.fromEntries(
    PHASES.filter((phase) => isFinished[phase])
      .map((phase) => [phase, seconds[phase]]),
  );
}

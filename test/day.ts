/**
 * A journal that is made up, for tests of what is made of it.
 *
 * @module
 */

import type { Screen } from "../mod.ts";
import type { Absence } from "../plugins/_absences.ts";
import type { Attempt, JournalEntry } from "../plugins/_journal.ts";
import { makeEntry } from "./journal.ts";

/** When the days of these journals begin, in milliseconds since 1970. */
export const MORNING = Date.parse("2026-11-24T06:00:00Z");

/** Milliseconds since 1970 of so many seconds after the beginning. */
export function at(seconds: number): number {
  return MORNING + 1000 * seconds;
}

/** A screen that nobody looks at, or a wide terminal without colours. */
export function screen(isTerminal = false): Screen {
  return {
    isTerminal,
    paint: (_, text) => text,
    size: () => [1000, 1000],
    print: () => {},
    bar: () => "",
    progress: () => ({ step: () => {}, end: () => {} }),
  };
}

/** A build of a minute in the morning, with these fields. */
export function morningBuild(fields: Partial<JournalEntry> = {}): JournalEntry {
  return makeEntry({
    asked: MORNING,
    accepted: MORNING + 1000,
    began: MORNING + 1000,
    connected: MORNING + 2000,
    sent: MORNING + 5000,
    built: MORNING + 55_000,
    retrieved: MORNING + 59_000,
    ended: MORNING + 60_000,
    ...fields,
  });
}

/** What somebody might call a derivation, or a server say, to do harm. */
export const HOSTILE: readonly string[] = [
  "</script><script>globalThis.harm = 1</script>",
  "<img src=x onerror=globalThis.harm=1>",
  "\"onmouseover='globalThis.harm=1'",
  "<!--<script>",
  "]]></style>&amp;&lt;",
  "\x1b]0;harm\x07\x1b[2J\r\n\u0085\u2028\u202eharm",
  "${globalThis.harm = 1}`\\",
  "__proto__",
  "x".repeat(200),
];

/** Numbers that look like chance and are the same each time, from 0 to 1. */
export function chance(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state * 1_664_525 + 1_013_904_223) % 2 ** 32;
    return state / 2 ** 32;
  };
}

const NAMES = ["hello-2.12", "gcc-14.3.0", "python-numpy-2.3.1", "rust-1.88.0"]
  .concat("linux-libre-6.16", "texlive-bin-2025", "guile-3.0.9", "emacs-30.2")
  .concat("ungoogled-chromium-139.0", "profile", "ghc-aeson-2.2", "go-1.24");

const PROBLEMS = ["connection refused", "no answer within 30 s"]
  .concat("connection reset by peer", "host key has changed");

/** How builds end, the most well. */
function outcomeOf(number: number): JournalEntry["outcome"] {
  if (number < 0.93) return "built";
  if (number < 0.97) return "failed";
  if (number < 0.98) return "timed-out";
  return number < 0.99 ? "lost" : "interrupted";
}

/** Makes up a build in a slot, which begins at some time. */
function makeUp(
  machine: string,
  slot: number,
  began: number,
  earlier: readonly Attempt[],
  random: () => number,
): JournalEntry {
  const seconds = 1000 * (1 + 300 * random() ** 6);
  const connected = began + 10 + 300 * random();
  const sent = connected + 200 + seconds * random() / 4;
  const built = sent + seconds;
  const retrieved = built + 100 + seconds * random() / 5;
  const name = NAMES[Math.floor(NAMES.length * random())]!;
  const outcome = outcomeOf(random());
  const accepted = earlier[0]?.began ?? began;
  return {
    derivation: `/gnu/store/${"0".repeat(32)}-${name}.drv`,
    ...{ name, machine, slot, earlier, accepted, began, outcome },
    asked: accepted - 50 - 10_000 * random() ** 8,
    ...{ connected, sent },
    ...(outcome === "built" ? { built, retrieved } : {}),
    ...(outcome === "built" ? {} : { problem: "exit code 1" }),
    items: Math.floor(300 * random() ** 4),
    ended: outcome === "built" ? retrieved + 20 : built,
    bytesSent: Math.floor(2 ** 28 * random() ** 4),
    bytesRetrieved: Math.floor(2 ** 26 * random() ** 4),
  };
}

/** Makes up builds on machines, a few of which fail some of them. */
export function makeDay(
  builds: number,
  machines: number,
  slots: number,
): { entries: JournalEntry[]; absences: Absence[] } {
  const random = chance(builds);
  const free = Array.from(
    { length: machines * slots },
    () => MORNING + 60_000 * random(),
  );
  const absences: Absence[] = [];
  const entries: JournalEntry[] = [];
  while (entries.length < builds) {
    const from = Math.min(...free);
    const lane = free.indexOf(from);
    const machineOf = (lane: number) => `w${lane % machines + 1}:22`;
    const slotOf = (lane: number) => Math.floor(lane / machines);
    const [machine, slot] = [machineOf(lane), slotOf(lane)];
    const problem = PROBLEMS[Math.floor(PROBLEMS.length * random())]!;
    const ended = from + 3000 * random();
    const isLost = random() < 0.02;
    const until = ended + 10_000 * 2 ** Math.floor(6 * random());
    if (isLost) absences.push({ machine, from: ended, until, problem });
    const other = isLost
      ? free.indexOf(free.toSorted((a, b) => a - b)[1]!)
      : lane;
    const began = Math.max(free[other]!, ended);
    const earlier = isLost
      ? [{ machine, slot, began: from, ended, problem }]
      : [];
    const start = isLost ? began : from;
    const made = makeUp(
      machineOf(other),
      slotOf(other),
      start,
      earlier,
      random,
    );
    entries.push(made);
    free[other] = made.ended + 2000 * random();
    for (let it = lane % machines; isLost && it < free.length; it += machines) {
      free[it] = Math.max(free[it]!, until);
    }
  }
  entries.sort((a, b) => a.ended - b.ended);
  return { entries, absences };
}

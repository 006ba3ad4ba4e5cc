/**
 * Counts of what became of builds, which only grow: kept with the journal, of
 * which they outlive the bounds.
 *
 * @module
 */

import type { DatabaseSync } from "node:sqlite";
import type { JournalEntry } from "../mod.ts";
import { finishedPhases } from "./_phases.ts";
import { checkTypes } from "./_records.ts";
import type { Types } from "./_records.ts";

/** The bounds of what is counted together, in seconds; the last has none. */
export const BOUNDS: readonly number[] = [
  ...[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30],
  ...[100, 300, 1000, 3000, 10_000, 30_000, Infinity],
];

/** A count: of which machine, if of one, and of what. */
export interface Count {
  /** What is counted. */
  readonly name:
    | "builds"
    | "attempts"
    | "busy"
    | "sent"
    | "retrieved"
    | "phase"
    | "bound";
  /** NAME:PORT, or nothing where it is of all machines. */
  readonly machine: string;
  /** The outcome, or the phase and its bound. */
  readonly label: string;
  /** How often, or how much: seconds or bytes. */
  readonly value: number;
}

const COUNT_TYPES: Types = {
  name: "string",
  machine: "string",
  label: "string",
  value: "number",
};

/** The table. */
export const TALLY_SCHEMA = `
  DROP TABLE IF EXISTS tally;
  CREATE TABLE tally (
    name TEXT NOT NULL, machine TEXT NOT NULL, label TEXT NOT NULL,
    value REAL NOT NULL, PRIMARY KEY (name, machine, label)) WITHOUT ROWID;
`;

/** Adds what is in a JSON list of counts. */
export const TALLY = `
  INSERT INTO tally SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3
  FROM json_each(?) WHERE true
  ON CONFLICT DO UPDATE SET value = tally.value + excluded.value`;

/** Drops what is known of machines that are no longer used. */
export const TALLY_END = `
  DELETE FROM tally WHERE machine <> ''
  AND machine NOT IN (SELECT machine FROM used)`;

/** What a build adds, for that: each count as a list of its fields. */
export function countsOf(build: JournalEntry): string {
  const { machine, outcome, earlier, began, ended } = build;
  const counts: (readonly [Count["name"], string, string, number])[] = [
    ["builds", machine, outcome, 1],
    ["sent", machine, "", build.bytesSent ?? 0],
    ["retrieved", machine, "", build.bytesRetrieved ?? 0],
    ["busy", machine, "", Math.max(0, ended - (began ?? ended)) / 1000],
  ];
  if (outcome === "lost") counts.push(["attempts", machine, "", 1]);
  for (const { machine, began, ended } of earlier) {
    counts.push(["attempts", machine, "", 1]);
    counts.push(["busy", machine, "", Math.max(0, ended - began) / 1000]);
  }
  for (const [phase, seconds] of Object.entries(finishedPhases(build))) {
    const bound = BOUNDS.find((it) => seconds <= it);
    counts.push(["phase", "", phase, seconds]);
    counts.push(["bound", "", `${phase} ${bound}`, 1]);
  }
  return JSON.stringify(counts);
}

/** What was counted so far. */
export function readCounts(database: DatabaseSync): Count[] {
  return database.prepare("SELECT * FROM tally").all()
    .map((row) => checkTypes<Count>(row, COUNT_TYPES));
}

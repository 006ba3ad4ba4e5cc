/**
 * The part of the journal that tells when machines took no builds, and why:
 * after failures, when they are left alone, and whatever else somebody sees who
 * looks now and then.
 *
 * @module
 */

import type { DatabaseSync } from "node:sqlite";
import { checkAll, shorten, withoutNull } from "./_records.ts";
import type { Types } from "./_records.ts";

/** A time in which a machine took nothing; milliseconds since 1970. */
export interface Absence {
  /** The machine, NAME:PORT. */
  readonly machine: string;
  /** When it began. */
  readonly from: number;
  /** When it ended, or will. */
  readonly until: number;
  /** Why. */
  readonly problem: string;
}

/** Why machines take nothing now, by NAME:PORT; `undefined`: they could. */
export type Reasons = ReadonlyMap<string, string | undefined>;

/** The tables. */
export const ABSENCE_SCHEMA = `
  DROP TABLE IF EXISTS absence;
  DROP TABLE IF EXISTS look;
  CREATE TABLE absence (
    machine TEXT NOT NULL, start REAL NOT NULL, until REAL NOT NULL,
    problem TEXT NOT NULL);
  CREATE INDEX absence_machine ON absence (machine, until);
  CREATE INDEX absence_until ON absence (until);
  CREATE TABLE look (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, before REAL NOT NULL);
  INSERT INTO look VALUES (0, 0, 0);
`;

/**
 * How often somebody looks why machines take nothing, in ms; how long ago that
 * must be at least; and for how long it is taken for true, if nobody looks again.
 */
export const LOOKING = {
  interval: 10_000,
  least: 9000,
  lifetime: 30_000,
} as const;

/** How many times are kept, the latest ones. */
const KEPT = 100_000;

/** Claims a look, unless there was one; returns when the one before was. */
const CLAIM = `UPDATE look SET before = time, time = ?
  WHERE time NOT BETWEEN ? AND ? RETURNING before`;

/** Ends an absence: now, of that machine, which lasts longer than now. */
export const END_OF_ABSENCE =
  "UPDATE absence SET until = ? WHERE machine = ? AND until > ?";

const ABSENCE_TYPES: Types = {
  machine: "string",
  from: "time",
  until: "time",
  problem: "string",
};

/** Puts in that a machine takes nothing, and drops what is too long ago. */
function insert(
  machine: string,
  [from, until]: readonly [number, number],
  problem: string,
  database: DatabaseSync,
): void {
  const { lastInsertRowid } = database.prepare(
    "INSERT INTO absence VALUES (?, ?, ?, ?)",
  ).run(machine, from, until, shorten(problem));
  database.prepare("DELETE FROM absence WHERE rowid <= ?")
    .run(Number(lastInsertRowid) - KEPT);
}

/** Notes that a machine is left alone from now on: that is the reason then. */
export function insertAbsence(
  machine: string,
  until: number,
  problem: string,
  database: DatabaseSync,
): void {
  const now = Date.now();
  database.exec("BEGIN IMMEDIATE"); // closing it takes back what fails
  database.prepare(END_OF_ABSENCE).run(now, machine, now);
  insert(machine, [now, until], problem, database);
  database.exec("COMMIT");
}

/** Claims to look now: when the look before was; `undefined`: there was one. */
export function claimLook(database: DatabaseSync): number | undefined {
  const now = Date.now();
  const [look] = database.prepare(CLAIM).all(now, now - LOOKING.least, now);
  return look && checkAll<{ before: number }>(look, { before: "time" }).before;
}

/** What machines took nothing for since the look before, if that was lately. */
function recentAbsences(
  before: number,
  now: number,
  database: DatabaseSync,
): (Absence & { readonly id: number })[] {
  const wasLately = before > now - LOOKING.lifetime;
  return database.prepare(
    `SELECT rowid AS id, machine, start AS "from", until, problem FROM absence
     WHERE until > ? AND start <= ?`,
  ).all(wasLately ? before : now, now)
    .map((row) => checkAll(row, { ...ABSENCE_TYPES, id: "number" }));
}

/**
 * Notes why machines take nothing now. What was so at the look before, too, goes
 * on; that is written where it is about to end, or something has changed.
 */
export function saveReasons(
  reasons: Reasons,
  before: number,
  database: DatabaseSync,
): void {
  const now = Date.now();
  const until = now + LOOKING.lifetime;
  const begun = new Map<string, string>();
  for (const [machine, why] of reasons) {
    if (why !== undefined) begun.set(machine, shorten(why));
  }
  const ends: [until: number, id: number][] = [];
  for (const it of recentAbsences(before, now, database)) {
    if (!reasons.has(it.machine)) continue;
    const isSame = begun.get(it.machine) === it.problem;
    if (isSame) begun.delete(it.machine);
    const isEnding = it.until <= until - LOOKING.interval;
    if (isSame && isEnding) ends.push([until, it.id]);
    if (!isSame && it.until > now) ends.push([now, it.id]);
  }
  if (ends.length + begun.size === 0) return;
  const end = database.prepare("UPDATE absence SET until = ? WHERE rowid = ?");
  database.exec("BEGIN IMMEDIATE"); // closing it takes back what fails
  for (const [time, id] of ends) end.run(time, id);
  for (const [machine, why] of begun) {
    insert(machine, [now, until], why, database);
  }
  database.exec("COMMIT");
}

/** When machines took nothing from `since` to `until`, as far as that goes. */
export function readAbsences(
  since: number,
  until: number,
  database: DatabaseSync,
): Absence[] {
  return database.prepare(
    `SELECT machine, start AS "from", min(until, ?) AS until, problem
     FROM absence WHERE absence.until >= ? AND start <= ? ORDER BY start`,
  ).all(until, since, until)
    .map((row) => checkAll<Absence>(withoutNull(row), ABSENCE_TYPES));
}

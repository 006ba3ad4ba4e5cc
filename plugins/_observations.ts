/**
 * Observations that all our processes share, in a small database beside the
 * slots.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { rmSync } from "node:fs";
import { basename, dirname } from "node:path";
import process from "node:process";
import type { DatabaseSync, SQLInputValue } from "node:sqlite";
import {
  afterFailure,
  asOwner,
  clearWay,
  definitionOf,
  inodeOf,
  isWithin,
  machineId,
  makePrivate,
  makeStateDirectory,
  reason,
  UNANSWERED,
} from "../mod.ts";
import type {
  Facts,
  Log,
  Machine,
  MachineRecord,
  Observations,
  PastBuild,
  Settings,
  Slot,
  UsedSlot,
} from "../mod.ts";

import { END_OF_ABSENCE } from "./_absences.ts";
import { Database } from "./_database.ts";
import { statusOf } from "./_ground.ts";
import type { Status } from "./_ground.ts";
import { learnQuickness } from "./_expectation.ts";
import { SharedJournal } from "./_journal.ts";
import {
  checkTypes,
  PAST_TYPES,
  Records,
  SLOT_TYPES,
  toRecord,
  USE_TYPES,
} from "./_records.ts";
import type { Row, Types, Use } from "./_records.ts";

/** For how long a machine is believed to be this one or another, in ms. */
const IDENTITY_LIFETIME = 86_400_000;

/** For how long it is known when a machine last began a build, in ms. */
const USE_LIFETIME = 30 * 86_400_000;

/**
 * After how long, in ms, or how many items, what machines hold is noted anew.
 * What was noted before is believed until that is so again.
 */
const HELD_LIMITS = { age: 15 * 86_400_000, rows: 250_000 } as const;

/** How many builds are kept, the latest ones. */
const KEPT_BUILDS = 100_000;

/** How many new builds there are before old ones go. */
const PRUNED_BUILDS = 1000;

/** For how long a build speaks against its machine, in ms. */
const DOUBT_LIFETIME = 3_600_000;

/** For how long observations are kept in memory, in ms, before another try. */
const OBSERVATIONS_RETRY = { locked: 1000, other: 10_000 } as const;

/** Of what is wrong with a database that is sound. */
const UNUSABLE =
  /locked|full|readonly|read-only|I\/O|open|permission|^E[A-Z]+:/i;

/** What is noted of a build that succeeded. */
const NOTES_OF_BUILD = [
  "INSERT INTO build VALUES (?, ?, ?, ?, ?)",
  "INSERT OR IGNORE INTO held SELECT value FROM json_each(?)",
  "UPDATE machine SET failures = 0, until = 0, quickness = ? WHERE id = ?",
  "DELETE FROM doubt WHERE machine = ?",
  END_OF_ABSENCE,
] as const;

/** Begins to note anew what machines hold. */
const HELD_ANEW = `
  DROP TABLE held_before;
  ALTER TABLE held RENAME TO held_before;
  CREATE TABLE held (key INTEGER PRIMARY KEY);`;

/**
 * What stands for an item on a machine: a number of some 48 bits, since an index
 * of names is one that a new process reads for long. It begins with the item's
 * own hash, in digits that are a part of those that parseInt() knows.
 */
function heldKeys(id: string, paths: readonly string[]): number[] {
  const machine = createHash("sha256").update(id).digest().readUIntBE(0, 6);
  return paths.map((path) =>
    machine + (Number.parseInt(basename(path).slice(0, 9), 36) || 0)
  );
}

/**
 * What our processes see of machines and builds, shared in a small database
 * beside the slots. Losing it loses nothing but speed, so no method throws: one
 * that is damaged is replaced, and memory used for a while where none can be.
 */
export class SharedObservations implements Observations {
  readonly #file: string;
  readonly #log: Log;
  readonly #told = new Set<string>();
  #database: Database | undefined;
  #inode = "";
  #retry = 0;
  /** What became of builds. */
  readonly journal: SharedJournal = new SharedJournal((work) =>
    this.#use(work)
  );
  readonly #records = new Records();
  /** What went to memory, and others must learn, or take a build for dead. */
  readonly #unwritten: ((database: DatabaseSync) => void)[] = [];

  /** Keeps the database in `directory`, made when first needed, or memory. */
  constructor(directory: string, log: Log) {
    this.#file = `${directory}/observations.sqlite`;
    this.#log = log;
  }

  /** The database, or the one in memory until it is tried again. */
  #open(): DatabaseSync {
    const isMemory = performance.now() < this.#retry;
    const inode = isMemory ? "memory" : inodeOf(this.#file);
    // Another process may have replaced it, or somebody removed it.
    if (this.#database !== undefined && inode === this.#inode) {
      if (!isMemory) makePrivate(this.#file);
      return this.#database;
    }
    this.#close();
    this.#inode = inode;
    if (!isMemory) {
      makeStateDirectory(dirname(this.#file));
      clearWay(this.#file, "isFile");
      makePrivate(this.#file);
    }
    const name = isMemory ? ":memory:" : this.#file;
    this.#inode = isMemory ? inode : inodeOf(name);
    this.#database = new Database(name);
    this.#database.makeReady();
    if (!isMemory) {
      for (const notes = this.#unwritten; notes.length > 0; notes.shift()) {
        notes[0]!(this.#database); // where that fails, it is left
      }
    }
    return this.#database;
  }

  #close(): void {
    const database = this.#database;
    this.#database = undefined;
    database?.close();
  }

  /** Notes what a slot is used for, also where that is to be noted later. */
  #noteSlot(sql: string, ...values: SQLInputValue[]): void {
    const note = (database: DatabaseSync) =>
      void database.prepare(sql).run(...values);
    this.#use(note);
    if (this.#inode === "memory") this.#unwritten.push(note);
  }

  /** Says what is wrong: all once, and what an account may not not at all. */
  #tell(what: string, error: unknown): void {
    const text = `${what} '${this.#file}': ${reason(error)}`;
    const { code } = error as NodeJS.ErrnoException;
    const isQuiet = code === "EACCES" || code === "EPERM" ||
      /locked/.test(reason(error)) || this.#told.has(what);
    if (isQuiet) return this.#log.debug(text);
    this.#told.add(what);
    this.#log.warn(text);
  }

  /** Sees to it that the next try does better. */
  #recover(error: unknown, canReplace: boolean): void {
    const inode = this.#inode;
    this.#close();
    const isDamaged = error instanceof SyntaxError || // of JSON
      !UNUSABLE.test(reason(error));
    if (canReplace && isDamaged) {
      this.#tell("replacing the damaged", error);
      try {
        if (inodeOf(this.#file) === inode) rmSync(this.#file);
        return;
      } catch (cause) {
        error = cause;
      }
    }
    this.#tell("keeping observations in memory instead of", error);
    const { locked, other } = OBSERVATIONS_RETRY;
    const isLocked = /locked/.test(reason(error));
    this.#retry = performance.now() + (isLocked ? locked : other);
  }

  /**
   * Whether the database by that name is open, and this account's alone: then
   * there is nobody who could lead it anywhere.
   */
  #isAtHand(): boolean {
    if (!this.#database || performance.now() < this.#retry) return false;
    const [file, directory] = [this.#file, dirname(this.#file)].map(statusOf);
    const account = process.geteuid!();
    const isOurs = (stat: Status) =>
      stat.uid === account && (stat.mode & 0o077) === 0;
    return file !== undefined && inodeOf(this.#file, file) === this.#inode &&
      isOurs(file) && directory !== undefined && isOurs(directory);
  }

  /** Does some work with the database, whatever is wrong with that. */
  #use<T>(work: (database: DatabaseSync) => T): T {
    if (!this.#isAtHand()) return asOwner(this.#file, () => this.#try(work));
    try {
      return work(this.#database!);
    } catch (error) {
      return asOwner(this.#file, () => {
        this.#recover(error, true);
        return this.#try(work, 2);
      });
    }
  }

  #try<T>(work: (database: DatabaseSync) => T, attempts = 1): T {
    for (;; attempts++) {
      try {
        return work(this.#open());
      } catch (error) {
        if (attempts === 3) throw error;
        this.#recover(error, attempts === 1);
      }
    }
  }

  #query(sql: string, ...values: SQLInputValue[]): Row[] {
    return this.#use((it) => it.prepare(sql).all(...values) as Row[]);
  }

  #read<T extends object>(
    types: Types,
    sql: string,
    ...values: SQLInputValue[]
  ): T[] {
    return this.#use((database) =>
      database.prepare(sql).all(...values)
        .map((row) => checkTypes<T>(row, types))
    );
  }

  /** All that is known of machines, or of one, by NAME:PORT. */
  machines(id?: string): Map<string, MachineRecord> {
    const all = `SELECT *, (SELECT count(*) FROM doubt WHERE machine = id
      AND time BETWEEN ? AND ?) AS doubts FROM machine`;
    const now = Date.now();
    const times = [now - DOUBT_LIFETIME, now];
    return this.#use((database) => {
      const rows = id === undefined
        ? database.prepare(all).all(...times)
        : database.prepare(`${all} WHERE id = ?`).all(...times, id);
      // A value that is cut is damage as well.
      return new Map(
        (rows as Row[]).map((row) => [`${row.id}`, this.#records.of(row)]),
      );
    });
  }

  /** Claims the right to ask a machine; false where another process does. */
  claim(id: string, seconds: number): boolean {
    const now = Date.now();
    return this.#query(
      `INSERT INTO machine (id, asked) VALUES (?, ?)
       ON CONFLICT DO UPDATE SET asked = excluded.asked
       WHERE asked NOT BETWEEN ? AND excluded.asked RETURNING id`,
      id,
      now,
      now - seconds * 1000,
    ).length > 0;
  }

  /** Notes what a machine said of itself: it can be reached again. */
  saveFacts(id: string, facts: Facts): void {
    this.#query(
      `INSERT INTO machine (id, facts) VALUES (?, ?) ON CONFLICT DO UPDATE
       SET facts = excluded.facts, asked = 0,
       until = iif(problem = ?, 0, until),
       failures = iif(problem = ?, 0, failures)`,
      id,
      JSON.stringify(facts),
      UNANSWERED,
      UNANSWERED,
    );
    const now = Date.now();
    const sql = `${END_OF_ABSENCE} AND problem = ?`;
    this.#query(sql, now, id, now, UNANSWERED);
  }

  /** Notes that a machine failed. */
  saveFailure(machine: Machine, problem: string, settings: Settings): void {
    const id = machineId(machine);
    const until = this.#use((database) => {
      database.exec("BEGIN IMMEDIATE"); // closing it takes back what fails
      const [row] = database.prepare("SELECT * FROM machine WHERE id = ?")
        .all(id);
      const record = row && toRecord(row);
      const after = afterFailure(machine, record, problem, settings);
      if (after !== record) {
        database.prepare(
          `INSERT INTO machine (id, failures, until, problem, definition)
           VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
           SET failures = excluded.failures, until = excluded.until,
           problem = excluded.problem, definition = excluded.definition,
           asked = 0, facts = NULL`,
        ).run(id, after.failures, after.until, problem, after.definition);
      }
      database.exec("COMMIT");
      return after === record ? 0 : after.until;
    });
    if (until > 0) this.journal.saveAbsence(id, until, problem);
  }

  /** Notes that a build failed on a machine and did well on another one. */
  saveDoubt(id: string, derivation: string): void {
    const now = Date.now();
    this.#query(
      "DELETE FROM doubt WHERE time NOT BETWEEN ? AND ?",
      now - DOUBT_LIFETIME,
      now,
    );
    this.#query(
      "INSERT OR REPLACE INTO doubt VALUES (?, ?, ?)",
      id,
      derivation,
      now,
    );
  }

  /** Notes whether a machine is this one; another definition may not be. */
  saveIdentity(machine: Machine, isThis: boolean): void {
    this.#query(
      "INSERT OR REPLACE INTO own VALUES (?, ?, ?)",
      definitionOf(machine),
      Number(isThis),
      Date.now(),
    );
  }

  /** Whether a machine is this one, as far as is known. */
  identity(machine: Machine): boolean | undefined {
    const now = Date.now();
    const [row] = this.#query(
      "SELECT own FROM own WHERE definition = ? AND time BETWEEN ? AND ?",
      definitionOf(machine),
      now - IDENTITY_LIFETIME,
      now,
    );
    return row && row.own === 1;
  }

  /** The definitions of this machine that are known. */
  ownDefinitions(): Set<string> {
    const now = Date.now();
    const rows = this.#query(
      "SELECT definition FROM own WHERE own = 1 AND time BETWEEN ? AND ?",
      now - IDENTITY_LIFETIME,
      now,
    );
    return new Set(rows.map(({ definition }) => definition as string));
  }

  /** Notes a build that succeeded, and what its machine holds now. */
  saveBuild(
    machine: Machine,
    name: string,
    seconds: number,
    items: readonly string[],
  ): void {
    const now = Date.now();
    const id = machineId(machine);
    const [row] = this.#read<{ quickness: number | null }>(
      { quickness: "number" },
      "SELECT quickness FROM machine WHERE id = ?",
      id,
    );
    const before = row?.quickness ?? 1;
    const past = this.history(name);
    const quickness = learnQuickness(machine, before, seconds, past);
    // One that only gets what no other takes may have a speed of 0.
    const speed = machine.speed > 0 ? machine.speed * quickness : 1;
    const keys = JSON.stringify(heldKeys(id, items));
    const last = this.#use((database) => {
      // What is prepared beforehand makes nobody wait.
      const [build, held, failures, doubts, absence] = NOTES_OF_BUILD
        .map((sql) => database.prepare(sql));
      database.exec("BEGIN IMMEDIATE"); // closing it takes back what fails
      const { lastInsertRowid } = build!
        .run(name, id, seconds, speed, now);
      const { changes } = held!.run(keys);
      if (changes > 0) this.#countHeld(database, Number(changes), now);
      failures!.run(quickness, id);
      doubts!.run(id);
      absence!.run(now, id, now);
      database.exec("COMMIT");
      if (this.#inode !== "memory") this.#told.clear();
      return Number(lastInsertRowid);
    });
    if (last % PRUNED_BUILDS === 0) this.#prune(last);
  }

  /** Counts new rows of what machines hold, which begins anew at its limits. */
  #countHeld(database: DatabaseSync, added: number, now: number): void {
    const [row] = database.prepare(
      `INSERT INTO noted VALUES (0, ?, ?) ON CONFLICT DO UPDATE
       SET rows = rows + excluded.rows RETURNING *`,
    ).all(now, added);
    const noted = checkTypes<{ rows: number; since: number }>(
      row!,
      { rows: "number", since: "time" },
    );
    const isYoung = isWithin(now - noted.since, 0, HELD_LIMITS.age);
    if (isYoung && noted.rows < HELD_LIMITS.rows) return;
    database.exec(HELD_ANEW);
    database.prepare("UPDATE noted SET rows = 0, since = ?").run(now);
  }

  /** Drops the oldest builds, and what outlived its use. */
  #prune(last: number): void {
    this.#query("DELETE FROM build WHERE rowid <= ?", last - KEPT_BUILDS);
    const now = Date.now();
    const day = now - IDENTITY_LIFETIME;
    this.#query("DELETE FROM own WHERE time NOT BETWEEN ? AND ?", day, now);
    const month = now - USE_LIFETIME;
    this.#query("DELETE FROM used WHERE time NOT BETWEEN ? AND ?", month, now);
    this.#query(
      `DELETE FROM machine WHERE max(until, asked) < ?
       AND id NOT IN (SELECT machine FROM used)`,
      month,
    );
  }

  /** Earlier builds of a name, the latest first. */
  history(name: string): PastBuild[] {
    return this.#pastBuilds("WHERE name = ? ORDER BY time DESC", name);
  }

  /** The same of names that differ in their version; of all for "". */
  similar(name: string): PastBuild[] {
    if (name === "") return this.#pastBuilds("ORDER BY rowid DESC");
    // What follows all digits.
    const range = [`${name}-0`, `${name}-:`];
    const where = "WHERE name >= ? AND name < ? ORDER BY time DESC";
    return this.#pastBuilds(where, ...range);
  }

  #pastBuilds(which: string, ...values: SQLInputValue[]): PastBuild[] {
    const sql = `SELECT machine, seconds, speed FROM build ${which} LIMIT 20`;
    return this.#read<PastBuild>(PAST_TYPES, sql, ...values);
  }

  /** Those of `paths` that a machine was seen to hold. */
  held(id: string, paths: readonly string[]): string[] {
    const keys = heldKeys(id, paths);
    const rows = this.#query(
      `WITH asked AS MATERIALIZED (SELECT value AS key FROM json_each(?))
       SELECT key FROM held JOIN asked USING (key)
       UNION SELECT key FROM held_before JOIN asked USING (key)`,
      JSON.stringify(keys),
    );
    const held = new Set(rows.map(({ key }) => key));
    return paths.filter((_, index) => held.has(keys[index]!));
  }

  /** Notes how fast a machine received a lot, in bytes a second. */
  saveBandwidth(id: string, bandwidth: number): void {
    this.#query(
      `UPDATE machine SET bandwidth = coalesce((bandwidth + ?) / 2, ?)
       WHERE id = ?`,
      bandwidth,
      bandwidth,
      id,
    );
  }

  /** What slots were used for last, unless that was noted to have ended. */
  slots(): UsedSlot[] {
    return this.#read(SLOT_TYPES, "SELECT * FROM slot");
  }

  /** Notes what a machine's slot is used for from now on. */
  useSlot(
    id: string,
    { file, inode }: Pick<Slot, "file" | "inode">,
    derivation: string,
  ): void {
    this.#noteSlot(
      "INSERT OR REPLACE INTO slot VALUES (?, ?, ?, ?)",
      file,
      derivation,
      Date.now(),
      inode,
    );
    this.#query("INSERT OR REPLACE INTO used VALUES (?, ?)", id, Date.now());
  }

  /** When machines last began a build, by NAME:PORT. */
  lastUsed(): Map<string, number> {
    const rows = this.#read<Use>(USE_TYPES, "SELECT * FROM used");
    return new Map(rows.map(({ machine, time }) => [machine, time]));
  }

  /** Notes that a slot is no longer used for a derivation. */
  releaseSlot(file: string, derivation: string): void {
    this.#noteSlot(
      "DELETE FROM slot WHERE file = ? AND derivation = ?",
      file,
      derivation,
    );
    this.#query("UPDATE wait SET released = vain");
  }

  /** Whether waiting for a slot was not in vain since the last was freed. */
  mayWait(): boolean {
    return this.#query("SELECT 1 FROM wait WHERE vain <= released").length > 0;
  }

  /** Notes that waiting for a slot was in vain. */
  saveVainWait(): void {
    this.#query("UPDATE wait SET vain = released + 1");
  }
}

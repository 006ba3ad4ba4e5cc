/**
 * The journal: what became of each build, and how far those are that are under
 * way. It is kept with the other observations, and as they are: losing it loses
 * no build.
 *
 * @module
 */

import type { DatabaseSync } from "node:sqlite";
import { derivationName } from "../mod.ts";
import type {
  Attempt,
  Context,
  Course,
  Journal,
  JournalEntry,
  Settings,
  Slot,
  WaitingBuild,
  WaitingOrder,
} from "../mod.ts";
import { checkTypes } from "./_records.ts";
import type { Row, Types } from "./_records.ts";
import { inOneLine } from "./_screen.ts";
import {
  countsOf,
  readCounts,
  TALLY,
  TALLY_END,
  TALLY_SCHEMA,
} from "./_tally.ts";
import type { Count } from "./_tally.ts";

export type { Attempt, Course, JournalEntry } from "../mod.ts";

/** A time in which a machine was left alone; milliseconds since 1970. */
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

/** What the journal has of some time. */
export interface JournalPart {
  /** Builds, in the order in which they have ended. */
  readonly entries: JournalEntry[];
  /** When machines were left alone, in order. */
  readonly absences: Absence[];
}

/** How far a build was at a time, in milliseconds since 1970. */
export interface ToldCourse extends Course {
  /** When it told that. */
  readonly time: number;
}

/** The tables; what is under way is made anew with them. */
export const JOURNAL_SCHEMA = `
  DROP TABLE IF EXISTS journal;
  DROP TABLE IF EXISTS absence;
  DROP TABLE IF EXISTS course;
  DROP TABLE IF EXISTS waiting;
  CREATE TABLE journal (
    id INTEGER PRIMARY KEY, derivation TEXT NOT NULL, machine TEXT NOT NULL,
    slot INTEGER NOT NULL, earlier TEXT NOT NULL, asked REAL NOT NULL,
    accepted REAL NOT NULL, began REAL, connected REAL, sent REAL, built REAL,
    retrieved REAL, ended REAL NOT NULL, items INTEGER, bytesSent REAL,
    bytesRetrieved REAL, outcome TEXT NOT NULL, problem TEXT);
  CREATE INDEX journal_ended ON journal (ended);
  CREATE TABLE absence (
    machine TEXT NOT NULL, start REAL NOT NULL, until REAL NOT NULL,
    problem TEXT NOT NULL);
  CREATE INDEX absence_machine ON absence (machine, until);
  CREATE TABLE course (
    file TEXT PRIMARY KEY, time REAL NOT NULL, course TEXT NOT NULL);
  CREATE TABLE waiting (
    derivation TEXT PRIMARY KEY, since REAL NOT NULL, seen REAL NOT NULL,
    why TEXT NOT NULL, rank REAL, machine TEXT, system TEXT, features TEXT);
  ${TALLY_SCHEMA}
`;

/** How often a build that is under way tells how far it is, in ms. */
const TELLING = 1000;

/**
 * For how long a build that is not heard of still waits, in ms. guix-daemon asks
 * again every 5 s, if it gets to it.
 */
const WAIT_LIFETIME = {
  urgent: 8000,
  shown: 15_000,
  counted: 60_000,
} as const;

/** How many builds that wait are looked at to see which ones go first. */
const URGENT = 64;

/** How many builds there are before old ones go. */
const PRUNED = 100;

/** How long a problem may be, in characters. */
const LONGEST_PROBLEM = 1000;

const COLUMNS = [
  ...["derivation", "machine", "slot", "earlier", "asked", "accepted"],
  ...["began", "connected", "sent", "built", "retrieved", "ended", "items"],
  ...["bytesSent", "bytesRetrieved", "outcome", "problem"],
] as const;

const INSERTION = `INSERT INTO journal (${COLUMNS.join(", ")})
  VALUES (${COLUMNS.map(() => "?").join(", ")})`;

const END_OF_WAIT =
  "DELETE FROM waiting WHERE derivation = ? RETURNING since, seen";

/** Ends an absence: now, of that machine, which lasts longer than now. */
export const END_OF_ABSENCE =
  "UPDATE absence SET until = ? WHERE machine = ? AND until > ?";

/** How a build can end. */
export const OUTCOMES: readonly JournalEntry["outcome"][] = [
  "built",
  "failed",
  "timed-out",
  "lost",
  "interrupted",
];

const ATTEMPT_TYPES: Types = {
  machine: "string",
  slot: "number",
  began: "time",
  ended: "time",
  problem: "string",
};

const ENTRY_TYPES: Types = {
  ...ATTEMPT_TYPES,
  derivation: "string",
  asked: "time",
  accepted: "time",
  connected: "time",
  sent: "time",
  built: "time",
  retrieved: "time",
  items: "number",
  bytesSent: "number",
  bytesRetrieved: "number",
  outcome: "string",
};

const COURSE_TYPES: Types = {
  ...ENTRY_TYPES,
  moved: "number",
  total: "number",
};

const ABSENCE_TYPES: Types = {
  machine: "string",
  from: "time",
  until: "time",
  problem: "string",
};

const WAITING_TYPES: Types = {
  derivation: "string",
  since: "time",
  seen: "time",
  why: "string",
  rank: "number",
  machine: "string",
  system: "string",
  features: "string",
};

const WAITING_NEEDED = ["derivation", "since", "seen", "why", "features"];

/** Leaves out what a row does not have. */
function withoutNull(row: object): object {
  return Object.fromEntries(
    Object.entries(row).filter(([, value]) => value !== null),
  );
}

/** Makes a build that waits of a row. */
function toWaiting(row: object): WaitingBuild {
  const { features, ...its } = checkAll<
    Omit<WaitingBuild, "features"> & { features: string }
  >(withoutNull(row), WAITING_TYPES, WAITING_NEEDED);
  return { ...its, features: features.split(",").filter(Boolean) };
}

/** The same, which has to have some of it. */
function checkAll<T extends object>(
  value: object,
  types: Types,
  needed: readonly string[] = Object.keys(types),
): T {
  const lacking = needed.find((name) => !(name in value));
  if (lacking !== undefined) throw new SyntaxError(`'${lacking}' is missing`);
  return checkTypes<T>(value, types);
}

/** Reads a list of attempts, such as is kept with a build. */
function parseAttempts(text: string): Attempt[] {
  const list: unknown = JSON.parse(text);
  if (!Array.isArray(list)) throw new SyntaxError("'earlier' is no list");
  return list.map((it) => checkAll<Attempt>(Object(it), ATTEMPT_TYPES));
}

/** Makes a build of a row. */
function toEntry({ id: _, earlier, ...row }: Row): JournalEntry {
  const needed = [
    ...["derivation", "machine", "slot", "asked", "accepted", "ended"],
    "outcome",
  ];
  const own = withoutNull(row);
  const entry = checkAll<JournalEntry>(own, ENTRY_TYPES, needed);
  if (!OUTCOMES.includes(entry.outcome)) throw new SyntaxError("no outcome");
  return {
    ...entry,
    name: derivationName(entry.derivation),
    earlier: parseAttempts(`${earlier}`),
  };
}

/** Makes a course of what a build has told. */
function toCourse(text: string): Course {
  const needed = ["machine", "slot", "began", "moved"];
  return checkAll<Course>(Object(JSON.parse(text)), COURSE_TYPES, needed);
}

/** A message as it is kept. */
function shorten(problem: string): string {
  return inOneLine(problem.slice(0, LONGEST_PROBLEM));
}

/** Since when a build was asked for that may have waited. */
function waitedSince({ asked }: JournalEntry, row: Row | undefined): number {
  if (row === undefined) return asked;
  const types = { since: "time", seen: "time" } as const;
  const { since, seen } = checkAll<Record<keyof typeof types, number>>(
    withoutNull(row),
    types,
  );
  const isSame = seen >= asked - WAIT_LIFETIME.counted;
  return isSame ? Math.min(since, asked) : asked;
}

/** What is kept of an attempt. */
function toAttempt(
  { machine, slot, began, ended, problem }: Attempt,
): Attempt {
  return { machine, slot, began, ended, problem: shorten(problem) };
}

/** The journal in the database of all our processes. */
export class SharedJournal implements Journal {
  readonly #use: <T>(work: (database: DatabaseSync) => T) => T;

  /** Keeps it where `use` leads, which copes with all that is wrong there. */
  constructor(use: <T>(work: (database: DatabaseSync) => T) => T) {
    this.#use = use;
  }

  /** Tells how far a build in a slot is, until what this returns is called. */
  follow({ file }: Pick<Slot, "file">, course: Course): () => void {
    let told = "";
    const tell = () => {
      const text = JSON.stringify(course);
      if (text === told) return;
      told = text;
      this.#run(
        "INSERT OR REPLACE INTO course VALUES (?, ?, ?)",
        ...[file, Date.now(), text],
      );
    };
    // Most builds are over before anybody could have looked.
    const timer = setInterval(tell, TELLING);
    return () => {
      clearInterval(timer);
      if (told !== "") this.#run("DELETE FROM course WHERE file = ?", file);
    };
  }

  /**
   * How far builds in slots were last, by the files of these. One that has been
   * killed has left what it told.
   */
  courses(): Map<string, ToldCourse> {
    return this.#use((database) => {
      const rows = database.prepare("SELECT * FROM course").all();
      return new Map(rows.map((row) => {
        const { time } = checkAll<ToldCourse>(row, { time: "time" });
        return [`${row.file}`, { ...toCourse(`${row.course}`), time }] as const;
      }));
    });
  }

  /** Notes that a build waits: what for, and how it stands among others. */
  saveWait(
    derivation: string,
    why: string,
    { rank, machine, system, features = [] }: WaitingOrder = {},
  ): void {
    const now = Date.now();
    this.#run(
      `INSERT INTO waiting VALUES (?, ?, ?, ?, ?, ?, ?, ?)
       ON CONFLICT DO UPDATE
       SET since = iif(seen BETWEEN ? AND excluded.seen, since, excluded.since),
       seen = excluded.seen, why = excluded.why, machine = excluded.machine,
       rank = excluded.rank`,
      ...[derivation, now, now, why, rank ?? null, machine ?? null],
      ...[system ?? null, features.join(",")],
      now - WAIT_LIFETIME.counted,
    );
  }

  /** For how many seconds a build has waited. */
  waited(derivation: string): number {
    const now = Date.now();
    const [row] = this.#waiting(
      "derivation = ? AND seen BETWEEN ? AND ?",
      ...[derivation, now - WAIT_LIFETIME.counted, now],
    );
    return Math.max(0, now - (row?.since ?? now)) / 1000;
  }

  /** How many builds a second have ended in the last minute. */
  pace(): number {
    const now = Date.now();
    const sql =
      "SELECT count(*) AS ended FROM journal WHERE ended BETWEEN ? AND ?";
    const [row] = this.#use((database) =>
      database.prepare(sql).all(now - 60_000, now)
    );
    return Number(row!.ended) / 60;
  }

  /** The most urgent ones of the builds that wait: who waits gains. */
  urgent(): WaitingBuild[] {
    const now = Date.now();
    return this.#waiting(
      `rank IS NOT NULL AND seen BETWEEN ? AND ?
       ORDER BY rank - since / 1000 DESC LIMIT ?`,
      ...[now - WAIT_LIFETIME.urgent, now, URGENT],
    );
  }

  #waiting(
    which: string,
    ...values: readonly (string | number)[]
  ): WaitingBuild[] {
    return this.#use((database) =>
      database.prepare(`SELECT * FROM waiting WHERE ${which}`).all(...values)
        .map(toWaiting)
    );
  }

  /** Builds that wait for a slot, those that wait the longest first. */
  waiting(): WaitingBuild[] {
    const now = Date.now();
    return this.#waiting(
      "seen BETWEEN ? AND ? ORDER BY since",
      ...[now - WAIT_LIFETIME.shown, now],
    );
  }

  /** Notes a build that is over; returns all that is known of it. */
  save(build: JournalEntry, settings: Settings): JournalEntry {
    const { problem } = build;
    const known: JournalEntry = {
      ...build,
      earlier: build.earlier.map(toAttempt),
      ...(problem !== undefined && { problem: shorten(problem) }),
    };
    return this.#use((database) => {
      // What is prepared beforehand makes nobody wait.
      const [wait, insertion, tally] = [END_OF_WAIT, INSERTION, TALLY]
        .map((sql) => database.prepare(sql));
      database.exec("BEGIN IMMEDIATE"); // closing it takes back what fails
      const asked = waitedSince(known, wait!.all(known.derivation)[0]);
      const entry = { ...known, asked };
      const row = { ...entry, earlier: JSON.stringify(entry.earlier) };
      const values = COLUMNS.map((name) => row[name] ?? null);
      const last = Number(insertion!.run(...values).lastInsertRowid);
      tally!.run(countsOf(entry));
      if (last % PRUNED === 0) this.#prune(last, settings, database);
      database.exec("COMMIT");
      return entry;
    });
  }

  /** Drops what is beyond the bounds. */
  #prune(
    last: number,
    { journalBuilds, journalLifetime }: Settings,
    database: DatabaseSync,
  ): void {
    const now = Date.now();
    const oldest = now - 1000 * journalLifetime;
    for (
      const [sql, value] of [
        ["DELETE FROM journal WHERE id <= ?", last - journalBuilds],
        ["DELETE FROM journal WHERE ended < ?", oldest],
        // The clock was set back.
        ["DELETE FROM journal WHERE ended > ?", now],
        ["DELETE FROM absence WHERE until < ?", oldest],
        ["DELETE FROM waiting WHERE seen < ?", now - WAIT_LIFETIME.counted],
      ] as const
    ) database.prepare(sql).run(value);
    database.exec(TALLY_END);
  }

  /** Notes that a machine is left alone from now on. */
  saveAbsence(machine: string, until: number, problem: string): void {
    this.#run(
      "INSERT INTO absence VALUES (?, ?, ?, ?)",
      ...[machine, Date.now(), until, shorten(problem)],
    );
  }

  /** What the journal has of the time from `since` to `until`. */
  read(since: number, until: number): JournalPart {
    return this.#use((database) => {
      const entries = database.prepare(
        "SELECT * FROM journal WHERE ended BETWEEN ? AND ? ORDER BY ended, id",
      ).all(since, until).map((row) => toEntry(row as Row));
      const absences = database.prepare(
        `SELECT machine, start AS "from", until, problem FROM absence
         WHERE until >= ? AND start <= ? ORDER BY start`,
      ).all(since, until)
        .map((row) => checkAll<Absence>(withoutNull(row), ABSENCE_TYPES));
      return { entries, absences };
    });
  }

  /** What was counted of all builds so far. */
  counts(): Count[] {
    return this.#use(readCounts);
  }

  #run(sql: string, ...values: readonly (string | number | null)[]): void {
    this.#use((database) => void database.prepare(sql).run(...values));
  }
}

/** The journal that all our processes share, if this one has it. */
export function journalOf(
  { observations: { journal } }: Pick<Context, "observations">,
): SharedJournal | undefined {
  return journal instanceof SharedJournal ? journal : undefined;
}

/**
 * What the journal has of the builds that ended from `since` to `until`, in
 * milliseconds since 1970, and of the machines that were left alone then.
 */
export function readJournal(
  context: Pick<Context, "observations">,
  since: number,
  until: number = Date.now(),
): JournalPart {
  return journalOf(context)?.read(since, until) ??
    { entries: [], absences: [] };
}

/**
 * The journal: what became of each build, and how far those are that are under
 * way. It is kept with the other observations, and as they are: losing it loses
 * no build.
 *
 * @module
 */

import { basename, dirname } from "node:path";
import type { DatabaseSync } from "node:sqlite";
import { clearInterval, setInterval } from "node:timers";
import { cleanUp, derivationName, EXIT, reason } from "../mod.ts";
import type {
  Attempt,
  Candidate,
  Context,
  Course,
  Journal,
  JournalEntry,
  OffloadError,
  Settings,
  Slot,
  UsedSlot,
  WaitingBuild,
  WaitingOrder,
  Work,
} from "../mod.ts";
import {
  ABSENCE_SCHEMA,
  claimLook,
  insertAbsence,
  LOOKING,
  readAbsences,
  saveReasons,
} from "./_absences.ts";
import type { Absence, Reasons } from "./_absences.ts";
import { expectationOf } from "./_expectation.ts";
import { checkAll, shorten, withoutNull } from "./_records.ts";
import type { Row, Types } from "./_records.ts";
import {
  countsOf,
  readCounts,
  TALLY,
  TALLY_END,
  TALLY_SCHEMA,
} from "./_tally.ts";
import type { Count } from "./_tally.ts";

export type { Attempt, Course, JournalEntry } from "../mod.ts";

/** What the journal has of some time. */
export interface JournalPart {
  /** Builds, in the order in which they have ended. */
  readonly entries: JournalEntry[];
  /** When machines took nothing, and why, in order. */
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
  DROP TABLE IF EXISTS course;
  DROP TABLE IF EXISTS waiting;
  CREATE TABLE journal (
    id INTEGER PRIMARY KEY, derivation TEXT NOT NULL, machine TEXT NOT NULL,
    slot INTEGER NOT NULL, earlier TEXT NOT NULL, asked REAL NOT NULL,
    accepted REAL NOT NULL, began REAL, connected REAL, sent REAL, built REAL,
    retrieved REAL, ended REAL NOT NULL, items INTEGER, bytesSent REAL,
    bytesRetrieved REAL, expected REAL, outcome TEXT NOT NULL, problem TEXT);
  CREATE INDEX journal_ended ON journal (ended);
  CREATE TABLE course (
    file TEXT PRIMARY KEY, time REAL NOT NULL, course TEXT NOT NULL);
  CREATE TABLE waiting (
    derivation TEXT PRIMARY KEY, since REAL NOT NULL, seen REAL NOT NULL,
    why TEXT NOT NULL, rank REAL, machine TEXT, system TEXT, features TEXT);
  ${ABSENCE_SCHEMA}
  ${TALLY_SCHEMA}
`;

/**
 * How often a build that is under way tells how far it is, in ms; and that it is
 * there still, where that is the same.
 */
const TELLING = { news: 1000, same: 10_000 } as const;

/**
 * For how long a build that is not heard of still waits, in ms. guix-daemon asks
 * again every 5 s, if it gets to it.
 */
const WAIT_LIFETIME = {
  urgent: 15_000,
  shown: 15_000,
  counted: 600_000,
} as const;

/** How many builds that wait are looked at to see which ones go first. */
const URGENT = 64;

/** How many builds there are before old ones go. */
const PRUNED = 100;

const COLUMNS = [
  ...["derivation", "machine", "slot", "earlier", "asked", "accepted"],
  ...["began", "connected", "sent", "built", "retrieved", "ended", "items"],
  ...["bytesSent", "bytesRetrieved", "expected", "outcome", "problem"],
] as const;

const INSERTION = `INSERT INTO journal (${COLUMNS.join(", ")})
  VALUES (${COLUMNS.map(() => "?").join(", ")})`;

const END_OF_WAIT =
  "DELETE FROM waiting WHERE derivation = ? RETURNING since, seen";

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
  expected: "number",
  outcome: "string",
};

const COURSE_TYPES: Types = {
  ...ENTRY_TYPES,
  moved: "number",
  total: "number",
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

/** Makes a build that waits of a row. */
function toWaiting(row: object): WaitingBuild {
  const { features, ...its } = checkAll<
    Omit<WaitingBuild, "features"> & { features: string }
  >(withoutNull(row), WAITING_TYPES, WAITING_NEEDED);
  return { ...its, features: features.split(",").filter(Boolean) };
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

/** Prepares to put in a build; what that returns does, and numbers it. */
function prepareEntry(
  database: DatabaseSync,
): (entry: JournalEntry) => number {
  const [insertion, tally] = [INSERTION, TALLY]
    .map((sql) => database.prepare(sql));
  return (entry) => {
    const row = { ...entry, earlier: JSON.stringify(entry.earlier) };
    const values = COLUMNS.map((name) => row[name] ?? null);
    tally!.run(countsOf(entry));
    return Number(insertion!.run(...values).lastInsertRowid);
  };
}

/** A build whose hook was killed, as far as it has told what it came to. */
function killedEntry(
  { file, derivation, time }: UsedSlot,
  told: ToldCourse | undefined,
): JournalEntry {
  const machine = basename(dirname(file));
  const own = told !== undefined && told.time >= time ? told : undefined;
  const began = own?.began ?? time;
  return {
    ...{ machine, slot: Number(basename(file)), ...own, began },
    ...{ derivation, name: derivationName(derivation), earlier: [] },
    ...{ asked: began, accepted: began, ended: own?.time ?? time },
    ...{ outcome: "interrupted", problem: "its hook was killed" },
  };
}

/** How a build has ended, by the error that it has ended with. */
function outcomeOf(
  error: unknown,
  { signal }: Context,
): JournalEntry["outcome"] {
  if (error === undefined) return "built";
  if (signal.aborted) return "interrupted";
  const { exitCode } = error as Partial<OffloadError>;
  if (exitCode === EXIT.buildFailed) return "failed";
  return exitCode === EXIT.timedOut ? "timed-out" : "lost";
}

/** What is known of a build that has just ended. */
function entryOf(
  { derivation, asked, accepted, courses }: Work,
  error: unknown,
  context: Context,
): JournalEntry {
  const isGivenUp = (it: Course): it is Course & Attempt => !!it.problem;
  return {
    ...courses.at(-1)!,
    derivation,
    name: derivationName(derivation),
    asked,
    accepted,
    earlier: courses.slice(0, -1).filter(isGivenUp),
    ended: Date.now(),
    outcome: outcomeOf(error, context),
    ...(error !== undefined && { problem: reason(error) }),
  };
}

/** Notes how long a build was expected to take where it has a slot now. */
function noteExpected(course: Course, at: Candidate | undefined): void {
  const expectation = at && expectationOf(at);
  if (expectation === undefined) return;
  course.expected = expectation.transfer + expectation.build;
}

/** The journal in the database of all our processes. */
export class SharedJournal implements Journal {
  readonly #use: <T>(work: (database: DatabaseSync) => T) => T;
  #watched?: Parameters<Journal["watch"]>;
  #watching?: ReturnType<typeof setInterval>;
  #nextLook = 0;

  /** Keeps it where `use` leads, which copes with all that is wrong there. */
  constructor(use: <T>(work: (database: DatabaseSync) => T) => T) {
    this.#use = use;
  }

  /**
   * Tells how far a build in a slot is, until what this returns is called; notes
   * what was expected of the machine that was chosen for it.
   */
  follow(
    { file }: Pick<Slot, "file">,
    course: Course,
    at?: Candidate,
  ): () => void {
    noteExpected(course, at);
    let told = "";
    let time = 0;
    const tell = () => {
      const text = JSON.stringify(course);
      const now = Date.now();
      if (text === told && now - time < TELLING.same) return;
      [told, time] = [text, now];
      this.#run(
        "INSERT OR REPLACE INTO course VALUES (?, ?, ?)",
        ...[file, now, text],
      );
    };
    // Most builds are over before anybody could have looked.
    const timer = setInterval(tell, TELLING.news);
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
       rank = excluded.rank, system = excluded.system,
       features = excluded.features`,
      ...[derivation, now, now, why, rank ?? null, machine ?? null],
      ...[system ?? null, features.join(",")],
      now - WAIT_LIFETIME.counted,
    );
  }

  /** Notes that a build does not wait any more. */
  endWait(derivation: string): void {
    this.#run("DELETE FROM waiting WHERE derivation = ?", derivation);
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
       AND NOT EXISTS (SELECT 1 FROM slot
         WHERE slot.derivation = waiting.derivation AND time >= seen)
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
      const wait = database.prepare(END_OF_WAIT);
      const insert = prepareEntry(database);
      database.exec("BEGIN IMMEDIATE"); // closing it takes back what fails
      const asked = waitedSince(known, wait.all(known.derivation)[0]);
      const entry = { ...known, asked };
      const last = insert(entry);
      if (last % PRUNED === 0) this.#prune(last, settings, database);
      database.exec("COMMIT");
      return entry;
    });
  }

  /**
   * Notes a build whose hook was killed, by what that has told: when it was last
   * heard of is then its end.
   */
  saveKilled(use: UsedSlot, settings: Settings): void {
    const told = this.courses().get(use.file);
    const entry = killedEntry(use, told);
    this.#use((database) => {
      const noted = database.prepare(
        "SELECT 1 FROM journal WHERE ended >= ? AND derivation = ? LIMIT 1",
      );
      const insert = prepareEntry(database);
      database.exec("BEGIN IMMEDIATE"); // closing it takes back what fails
      if (noted.all(use.time, use.derivation).length === 0) {
        const last = insert(entry);
        if (last % PRUNED === 0) this.#prune(last, settings, database);
      }
      database.prepare("DELETE FROM course WHERE file = ?").run(use.file);
      database.exec("COMMIT");
    });
  }

  /** Notes a build that has ended, with an error or without. */
  end(work: Work, error: unknown, context: Context): JournalEntry {
    const build = entryOf(work, error, context);
    let known = build;
    const { log, settings } = context;
    cleanUp(log, () => known = this.save(build, settings));
    return known;
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
        ["DELETE FROM absence WHERE start > ?", now],
        ["DELETE FROM waiting WHERE seen < ?", now - WAIT_LIFETIME.counted],
      ] as const
    ) database.prepare(sql).run(value);
    database.exec(TALLY_END);
  }

  /** Notes that a machine is left alone from now on. */
  saveAbsence(machine: string, until: number, problem: string): void {
    this.#use((it) => insertAbsence(machine, until, problem, it));
  }

  /**
   * Notes why machines take nothing: soon, and now and then for as long as this
   * process is there. Of all our processes one does.
   */
  watch(...watched: Parameters<Journal["watch"]>): void {
    this.#watched = watched;
    this.#watching ??= setInterval(() => this.#look(), LOOKING.interval)
      .unref();
    this.#look();
  }

  async #look(): Promise<void> {
    if (performance.now() < this.#nextLook) return;
    this.#nextLook = performance.now() + LOOKING.least;
    const watched = this.#watched!;
    try {
      const before = this.#use(claimLook);
      if (before === undefined) return;
      const { lookAtMachines } = await import("./_idle.ts");
      this.saveReasons(await lookAtMachines(...watched), before);
    } catch (error) {
      const [, , { log }] = watched;
      log.debug(`why machines take nothing: ${reason(error)}`);
    }
  }

  /** Notes why machines take nothing now; `before` is when that last was. */
  saveReasons(reasons: Reasons, before: number): void {
    this.#use((it) => saveReasons(reasons, before, it));
  }

  /** What the journal has of the time from `since` to `until`. */
  read(since: number, until: number): JournalPart {
    return this.#use((database) => {
      const entries = database.prepare(
        "SELECT * FROM journal WHERE ended BETWEEN ? AND ? ORDER BY ended, id",
      ).all(since, until).map((row) => toEntry(row as Row));
      const absences = readAbsences(since, until, database);
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
 * milliseconds since 1970, and of the machines that took nothing then.
 */
export function readJournal(
  context: Pick<Context, "observations">,
  since: number,
  until: number = Date.now(),
): JournalPart {
  return journalOf(context)?.read(since, until) ??
    { entries: [], absences: [] };
}

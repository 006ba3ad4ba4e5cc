/**
 * The database of what our processes see of machines and builds: its tables, and
 * how it is opened.
 *
 * @module
 */

import { DatabaseSync } from "node:sqlite";
import type { StatementSync } from "node:sqlite";
import { JOURNAL_SCHEMA } from "./_journal.ts";

// The journal is in memory: whatever file lay beside the database would be of
// the next one, too, when that is replaced, and what is mapped can be cut off.
const OBSERVATIONS_PRAGMAS = `
  PRAGMA busy_timeout = 250;
  PRAGMA journal_mode = MEMORY;
  PRAGMA synchronous = OFF;
`;

/** Another number here makes the tables anew that changed. */
const OBSERVATIONS_VERSION = 6;

const OBSERVATIONS_SCHEMA = `
  DROP TABLE IF EXISTS machine;
  DROP TABLE IF EXISTS build;
  CREATE TABLE IF NOT EXISTS machine (
    id TEXT PRIMARY KEY, facts TEXT, failures INTEGER NOT NULL DEFAULT 0,
    until REAL NOT NULL DEFAULT 0, problem TEXT NOT NULL DEFAULT '',
    definition TEXT NOT NULL DEFAULT '',
    asked REAL NOT NULL DEFAULT 0, bandwidth REAL, quickness REAL);
  CREATE TABLE IF NOT EXISTS build (
    name TEXT, machine TEXT, seconds REAL, speed REAL, time REAL);
  CREATE INDEX IF NOT EXISTS build_name ON build (name, time);
  DROP TABLE IF EXISTS held;
  DROP TABLE IF EXISTS slot;
  CREATE TABLE held (key INTEGER PRIMARY KEY);
  CREATE TABLE IF NOT EXISTS held_before (key INTEGER PRIMARY KEY);
  CREATE TABLE IF NOT EXISTS noted (
    id INTEGER PRIMARY KEY, since REAL NOT NULL, rows INTEGER NOT NULL);
  CREATE TABLE slot (
    file TEXT PRIMARY KEY, derivation TEXT, time REAL, inode TEXT);
  CREATE TABLE IF NOT EXISTS own (
    definition TEXT PRIMARY KEY, own INTEGER NOT NULL, time REAL NOT NULL);
  CREATE TABLE IF NOT EXISTS doubt (
    machine TEXT, derivation TEXT, time REAL, PRIMARY KEY (machine, derivation))
    WITHOUT ROWID;
  CREATE TABLE IF NOT EXISTS used (machine TEXT PRIMARY KEY, time REAL);
  CREATE TABLE IF NOT EXISTS wait (
    id INTEGER PRIMARY KEY, released REAL NOT NULL, vain REAL NOT NULL);
  INSERT OR IGNORE INTO wait VALUES (0, 0, 0);
  ${JOURNAL_SCHEMA}
  PRAGMA user_version = ${OBSERVATIONS_VERSION};
`;

/** Views and triggers are not ours: what reads and writes would run them. */
const OBSERVATIONS_STATE = `
  SELECT user_version AS version, (SELECT count(*) FROM sqlite_schema
    WHERE type NOT IN ('table', 'index')) AS code
  FROM pragma_user_version`;

/** Which version the tables are of; `code` counts what would be run. */
function stateOf(database: DatabaseSync): { version: number; code: number } {
  return database.prepare(OBSERVATIONS_STATE).all()[0] as ReturnType<
    typeof stateOf
  >;
}

/** Makes the tables, unless another process has meanwhile: it may use them. */
function makeTables(database: DatabaseSync): void {
  database.exec("BEGIN IMMEDIATE"); // closing it takes back what fails
  const isDone = stateOf(database).version === OBSERVATIONS_VERSION;
  if (!isDone) database.exec(OBSERVATIONS_SCHEMA);
  database.exec("COMMIT");
}

/** Such a database, which has each statement prepared but once. */
export class Database extends DatabaseSync {
  readonly #statements = new Map<string, StatementSync>();

  /** Makes the tables, unless they are there. */
  makeReady(): void {
    this.exec(OBSERVATIONS_PRAGMAS);
    const { version, code } = stateOf(this);
    if (code !== 0) throw new SyntaxError("it holds what would be run");
    // Who only opens it writes nothing, and so waits for nobody.
    if (version !== OBSERVATIONS_VERSION) makeTables(this);
  }

  override prepare(sql: string): StatementSync {
    const statement = this.#statements.get(sql) ?? super.prepare(sql);
    this.#statements.set(sql, statement);
    return statement;
  }

  override close(): void {
    this.#statements.clear();
    super.close();
  }
}

/**
 * What rows of the observations hold, which others may have written: a value of
 * another type is damage.
 *
 * @module
 */

import type { SQLOutputValue } from "node:sqlite";
import { isWithin } from "../mod.ts";
import type { Facts, MachineRecord } from "../mod.ts";
import { inOneLine } from "./_screen.ts";

/** A row of the database. */
export type Row = Record<string, SQLOutputValue>;

/** The latest time that there is, in milliseconds since 1970. */
const LATEST_TIME = 8.64e15;

/** Types of values, by name; a time is a number of milliseconds since 1970. */
export type Types = Readonly<
  Record<string, "string" | "number" | "object" | "time">
>;

/**
 * Sees that what somebody else wrote has those types, where it is not null.
 *
 * @throws {SyntaxError} where it has not, which is damage as well.
 */
export function checkTypes<T extends object>(
  value: object,
  types: Types,
): T {
  for (const name in types) {
    const type = types[name]!;
    const it = (value as Record<string, unknown>)[name] ?? undefined;
    if (it === undefined) continue;
    const expected = type === "time" ? "number" : type;
    const isNoTime = type === "time" &&
      !isWithin(it, -LATEST_TIME, LATEST_TIME);
    if (typeof it !== expected || isNoTime) {
      throw new SyntaxError(`'${name}' is no ${type}`);
    }
  }
  return value as T;
}

/** The same of a value that has to have some of it, or all. */
export function checkAll<T extends object>(
  value: object,
  types: Types,
  needed: readonly string[] = Object.keys(types),
): T {
  const lacking = needed.find((name) => !(name in value));
  if (lacking !== undefined) throw new SyntaxError(`'${lacking}' is missing`);
  return checkTypes<T>(value, types);
}

/** How long a message may be that is kept, in characters. */
const LONGEST_MESSAGE = 1000;

/** A message as it is kept. */
export function shorten(message: string): string {
  return inOneLine(message.slice(0, LONGEST_MESSAGE));
}

/** Leaves out what a row does not have. */
export function withoutNull(row: object): object {
  return Object.fromEntries(
    Object.entries(row).filter(([, value]) => value !== null),
  );
}

const FACTS_TYPES: Types = {
  time: "time",
  roundTrip: "number",
  login: "number",
  load: "number",
  cores: "number",
  memory: "number",
  clock: "number",
  uname: "string",
  socket: "string",
  pressure: "object",
  store: "object",
  build: "object",
};

const FACTS_PARTS: Types = {
  cpu: "number",
  io: "number",
  memory: "number",
  bytes: "number",
  inodes: "number",
};

function toFacts(text: string): Facts {
  const facts = JSON.parse(text);
  checkTypes({ facts }, { facts: "object" });
  checkTypes(facts, FACTS_TYPES);
  for (const part of [facts.pressure, facts.store, facts.build]) {
    checkTypes(part ?? {}, FACTS_PARTS);
    // JSON has null where a number of inodes is infinite.
    if (part?.inodes === null) part.inodes = Infinity;
  }
  return facts;
}

const RECORD_TYPES: Types = {
  id: "string",
  facts: "string",
  problem: "string",
  definition: "string",
  failures: "number",
  until: "time",
  asked: "time",
  bandwidth: "number",
  quickness: "number",
  doubts: "number",
};

/** Of a build that was done. */
export const PAST_TYPES: Types = {
  machine: "string",
  seconds: "number",
  speed: "number",
};

/** Of what a slot was used for. */
export const SLOT_TYPES: Types = {
  file: "string",
  derivation: "string",
  time: "time",
  inode: "string",
};

/** When a machine last began a build. */
export type Use = { readonly machine: string; readonly time: number };

/** The same of that. */
export const USE_TYPES: Types = { machine: "string", time: "time" };

/** Makes a record of a row. */
export function toRecord(row: Row): MachineRecord {
  checkTypes(row, RECORD_TYPES);
  const { id: _, facts, bandwidth, quickness, ...record } = row;
  return {
    ...record as unknown as MachineRecord,
    bandwidth: bandwidth as number | null ?? undefined,
    quickness: quickness as number | null ?? undefined,
    facts: facts === null ? undefined : toFacts(`${facts}`),
  };
}

/** Whether rows of the same columns hold the same. */
function isSame(before: Row, row: Row): boolean {
  for (const name in row) if (row[name] !== before[name]) return false;
  return true;
}

/** Records of machines, made anew of those rows alone that have changed. */
export class Records {
  readonly #known = new Map<string, { row: Row; record: MachineRecord }>();

  /** What a row says. */
  of(row: Row): MachineRecord {
    const known = this.#known.get(`${row.id}`);
    if (known && isSame(known.row, row)) return known.record;
    const record = toRecord(row);
    this.#known.set(`${row.id}`, { row, record });
    return record;
  }
}

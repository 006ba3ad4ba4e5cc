/**
 * Offload: a drop-in replacement for `guix offload`, the build hook with which
 * GNU Guix's guix-daemon sends builds to other machines over SSH.
 *
 * With deps.ts it is a complete offloader of plain machine files; plugins/ has
 * all else, found by its name when it is needed. What is called stands above
 * what calls it:
 *
 *     Types
 *     Errors and log
 *     Machine file      evaluateMachineFile(), machineFromFields()
 *     Plugins           readSettings(), loadPlugins(), listMachines()
 *     Wire              openStore(), queryPathInfos(), operateAll()
 *     Archives          exportBundle(), restoreItem(), checkSignature()
 *     Synchronization   acquireBuildSlot(), afterFailure(), openObservations()
 *     Sessions          openSession(), openRemoteDaemon()
 *     Scheduling        parseRequest(), surveyMachines(), exclusion(), rank(),
 *                       chooseBuildMachine(), chooseReadyMachine()
 *     Offloading        clearLeftovers(), sendAndBuild(), retrieveOutputs(),
 *                       attempt(), offload(), processRequest()
 *     Commands          what plugins/_commands.ts runs
 *     Entry             runHook(), main()
 *
 * A request comes in at the end: runHook() reads it, processRequest() answers
 * it and has offload() do the build, by as many attempt()s as it takes.
 *
 * @module
 */

import { Buffer, isUtf8 } from "node:buffer";
import { createHash, randomUUID } from "node:crypto";
import type { Hash } from "node:crypto";
import {
  chmodSync,
  closeSync,
  existsSync,
  fstatSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmdirSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import type { Stats } from "node:fs";
import { createConnection } from "node:net";
import { userInfo } from "node:os";
import { basename, dirname } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { DatabaseSync } from "node:sqlite";
import type { Duplex } from "node:stream";
import {
  clearInterval,
  clearTimeout,
  setInterval,
  setTimeout,
} from "node:timers"; // those of Deno 2.7 itself lack unref()
import { setTimeout as delay } from "node:timers/promises";
import { format } from "node:util";
import {
  become,
  chunksOf,
  ciphers,
  convertPrivateKey,
  glob,
  HOST_KEY_ALGORITHMS,
  isProgram,
  makeDirectories,
  openSocket,
  pieceSizeOf,
  quicken,
  renameToBytes,
  reopen,
  runtimeProblem,
  sleep,
  ssh2,
  symlinkBytes,
  tellReached,
  verifyEcdsa,
  verifyRsa,
  withoutSign,
} from "./deps.ts";
import type { ConnectConfig } from "./deps.ts";

// ---------------------------------------------------------------------------
// Types
// ---------------------------------------------------------------------------

/**
 * A build machine: a `<build-machine>` record of guix/scripts/offload.scm,
 * with the names of its fields in camel case.
 */
export interface Machine {
  /** Host name or address, of which libssh overlooks `USER@` and brackets. */
  readonly name: string;
  /** TCP port of its SSH server. */
  readonly port: number;
  /** System types it builds for, for example `x86_64-linux`. */
  readonly systems: readonly string[];
  /** Account to log in to. */
  readonly user: string;
  /** File name of the SSH private key to log in with. */
  readonly privateKey: string;
  /** Its SSH host key as OpenSSH writes it: `ssh-ed25519 AAAA… comment`. */
  readonly hostKey: string;
  /** The reference's list of SSH compression methods; `none` for never. */
  readonly compression: string;
  /** Compression level, 1 to 9. */
  readonly compressionLevel: number;
  /** File name of the guix-daemon socket there. */
  readonly daemonSocket: string;
  /**
   * Normalized load (0 to 1) from which on it gets no build; `false`, like 1
   * or more, for any.
   */
  readonly overloadThreshold: number | false;
  /** How many builds it runs at a time: its slots. */
  readonly parallelBuilds: number;
  /** Relative speed: a machine of 2 is preferred to one of 1. */
  readonly speed: number;
  /** Features that derivations may require, for example `kvm`. */
  readonly features: readonly string[];
}

/** A build that the daemon offers. */
export interface Request {
  /** Whether the daemon has a free slot and would build it itself. */
  readonly wantsLocal: boolean;
  /** The system type it is for. */
  readonly system: string;
  /** File name of the derivation. */
  readonly derivation: string;
  /** The features that it requires. */
  readonly features: readonly string[];
}

/** The environment's variables. */
export type Variables = Readonly<Record<string, string | undefined>>;

/** Limits that a build runs under, in seconds. */
export interface BuildOptions {
  /** How long it may print nothing. */
  readonly maxSilentTime: number;
  /** How long it may take. */
  readonly buildTimeout: number;
}

// ---------------------------------------------------------------------------
// Errors and log
// ---------------------------------------------------------------------------

/** What the hook's exit code tells the daemon. */
export const EXIT = {
  transient: 1,
  usage: 2,
  buildFailed: 100,
  timedOut: 101,
} as const;

/** What went wrong, for programs: these words stay what they are. */
export const ERROR_CODES = [
  // here
  "usage",
  "configuration",
  "local",
  "plugin",
  // there
  "connect",
  "host-key",
  "private-key",
  "authentication",
  "daemon",
  "command",
  "late",
  // of what is sent
  "unauthorized",
  "signature",
  "protocol",
  // anything else
  "failed",
] as const;

/** One of them. */
export type ErrorCode = typeof ERROR_CODES[number];

/** The code of an error, whoever threw it. */
export function codeOf(error: unknown): ErrorCode {
  const { code } = (error ?? {}) as Partial<OffloadError>;
  return ERROR_CODES.find((known) => known === code) ?? "failed";
}

/** What an {@linkcode OffloadError} may carry beside its message. */
export interface OffloadErrorOptions extends ErrorOptions {
  /** What the user can do about it. */
  readonly hint?: string | undefined;
  /** Exit code of a process that ends with it: 1 unless told. */
  readonly exitCode?: number | undefined;
  /** What went wrong, for programs: its class's code unless told. */
  readonly code?: ErrorCode | undefined;
}

/** An expected failure, told in Guix's voice: lower case, with the reason. */
export class OffloadError extends Error {
  /** Its class, for stack traces. */
  override readonly name: string = "OffloadError";
  /** What the user can do about it. */
  readonly hint: string | undefined;
  /** 100: the build failed; 101: it timed out; else transient. */
  readonly exitCode: number;
  /** What went wrong, for programs. */
  readonly code: ErrorCode;
  /** What it is where nothing is told. */
  static readonly code: ErrorCode = "failed";

  /** Makes an error with its message and, where known, cause and hint. */
  constructor(message: string, options: OffloadErrorOptions = {}) {
    super(message, options);
    this.hint = options.hint;
    this.exitCode = options.exitCode ?? 1;
    this.code = options.code ?? new.target.code;
  }
}

/** A failure of this machine: no other build machine would help. */
export class LocalError extends OffloadError {
  /** What is wrong, for programs. */
  static override readonly code = "local";
}

/** A peer says what it must not: asking it again would not help. */
class ProtocolError extends OffloadError {
  static override readonly code = "protocol";
}

/** A builder was killed, which the build may have done as well as the machine. */
class Killed extends OffloadError {}

/** More came than is taken, which the build may have made as well. */
class Excess extends ProtocolError {}

/** What was waited for takes too long. */
export class Late extends OffloadError {
  /** What is wrong, for programs. */
  static override readonly code = "late";
}

/** Waits for work that may take so many seconds, else fails with `message`. */
export async function within<T>(
  seconds: number,
  work: Promise<T>,
  message: string,
): Promise<T> {
  const late = Promise.withResolvers<never>();
  const fail = () => late.reject(new Late(message));
  const timer = setTimeout(fail, seconds * 1000);
  try {
    return await Promise.race([work, late.promise]);
  } finally {
    clearTimeout(timer);
  }
}

/** Cleans up, each step whatever became of the one before. */
export function cleanUp(log: Log, ...steps: readonly (() => unknown)[]): void {
  for (const step of steps) {
    try {
      step();
    } catch (error) {
      log.warn(error);
    }
  }
}

/** Seconds after which it is told again what is waited for. */
const REMINDER = 10;

/**
 * Does work that may be silent, and says now and then what is waited for:
 * guix-daemon ends a hook that says nothing for `max-silent-time`.
 */
export async function remind<T>(
  what: string,
  log: Log,
  work: () => Promise<T>,
): Promise<T> {
  const start = performance.now();
  const tell = () => {
    const seconds = Math.round((performance.now() - start) / 1000);
    log.info(`still ${what} after ${seconds} s...`);
  };
  const timer = setInterval(tell, REMINDER * 1000);
  try {
    return await work();
  } finally {
    clearInterval(timer);
  }
}

/** How a piece of text is meant. */
export type Style = "good" | "bad" | "doubtful" | "heading";

/** A piece of text that is coloured, where there are colours. */
export interface Styled {
  /** What it means. */
  readonly style: Style;
  /** As it came: it is cleaned before it is coloured. */
  readonly text: string;
}

/** Where a request or a command writes its messages, a line each. */
export interface Log {
  /** Progress that every user sees; what follows is of the same line. */
  info(message: string, ...more: readonly (string | Styled)[]): void;
  /** A trace that clients parse, such as `@ build-remote`. */
  trace(line: string): void;
  /** Something is wrong, and work goes on. */
  warn(problem: unknown): void;
  /** Something is wrong, and the work ends. */
  error(problem: unknown): void;
  /** For debugging: written only where OFFLOAD_DEBUG is set. */
  debug(message: string): void;
}

/** Where a command shows what it has to say. */
export interface Screen {
  /** Whether a person looks at it: only then there are tables. */
  readonly isTerminal: boolean;
  /** Colours a text, which is clean, where there are colours. */
  paint(style: Style, text: string): string;
  /** How many columns and lines there is room for. */
  size(): readonly [columns: number, lines: number];
  /** Draws how much of something is done, 0 to 1. */
  bar(share: number, columns: number): string;
  /** Writes text as it is. */
  print(text: string): void;
  /** Shows whoever waits how much of some work is done, until it ends. */
  progress(what: string, total: number): Progress;
}

/** Work that is shown to whoever waits for it. */
export interface Progress {
  /** Another part is done. */
  step(): void;
  /** All is done, or given up. */
  end(): void;
}

/** The system's error codes, as strerror says them. */
const SYSTEM_ERRORS: Readonly<Record<string, string>> = {
  EACCES: "permission denied",
  ECONNREFUSED: "connection refused",
  ECONNRESET: "connection reset by peer",
  EHOSTUNREACH: "no route to host",
  EISDIR: "it is a directory",
  ENETUNREACH: "network is unreachable",
  ENOENT: "no such file or directory",
  ENOSPC: "no space left on device",
  ENOTFOUND: "name or service not known",
  EPERM: "operation not permitted",
  ETIMEDOUT: "connection timed out",
};

/** Says in a few words what a problem is. */
export function reason(problem: unknown): string {
  if (!(problem instanceof Error)) return String(problem);
  const { code } = problem as NodeJS.ErrnoException;
  return SYSTEM_ERRORS[code ?? ""] ?? problem.message;
}

/** `1 store item`, `2 store items`. */
export function count(items: number): string {
  return `${items} store item${items === 1 ? "" : "s"}`;
}

/** Bytes, in MiB, as messages have them. */
export function mebibytes(bytes: number): string {
  return (bytes / 2 ** 20).toFixed(1);
}

/** Longest message that is shown whole, in characters. */
const LONGEST_MESSAGE = 65536;

/**
 * Text from outside as messages may contain it: what controls a terminal is
 * taken out, and no further line begins as an answer to guix-daemon would.
 */
export function printable(text: string): string {
  return text.slice(0, LONGEST_MESSAGE).replace(
    /\p{Cc}/gu,
    (it) => it === "\n" ? "\n  " : it === "\t" ? it : "?",
  );
}

// ---------------------------------------------------------------------------
// Machine file
// ---------------------------------------------------------------------------

/** Something wrong with a machine file or with one machine in it. */
export interface Problem {
  /** A machine with an error is left out, one with a warning is not. */
  readonly severity: "warning" | "error";
  /** What is wrong, after `FILE:LINE:COLUMN: ` where the place is known. */
  readonly message: string;
  /** What to do about it. */
  readonly hint?: string | undefined;
  /** How it is told, where not as what it is. */
  readonly toldAs?: "warning" | undefined;
  /** What is wrong, for programs: `configuration` unless told. */
  readonly code?: ErrorCode | undefined;
}

/** What a machine file evaluates to. */
export interface MachineFile {
  /** Its name. */
  readonly file: string;
  /** The machines, in the order of the file. */
  readonly machines: readonly Machine[];
  /** Warnings and errors. */
  readonly problems: readonly Problem[];
  /** Place and name of what only Guile can evaluate; no machines then. */
  readonly needsGuile?: string;
}

/** Far more than 10,000 machines take; lists of lists may hold still more. */
const maximumSteps = 5_000_000;

/** Of parentheses: the stack has room for more. */
const maximumDepth = 500;

/** Thrown, with place and text, at what only Guile can be sure about. */
class NeedsGuile extends Error {}

/** A piece of program and where it begins; exact numbers are bigints. */
type Form = { at: number; value: Atom | Form[] };
type Atom = boolean | bigint | number | string | symbol;
/** A value; undefined is the unspecified one. */
type Value = undefined | Atom | Value[] | BuildMachine;
/** A `<build-machine>` record and where it was made. */
type BuildMachine = { at: number; fields: Record<string, Value> };
/** Variables by name; those of the scopes around are its prototypes. */
type Scope = { [name: symbol]: Value };
/** A place in the text and what is bound there. */
type Site = { source: Source; at: number; scope: Scope };

/** A file under evaluation, and how far that is. */
type Source = {
  readonly file: string;
  readonly text: string;
  /** The user's home directory in the password database. */
  readonly home: string | undefined;
  /** What the file defines. */
  readonly globals: Scope;
  position: number;
  depth: number;
  steps: number;
  /** What `place` found last: it mostly goes on from there. */
  located: { at: number; line: number; column: number };
};

/** Says where a position is, as Guile counts: lines from 1, columns from 0. */
function place({ file, text, located }: Source, at: number, first = 0): string {
  if (at < located.at) Object.assign(located, { at: 0, line: 1, column: 0 });
  for (; located.at < at; located.at++) {
    const code = text.charCodeAt(located.at);
    if (code === 10) located.line++;
    if (code === 10 || code === 13) located.column = 0;
    else if (code === 9) located.column = (located.column | 7) + 1;
    else if ((code & 0xfc00) !== 0xdc00) located.column++;
  }
  return `${file}:${located.line}:${located.column + first}`;
}

/** Makes the error for something wrong at a position. */
function failure(source: Source, at: number, message: string) {
  return new OffloadError(`${place(source, at)}: ${message}`);
}

/** Makes an error of the reader, at its position; Guile's count from 1. */
function readFailure(source: Source, message: string, hint?: string) {
  const where = place(source, source.position, 1);
  return new OffloadError(`${where}: ${message}`, { hint });
}

/** Leaves the file to Guile, because of a form, unless that is data. */
function needData({ source, at }: Site, isData: unknown): asserts isData {
  if (isData) return;
  const start = source.text.slice(at, at + 60);
  const [form = ""] = /^[(["]?[^\s()[\]";]*/.exec(start) ?? [];
  const rest = /^[(["]/.test(form) ? " …" : "";
  throw new NeedsGuile(`${place(source, at)}: ${form}${rest}`);
}

/** Takes some steps, within the bounds. */
function spend(source: Source, at: number, steps: number): void {
  source.steps += steps;
  if (source.steps <= maximumSteps && source.depth <= maximumDepth) return;
  throw failure(source, at, "too deeply nested, or too large");
}

/** Takes what a sticky pattern matches here, and gives its group. */
function take(source: Source, pattern: RegExp): string {
  pattern.lastIndex = source.position;
  const found = pattern.exec(source.text);
  if (found) source.position = pattern.lastIndex;
  return found?.[1] ?? "";
}

/** Blanks, then a comment, parenthesis, prefix, quote or, last, an atom. */
const tokenPattern =
  /[ \t\r\n\f]*(;[^\n]*|#[|;]|[()[\]'`"]|,@?|[^()[\]"; \t\r\n\f]+)?/y;

/** Takes the next token that is no comment; none at the end of the text. */
function nextToken(source: Source): string {
  for (;;) {
    const token = take(source, tokenPattern);
    if (token === "#|") skipBlockComment(source);
    else if (token === "#;") readForm(source, "#; comment");
    else if (token[0] !== ";") return token;
  }
}

/** Skips the rest of a block comment; they nest. */
function skipBlockComment(source: Source): void {
  for (let depth = 1; depth > 0;) {
    const edge = take(source, /[^]*?(#\||\|#)/y);
    depth += edge === "#|" ? 1 : -1;
    if (edge) continue;
    source.position = source.text.length;
    throw readFailure(source, "unterminated `#| ... |#' comment");
  }
}

/** What the prefixes of data abbreviate, and Guile's words for what follows. */
const abbreviations: Record<string, [name: string, what: string]> = {
  "'": ["quote", "quoted expression"],
  "`": ["quasiquote", "quasiquoted expression"],
  ",": ["unquote", "unquoted expression"],
  ",@": ["unquote-splicing", "subexpression of ,@"],
};

/** Reads the next datum; WHAT is missing where there is none. */
function readForm(source: Source, what: string, token = nextToken(source)) {
  const at = source.position - token.length;
  source.depth++;
  spend(source, at, 1);
  const value = readValue({ source, at, scope: {} }, what, token);
  source.depth--;
  return { at, value };
}

/** Reads what begins with a token. */
function readValue(site: Site, what: string, token: string): Form["value"] {
  const { source, at } = site;
  const abbreviated = /^[`',]/.test(token) && abbreviations[token];
  if (abbreviated) {
    const [name, rest] = abbreviated;
    return [{ at, value: Symbol.for(name) }, readForm(source, rest)];
  }
  if (token === "(" || token === "[") return readList(source, at, token);
  if (token === '"') return readString(site);
  if (token && token !== ")" && token !== "]") return readAtom(site, token);
  const end = `unexpected end of input while reading ${what}`;
  throw readFailure(source, token ? `unexpected "${token}"` : end);
}

/** Reads the rest of a list. */
function readList(source: Source, at: number, opening: string): Form[] {
  const close = opening === "(" ? ")" : "]";
  const items: Form[] = [];
  let token = nextToken(source);
  for (; token && !")]".includes(token); token = nextToken(source)) {
    items.push(readForm(source, "", token));
  }
  if (token === close) return items;
  if (token) throw readFailure(source, `mismatched close paren: ${token}`);
  const message = `unexpected end of input while searching for: ${close}`;
  const hint = `the '${opening}' at ${place(source, at)} is not closed`;
  throw readFailure(source, message, hint);
}

/** Letters after a backslash in a string and what they stand for. */
const escapes = { from: '|\\("0fnrtavb', to: '|\\("\0\f\n\r\t\x07\v\b' };

/** What an escape in a string stands for. */
function readEscape(site: Site, escape: string): string {
  const letter = escapes.from.indexOf(escape.slice(1));
  if (letter >= 0) return escapes.to[letter]!;
  if (escape === "\\\n") return "";
  const code = parseInt(escape.slice(2), 16);
  needData(site, code <= 0x10ffff && (code & 0xfff800) !== 0xd800);
  return String.fromCodePoint(code);
}

/** Reads the rest of a string. */
function readString(site: Site): string {
  const { source } = site;
  for (let result = "";;) {
    result += take(source, /([^"\\]*)/y);
    const edge = take(
      source,
      /("|\\(?:x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{6}|[^]))/y,
    );
    if (edge === '"') return result;
    if (edge) result += readEscape(site, edge);
    else {
      source.position = source.text.length;
      const message = "unexpected end of input while reading string";
      throw readFailure(source, message);
    }
  }
}

/** Reads a number, symbol, boolean or keyword (as the symbol `#:NAME`). */
function readAtom(site: Site, token: string): Atom {
  if (/^[^\d#+.-]/.test(token)) return Symbol.for(token);
  if (/^[+-]?\d{1,15}$/.test(token)) return BigInt(token);
  if (/^[+-]?(\d+\.\d*|\.\d+)$/.test(token)) return Number(token);
  if (/^#(t|true|f|false)$/.test(token)) return token[1] === "t";
  needData(
    site,
    !/^#([^:]|$|:#|:$)|^[+-]?\.?\d|^[+-](i|nan)|^\.$/i.test(token),
  );
  return Symbol.for(token);
}

/** The symbol that a form is. */
function symbolIn(site: Site, form: Form | undefined): symbol {
  needData(site, typeof form?.value === "symbol");
  return form.value;
}

/** The operand of a form `(NAME OPERAND)`. */
function operandOf(name: string, { value }: Form): Form | undefined {
  if (!Array.isArray(value) || value.length !== 2) return undefined;
  return value[0]?.value === Symbol.for(name) ? value[1] : undefined;
}

/** Evaluates a form; what is a program, rather than data, is Guile's. */
function evaluate({ source, scope }: Site, form: Form): Value {
  const { at, value } = form;
  const site = { source, at, scope };
  if (typeof value === "symbol") {
    needData(site, value in scope);
    return scope[value];
  }
  if (!Array.isArray(value)) return value;
  source.depth++;
  spend(source, at, 1);
  const [head, ...forms] = value;
  const evaluateForm = typeof head?.value === "symbol"
    ? expressions[head.value]
    : machinesOfGuixSystem;
  needData(site, evaluateForm);
  const result = evaluateForm(site, forms, head!);
  source.depth--;
  return result;
}

/** The value of a quoted form. */
function datumOf({ value }: Form): Value {
  return Array.isArray(value) ? value.map(datumOf) : value;
}

/** Writes a form that holds but names. */
function written({ value }: Form): string {
  return Array.isArray(value)
    ? `(${value.map(written).join(" ")})`
    : typeof value === "symbol"
    ? value.description ?? ""
    : "#";
}

/** What Guix System writes first (gnu/services/base.scm): where modules are, of
 * which it uses none; what makes one list of its machines. */
const LOAD_PATH =
  /^\(expand load eval\) \(let \(\(extensions [^!]*\) \(set! %load-path [^!]*\) \(set! %load-compiled-path [^!]*\)\)$/;
const GUIX_SYSTEM = "(@ (srfi srfi-1) append-map) " +
  "(lambda (entry) (if (build-machine? entry) (list entry) entry))";

/** Evaluates what Guix System writes: each machine may be a list of some. */
function machinesOfGuixSystem(site: Site, forms: Form[], head: Form): Value[] {
  const [procedure, list, ...others] = forms;
  needData(site, procedure && list && others.length === 0);
  needData(site, `${written(head)} ${written(procedure)}` === GUIX_SYSTEM);
  const entries = evaluate(site, list);
  needData(site, Array.isArray(entries));
  return entries.flatMap((entry) => {
    needData(site, Array.isArray(entry) || isBuildMachine(entry));
    return entry;
  });
}

/** Evaluates a definition. */
function define(site: Site, [target, form, ...others]: Form[]): undefined {
  const name = symbolIn(site, target);
  needData(site, form !== undefined && others.length === 0);
  needData(site, !(name in expressions) && !(name in definitions));
  site.source.globals[name] = evaluate(site, form);
}

/** Modules that bind nothing by which what is evaluated here means more. */
const MODULES = new Set([
  "(guile)",
  "(guix gexp)",
  "(guix scripts offload)",
  "(ice-9 format)",
  "(ice-9 match)",
  "(ice-9 rdelim)",
  "(ice-9 textual-ports)",
  "(rnrs io ports)",
  "(srfi srfi-1)",
  "(srfi srfi-26)",
]);

/** Takes note of modules that are used. */
function useModules(site: Site, forms: Form[]): undefined {
  needData(site, forms.every((form) => MODULES.has(written(form))));
}

/** Takes field specifiers apart, or objects to them as Guix does. */
function fieldsIn(site: Site, specifiers: Form[]) {
  const { source, at } = site;
  const original = specifiers[0] && operandOf("inherit", specifiers[0]);
  const own = original ? specifiers.slice(1) : specifiers;
  const fields = own.map((specifier): [symbol, Form] => {
    const { value } = specifier;
    if (Array.isArray(value) && value.length === 2) {
      return [symbolIn(site, value[0]), value[1]!];
    }
    // Guile knows no place of symbols, nor of what fits into a word.
    const isPlaced = Array.isArray(value)
      ? value.length > 0
      : ["string", "number"].includes(typeof value);
    const there = isPlaced ? specifier.at : at;
    throw failure(source, there, "invalid field specifier");
  });
  const names = fields.map(([name]) => name.description ?? "");
  const repeated = own.find((_, i) => names.indexOf(names[i]!) < i);
  if (repeated && !original) {
    throw failure(source, repeated.at, "duplicate field initializer");
  }
  const required = original ? [] : ["name", "user", "host-key"];
  const extraneous = names.filter((name) => !fieldNames.includes(name));
  const missing = required.filter((name) => !names.includes(name));
  const [kind, wrong] = extraneous.length > 0
    ? ["extraneous", extraneous]
    : ["missing", missing];
  if (wrong.length === 0) return { fields, original };
  // Guile writes other symbols in a way of its own.
  needData(site, wrong.every((name) => /^[\w!?*<>=/-]+$/.test(name)));
  const message = `${kind} field initializers (${wrong.join(" ")})`;
  throw failure(source, at, message);
}

/** What a build machine has where nothing is said. */
function usualFields(home: string | undefined): Record<string, Value> {
  const entries = Object.keys(machineFields)
    .map((name) => [name, usualValue(name, home) ?? false] as const);
  return { ...Object.fromEntries(entries), system: false };
}

/** Makes a build machine; its fields see those before them as variables. */
function buildMachine(site: Site, specifiers: Form[]): BuildMachine {
  const { source, at } = site;
  const { fields, original } = fieldsIn(site, specifiers);
  const values: Record<string, Value> = {};
  let inner = site;
  for (const [name, form] of fields) {
    const value = evaluate(inner, form);
    values[name.description ?? ""] = value;
    inner = { source, at, scope: Object.create(inner.scope) };
    inner.scope[name] = value;
  }
  const record = original
    ? evaluate(inner, original)
    : { at, fields: usualFields(source.home) };
  needData(site, isBuildMachine(record));
  return { at, fields: { ...record.fields, ...values } };
}

/** Tells build machines. */
function isBuildMachine(value: Value): value is BuildMachine {
  return typeof value === "object" && "fields" in value;
}

/** The forms that are evaluated here, wherever they are. */
const expressions: Record<
  symbol,
  ((site: Site, forms: Form[], head: Form) => Value) | undefined
> = {
  [Symbol.for("quote")]: (site, [form, ...others]) => {
    needData(site, form && others.length === 0);
    return datumOf(form);
  },
  [Symbol.for("list")]: (site, forms) =>
    forms.map((form) => evaluate(site, form)),
  [Symbol.for("build-machine")]: buildMachine,
};

/** Those that stand alone, of the top level. */
const definitions: Record<symbol, typeof define | undefined> = {
  [Symbol.for("define")]: define,
  [Symbol.for("define-public")]: define,
  [Symbol.for("use-modules")]: useModules,
  [Symbol.for("eval-when")]: (site, forms) => {
    needData(site, LOAD_PATH.test(forms.map(written).join(" ")));
  },
};

/** Evaluates a form of the top level. */
function evaluateTop(source: Source, { at, value }: Form): Value {
  const site = { source, at, scope: source.globals };
  const [head, ...forms] = Array.isArray(value) ? value : [];
  const definition = typeof head?.value === "symbol"
    ? definitions[head.value]
    : undefined;
  return definition ? definition(site, forms) : evaluate(site, { at, value });
}

/** The socket of a daemon where nothing names another. */
export const DAEMON_SOCKET = "/var/guix/daemon-socket/socket";

/** What a field must be, whether a value is, and what it is taken for. */
type FieldRule = [
  expected: string,
  accepts: (value: unknown) => boolean,
  take?: (value: unknown) => unknown,
];

/** Makes the rule of a string that matches. */
function stringRule(expected: string, pattern: RegExp): FieldRule {
  return [expected, (it) => typeof it === "string" && pattern.test(it)];
}

/**
 * Makes the rule of a list in which some string matches, if there is anything.
 * As in the reference, what else is in it is what no build asks for.
 */
function listRule(expected: string, pattern: RegExp): FieldRule {
  const [, accepts] = stringRule(expected, pattern);
  return [
    expected,
    (it) => Array.isArray(it) && (it.length === 0 || it.some(accepts)),
    (it) => (it as unknown[]).filter((item) => typeof item === "string"),
  ];
}

/** Makes the rule of an integer in a range. */
function integerRule(least: number, most: number): FieldRule {
  const range = most === Infinity ? "on" : `to ${most}`;
  const expected = `an integer from ${least} ${range}`;
  return [expected, (it) => Number.isInteger(it) && isWithin(it, least, most)];
}

/** Tells whether a value is a number in a range. */
export function isWithin(value: unknown, least: number, most: number): boolean {
  return typeof value === "number" && least <= value && value <= most;
}

/** Makes the rule of any number; infinite ones are taken for large ones. */
function numberRule(expected: string): FieldRule {
  return [
    expected,
    (it) => typeof it === "number" && !Number.isNaN(it),
    (it) => Math.max(-1e300, Math.min(Number(it), 1e300)),
  ];
}

/** Makes a rule that takes `#f`, too, for the value that this stands for. */
function optional(
  [expected, accepts, take = (it) => it]: FieldRule,
  absent: () => unknown,
): FieldRule {
  return [
    `${expected}, or #f`,
    (it) => it === false || accepts(it),
    (it) => it === false ? absent() : take(it),
  ];
}

/** Makes a rule that takes a value for another one. */
function taken(
  [expected, accepts]: FieldRule,
  take: (value: unknown) => unknown,
): FieldRule {
  return [expected, accepts, take];
}

/** Tells host keys as OpenSSH writes them, with the same type outside and in. */
function isHostKey(value: unknown): boolean {
  const [type = "", data = ""] = String(value).trim().split(/\s+/);
  const types = /^(ssh-(ed25519|rsa|dss)|ecdsa-sha2-nistp(256|384|521))$/;
  if (!types.test(type) || !/^[a-z\d+/]+={0,2}$/i.test(data)) return false;
  const inner = atob(data.slice(0, Math.min(40, data.length & ~3))).slice(4);
  return inner.startsWith(type) || type.startsWith(inner);
}

/** The methods by which libssh compresses nothing. */
const NO_COMPRESSION = /^no(ne)?(,|$)/;

/** More slots than any machine has; the files of all are looked at. */
const MOST_SLOTS = 9999;

/** The key of ssh, unless a machine names one; HOME is the user's. */
function usualKey(home: string | undefined): string | false {
  return home === undefined ? false : `${home}/.ssh/id_rsa`;
}

/**
 * The fields of a machine, and what they are where they are left out. What the
 * reference works with is taken, if for another value; `#f` is what libssh has
 * without the option.
 */
const machineFields: Record<
  string,
  readonly [
    rule: FieldRule,
    usual?: string | number | string[] | ((home?: string) => string | false),
  ]
> = {
  name: [stringRule("a host name", /^[^\s/]+$/)],
  port: [integerRule(1, 65535), 22],
  systems: [listRule("a list of systems like x86_64-linux", /^\w+-[\w-]+$/)],
  user: [optional(
    stringRule("an account name", /^\P{Cc}+$/u),
    () => userInfo().username,
  )],
  "private-key": [stringRule("a file name", /^[^\0]+$/), usualKey],
  "host-key": [["a key like 'ssh-ed25519 AAAAC3…'", isHostKey]],
  compression: [
    optional(
      taken(
        stringRule("a list of methods", /./),
        (it) => NO_COMPRESSION.test(String(it)) ? "none" : it,
      ),
      () => "none",
    ),
    "zlib@openssh.com,zlib",
  ],
  "compression-level": [optional(integerRule(1, 9), () => 7), 3],
  "daemon-socket": [
    taken(
      stringRule("a file name", /^[^\0]+$/),
      (it) => String(it).replace(/^(file|unix):\/\/(?=\/)/, ""),
    ),
    DAEMON_SOCKET,
  ],
  "overload-threshold": [optional(numberRule("a number"), () => false), 0.8],
  "parallel-builds": [
    taken(integerRule(0, Infinity), (it) => Math.min(Number(it), MOST_SLOTS)),
    1,
  ],
  speed: [numberRule("a number"), 1],
  features: [optional(listRule("a list of strings", /^/), () => []), []],
};

/** The value of a field that is left out. */
function usualValue(
  name: string,
  home?: string,
): string | number | false | string[] | undefined {
  const [, usual] = machineFields[name]!;
  return typeof usual === "function" ? usual(home) : usual;
}

/** All fields that a `<build-machine>` record has. */
const fieldNames = [...Object.keys(machineFields), "system", "location"];

/** What {@linkcode Machine} calls a field of a machine file. */
function propertyOf(field: string): string {
  return field.replace(/-(.)/g, (_, letter: string) => letter.toUpperCase());
}

/**
 * Makes a machine of fields, or says what is wrong with them. The names are
 * those of {@linkcode machineToJson}; those that have a default may be left out.
 * WHERE is where they stand, if anywhere.
 */
export function machineFromFields(
  fields: Record<string, unknown>,
  where: string,
): Machine | Problem {
  const machine: Record<string, unknown> = {};
  const reasons = Object.keys(fields)
    .filter((name) => !Object.hasOwn(machineFields, name))
    .map((name) => `unknown field '${name}'`);
  for (const [name, [rule]] of Object.entries(machineFields)) {
    const [expected, accepts, take = (it: unknown) => it] = rule;
    const value = fields[name] === undefined
      ? usualValue(name, userInfo().homedir)
      : fields[name];
    if (accepts(value)) {
      machine[propertyOf(name)] = take(value);
      continue;
    }
    const found = JSON.stringify(value)?.slice(0, 60) ?? typeof value;
    reasons.push(`field '${name}' must be ${expected}, not ${found}`);
  }
  if (reasons.length === 0) return machine as unknown as Machine;
  const name = String(fields.name).replace(/\p{Cc}/gu, "?");
  const message = `machine '${name}': ${reasons.join("; ")}`;
  return { severity: "error", message: `${where && `${where}: `}${message}` };
}

/** Gives the fields of a machine by their names in the machine file. */
export function machineToJson(machine: Machine): Record<string, unknown> {
  const values: Record<string, unknown> = { ...machine };
  const entries = Object.keys(machineFields)
    .map((name) => [name, values[propertyOf(name)]]);
  return Object.fromEntries(entries);
}

/** Turns a value into plain data. */
function plain(source: Source, at: number, value: Value): unknown {
  spend(source, at, 1);
  if (Array.isArray(value)) return value.map((it) => plain(source, at, it));
  if (typeof value === "bigint") return Number(value);
  return typeof value === "object" || typeof value === "symbol" ? {} : value;
}

/** Makes machines of records, and says what is wrong with those. */
function machinesOfRecords(source: Source, records: BuildMachine[]) {
  const machines: Machine[] = [];
  const problems: Problem[] = [];
  for (const { at, fields: values } of records) {
    const all: Record<string, unknown> = {};
    for (const name in values) all[name] = plain(source, at, values[name]);
    const { system, location: _, ...fields } = all;
    if (fields.systems === false && system !== false) {
      fields.systems = [system];
      const where = place(source, at);
      const message =
        `${where}: The 'system' field is deprecated, please use 'systems' instead.`;
      problems.push({ severity: "warning", message });
    }
    const machine = machineFromFields(fields, "");
    if (!("severity" in machine)) machines.push(machine);
    else problems.push(machineFromFields(fields, place(source, at)) as Problem);
  }
  return { machines, problems };
}

/** Evaluates all forms of a file; the value is that of the last. */
function evaluateForms(source: Source): Value {
  const start = { source, at: 0, scope: {} };
  const [, coding = "utf-8"] = /^;.*coding[:=]\s*([-\w]+)/m.exec(
    source.text.slice(0, 500),
  ) ?? [];
  needData(start, /^utf-?8$/i.test(coding) && !source.text.includes("\ufffd"));
  let value: Value;
  for (let token = nextToken(source); token; token = nextToken(source)) {
    const form = readForm(source, "", token);
    value = evaluateTop(source, form);
  }
  return value;
}

/**
 * Evaluates a machine file that holds data: machines, definitions of constants
 * and of machines, what Guix System writes. A program is left to Guile; where
 * Guile would find an error in what comes before, it is thrown. HOME is the
 * user's home directory in the password database, as the reference sets it.
 */
export function evaluateMachineFile(
  content: string | Uint8Array,
  file: string,
  home: string | undefined,
): MachineFile {
  const text = typeof content === "string"
    ? content.replace(/^\ufeff/, "")
    : new TextDecoder().decode(content);
  const source: Source = {
    file,
    text,
    home,
    globals: {},
    position: 0,
    depth: 0,
    steps: 0,
    located: { at: 0, line: 1, column: 0 },
  };
  const nothing = { file, machines: [], problems: [] };
  try {
    const value = evaluateForms(source);
    if (Array.isArray(value) && value.every(isBuildMachine)) {
      return { ...nothing, ...machinesOfRecords(source, value) };
    }
  } catch (error) {
    if (error instanceof NeedsGuile) {
      return { ...nothing, needsGuile: error.message };
    }
    // The stack may end before the depth does, since others are on it, too.
    if (!(error instanceof RangeError)) throw error;
    throw failure(source, source.position, "too deeply nested");
  }
  const message =
    `'${file}' did not return a list of build machines; ignoring it`;
  return { ...nothing, problems: [{ severity: "error", message }] };
}

// ---------------------------------------------------------------------------
// Plugins
// ---------------------------------------------------------------------------

/** A value, or the promise of one. */
export type Awaitable<T> = T | Promise<T>;

/** The options of a plugin: what the settings say over their defaults. */
export type Options = Readonly<Record<string, number | boolean | string>>;

/** A setting, or an option of a plugin, in the words of JSON Schema. */
export interface Setting {
  /** What it means, and in which unit. */
  readonly description: string;
  /** What it is unless told; what is told must be of the same type. */
  readonly default: number | boolean | string | Readonly<Record<string, never>>;
  /** The least number. */
  readonly minimum?: number;
  /** The largest number. */
  readonly maximum?: number;
}

/** The seconds of a day. */
export const DAY = 86400;

/** The settings: what each is unless told, a number's bounds, its meaning. */
// deno-fmt-ignore: a table, in which a row is one
export const SETTINGS = {
  attempts: [3, 1, 100,
    "how many machines a build is tried on, one after another"],
  backoff: [10, 0, DAY,
    "seconds for which a machine that failed is left alone; doubled at each " +
    "further failure"],
  backoffLimit: [600, 0, DAY,
    "seconds beyond which that does not grow"],
  buildLocally: [true,
    "whether guix-daemon may build what no machine can be reached for"],
  connect: ["guix",
    "the built-in plugin that connects to machines"],
  connectTimeout: [30, 1, 600,
    "seconds that connecting to a machine may take"],
  decisionTimeout: [3, 0.1, 60,
    "seconds within which a request is answered"],
  factsLifetime: [5, 0, 600,
    "seconds for which what a machine said of itself is believed"],
  hookTimeout: [1, 0.01, 60,
    "seconds that a plugin's machines and scores may take"],
  journalBuilds: [100_000, 0, 10_000_000,
    "builds that are kept in the journal, the latest ones"],
  journalLifetime: [30 * DAY, 0, 3650 * DAY,
    "seconds for which a build is kept there"],
  keepaliveTimeout: [60, 1, 3600,
    "seconds without a sign of life after which a connection is given up, " +
    "and the guix-daemon at its end asked for one"],
  keepConnections: [60, 0, 600,
    "seconds for which a process that stays keeps a connection that no build " +
    "uses, and four times as long at all"],
  maximumArchiveSize: [2 ** 36, 2 ** 20, 2 ** 50,
    "bytes that the outputs of a build may take, on the way and on the disk, " +
    "where each file, directory and link takes 4096 at least"],
  minimumFreeSpace: [100 * 2 ** 20, 0, 2 ** 50,
    "bytes that must be free in a machine's store"],
  outageTimeout: [300, 0, DAY,
    "seconds for which a build whose machine failed waits for one that can " +
    "be reached"],
  resident: [true,
    "whether a process stays that serves further builds"],
  residentIdle: [600, 1, DAY,
    "seconds without a build after which it ends"],
  score: ["auto",
    "the built-in plugin that scores machines; 'auto' is 'expected', or " +
    "'guix' where another plugin scores"],
  stepTimeout: [1800, 1, DAY,
    "seconds for which nothing may move before and after a build, as where a " +
    "machine collects garbage first"],
  substitutes: [false,
    "whether a machine may fetch inputs and outputs from its substitute " +
    "servers; else it asks them for nothing"],
  transport: ["guix",
    "the built-in plugin that moves archives"],
  use: [{},
    "further built-in plugins, and the options of plugins"],
} as const satisfies Readonly<Record<
  string,
  | readonly [usual: number, least: number, most: number, meaning: string]
  | readonly [usual: boolean | string | object, meaning: string]
>>;

/** What a setting may be told to be: what is of the type of its default. */
export type SettingValue<Usual> = Usual extends number ? number
  : Usual extends boolean ? boolean
  : Usual extends string ? string
  : Readonly<Record<string, Partial<Options>>>;

/** The settings: those of settings.json over the defaults. */
export type Settings = {
  readonly [Name in keyof typeof SETTINGS]: SettingValue<
    (typeof SETTINGS)[Name][0]
  >;
};

/** The settings, told as plugins tell their options. */
export function describeSettings(): Record<string, Setting> {
  const entries = Object.entries(SETTINGS).map(([name, row]) => {
    const [usual, least, most] = row;
    const description = row[row.length - 1] as string;
    const bounds = row.length === 2 ? {} : { minimum: least, maximum: most };
    return [name, { default: usual, ...bounds, description }];
  });
  return Object.fromEntries(entries);
}

/** The environment variable that overrides a setting. */
function settingVariable(name: string): string {
  return `OFFLOAD_${name.replace(/[A-Z]/g, "_$&").toUpperCase()}`;
}

/** Checks the value of a setting, which `where` names. */
function checkSetting<T>(setting: Setting, value: T, where: string): T {
  const { default: usual, minimum = -Infinity, maximum = Infinity } = setting;
  const isObject = value?.constructor === Object;
  if (typeof value !== typeof usual || (value instanceof Object && !isObject)) {
    const got = JSON.stringify(value);
    throw new OffloadError(`${where}: expected a ${typeof usual}, got ${got}`);
  }
  if (typeof value === "number" && !isWithin(value, minimum, maximum)) {
    throw new OffloadError(
      `${where}: ${value} is not between ${minimum} and ${maximum}`,
    );
  }
  return value;
}

/** Checks an object of settings, in `where`, against what there is. */
function checkSettings(
  table: Readonly<Record<string, Setting>>,
  values: Readonly<Record<string, unknown>>,
  where: string,
): void {
  for (const [name, value] of Object.entries(values)) {
    if (!Object.hasOwn(table, name)) {
      throw new OffloadError(`${where}: unknown setting '${name}'`, {
        hint: `the settings are ${Object.keys(table).join(", ")}`,
      });
    }
    checkSetting(table[name]!, value, `${where}: '${name}'`);
  }
}

/** Reads a setting from an environment variable's text. */
function parseSetting(
  { default: usual }: Setting,
  text: string,
  variable: string,
): unknown {
  const type = typeof usual;
  if (type === "number" && text.trim() !== "") return Number(text);
  if (type === "boolean" && /^(true|false)$/.test(text)) return text === "true";
  return type === "object" ? parseJson(text, variable) : text;
}

/** Parses JSON that stands in `where`. */
function parseJson(text: string, where: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new OffloadError(`${where}: ${reason(cause)}`, { cause });
  }
}

/** Refuses a file, or directory, that somebody else could have written. */
export function checkOwner(file: string): void {
  const { uid, mode } = statSync(file);
  const trusted = uid === 0 || uid === process.getuid?.();
  if (!trusted || (mode & 0o022) !== 0) {
    throw new OffloadError(
      `${file}: others than root and the daemon's user can write it`,
      { hint: `run 'chown root ${file}; chmod go-w ${file}'` },
    );
  }
}

/** Reads the object in settings.json, where there is one. */
function readSettingsFile(file: string): Record<string, unknown> {
  if (!existsSync(file)) return {};
  // Some settings name programs to run.
  [dirname(file), file].forEach(checkOwner);
  const settings = parseJson(readFileSync(file, "utf8"), file);
  if (settings?.constructor === Object) return { ...settings };
  throw new OffloadError(`${file}: expected an object`);
}

/**
 * Reads the settings: the environment's over those of `directory`'s
 * settings.json over the defaults.
 *
 * @throws {OffloadError} that names what is unknown or wrong.
 */
export function readSettings(
  directory: string,
  environment: Variables,
): Settings {
  const file = `${directory}/settings.json`;
  const { $schema: _, ...settings } = readSettingsFile(file);
  const table = describeSettings();
  checkSettings(table, settings, file);
  for (const [name, setting] of Object.entries(table)) {
    const variable = settingVariable(name);
    const text = environment[variable];
    settings[name] ??= setting.default;
    if (text === undefined) continue;
    const value = parseSetting(setting, text, variable);
    settings[name] = checkSetting(setting, value, variable);
  }
  return settings as unknown as Settings;
}

/** What a build machine says of itself. */
export interface Facts {
  /** When it said so, in milliseconds since 1970. */
  readonly time: number;
  /** How long a message there and back takes, in milliseconds. */
  readonly roundTrip?: number | undefined;
  /** How long it took to log in, until its guix-daemon answered, in seconds. */
  readonly login?: number | undefined;
  /** The daemon's socket that the login's own environment names. */
  readonly socket?: string | undefined;
  /** Load average of the last minute. */
  readonly load?: number | undefined;
  /** Logical processors. */
  readonly cores?: number | undefined;
  /** Bytes of memory that are available. */
  readonly memory?: number | undefined;
  /** Share of the last 10 s (0 to 100) in which tasks waited for each. */
  readonly pressure?:
    | Readonly<Record<"cpu" | "io" | "memory", number>>
    | undefined;
  /** Bytes and inodes that are free in its store. */
  readonly store?: FreeSpace | undefined;
  /** Bytes and inodes that are free where it builds. */
  readonly build?: FreeSpace | undefined;
  /** Seconds that its clock is ahead of ours. */
  readonly clock?: number | undefined;
  /** Kernel, host name, release and architecture, as uname says. */
  readonly uname?: string | undefined;
}

/** Room in a file system. */
export interface FreeSpace {
  /** Free bytes. */
  readonly bytes: number;
  /** Free inodes. */
  readonly inodes: number;
}

/** A build that was done. */
export interface PastBuild {
  /** NAME:PORT of the machine. */
  readonly machine: string;
  /** How long it took, in seconds. */
  readonly seconds: number;
  /** The speed that the machine had, as far as it was known then. */
  readonly speed?: number;
}

/** A build that has a slot. */
export interface RunningBuild {
  /** Name of the derivation, without hash and `.drv`. */
  readonly name: string;
  /** Since when it has that slot, in milliseconds since 1970. */
  readonly since: number;
}

/** A build that was asked for and has no slot yet. */
export interface WaitingBuild {
  /** File name of the derivation. */
  readonly derivation: string;
  /** Since when, in milliseconds since 1970. */
  readonly since: number;
  /** When it was asked for last: guix-daemon does so every 5 s. */
  readonly seen: number;
  /** What for: "busy" is a free slot, "unreachable" a machine. */
  readonly why: string;
  /** How urgent it is: what is more goes first. */
  readonly rank?: number;
  /** NAME:PORT of the machine that it waits for, though others are free. */
  readonly machine?: string | undefined;
  /** The system type it is for. */
  readonly system?: string;
  /** The features that it requires. */
  readonly features?: readonly string[];
}

/** How a build that waits stands among others. */
export type WaitingOrder = Pick<
  WaitingBuild,
  "rank" | "machine" | "system" | "features"
>;

/** A derivation whose outputs are not there. */
export interface Dependent {
  /** Its name, without hash and `.drv`. */
  readonly name: string;
  /** The same of those that need it. */
  readonly dependents: readonly Dependent[];
}

/** A store item that a build needs. */
export interface InputItem {
  /** File name. */
  readonly path: string;
  /** Size of its nar, in bytes. */
  readonly size: number;
}

/** A machine that could take a build, as a score sees it. */
export interface Candidate {
  /** The machine. */
  readonly machine: Machine;
  /** Its NAME:PORT. */
  readonly id: string;
  /** What it said of itself a few seconds ago at most, if it did. */
  readonly facts: Facts | undefined;
  /** How many of its slots are free now; asks each, which takes a while. */
  freeSlots(): number;
  /** Builds of ours that were seen to begin there, and not to end. */
  running(): readonly RunningBuild[];
  /** How quick it was seen to be: a multiple of its `speed`. */
  readonly quickness: number | undefined;
  /** Those of `paths` that it was seen to hold. */
  holds(paths: readonly string[]): readonly string[];
  /** Bytes a second that it was seen to receive, if it was. */
  readonly bandwidth: number | undefined;
  /** When it last began a build of ours, in milliseconds since 1970. */
  readonly lastUsed: number | undefined;
}

/** A build to score machines for. */
export interface ScoredRequest extends Request {
  /** Name of the derivation, without hash and `.drv`. */
  readonly name: string;
  /** When it is asked about, in milliseconds since 1970. */
  readonly time: number;
  /** Whether it needs another machine, since one has let it down. */
  readonly isAccepted: boolean;
  /** Earlier builds of that name, or another, the latest first. */
  history(name?: string): readonly PastBuild[];
  /** The same of names that begin so; of all for "". */
  similar(beginning: string): readonly PastBuild[];
  /** What it needs; takes a while. */
  inputs(): Promise<readonly InputItem[]>;
  /** What needs it, and is not there; takes a while. */
  dependents(): Promise<readonly Dependent[]>;
  /** For how many seconds it has waited. */
  waited(): number;
  /** How many builds a second have ended in the last minute. */
  pace(): number;
  /** The most urgent ones of the builds that wait, some dozens at the most. */
  waiting(): readonly WaitingBuild[];
}

/** A machine that may take a build, and its score. */
export interface ScoredCandidate {
  /** The machine. */
  readonly candidate: Candidate;
  /** The sum of the scores. */
  readonly score: number;
}

/** Why a build does not take a slot now. */
export interface Deferral {
  /** The reason, as users read it. */
  readonly why: string;
  /** How urgent the build is, beside others that wait. */
  readonly rank: number;
  /**
   * Whether guix-daemon waits for the answer, which nothing of that client
   * overtakes; else it asks again, after 5 s at most.
   */
  readonly isHeld: boolean;
  /** The machine whose slot it waits for; else any. */
  readonly candidate?: Candidate;
  /** Whether it does not wait: guix-daemon, where it would, builds it here. */
  readonly isHere?: boolean;
}

/** What a plugin is given beside the matter at hand. */
export interface PluginContext {
  /** Messages for the user whose build it is. */
  readonly log: Log;
  /** Ends the work. */
  readonly signal: AbortSignal;
  /** The settings. */
  readonly settings: Settings;
  /** The plugin's own options. */
  readonly options: Options;
  /** The environment's variables. */
  readonly environment: Variables;
  /** Where Guix keeps its configuration: /etc/guix. */
  readonly configDirectory: string;
  /** Where Guix keeps its state: /var/guix. */
  readonly stateDirectory: string;
  /**
   * Does what touches a file of the state as its owner, whose alone it is: as
   * such even where root runs a command.
   */
  asOwner<T>(file: string, action: () => T): T;
  /**
   * Has a directory of the state in which something can be written, or one in
   * memory in place of it.
   */
  writable(directory: string): string;
  /** The machine file, as far as it is evaluated without Guile. */
  machineFile(): Awaitable<MachineFile>;
  /** Tells of something wrong with the machine file. */
  report(problem: Problem): void;
  /** The program of the real guix. */
  readonly guix: string;
  /** Checks the fields of a machine, named as in the machine file. */
  machineFromFields(
    fields: Record<string, unknown>,
    where: string,
  ): Machine | Problem;
}

/** A build's connections, for a transport. */
export interface TransportContext extends PluginContext {
  /** The build machine. */
  readonly machine: Machine;
  /** The daemon of the build machine. */
  readonly remote: StoreConnection;
  /** The daemon here. */
  readonly local: StoreConnection;
  /** How long a message there and back takes, in milliseconds. */
  readonly roundTrip: number;
  /** Opens another connection to the daemon of the build machine. */
  openDaemon(): Promise<StoreConnection>;
  /** Leaves one, on which nothing went wrong, to who opens one next. */
  leaveDaemon(store: StoreConnection): void;
  /** Runs a shell command on the machine. */
  exec(command: string): Promise<RemoteProcess>;
  /**
   * Does work while which nothing need pass over the connections: else a
   * machine is given up after `stepTimeout`.
   */
  patiently<T>(work: () => Promise<T>): Promise<T>;
  /** Makes a bundle of items, which the daemon here signs. */
  exportBundle(paths: readonly string[]): AsyncIterable<Uint8Array>;
}

/**
 * How far a connection is: a server is there, it has said something, and it has
 * shown the right host key.
 */
export type Reached = "connect" | "greeting" | "host key";

/** A command that runs on a build machine. */
export interface RemoteProcess {
  /** Its standard input and output. */
  readonly channel: Duplex;
  /**
   * Settles at its end, once all its output was read: its exit code, and what
   * it wrote to standard error.
   */
  readonly ended: Promise<{ readonly code: number; readonly errors: string }>;
}

/** A connection to a build machine, over which all goes there and back. */
export interface Connection {
  /** Why it ended, if it did. */
  failure(): Error | undefined;
  /** Settles when it has ended, where that is noticed. */
  readonly ended?: Promise<void>;
  /** Connects to a Unix-domain socket there; rejects where that can't be. */
  openSocket(file: string): Promise<Duplex>;
  /**
   * So many bytes arrive at such a socket in one piece, if they are written in
   * one: then a daemon takes requests together. Default: 0.
   */
  readonly pieceSize?: number;
  /** Runs a shell command there. */
  exec(command: string): Promise<RemoteProcess>;
  /** What builds leave there, where it is kept for the next. */
  readonly kept?: Kept;
  /** Ends it and all that runs over it; because of an error, at once. */
  close(error?: Error): void;
}

/** What is kept with a connection to a machine. */
export interface Kept {
  /** Connections to its guix-daemon that nobody uses: the last is used next. */
  readonly daemons: StoreConnection[];
  /** When something last passed over a channel, by `performance.now()`. */
  used: number;
}

/** Why a machine gets no build now. */
export interface Exclusion {
  /** The reason, as users read it. */
  readonly why: string;
  /** Whether builds had better wait for it than be built locally. */
  readonly isBusy: boolean;
  /** Makes it ready, in the background: a build has no other place. */
  start?(): Awaitable<void>;
  /** Whether it is being made ready: meanwhile no other machine is started. */
  readonly isStarting?: boolean;
}

/**
 * Moves archives between the stores. What it brings is checked here, whatever
 * brought it.
 */
export interface Transport {
  /**
   * Returns those of `paths` that the machine lacks, and may first have it fetch
   * what it can by itself.
   */
  missing(paths: readonly string[]): Awaitable<readonly string[]>;
  /**
   * Waits for the right to send `size` bytes, where there is such a thing: then
   * it is asked again what is missing. What it returns gives the right back.
   */
  reserve?(size: number): Awaitable<Pick<Slot, "release"> | undefined>;
  /** Sends items, each after those that it refers to. */
  send(items: ReadonlyMap<string, PathInfo>): Awaitable<void>;
  /** Told when a derivation is there and is being built: `retrieve` is next. */
  prepare?(derivation: string): void;
  /**
   * The bundle that `guix archive --export` makes of `paths` there: items of
   * `size` bytes, where that is known.
   */
  retrieve(paths: readonly string[], size?: number): AsyncIterable<Uint8Array>;
}

/** The hooks: what a plugin may do. */
export interface Hooks {
  /** Lists machines; of all plugins' lists, the first NAME:PORT wins. */
  machines(context: PluginContext): Awaitable<readonly Machine[]>;
  /** Says why a machine is not even to be asked; the first answer wins. */
  exclude(
    machine: Machine,
    context: PluginContext,
  ): Awaitable<Exclusion | undefined>;
  /**
   * Connects to a machine with the pinned host key; the first answer wins. It
   * may tell `reached` how far it is.
   */
  connect(
    machine: Machine,
    context: PluginContext,
    reached?: (what: Reached) => void,
  ): Awaitable<Connection | undefined>;
  /**
   * Scores a machine, one of all that may take a build; summed. `undefined`
   * abstains, -Infinity vetoes.
   */
  score(
    candidate: Candidate,
    request: ScoredRequest,
    context: PluginContext,
    all?: readonly Candidate[],
  ): Awaitable<number | undefined>;
  /**
   * Says why a build had better wait than go to the first of these machines,
   * the best ones first, that has a free slot; the first answer wins.
   */
  defer(
    ranking: readonly ScoredCandidate[],
    request: ScoredRequest,
    context: PluginContext,
  ): Awaitable<Deferral | undefined>;
  /** Takes leave to build there until the connection ends; `false`: none. */
  admit(
    machine: Machine,
    context: TransportContext,
  ): Awaitable<boolean | undefined>;
  /** Moves archives to and from a machine; the first answer wins. */
  transport(
    machine: Machine,
    context: TransportContext,
  ): Awaitable<Transport | undefined>;
  /** Told of a build that is over: nothing waits for what it does then. */
  ended(build: JournalEntry, context: PluginContext): Awaitable<void>;
}

/** A plugin: a name, and at least one hook, or a command. */
export interface Plugin extends Partial<Hooks> {
  /** Names it in messages and settings. */
  readonly name: string;
  /** What the setting `use` may say of it. */
  readonly options?: Readonly<Record<string, Setting>>;
  /** What `offload` and its name do. */
  readonly command?: Command;
}

/** What serving a request needs of the world. */
export interface Context extends PluginContext {
  /** Takes the log of the build; settles when it can take more. */
  readonly buildLog: (text: Uint8Array) => Awaitable<void>;
  /** Limits on the build. */
  readonly buildOptions: BuildOptions;
  /** The system type of this machine. */
  readonly system: string;
  /** The store: /gnu/store. */
  readonly storeDirectory: string;
  /** Socket of this machine's daemon. */
  readonly daemonSocket: string;
  /** The plugins, in the order in which they are asked. */
  readonly plugins: readonly Plugin[];
  /** What was reported of the machine file. */
  readonly problems: readonly Problem[];
  /** What our processes saw of the machines. */
  readonly observations: Observations;
  /** Connects to machines, where connections to them are kept. */
  readonly connect?: typeof connectByPlugin;
  /** Connections to the daemon here that are kept, where they are. */
  readonly localDaemons?: StoreConnection[];
  /** Those who wait for slots, where this process serves several hooks. */
  readonly queue?: SlotQueue;
  /** Has another process move store items; false where it is to be done here. */
  readonly carry?: (load: Load, context: BuildContext) => Promise<boolean>;
  /** Tells plugins of a build that is over, where this process stays for that. */
  readonly tellLater?: (build: JournalEntry) => void;
}

/** Store items that are to be moved for a build: one of both. */
export interface Load {
  /** What is built. */
  readonly derivation: string;
  /** How much they are, in bytes. */
  readonly bytes: number;
  /** What is to be sent. */
  readonly inputs?: readonly string[];
  /** What is to be retrieved. */
  readonly outputs?: readonly string[];
}

/** Those who wait for slots in a process. */
export interface SlotQueue {
  /** Waits for a free slot until `end`, by `performance.now()`. */
  untilFree(
    isFree: () => boolean,
    end: number,
    signal: AbortSignal,
  ): Promise<boolean>;
  /** Told that a slot was freed here. */
  tellFreed(): void;
}

/** Seconds that each hook may take, in the order in which a build meets them. */
export const HOOKS: Readonly<
  Record<keyof Hooks, (settings: Settings, isOurs: boolean) => number>
> = {
  // Guile alone takes a while to start, and has a bound of its own.
  machines: ({ hookTimeout }, isOurs) => isOurs ? 60 : hookTimeout,
  exclude: ({ hookTimeout }) => hookTimeout,
  // By itself it says better what is late.
  connect: ({ connectTimeout }) => 1.5 * connectTimeout,
  score: ({ hookTimeout }) => hookTimeout,
  defer: ({ hookTimeout }) => hookTimeout,
  admit: ({ connectTimeout }) => connectTimeout,
  // What is ours may have to be loaded.
  transport: ({ hookTimeout }, isOurs) => isOurs ? 60 : hookTimeout,
  ended: ({ connectTimeout }, isOurs) => isOurs ? 60 : connectTimeout,
};

/** The hooks of which the setting of that name chooses one built-in plugin's. */
type Choice = keyof Hooks & keyof Settings;

/** Tells those hooks. */
function isChoice(hook: string): hook is Choice {
  return hook in HOOKS && hook in SETTINGS;
}

/** The score where the setting says "auto", if no other plugin scores. */
const AUTOMATIC_SCORE = "expected";

/** The built-in plugin that is chosen for a hook, by what else there is. */
function chosenName(
  hook: Choice,
  { plugins, settings }: Pick<Context, "plugins" | "settings">,
): string {
  if (hook !== "score" || settings.score !== "auto") return settings[hook];
  const isOther = (plugin: Plugin) =>
    plugin.score !== undefined && plugin.name !== AUTOMATIC_SCORE &&
    (!isBuiltin(plugin) || plugin.name in settings.use);
  const isThere = plugins.some(({ name }) => name === AUTOMATIC_SCORE);
  const isAlone = isThere && !plugins.some(isOther);
  return isAlone ? AUTOMATIC_SCORE : guixPlugin.name;
}

/** The files in plugins/, in a bundle, which has them in itself. */
declare const BUNDLED_PLUGINS: string;

/** The files in plugins/; without that directory, none. */
function listBuiltinFiles(): readonly string[] {
  if (typeof BUNDLED_PLUGINS !== "undefined") return BUNDLED_PLUGINS.split(" ");
  const directory = new URL("plugins", import.meta.url);
  if (!existsSync(directory)) return [];
  // Where others may make a directory, it need not be ours.
  const owners = [0, statSync(new URL(import.meta.url)).uid];
  return owners.includes(statSync(directory).uid) ? readdirSync(directory) : [];
}

/** The names of the plugins that are built in, by which they are found. */
export function builtinNames(): string[] {
  return listBuiltinFiles().filter((file) => /^[a-z].*\.ts$/.test(file))
    .map((file) => file.slice(0, -".ts".length).replaceAll("_", "-")).sort();
}

/** What was imported of plugins/: to import it again takes its time. */
const imported = new Map<string, unknown>();

/**
 * Imports a file of plugins/, by its name without the end, if it is there.
 *
 * @throws {LocalError} where it can't be: that is no machine's fault.
 */
async function importFromPlugins<T>(name: string): Promise<T | undefined> {
  if (imported.has(name)) return imported.get(name) as T;
  if (!listBuiltinFiles().includes(`${name}.ts`)) return undefined;
  try {
    imported.set(name, await import(`./plugins/${name}.ts`));
    return imported.get(name) as T;
  } catch (cause) {
    const message = `failed to load plugins/${name}.ts: ${reason(cause)}`;
    throw new LocalError(message, { cause });
  }
}

/** Imports one that can't be done without; `what` says what is lacking else. */
async function demandFromPlugins<T>(name: string, what: string): Promise<T> {
  const found = await importFromPlugins<T>(name);
  if (found !== undefined) return found;
  const hint = "have Offload's plugins/ beside mod.ts";
  throw new OffloadError(what, { hint });
}

/** Uses a file of plugins/, if it is there, for what no build depends on. */
async function useAside<Module>(
  name: string,
  { log }: Pick<Context, "log">,
  use: (module: Module) => Awaitable<void>,
): Promise<void> {
  try {
    const module = await importFromPlugins<Module>(name);
    if (module !== undefined) await use(module);
  } catch (error) {
    log.debug(reason(error));
  }
}

/** Loads the built-in plugin of a name; `undefined`: there is none. */
export async function loadBuiltin(name: string): Promise<Plugin | undefined> {
  if (!/^[a-z][a-z0-9-]*$/.test(name)) return undefined;
  const file = name.replaceAll("-", "_");
  const found = await importFromPlugins<{ default: Plugin }>(file);
  if (found === undefined) return undefined;
  builtinPlugins.add(found.default);
  return found.default;
}

/** Where on a build's way a plugin is asked first. */
function turnOf(plugin: Plugin): number {
  return Object.keys(HOOKS).findIndex((hook) => hook in plugin);
}

/**
 * Loads built-in plugins with hooks, all unless told which, in the order in
 * which they are asked: as a build meets them, then as they are named.
 */
export async function loadBuiltins(
  names: readonly string[] = builtinNames(),
): Promise<Plugin[]> {
  const plugins = await Promise.all(names.map(loadBuiltin));
  return plugins.filter((plugin) => plugin !== undefined)
    .filter((plugin) => turnOf(plugin) >= 0)
    .sort((a, b) => turnOf(a) - turnOf(b));
}

/** Loads what the settings name of the built-in plugins, after our own. */
async function loadChosen(settings: Settings): Promise<Plugin[]> {
  const own = [guixPlugin, guilePlugin];
  const choices = Object.keys(HOOKS).filter(isChoice);
  const names = new Set([
    ...choices.map((hook) => settings[hook]),
    ...Object.keys(settings.use),
  ]);
  if (names.delete("auto")) names.add(AUTOMATIC_SCORE);
  own.forEach(({ name }) => names.delete(name));
  const plugins = [...own, ...await loadBuiltins([...names])];
  for (const hook of choices) {
    const choice = chosenName(hook, { plugins, settings });
    const isThere = ({ name, [hook]: call }: Plugin) =>
      name === choice && call !== undefined;
    if (plugins.some(isThere)) continue;
    const known = [...own, ...await loadBuiltins()]
      .filter((plugin) => plugin[hook] !== undefined)
      .map(({ name }) => name);
    throw new OffloadError(
      `there is no built-in ${hook} '${settings[hook]}', only '` +
        `${known.join("', '")}'`,
    );
  }
  return plugins;
}

/** What loads a site's plugins: `plugins/_site.ts`. */
interface SiteModule {
  loadFiles(
    files: readonly string[],
    taken: readonly string[],
    seconds: number,
    log: Log,
  ): Promise<{ plugins: Plugin[]; failures: number }>;
}

/** Loads a site's plugins, by file name; says how many can't be. */
export async function loadSite(
  directory: string,
  seconds: number,
  log: Log,
): Promise<{ plugins: Plugin[]; failures: number }> {
  const files = await findPlugins(directory);
  if (files.length === 0) return { plugins: [], failures: 0 };
  const taken = [guixPlugin.name, guilePlugin.name, ...builtinNames()];
  const what = `nothing here loads the plugins in '${directory}'`;
  try {
    const site = await demandFromPlugins<SiteModule>("_site", what);
    return await site.loadFiles(files, taken, seconds, log);
  } catch (error) {
    log.warn(error);
    return { plugins: [], failures: files.length };
  }
}

/**
 * Loads the plugins: those of the site, by file name, before the built-in
 * ones. One that can't be loaded is warned about: it stops no build.
 */
export async function loadPlugins(
  directory: string,
  settings: Settings,
  log: Log,
): Promise<readonly Plugin[]> {
  const chosen = await loadChosen(settings);
  const { hookTimeout } = settings;
  const { plugins, failures } = await loadSite(directory, hookTimeout, log);
  plugins.push(...chosen);
  for (const [name, options] of Object.entries(settings.use)) {
    const plugin = plugins.find((plugin) => plugin.name === name);
    if (plugin === undefined && failures > 0) continue; // it may be that one
    if (plugin === undefined) {
      const known = new Set([...plugins, ...await loadBuiltins()]
        .map(({ name }) => name));
      throw new OffloadError(`setting 'use': there is no plugin '${name}'`, {
        hint: `the plugins are ${[...known].join(", ")}`,
      });
    }
    const isObject = options?.constructor === Object;
    if (!isObject) throw new OffloadError(`setting 'use.${name}': no object`);
    checkSettings(plugin.options ?? {}, options, `setting 'use.${name}'`);
  }
  return plugins;
}

async function findPlugins(directory: string): Promise<string[]> {
  if (!existsSync(directory)) return [];
  const options = { cwd: directory, absolute: true, flush: true };
  const files = await glob("*.{ts,js,mjs}", options);
  return files.filter((file) => !/^[._]/.test(basename(file))).sort();
}

/** What an error that a hook throws may say beside its message. */
export interface PluginError extends Error {
  /** What the user can do about it. */
  readonly hint?: string;
  /** Whether it is this machine's failure: no other build machine would help. */
  readonly isLocal?: boolean;
}

/** Names a plugin and its hook in what goes wrong there. */
export function hookError(
  plugin: Plugin,
  hook: keyof Hooks,
  cause: unknown,
): OffloadError {
  const isOurs = isBuiltin(plugin) && /machines|connect/.test(hook);
  if (isOurs && cause instanceof OffloadError) return cause;
  const prefix = isOurs ? "" : `plugin '${plugin.name}': ${hook}: `;
  const { hint, isLocal } = (cause ?? {}) as PluginError;
  const message = prefix + reason(cause);
  if (isLocal === true) return new LocalError(message, { cause, hint });
  const code = isOurs ? codeOf(cause) : "plugin";
  return new OffloadError(message, { cause, hint, code });
}

/** What hooks are called with, and the plugins. */
export type HookContext =
  & Omit<PluginContext, "options">
  & Pick<Context, "plugins">;

/** A plugin that has a hook. */
export type PluginWith<K extends keyof Hooks> = Plugin & Pick<Hooks, K>;

/** Calls a plugin's hook, with a context that is the plugin's own. */
type HookCall<K extends keyof Hooks, C, T> = (
  plugin: PluginWith<K>,
  own: C & Pick<PluginContext, "options">,
) => Awaitable<T>;

/** Calls a hook within its time, and names it in what goes wrong. */
async function callHook<K extends keyof Hooks, C extends HookContext, T>(
  hook: K,
  plugin: PluginWith<K>,
  context: C,
  call: HookCall<K, C, T>,
): Promise<T> {
  const seconds = HOOKS[hook](context.settings, isBuiltin(plugin));
  const answer = async () => await call(plugin, contextFor(plugin, context));
  try {
    return await within(seconds, answer(), `no answer within ${seconds} s`);
  } catch (cause) {
    throw hookError(plugin, hook, cause);
  }
}

/** Whether a plugin is one of ours, not the site's. */
function isBuiltin(plugin: Plugin): boolean {
  return builtinPlugins.has(plugin);
}

/** Whether it is a built-in one that needs no setting: the machine file's. */
export function isDefault(plugin: Plugin): boolean {
  return isBuiltin(plugin) && plugin.options === undefined;
}

/**
 * The plugins whose hook counts: a site's own always, of the built-in ones
 * those that the settings name, and what has nothing to be told.
 */
export function pluginsWith<K extends keyof Hooks>(
  hook: K,
  { plugins, settings }: Pick<Context, "plugins" | "settings">,
): PluginWith<K>[] {
  // Who scores knows what a wait is worth.
  const choice = hook === "defer" ? "score" : hook;
  const isUsed = (plugin: Plugin) => {
    // Of what is chosen by another setting, 'use' has the options alone.
    const isNamed = plugin.name in settings.use &&
      plugin.name !== AUTOMATIC_SCORE;
    if (!isBuiltin(plugin) || isNamed) return true;
    if (!isChoice(choice)) return isDefault(plugin);
    return plugin.name === chosenName(choice, { plugins, settings });
  };
  return plugins.filter((plugin): plugin is PluginWith<K> =>
    plugin[hook] !== undefined && isUsed(plugin)
  );
}

/** Gives a plugin's hooks their context: with the plugin's own options. */
export function contextFor<T extends Omit<PluginContext, "options">>(
  plugin: Plugin,
  context: T,
): T & Pick<PluginContext, "options"> {
  const options: Record<string, unknown> = {};
  for (const [name, option] of Object.entries(plugin.options ?? {})) {
    options[name] = context.settings.use[plugin.name]?.[name] ?? option.default;
  }
  return { ...context, options: options as Options };
}

/** Calls a hook of plugins in turn; the first answer wins. */
async function firstAnswer<K extends keyof Hooks, C extends HookContext, T>(
  hook: K,
  context: C,
  call: HookCall<K, C, T | undefined>,
): Promise<T | undefined> {
  for (const plugin of pluginsWith(hook, context)) {
    const answer = await callHook(hook, plugin, context, call);
    if (answer !== undefined) return answer;
  }
  return undefined;
}

/** Calls a hook of plugins in turn; all must agree, or have no opinion. */
async function allAgree<K extends keyof Hooks, C extends HookContext>(
  hook: K,
  context: C,
  call: HookCall<K, C, boolean | undefined>,
): Promise<boolean> {
  for (const plugin of pluginsWith(hook, context)) {
    if (await callHook(hook, plugin, context, call) === false) return false;
  }
  return true;
}

/** Calls a hook of all plugins at once; one that fails is told, and left out. */
async function allAnswers<K extends keyof Hooks, C extends HookContext, T>(
  hook: K,
  context: C,
  call: HookCall<K, C, T>,
  tell: (error: OffloadError, plugin: Plugin) => void,
): Promise<{ plugin: Plugin; answer: T }[]> {
  const calls = pluginsWith(hook, context).map(async (plugin) => {
    try {
      return { plugin, answer: await callHook(hook, plugin, context, call) };
    } catch (error) {
      context.signal.throwIfAborted();
      tell(error as OffloadError, plugin);
      return undefined;
    }
  });
  return (await Promise.all(calls)).filter((it) => it !== undefined);
}

/** The same of candidates: what the plugins say of each, by the plugin. */
async function answersAbout<K extends keyof Hooks, T>(
  candidates: readonly Candidate[],
  hook: K,
  context: Context,
  call: (
    candidate: Candidate,
    ...its: Parameters<HookCall<K, Context, T>>
  ) => Awaitable<T | undefined>,
): Promise<[name: string, answer: T][][]> {
  const answers = await allAnswers(
    hook,
    context,
    (...its) => Promise.all(candidates.map((it) => call(it, ...its))),
    (error) => context.log.warn(error),
  );
  return candidates.map((_, index) =>
    answers.flatMap(({ plugin: { name }, answer: { [index]: answer } }) =>
      answer === undefined ? [] : [[name, answer]]
    )
  );
}

/** Concatenates the plugins' machines, and says whether all could tell all. */
async function concatMachines(
  context: Context,
): Promise<{ machines: Machine[]; areAll: boolean }> {
  let areAll = true;
  const report = (problem: Problem) => {
    if (problem.severity === "error") areAll = false;
    context.report(problem);
  };
  const lists = await allAnswers(
    "machines",
    { ...context, report },
    (plugin, own) => plugin.machines(own),
    ({ message, hint }, plugin) => {
      const toldAs = isBuiltin(plugin) ? undefined : "warning";
      report({ severity: "error", message, hint, toldAs });
    },
  );
  const machines: Machine[] = [];
  for (const { answer } of lists) {
    const known = new Set(machines.map(machineId));
    machines.push(...answer.filter((each) => !known.has(machineId(each))));
  }
  return { machines, areAll };
}

/** Asks all plugins for machines; of each NAME:PORT, the first plugin's. */
export async function listMachines(context: Context): Promise<Machine[]> {
  return (await concatMachines(context)).machines;
}

/** Tells plugins of a build that is over, and warns of what fails there. */
export async function tellEnded(
  build: JournalEntry,
  context: Context,
): Promise<void> {
  await allAnswers(
    "ended",
    context,
    (plugin, own) => plugin.ended(build, own),
    (error) => context.log.warn(error),
  );
}

/** The same once nobody waits: at once, that would delay guix-daemon. */
async function tellEndedLater(
  build: JournalEntry,
  context: Context,
): Promise<void> {
  if (pluginsWith("ended", context).length === 0) return;
  if (context.tellLater) return context.tellLater(build);
  type Module = { tellApart(build: JournalEntry, context: Context): void };
  await useAside<Module>(
    "_ended",
    context,
    (it) => it.tellApart(build, context),
  );
}

/** The scores of a candidate: each plugin's, and their sum. */
export interface Scores {
  /** By the plugin's name; those that abstain are left out. */
  readonly byPlugin: Readonly<Record<string, number>>;
  /** Their sum: -Infinity where one vetoes. */
  readonly total: number;
}

/** Sums the scores that the plugins give each candidate. */
export async function sumScores(
  candidates: readonly Candidate[],
  request: ScoredRequest,
  context: Context,
): Promise<Scores[]> {
  const answers = await answersAbout(
    candidates,
    "score",
    context,
    (candidate, plugin, own) =>
      plugin.score(candidate, request, own, candidates),
  );
  return answers.map((scores) => ({
    byPlugin: Object.fromEntries(scores),
    total: scores.reduce((sum, [, score]) => sum + score, 0),
  }));
}

/** The first plugin's answer why a candidate is not even to be asked. */
async function firstExclusions(
  candidates: readonly Candidate[],
  context: Context,
): Promise<(Exclusion | undefined)[]> {
  const answers = await answersAbout(
    candidates,
    "exclude",
    context,
    ({ machine }, plugin, own) => plugin.exclude(machine, own),
  );
  return answers.map(([first]) => first?.[1]);
}

/** The defaults: machine file, order and transport of the reference. */
const guixPlugin: Plugin = {
  name: "guix",
  async machines(context) {
    const { machines, problems } = await context.machineFile();
    problems.forEach(context.report);
    return machines;
  },
  connect: openConnection,
  score: ({ machine }) => machine.speed,
  async transport(machine, context) {
    const quick = await loadBuiltin("quick");
    return await quick?.transport?.(machine, context) ??
      plainTransport(context);
  },
};

/** Stands in for the plugin of that name, which only programs need. */
const guilePlugin: Plugin = {
  name: "guile-machines",
  async machines(context) {
    let file: MachineFile;
    try {
      file = await context.machineFile();
    } catch {
      return []; // the plugin "guix" tells what is wrong
    }
    if (file.needsGuile === undefined) return [];
    const plugin = await loadBuiltin(guilePlugin.name);
    if (plugin?.machines !== undefined) {
      return await plugin.machines({ ...context, machineFile: () => file });
    }
    throw new OffloadError(
      `${file.needsGuile}: only Guile can evaluate this, and the plugin ` +
        `'${guilePlugin.name}' is not there`,
      { hint: "have Offload's plugins/ beside mod.ts, or a plain list there" },
    );
  },
};

/** The built-in plugins that are loaded. */
const builtinPlugins = new Set([guixPlugin, guilePlugin]);

// ---------------------------------------------------------------------------
// Wire: the store RPC
// ---------------------------------------------------------------------------
//
// Numbers are 64-bit little-endian; strings carry their length before them and
// are padded with zeros to a multiple of 8 (guix/serialization.scm,
// guix/store.scm).

/** What can be serialized. */
export type WireValue =
  | number
  | boolean
  | string
  | Uint8Array
  | readonly string[];

/** Lengths beyond which a peer is not believed, in bytes or items. */
export const LIMITS = {
  storePath: 4096,
  message: 1 << 20,
  chunk: 16 << 20,
  list: 1 << 20,
  listSize: 32 << 20,
  signature: 16384,
} as const;

function encodeNumber(value: number): Buffer {
  const buffer = Buffer.alloc(8);
  buffer.writeBigUInt64LE(BigInt(value));
  return buffer;
}

function encodeBytes(bytes: Uint8Array): Buffer {
  const size = 8 + bytes.length + padding(bytes.length);
  return Buffer.concat([encodeNumber(bytes.length), bytes], size);
}

function encodeValue(value: WireValue): Buffer {
  if (typeof value === "string") return encodeBytes(Buffer.from(value));
  if (value instanceof Uint8Array) return encodeBytes(value);
  if (typeof value !== "object") return encodeNumber(Number(value));
  return Buffer.concat([encodeNumber(value.length), encode(...value)]);
}

/** Serializes values the way guix-daemon reads them. */
export function encode(...values: readonly WireValue[]): Buffer {
  return Buffer.concat(values.map(encodeValue));
}

function padding(size: number): number {
  return (8 - size % 8) % 8;
}

/** Shorter chunks are put together, in bytes. */
const SMALL_CHUNK = 512;

/**
 * Reads exact amounts from a stream of chunks, pulling no more than it needs,
 * and hashes what it hands out where asked to.
 *
 * Every method throws an {@linkcode OffloadError} that names the stream where
 * it ends too early or says something absurd.
 */
export class ByteReader {
  readonly #source: AsyncIterator<Uint8Array>;
  /** What messages call it. */
  readonly name: string;
  readonly #chunks: Buffer[] = [];
  #size = 0;
  #hash: Hash | undefined;

  /** Reads from `source`, which messages call `name`. */
  constructor(source: AsyncIterable<Uint8Array> | Duplex, name: string) {
    this.#source = "pipe" in source
      ? chunksOf(source)
      : source[Symbol.asyncIterator]();
    this.name = name;
  }

  /** Begins to hash, with SHA-256, what is read from here on. */
  startHash(): void {
    this.#hash = createHash("sha256");
  }

  /** The hash of what was read since `startHash`, which it ends. */
  finishHash(): Buffer {
    const hash = this.#hash!.digest();
    this.#hash = undefined;
    return hash;
  }

  /** An error about this stream. */
  error(message: string): OffloadError {
    return new ProtocolError(`${this.name}: ${message}`);
  }

  /** What breaks off may just be broken: no error of the peer's. */
  #endOfData(): OffloadError {
    return new OffloadError(`${this.name}: unexpected end of data`);
  }

  /** Whether another byte follows. */
  async more(): Promise<boolean> {
    while (this.#size === 0) if (!await this.#pull()) return false;
    return true;
  }

  /** Reads `size` bytes. */
  async read(size: number): Promise<Buffer> {
    while (this.#size < size) if (!await this.#pull()) throw this.#endOfData();
    const bytes = this.#take(size);
    this.#hash?.update(bytes);
    return bytes;
  }

  /** Reads what is at hand, at least a byte and at most `limit`. */
  async readSome(limit: number): Promise<Buffer> {
    await this.read(0);
    if (!await this.more()) throw this.#endOfData();
    return this.read(Math.min(limit, this.#chunks[0]!.length));
  }

  /** Reads up to `limit` bytes, fewer only where the stream ends. */
  async readFull(limit: number): Promise<Buffer> {
    while (this.#size < limit) if (!await this.#pull()) break;
    return this.read(Math.min(limit, this.#size));
  }

  /** What is left, as it comes. */
  async *rest(): AsyncGenerator<Buffer, void> {
    while (await this.more()) yield await this.readSome(LIMITS.chunk);
  }

  /** Reads a number, at most `limit`. */
  async number(limit: number = Number.MAX_SAFE_INTEGER): Promise<number> {
    const value = (await this.read(8)).readBigUInt64LE();
    if (value > BigInt(limit)) {
      throw this.error(`unexpected number ${value}, more than ${limit}`);
    }
    return Number(value);
  }

  /** Reads a byte string of at most `limit` bytes. */
  async bytes(limit: number): Promise<Buffer> {
    const bytes = await this.read(await this.number(limit));
    await this.padding(bytes.length);
    return bytes;
  }

  /** Reads the zeros behind a byte string of `size` bytes. */
  async padding(size: number): Promise<void> {
    const zeros = await this.read(padding(size));
    if (zeros.some((byte) => byte !== 0)) {
      throw this.error("padding that is not zero");
    }
  }

  /** Reads a string of at most `limit` bytes of UTF-8. */
  async string(limit: number): Promise<string> {
    return (await this.bytes(limit)).toString();
  }

  /** Reads a list of store paths. */
  async strings(): Promise<string[]> {
    const strings = [];
    let size = 0;
    for (let left = await this.number(LIMITS.list); left > 0; left--) {
      const bytes = await this.bytes(LIMITS.storePath);
      size += bytes.length;
      if (size > LIMITS.listSize) throw this.error("a list that is too long");
      strings.push(bytes.toString());
    }
    return strings;
  }

  async #next(): Promise<IteratorResult<Uint8Array>> {
    try {
      return await this.#source.next();
    } catch (cause) {
      if (cause instanceof OffloadError) throw cause;
      const message = `${this.name}: ${reason(cause)}`;
      throw new OffloadError(message, { cause });
    }
  }

  async #pull(): Promise<boolean> {
    const { value, done } = await this.#next();
    if (done) return false;
    if (value.length === 0) return true;
    const chunk = Buffer.from(value.buffer, value.byteOffset, value.length);
    const last = this.#chunks.at(-1);
    // A peer that sends byte by byte must not cost an object for each.
    const both = last !== undefined && last.length + chunk.length < SMALL_CHUNK;
    if (both) this.#chunks.push(Buffer.concat([this.#chunks.pop()!, chunk]));
    else this.#chunks.push(chunk);
    this.#size += value.length;
    return true;
  }

  #take(size: number): Buffer {
    this.#size -= size;
    const parts = [];
    while (size > 0) {
      const chunk = this.#chunks[0]!;
      parts.push(chunk.subarray(0, size));
      if (chunk.length > size) this.#chunks[0] = chunk.subarray(size);
      else this.#chunks.shift();
      size -= Math.min(size, chunk.length);
    }
    return parts.length === 1 ? parts[0]! : Buffer.concat(parts);
  }
}

/** An error that a guix-daemon reports. */
export class DaemonError extends OffloadError {
  /** The daemon's own status: 100 for a build that failed for good. */
  readonly status: number;

  /** Makes an error of the daemon's message and status. */
  constructor(message: string, status: number) {
    // What it says of a signature whose key is not in its list.
    const isUnauthorized = message.includes("unauthorized public key");
    super(message, { code: isUnauthorized ? "unauthorized" : "daemon" });
    this.status = status;
  }
}

/** A connection to a guix-daemon, past the handshake. */
export interface StoreConnection {
  /** What messages call it: `guix-daemon on 'HOST'`. */
  readonly name: string;
  /** The socket or SSH channel beneath. */
  readonly stream: Duplex;
  /** Its incoming side. */
  readonly reader: ByteReader;
  /** Minor version of the daemon's protocol. */
  readonly minor: number;
  /** Bytes of requests that it takes ahead of its answers; 0: one request. */
  readonly ahead: number;
  /** Seconds that each of their answers may take; forever unless told. */
  readonly patience?: number | undefined;
  /** Whether what signs for it has been started, which takes a while. */
  hasSigned?: boolean;
}

/**
 * What a guix-daemon reads at once, in bytes (nix/libutil/serialise.hh). While
 * it works it expects silence (nix/nix-daemon/nix-daemon.cc), but what it has
 * read by then may hold further requests, if all of them came in one piece.
 */
export const READ_SIZE = 32768;

/** What a daemon's operation reads and writes while it works. */
export interface OperationStreams {
  /** Takes each piece of a log; no more is read while it can take no more. */
  readonly log?: (text: Buffer) => Awaitable<void>;
  /** Has the data that the operation asks for. */
  readonly source?: ByteReader;
}

const WORKER_MAGIC = [0x6e697863, 0x6478696f] as const;
const PROTOCOL_VERSION = 0x164;
/** Guix 0.9 of 2015: what came before counts the arguments differently. */
const OLDEST_MINOR = 0x61;

/** The numbers of the operations. */
export const OPERATION = {
  addToStore: 7,
  addTextToStore: 8,
  buildThings: 9,
  addTempRoot: 11,
  exportPath: 16,
  setOptions: 19,
  queryReferrers: 6,
  queryDerivationOutputs: 22,
  queryPathInfo: 26,
  importPaths: 27,
  queryValidPaths: 31,
  querySubstitutablePaths: 32,
} as const;

const STDERR = {
  next: 0x6f6c6d67,
  read: 0x64617461,
  write: 0x64617416,
  last: 0x616c7473,
  error: 0x63787470,
} as const;

/** Writes with back-pressure; what fails, fails the next read as well. */
async function write(stream: Duplex, bytes: Uint8Array): Promise<void> {
  if (!stream.writable || stream.write(bytes)) return;
  await new Promise<void>((resolve, reject) => {
    const done = (error?: Error | null) => {
      stream.off("drain", done).off("close", done).off("error", done);
      error ? reject(error) : resolve();
    };
    stream.on("drain", done).on("close", done).on("error", done);
  });
}

async function daemonError(store: StoreConnection): Promise<DaemonError> {
  const message = await store.reader.string(LIMITS.message);
  // The daemon sends no status for what goes wrong very early.
  const status = await store.reader.more() ? await store.reader.number() : 1;
  return new DaemonError(message.trim(), status);
}

/** Connections that a build has left, and on which no answer came since. */
const LEFT = new WeakSet<StoreConnection>();

/**
 * Serves a daemon's operation until it hands out data (a non-empty result) or
 * ends (`undefined`).
 */
async function nextData(
  store: StoreConnection,
  { log, source }: OperationStreams = {},
): Promise<Buffer | undefined> {
  const { reader } = store;
  for (let heard = 0;;) {
    const code = await reader.number();
    LEFT.delete(store);
    if (code === STDERR.last) return undefined;
    if (code === STDERR.write) return reader.bytes(LIMITS.chunk);
    if (code === STDERR.error) throw await daemonError(store);
    if (code === STDERR.next) {
      const text = await reader.bytes(LIMITS.message);
      await log?.(text);
      heard += 64 + text.length;
      if (log === undefined && heard > LIMITS.chunk) {
        throw reader.error("too many messages");
      }
    } else if (code === STDERR.read && source !== undefined) {
      const limit = Math.min(await reader.number(), LIMITS.chunk);
      await write(store.stream, encode(await source.readFull(limit)));
    } else throw reader.error(`unexpected message 0x${code.toString(16)}`);
  }
}

/** Waits for the end of an operation. */
async function finish(
  store: StoreConnection,
  streams?: OperationStreams,
): Promise<void> {
  if (await nextData(store, streams) !== undefined) {
    throw store.reader.error("unexpected data");
  }
}

async function operate(
  store: StoreConnection,
  request: readonly WireValue[],
  streams?: OperationStreams,
): Promise<void> {
  await write(store.stream, encode(...request));
  await finish(store, streams);
}

/** An operation: what is sent, and what reads that which it returns. */
export interface Call {
  /** What is sent: the number of the operation, and its arguments. */
  readonly request: Buffer;
  /** Reads what comes back. */
  readonly result: (reader: ByteReader) => Promise<unknown>;
  /** Whether the answer may take as long as it likes. */
  readonly takesLong?: boolean;
}

/** Any of a kind, also one after another. */
export type Sequence<T> = Iterable<T> | AsyncIterable<T>;

/** Puts together what goes in one message, as soon as that is full. */
async function* messagesOf<T extends { readonly request: Buffer }>(
  calls: Sequence<T>,
  { ahead }: StoreConnection,
): AsyncGenerator<readonly T[], void> {
  let message: T[] = [];
  let size = 0;
  for await (const call of calls) {
    if (message.length > 0 && size + call.request.length > ahead) {
      yield message;
      [message, size] = [[], 0];
    }
    message.push(call);
    size += call.request.length;
  }
  if (message.length > 0) yield message;
}

/** Writes requests in one piece. */
export async function writeMessage(
  { stream }: StoreConnection,
  message: readonly { readonly request: Buffer }[],
): Promise<void> {
  await write(stream, Buffer.concat(message.map(({ request }) => request)));
}

/**
 * Performs operations one after another, waiting for answers only between
 * messages. What the daemon refuses is thrown once the rest of the message is
 * answered: the connection stays of use.
 */
export async function operateAll(
  store: StoreConnection,
  calls: Sequence<Call>,
  streams?: OperationStreams,
): Promise<void> {
  const messages = messagesOf(calls, store);
  let next = messages.next();
  // What makes the next message may still be reading from somewhere.
  const failed = (error: unknown) => next.then(() => error, () => error);
  for (;;) {
    const { value: message, done } = await next;
    if (done) return;
    await writeMessage(store, message);
    next = messages.next(); // made while the daemon is at work
    next.catch(() => {}); // it is told when it is awaited
    let refused: DaemonError | undefined;
    for (const { result, takesLong = message.length === 1 } of message) {
      try {
        const answer = finish(store, streams).then(() => result(store.reader));
        await awaitAnswer(store, takesLong, answer);
      } catch (error) {
        if (!(error instanceof DaemonError) || isOutOfStep(error)) {
          const cause = refused ?? error;
          throw await failed(message.length > 1 ? asLost(cause) : cause);
        }
        refused ??= error;
      }
    }
    if (refused !== undefined) throw await failed(refused);
  }
}

/**
 * What a daemon says that got something while it was at work, or does not, or
 * leaves instead of saying.
 */
const OUT_OF_STEP = /^EOF expected|^no answer to requests that came together/;

/** The error where a daemon that lost count may have left for that. */
function asLost(error: unknown): unknown {
  if (!/: unexpected end of data$/.test(reason(error))) return error;
  const message = `no answer to requests that came together: ${reason(error)}`;
  return new OffloadError(message, { cause: error });
}

/** Whether a daemon got something while it was at work: it lost count then. */
export function isOutOfStep(error: unknown): boolean {
  return error instanceof OffloadError && !(error instanceof LocalError) &&
    (isOutOfStep(error.cause) || OUT_OF_STEP.test(error.message));
}

/**
 * Waits for an answer. A daemon that lost count of requests may say so, or wait
 * for the rest of one that it takes for longer than it is.
 */
async function awaitAnswer(
  { patience }: StoreConnection,
  takesLong: boolean,
  answer: Promise<unknown>,
): Promise<void> {
  const late = "no answer to requests that came together";
  if (takesLong || patience === undefined) await answer;
  else await within(patience, answer, late);
}

/**
 * Shakes hands with the guix-daemon at the other end of `stream`, where so many
 * bytes arrive in one piece if they were written in one, or should: it answers
 * within `patience` seconds then.
 *
 * @throws {OffloadError} where the peer is none or too old.
 */
export async function openStore(
  stream: Duplex,
  name: string,
  pieceSize = 0,
  patience?: number,
): Promise<StoreConnection> {
  const reader = new ByteReader(stream, name);
  // The version needn't be known to send ours: one round trip, not two.  The
  // two zeros are: no processor affinity, no space reserved.
  await write(stream, encode(WORKER_MAGIC[0], PROTOCOL_VERSION, 0, 0));
  if (await reader.number() !== WORKER_MAGIC[1]) {
    throw reader.error("not a guix-daemon: unexpected greeting");
  }
  const version = await reader.number();
  const minor = version & 0xff;
  const major = version - minor;
  if (major !== (PROTOCOL_VERSION & ~0xff) || minor < OLDEST_MINOR) {
    throw reader.error(`unsupported protocol 0x${version.toString(16)}`);
  }
  const ahead = Math.min(pieceSize, READ_SIZE);
  const store = { name, stream, reader, minor, ahead, patience };
  await nextData(store);
  return store;
}

/** Sets the options of the builds of a connection. */
export function optionsCall(options: BuildOptions, substitutes = false): Call {
  const request = encode(
    OPERATION.setOptions,
    false, // keep failed builds
    false, // keep going
    false, // fall back to building
    0, // verbosity
    false, // no build hook: machines could offload in circles
    0, // verbosity of builds
    0, // type of log
    false, // build traces
    substitutes, // else its servers are asked for the outputs of each build
    2, // options by name
    "build-timeout",
    String(options.buildTimeout),
    "build-max-silent-time",
    String(options.maxSilentTime),
  );
  return { request, result: () => Promise.resolve() };
}

/** Returns those of `paths` that are valid in the store. */
export async function queryValidPaths(
  store: StoreConnection,
  paths: readonly string[],
): Promise<string[]> {
  await operate(store, [OPERATION.queryValidPaths, paths]);
  return store.reader.strings();
}

/** What a store knows of an item. */
export interface PathInfo {
  /** Store items that it refers to. */
  readonly references: readonly string[];
  /** Size of its nar, in bytes. */
  readonly narSize: number;
  /** SHA-256 of its nar, in hexadecimal. */
  readonly narHash: string;
  /** When the store got it, in seconds since 1970. */
  readonly registered?: number;
}

/** Length of the hash with which the name of a store item begins. */
export const HASH_PART_LENGTH = 32;

/** The name of a store item, without directory and hash. */
export function itemName(path: string): string {
  return basename(path).slice(HASH_PART_LENGTH + 1);
}

/** The name of a derivation, without hash and `.drv`. */
export function derivationName(path: string): string {
  return itemName(path).replace(/\.drv$/, "");
}

/** Asks what a store knows of `path`, and hands it on. */
function pathInfoCall(path: string, take: (info: PathInfo) => void): Call {
  return {
    request: encode(OPERATION.queryPathInfo, path),
    result: async (reader) => {
      await reader.string(LIMITS.storePath); // deriver
      const narHash = await reader.string(LIMITS.storePath);
      const references = await reader.strings();
      const registered = await reader.number();
      const narSize = await reader.number();
      take({ references, narHash, narSize, registered });
    },
  };
}

/** Returns what the store knows of each of `paths`, which must be valid. */
export async function queryPathInfos(
  store: StoreConnection,
  paths: readonly string[],
): Promise<Map<string, PathInfo>> {
  const infos = new Map<string, PathInfo>();
  const calls = paths.map((path) =>
    pathInfoCall(path, (info) => infos.set(path, info))
  );
  await operateAll(store, calls);
  return infos;
}

/** The request that adds a text to the store. */
export function addTextRequest(
  name: string,
  text: Uint8Array,
  references: readonly string[],
): Buffer {
  return encode(OPERATION.addTextToStore, name, text, references);
}

/** Adds an item to the store and hands on its path, which follows from it. */
export function addCall(request: Buffer, take: (path: string) => void): Call {
  return {
    request,
    result: async (reader) => take(await reader.string(LIMITS.storePath)),
  };
}

/** Builds derivations and substitutes other items. */
export function buildCall(things: readonly string[]): Call {
  const normalMode = 0;
  return {
    request: encode(OPERATION.buildThings, things, normalMode),
    result: (reader) => reader.number(),
    takesLong: true,
  };
}

/** Reads an export: nar, metadata and, where it is to sign, a signature. */
export async function* readExport(
  store: StoreConnection,
  path: string,
): AsyncGenerator<Buffer, void> {
  let data;
  while ((data = await nextData(store)) !== undefined) yield data;
  if (await store.reader.number() !== 1) {
    throw store.reader.error(`failed to export '${path}'`);
  }
}

/** Imports a bundle of items and returns their paths. */
export async function importPaths(
  store: StoreConnection,
  bundle: AsyncIterable<Uint8Array>,
): Promise<string[]> {
  const source = new ByteReader(bundle, "archive");
  await operate(store, [OPERATION.importPaths], { source });
  return store.reader.strings();
}

// ---------------------------------------------------------------------------
// Archives: nars, export bundles, signatures
// ---------------------------------------------------------------------------

const EXPORT_MAGIC = 0x4558494e;

/** Makes a bundle of the signed exports of `paths` (guix/store.scm). */
export async function* exportBundle(
  store: StoreConnection,
  paths: readonly string[],
): AsyncGenerator<Buffer, void> {
  const sign = true;
  const exports = paths.map((path) => (
    { path, request: encode(OPERATION.exportPath, path, sign) }
  ));
  for await (const message of messagesOf(exports, store)) {
    await writeMessage(store, message);
    for (const { path } of message) {
      yield encode(1);
      yield* readExport(store, path);
    }
  }
  store.hasSigned = true;
  yield encode(0);
}

/** Longest file name and symlink target, in bytes (limits.h). */
const LONGEST_NAME = 255;
const LONGEST_TARGET = 4095;

async function expectTokens(
  reader: ByteReader,
  ...tokens: readonly string[]
): Promise<void> {
  const expected = encode(...tokens);
  if (!expected.equals(await reader.read(expected.length))) {
    throw reader.error(`invalid nar: expected '${tokens.join("' '")}'`);
  }
}

/** What file systems mostly give out at once, in bytes. */
const BLOCK = 4096;

/** Told what a part of an archive takes on the disk, before it is written. */
export type Take = (size: number) => void;

/** Lets archives take so many bytes, all in all. */
export function takeUpTo(limit: number): Take {
  let taken = 0;
  return (size) => {
    taken += size;
    if (taken <= limit) return;
    throw new Excess(`more than ${mebibytes(limit)} MiB came back`, {
      hint: "the setting 'maximumArchiveSize' is the limit",
    });
  };
}

/**
 * Restores the nar that `reader` is at as the new file `target`; `take` may
 * throw where that takes too much.
 */
export async function restoreNar(
  reader: ByteReader,
  target: string,
  take: Take = () => {},
): Promise<void> {
  await expectTokens(reader, "nix-archive-1");
  await restoreNode(reader, target, take);
}

function checkLength(reader: ByteReader, length: number): void {
  if (length > LONGEST_TARGET) {
    throw new Excess(`${reader.name}: invalid nar: a file name is too long`);
  }
}

async function restoreNode(
  reader: ByteReader,
  target: string,
  take: Take,
): Promise<void> {
  checkLength(reader, Buffer.byteLength(target));
  await expectTokens(reader, "(", "type");
  const type = await reader.string(LONGEST_NAME);
  take(BLOCK); // the inode, and what names it or it names
  if (type === "regular") await restoreRegular(reader, target, take);
  else if (type === "symlink") await restoreSymlink(reader, target);
  else if (type === "directory") return restoreDirectory(reader, target, take);
  else throw reader.error(`invalid nar: unsupported file type '${type}'`);
  await expectTokens(reader, ")");
}

async function restoreRegular(
  reader: ByteReader,
  target: string,
  take: Take,
): Promise<void> {
  let token = await reader.string(LONGEST_NAME);
  const mode = token === "executable" ? 0o755 : 0o644;
  if (token === "executable") {
    await expectTokens(reader, "");
    token = await reader.string(LONGEST_NAME);
  }
  if (token !== "contents") {
    throw reader.error(`invalid nar: unexpected '${token}' in a file`);
  }
  const size = await reader.number();
  take(BLOCK * Math.ceil(size / BLOCK));
  // "wx": nothing may be there, not even a symlink to follow.
  const file = openSync(target, "wx", mode);
  try {
    for (let left = size; left > 0;) {
      const bytes = await reader.readSome(left);
      writeFileSync(file, bytes);
      left -= bytes.length;
    }
  } finally {
    closeSync(file);
  }
  await reader.padding(size);
}

async function restoreSymlink(
  reader: ByteReader,
  target: string,
): Promise<void> {
  await expectTokens(reader, "target");
  const destination = await reader.bytes(LONGEST_TARGET);
  if (destination.length === 0 || destination.includes(0)) {
    throw reader.error("invalid nar: unusable symlink target");
  }
  symlinkBytes(destination, target);
}

async function restoreDirectory(
  reader: ByteReader,
  target: string,
  take: Take,
): Promise<void> {
  mkdirSync(target);
  let previous: Buffer | undefined;
  for (;;) {
    const token = await reader.string(LONGEST_NAME);
    if (token === ")") return;
    if (token !== "entry") {
      throw reader.error(`invalid nar: unexpected '${token}' in a directory`);
    }
    await expectTokens(reader, "(", "name");
    const name = await reader.bytes(LONGEST_NAME);
    checkEntryName(reader, name, previous);
    await expectTokens(reader, "node");
    await restoreEntry(reader, target, name, take);
    await expectTokens(reader, ")");
    previous = name;
  }
}

/** Strictly rising names can't repeat, so nothing is restored twice. */
function checkEntryName(
  reader: ByteReader,
  name: Buffer,
  previous: Buffer | undefined,
): void {
  const text = name.toString();
  if (
    ["", ".", ".."].includes(text) || name.includes("/") || name.includes(0)
  ) {
    throw reader.error(`invalid nar: file name ${JSON.stringify(text)}`);
  }
  if (previous !== undefined && Buffer.compare(previous, name) >= 0) {
    throw reader.error(`invalid nar: file name '${text}' is out of order`);
  }
}

/** File names are bytes: one that is no UTF-8 gets its name at the end. */
async function restoreEntry(
  reader: ByteReader,
  directory: string,
  name: Buffer,
  take: Take,
): Promise<void> {
  if (isUtf8(name)) return restoreNode(reader, `${directory}/${name}`, take);
  checkLength(reader, Buffer.byteLength(directory) + 1 + name.length);
  const temporary = `${directory}/${randomUUID()}`;
  await restoreNode(reader, temporary, take);
  renameToBytes(temporary, Buffer.concat([Buffer.from(`${directory}/`), name]));
}

/** What an export says of its item, behind the nar. */
export interface ItemMetadata {
  /** Its place in the store. */
  readonly path: string;
  /** The items that it refers to. */
  readonly references: readonly string[];
  /** The derivation that made it; empty where that is not known. */
  readonly deriver: string;
  /** Who vouches for it: a canonical s-expression, if anybody does. */
  readonly signature: string | undefined;
  /** SHA-256 of all but the signature. */
  readonly hash: Buffer;
}

/** Restores an exported item as the new file `target`. */
export async function restoreItem(
  reader: ByteReader,
  target: string,
  take: Take,
): Promise<ItemMetadata> {
  reader.startHash();
  await restoreNar(reader, target, take);
  if (await reader.number() !== EXPORT_MAGIC) {
    throw reader.error("corrupt file set archive");
  }
  const path = await reader.string(LIMITS.storePath);
  const references = await reader.strings();
  const deriver = await reader.string(LIMITS.storePath);
  const hash = reader.finishHash();
  const signed = await reader.number(1) === 1;
  const signature = signed
    ? (await reader.bytes(LIMITS.signature)).toString("latin1")
    : undefined;
  return { path, references, deriver, signature, hash };
}

/** A canonical s-expression: an atom or a list. */
export type Sexp = Buffer | readonly Sexp[];

const SEXP_DEPTH = 32;
const SEXP_ESCAPES: Record<string, string> = {
  b: "\b",
  t: "\t",
  v: "\v",
  n: "\n",
  f: "\f",
  r: "\r",
};

/** The forms of an atom, each with how to read it (SPKI, RFC 2693). */
const SEXP_ATOMS: readonly (readonly [RegExp, (text: string) => Buffer])[] = [
  [
    /#((?:\s*[0-9A-Fa-f]\s*[0-9A-Fa-f])*\s*)#/y,
    (hex) => Buffer.from(hex.replace(/\s/g, ""), "hex"),
  ],
  [/\|([A-Za-z0-9+/=\s]*)\|/y, (base64) => Buffer.from(base64, "base64")],
  [/"((?:[^"\\]|\\[^])*)"/y, unescapeSexp],
  [/([^\s()#|"]+)/y, (token) => Buffer.from(token, "latin1")],
];

function unescapeSexp(text: string): Buffer {
  const escape = /\\(?:x([0-9A-Fa-f]{2})|([0-7]{3})|(\r\n|\n\r|\r|\n)|([^]))/g;
  const plain = text.replace(escape, (_, hex, octal, newline, other) => {
    if (hex !== undefined) return String.fromCharCode(parseInt(hex, 16));
    if (octal !== undefined) return String.fromCharCode(parseInt(octal, 8));
    return newline === undefined ? SEXP_ESCAPES[other] ?? other : "";
  });
  return Buffer.from(plain, "latin1");
}

/**
 * Reads an s-expression in the advanced format, as libgcrypt writes it.
 *
 * @throws {OffloadError} where `text`, which messages call `name`, is none.
 */
export function parseSexp(text: string, name: string): Sexp {
  let position = 0;
  const skipSpace = () => {
    while (/\s/.test(text[position] ?? "")) position++;
  };
  const fail = () => {
    throw new OffloadError(`${name}: invalid s-expression at ${position}`);
  };
  const readAtom = (): Buffer => {
    for (const [pattern, decode] of SEXP_ATOMS) {
      pattern.lastIndex = position;
      const match = pattern.exec(text);
      if (match === null) continue;
      position = pattern.lastIndex;
      return decode(match[1]!);
    }
    return fail();
  };
  const read = (depth: number): Sexp => {
    skipSpace();
    if (text[position] !== "(") return readAtom();
    if (depth === SEXP_DEPTH) fail();
    const list: Sexp[] = [];
    for (position++;;) {
      skipSpace();
      if (text[position] === ")") return position++, list;
      list.push(read(depth + 1));
    }
  };
  const sexp = read(0);
  skipSpace();
  return position === text.length ? sexp : fail();
}

/** Whether an s-expression is an atom. */
export function isAtom(sexp: Sexp | undefined): sexp is Buffer {
  return sexp instanceof Buffer;
}

/** The same text for the same s-expression. */
export function sexpKey(sexp: Sexp): string {
  if (isAtom(sexp)) return sexp.toString("hex");
  return `(${sexp.map(sexpKey).join(" ")})`;
}

/** The first list in `sexp` that begins with `token`. */
export function findToken(
  sexp: Sexp | undefined,
  token: string,
): readonly Sexp[] | undefined {
  if (sexp === undefined || isAtom(sexp)) return undefined;
  const [head] = sexp;
  if (isAtom(head) && head.equals(Buffer.from(token))) return sexp;
  for (const element of sexp) {
    const found = findToken(element, token);
    if (found !== undefined) return found;
  }
  return undefined;
}

/** The last atom of the list that begins with `token`. */
export function tokenValue(
  sexp: Sexp | undefined,
  token: string,
): Buffer | undefined {
  const value = findToken(sexp, token)?.at(-1);
  return isAtom(value) ? value : undefined;
}

/** The keys whose signatures are believed, each as `sexpKey` writes it. */
export type Acl = ReadonlySet<string>;

/**
 * Reads an access-control list: entries of a key and `(tag (guix import))`
 * (guix/pki.scm).
 */
export function parseAcl(text: string, file: string): Acl {
  const acl = parseSexp(text, file);
  const invalid = () =>
    new OffloadError(`${file}: invalid access-control list`);
  const importTag = sexpKey(parseSexp("(tag (guix import))", file));
  const keys = new Set<string>();
  if (findToken(acl, "acl") !== acl) throw invalid();
  for (const entry of acl.slice(1)) {
    const key = findToken(entry, "public-key");
    const tag = findToken(entry, "tag");
    const isEntry = findToken(entry, "entry") === entry;
    if (!isEntry || key === undefined || tag === undefined) throw invalid();
    if (sexpKey(tag) === importTag) keys.add(sexpKey(key));
  }
  return keys;
}

/** Reads the access-control list; without one, nothing may come back. */
export function readAcl(configDirectory: string): Acl {
  const file = `${configDirectory}/acl`;
  try {
    const acl = parseAcl(readFileSync(file, "latin1"), file);
    if (acl.size > 0) return acl;
  } catch (cause) {
    const message = `failed to read '${file}': ${reason(cause)}`;
    throw new LocalError(message, { cause });
  }
  throw new LocalError(`'${file}' authorizes no key`, {
    hint: "run 'guix archive --authorize' with the build machines' " +
      "/etc/guix/signing-key.pub",
  });
}

const UNAUTHORIZED = "unauthorized public key";

/**
 * Checks that `signature` is one of `hash` by a key of `acl`.
 *
 * @returns what is wrong, in the reference's words, or `undefined`.
 */
export function checkSignature(
  signature: string,
  hash: Buffer,
  acl: Acl,
): string | undefined {
  const sexp = parseSexp(signature, "signature");
  const data = findToken(sexp, "data");
  const key = findToken(sexp, "public-key");
  const signed = tokenValue(data, "hash");
  if (key === undefined || signed === undefined) {
    return "corrupt signature data";
  }
  if (!acl.has(sexpKey(key))) return UNAUTHORIZED;
  if (!signed.equals(hash)) return "invalid hash";
  return verifySignature(findToken(sexp, "sig-val"), hash, key);
}

function verifySignature(
  value: Sexp | undefined,
  hash: Buffer,
  key: Sexp,
): string | undefined {
  const [n, e, q] = ["n", "e", "q"].map((name) => tokenValue(key, name));
  const [r, s] = ["r", "s"].map((name) => tokenValue(value, name));
  const curve = tokenValue(key, "curve")?.toString();
  const eddsa = tokenValue(key, "flags")?.toString() === "eddsa";
  const isRsa = n !== undefined && e !== undefined;
  if (!isRsa && (q === undefined || curve !== "Ed25519" || eddsa)) {
    return UNSUPPORTED_KEY;
  }
  const valid = isRsa
    ? s !== undefined && verifyRsa(n, e, hash, s)
    : r !== undefined && s !== undefined && verifyEcdsa(q!, hash, r, s);
  return valid ? undefined : "invalid signature";
}

// Guix 1.5 can make an EdDSA key, but not sign with it.
const UNSUPPORTED_KEY =
  "unsupported type of key: expected ECDSA on Ed25519, or RSA";

// ---------------------------------------------------------------------------
// Synchronization: slots, observations
// ---------------------------------------------------------------------------

/** A build slot of a machine, held until it is released or the process ends. */
export interface Slot {
  /** The file that is locked. */
  readonly file: string;
  /** That file's device and inode: another one by its name is another slot. */
  readonly inode: string;
  /** Gives the slot back. */
  release(): void;
}

/** Whose a file is, if not root's, or else what is on the way to it. */
export function ownerOf(file: string): Stats | undefined {
  const owner = dirname(file) === file ? undefined : ownerOf(dirname(file));
  if (owner !== undefined) return owner;
  try {
    let stat = lstatSync(file, { throwIfNoEntry: false });
    // A link is of whom made it, what it leads to maybe of another.
    if (stat?.uid === 0 && stat.isSymbolicLink()) stat = statSync(file);
    return stat?.uid === 0 ? undefined : stat;
  } catch {
    return undefined; // the others are told where it is used
  }
}

/**
 * Does what touches a file of the state: what it makes is its owner's alone.
 * Where root does it and the file, or what it is in, is another account's, it
 * is done with the rights of that one, who could lead root anywhere.
 */
export function asOwner<T>(file: string, action: () => T): T {
  const owner = process.geteuid?.() === 0 ? ownerOf(file) : undefined;
  const goBack = owner && become(owner);
  const mask = process.umask(0o077);
  try {
    return action();
  } finally {
    process.umask(mask);
    goBack?.();
  }
}

/** Takes away what others than its owner may do with a file of the state. */
export function makePrivate(file: string): void {
  const mode = statSync(file, { throwIfNoEntry: false })?.mode ?? 0;
  if ((mode & 0o077) !== 0) chmodSync(file, mode & 0o700);
}

/**
 * Removes what is where a file or a directory of the state has to be, and is
 * of another kind, but for links. A directory is removed as one, so that a file
 * that took its place meanwhile stays.
 */
export function clearWay(file: string, kind: "isFile" | "isDirectory"): void {
  const stat = lstatSync(file, { throwIfNoEntry: false });
  if (stat === undefined || stat[kind]()) return;
  if (stat.isSymbolicLink()) {
    // SQLite would wait for who writes into a FIFO.
    const isRight = statSync(file, { throwIfNoEntry: false })?.[kind]() ?? true;
    if (!isRight) throw new Error("a link leads to something else");
  } else if (stat.isDirectory()) {
    for (const name of readdirSync(file)) removeFile(`${file}/${name}`);
    rmdirSync(file);
  } else rmSync(file);
}

/** Makes a directory of the state, for its owner alone. */
export function makeStateDirectory(directory: string): void {
  clearWay(directory, "isDirectory");
  makeDirectories(directory);
  makePrivate(directory);
}

/** Where files are that are in memory. */
const MEMORY = "/dev/shm";
const MEMORY_PREFIX = "guix-offload-";

/** Whether only this account can have made a directory, and what is in it. */
function isOwn(directory: string): boolean {
  const stat = lstatSync(directory, { throwIfNoEntry: false });
  return stat?.isDirectory() === true && (stat.mode & 0o077) === 0 &&
    stat.uid === process.geteuid!();
}

/**
 * What stands in for a directory of the state, whose name it has, if anything
 * does: of several places in memory, all take the account's first.
 */
function findStandIn(directory: string): string | undefined {
  if (!existsSync(MEMORY)) return undefined;
  const own = readdirSync(MEMORY)
    .filter((name) => name.startsWith(MEMORY_PREFIX))
    .sort().map((name) => `${MEMORY}/${name}`).find(isOwn);
  return own && `${own}/${basename(directory)}`;
}

/** The same, made if need be, by a name that nobody can have taken before. */
function standIn(directory: string): string {
  if (!findStandIn(directory)) mkdtempSync(`${MEMORY}/${MEMORY_PREFIX}`);
  return findStandIn(directory)!;
}

/** Does with a directory what can be done in memory if it can't be there. */
export function orInMemory<T>(
  directory: string,
  action: (place: string) => T,
  tell: (error: unknown) => void = () => {},
): T {
  try {
    return action(directory);
  } catch (error) {
    let done;
    try {
      done = action(asOwner(directory, () => standIn(directory)));
    } catch {
      throw error;
    }
    tell(error);
    return done;
  }
}

/**
 * Has a directory of the state in which something can be written: `directory`
 * or, where that can't be, as on a file system that is full, one in memory.
 */
export function writableDirectory(directory: string): string {
  const check = (place: string) => {
    makeStateDirectory(place);
    const file = `${place}/writable.${process.pid}`;
    try {
      writeFileSync(file, "it is");
    } finally {
      rmSync(file, { force: true });
    }
    return place;
  };
  return orInMemory(directory, (place) => asOwner(place, () => check(place)));
}

/** Names a machine as the slot directories do. */
export function machineId(machine: Machine): string {
  return `${machine.name}:${machine.port}`;
}

/** All that is said of a machine: another word makes it another try. */
export function definitionOf(machine: Machine): string {
  return JSON.stringify(machine);
}

/** Where the slot files of a machine are. */
export function slotDirectory(
  machine: Machine,
  stateDirectory: string,
): string {
  return `${stateDirectory}/offload/${machineId(machine)}`;
}

/** The inodes of the files that this process has locked. */
const lockedHere = new Set<string>();

/**
 * Locks a file against `guix offload` and our own processes alike.
 *
 * The reference takes fcntl locks, which a JavaScript runtime has no call for,
 * but SQLite takes them too.  The file stays empty.
 */
export function lockFile(file: string): Slot | undefined {
  if (lockedHere.has(inodeOf(file))) return undefined;
  return asOwner(file, () => lockOwn(file));
}

// No journal file beside it, which would be left behind. What is set is never
// written, but nothing is locked in a file that can't be.
const LOCK = `
  PRAGMA journal_mode = MEMORY;
  BEGIN EXCLUSIVE;
  PRAGMA user_version = 1;
`;

function lockOwn(file: string, isDamaged = false): Slot | undefined {
  clearWay(file, "isFile");
  makePrivate(file); // others could lock what they may read
  // SQLite would not say why it can't.
  if (!existsSync(file)) closeSync(openSync(file, "a"));
  const inode = inodeOf(file);
  const database = new DatabaseSync(file, { timeout: 0 });
  try {
    database.exec(LOCK);
    lockedHere.add(inode);
    const release = () => {
      lockedHere.delete(inode);
      database.close();
    };
    return { file, inode, release };
  } catch (error) {
    database.close();
    if (/database is locked/.test(String(error))) return undefined;
    // We hold no lock of it, which this would give up.
    if (/readonly/.test(String(error))) closeSync(openSync(file, "r+"));
    if (isDamaged || statSync(file).size === 0) throw error;
  }
  truncateSync(file);
  return lockOwn(file, true);
}

/** Locks the first free slot of a machine, in a directory that is made. */
function lockSlot(machine: Machine, directory: string): Slot | undefined {
  asOwner(directory, () => {
    makeStateDirectory(dirname(directory)); // closes all that is in it
    makeStateDirectory(directory);
  });
  // Twice: of two that try the same slot at once, neither may get it.
  for (let slot = 0; slot < 2 * machine.parallelBuilds; slot++) {
    const locked = lockFile(`${directory}/${slot % machine.parallelBuilds}`);
    if (locked !== undefined) return locked;
  }
  return undefined;
}

/**
 * Takes a free slot of a machine, or returns `undefined` where it has none.
 * Where no file can be locked, as on a full disk, slots are in memory, and
 * `guix offload` has others.
 *
 * @throws {OffloadError} where the slot files can't be written.
 */
export function acquireBuildSlot(
  machine: Machine,
  stateDirectory: string,
  log?: Log,
): Slot | undefined {
  const directory = slotDirectory(machine, stateDirectory);
  const failed = `failed to lock a build slot in '${directory}': `;
  const hint = "the account that guix-daemon runs as must own it";
  const lock = (place: string) => lockSlot(machine, place);
  try {
    return orInMemory(directory, lock, (cause) => {
      const message = `${failed}${reason(cause)}; it is in memory instead`;
      log?.warn(new OffloadError(message, { hint }));
    });
  } catch (cause) {
    throw new OffloadError(failed + reason(cause), { cause, hint });
  }
}

/**
 * Whether somebody holds a slot. The lock itself tells: the text of /proc/locks
 * names a device and an inode as they need not be known here.
 */
export function isLocked(file: string): boolean {
  const stat = statSync(file, { throwIfNoEntry: false });
  if (!stat?.isFile()) return false;
  if (lockedHere.has(inodeOf(file, stat))) return true;
  // Looks share their lock, so that they don't meet each other's.
  let database: DatabaseSync | undefined;
  try {
    database = new DatabaseSync(file, { timeout: 0, readOnly: true });
    database.exec("PRAGMA schema_version");
    return false;
  } catch (error) {
    return /database is locked/.test(String(error));
  } finally {
    database?.close();
  }
}

/** Whether this account may look into a directory, or none is there. */
export function maySee(directory: string): boolean {
  try {
    statSync(`${directory}/.`, { throwIfNoEntry: false });
    return true;
  } catch {
    return false;
  }
}

/** The files of a machine's slots that are taken, as far as can be seen. */
export function takenSlots(
  machine: Machine,
  stateDirectory: string,
): string[] {
  const directory = slotDirectory(machine, stateDirectory);
  if (!maySee(directory)) return [];
  return asOwner(directory, () => {
    const slots = Array.from({ length: machine.parallelBuilds }, (_, n) => n);
    return [directory, findStandIn(directory)]
      .flatMap((place) => place ? slots.map((slot) => `${place}/${slot}`) : [])
      .filter(isLocked);
  });
}

/** Counts the free slots of a machine, without taking them. */
export function countFreeSlots(
  machine: Machine,
  stateDirectory: string,
): number {
  const taken = takenSlots(machine, stateDirectory).length;
  return Math.max(0, machine.parallelBuilds - taken);
}

/** What was seen of a machine. */
export interface MachineRecord {
  /** What it said of itself last. */
  readonly facts: Facts | undefined;
  /** How often it failed since a build last succeeded there. */
  readonly failures: number;
  /** Until when it is left alone, in milliseconds since 1970. */
  readonly until: number;
  /** Why. */
  readonly problem: string;
  /** The fields with which it failed: others are another try. */
  readonly definition: string;
  /** When one of our processes began to ask it, and has no answer yet. */
  readonly asked: number;
  /** Bytes a second that it received. */
  readonly bandwidth: number | undefined;
  /** How quick it was: a multiple of its `speed`. */
  readonly quickness?: number | undefined;
  /**
   * How many different builds failed there that did well on other machines,
   * lately and since one did well there.
   */
  readonly doubts: number;
}

/** The problem of a machine that took too long; a late answer clears it. */
export const UNANSWERED = "no answer yet";

/** How many different builds must speak against a machine: it comes last. */
export const DOUBTS = 2;

/** Names a file that has a name, so that another by that name is noticed. */
export function inodeOf(
  file: string,
  stat: Pick<Stats, "dev" | "ino"> | undefined = statSync(file, {
    throwIfNoEntry: false,
  }),
): string {
  return stat === undefined ? "none" : `${stat.dev}:${stat.ino}`;
}

/** What is known of a machine of which nothing was seen. */
const NOTHING_SEEN: MachineRecord = {
  facts: undefined,
  failures: 0,
  until: 0,
  problem: "",
  definition: "",
  asked: 0,
  bandwidth: undefined,
  doubts: 0,
};

/** Until when a machine is left alone, in milliseconds since 1970. */
export function leftAloneUntil(
  machine: Machine,
  record: MachineRecord | undefined,
  { backoff, backoffLimit }: Settings,
): number {
  if (!record?.until || record.definition !== definitionOf(machine)) return 0;
  // Times too far in the future are of before the clock was set back.
  const latest = Date.now() + 1000 * Math.max(backoff, backoffLimit);
  return record.until <= latest ? record.until : 0;
}

/**
 * What is known of a machine once it failed: it is left alone for a growing
 * while. What happens meanwhile, to other builds there, is part of the same
 * failure.
 */
export function afterFailure(
  machine: Machine,
  record: MachineRecord = NOTHING_SEEN,
  problem: string,
  settings: Settings,
): MachineRecord {
  const now = Date.now();
  if (leftAloneUntil(machine, record, settings) >= now) return record;
  const { backoff, backoffLimit } = settings;
  const doublings = Math.min(record.failures, 20);
  const seconds = Math.min(backoff * 2 ** doublings, backoffLimit);
  return {
    ...record,
    facts: undefined,
    failures: record.failures + 1,
    until: now + 1000 * seconds,
    problem,
    definition: definitionOf(machine),
    asked: 0,
  };
}

/** An attempt to build on a machine; times are milliseconds since 1970. */
export interface Attempt {
  /** The machine, NAME:PORT. */
  readonly machine: string;
  /** The number of its slot. */
  readonly slot: number;
  /** When the machine was chosen, for the last time. */
  readonly began: number;
  /** When it was given up. */
  readonly ended: number;
  /** Why it came to nothing. */
  readonly problem: string;
}

/** How far an attempt is: noted as it goes; times as above. */
export interface Course extends Pick<Attempt, "machine" | "slot" | "began"> {
  /** When the machine's daemon answered. */
  connected?: number;
  /** When the inputs were there. */
  sent?: number;
  /** When it was built. */
  built?: number;
  /** When the outputs were here. */
  retrieved?: number;
  /** When it was given up. */
  ended?: number;
  /** How many store items were sent. */
  items?: number;
  /** How many bytes these are. */
  bytesSent?: number;
  /** How many bytes of outputs were retrieved. */
  bytesRetrieved?: number;
  /** How many seconds it was expected to take. */
  expected?: number;
  /** How many bytes have moved of what moves now. */
  moved: number;
  /** How many bytes all of that is. */
  total?: number;
  /** Why it came to nothing. */
  problem?: string;
}

/** A build, from its request to its end; times are milliseconds since 1970. */
export interface JournalEntry
  extends Readonly<Omit<Course, "began" | "moved" | "total">> {
  /** File name of the derivation. */
  readonly derivation: string;
  /** Its name, without hash and ".drv". */
  readonly name: string;
  /** Attempts before the last one, to which the rest belongs. */
  readonly earlier: readonly Attempt[];
  /** When guix-daemon asked, for the first time in a row. */
  readonly asked: number;
  /** When that was answered. */
  readonly accepted: number;
  /** When the last attempt began. */
  readonly began?: number;
  /** When it was over. */
  readonly ended: number;
  /** How: `lost` is what no machine could do, `interrupted` what was called off. */
  readonly outcome: "built" | "failed" | "timed-out" | "lost" | "interrupted";
}

/** What is kept of builds, and told of those that are under way. */
export interface Journal {
  /** Tells how far a build in a slot is, until what this returns is called. */
  follow(slot: Pick<Slot, "file">, course: Course, at?: Candidate): () => void;
  /** Notes that a build waits: what for, and how it stands among others. */
  saveWait(
    derivation: string,
    why: string,
    order?: WaitingOrder,
  ): void;
  /** Notes that a build does not wait any more. */
  endWait(derivation: string): void;
  /** For how many seconds a build has waited. */
  waited(derivation: string): number;
  /** How many builds a second have ended in the last minute. */
  pace(): number;
  /** The most urgent ones of the builds that wait. */
  urgent(): readonly WaitingBuild[];
  /** Notes a build that is over; returns all that is known of it. */
  save(build: JournalEntry, settings: Settings): JournalEntry;
  /** Notes a build whose hook was killed, which so has not. */
  saveKilled(use: UsedSlot, settings: Settings): void;
  /** Notes why machines take nothing, now and as long as this process is there. */
  watch(machines: Machine[], request: ScoredRequest, context: Context): void;
  /** The same of one that has ended so far, with an error or without. */
  end(work: Work, error: unknown, context: Context): JournalEntry;
}

/**
 * What is seen of machines and builds: by this process, or by all of ours where
 * plugins/ has the means. Losing it loses nothing but speed: no method throws.
 */
export interface Observations {
  /** All that is known of machines, or of one, by NAME:PORT. */
  machines(id?: string): Map<string, MachineRecord>;
  /** Claims the right to ask a machine; false where another process does. */
  claim(id: string, seconds: number): boolean;
  /** Notes what a machine said of itself: it can be reached again. */
  saveFacts(id: string, facts: Facts): void;
  /** Notes that a machine failed. */
  saveFailure(machine: Machine, problem: string, settings: Settings): void;
  /** Notes that a build failed on a machine and did well on another one. */
  saveDoubt(id: string, derivation: string): void;
  /** Notes whether a machine is this one; another definition may not be. */
  saveIdentity(machine: Machine, isThis: boolean): void;
  /** Whether a machine is this one, as far as is known. */
  identity(machine: Machine): boolean | undefined;
  /** The definitions of this machine that are known. */
  ownDefinitions(): Set<string>;
  /** Notes a build that succeeded, and what its machine holds now. */
  saveBuild(
    machine: Machine,
    name: string,
    seconds: number,
    items: readonly string[],
  ): void;
  /** Earlier builds of a name, the latest first. */
  history(name: string): PastBuild[];
  /** The same of names that begin so. */
  similar(beginning: string): PastBuild[];
  /** Those of `paths` that a machine was seen to hold. */
  held(id: string, paths: readonly string[]): string[];
  /** Notes how fast a machine received a lot, in bytes a second. */
  saveBandwidth(id: string, bandwidth: number): void;
  /** What slots were used for last, unless that was noted to have ended. */
  slots(): UsedSlot[];
  /** Notes what a machine's slot is used for from now on. */
  useSlot(
    id: string,
    slot: Pick<Slot, "file" | "inode">,
    derivation: string,
  ): void;
  /** When machines last began a build, by NAME:PORT. */
  lastUsed(): Map<string, number>;
  /** Notes that a slot is no longer used for a derivation. */
  releaseSlot(file: string, derivation: string): void;
  /** Whether waiting for a slot was not in vain since the last was freed. */
  mayWait(): boolean;
  /** Notes that waiting for a slot was in vain. */
  saveVainWait(): void;
  /** What is kept of builds, where all our processes see the same. */
  readonly journal?: Journal;
}

/** What this process sees by itself: enough not to try a machine at once again. */
function observeAlone(): Observations {
  const records = new Map<string, MachineRecord>();
  const note = (id: string, changes: Partial<MachineRecord>) => {
    const record = records.get(id) ?? NOTHING_SEEN;
    records.set(id, { ...record, ...changes });
  };
  return {
    machines: () => records,
    claim: () => true,
    saveFacts: (id, facts) => {
      const isLate = records.get(id)?.problem === UNANSWERED;
      note(id, { facts, ...(isLate && { until: 0, failures: 0 }) });
    },
    saveFailure: (machine, problem, settings) => {
      const id = machineId(machine);
      note(id, afterFailure(machine, records.get(id), problem, settings));
    },
    saveDoubt: () => {},
    saveIdentity: () => {},
    identity: () => undefined,
    ownDefinitions: () => new Set(),
    saveBuild: (machine) => note(machineId(machine), { until: 0, failures: 0 }),
    history: () => [],
    similar: () => [],
    held: () => [],
    saveBandwidth: () => {},
    slots: () => [],
    useSlot: () => {},
    lastUsed: () => new Map(),
    releaseSlot: () => {},
    mayWait: () => true,
    saveVainWait: () => {},
  };
}

/** Has what all our processes see, where plugins/ has the means to share it. */
async function openObservations(
  directory: string,
  log: Log,
): Promise<Observations> {
  type Shared = { SharedObservations: SharedObservations };
  type SharedObservations = new (directory: string, log: Log) => Observations;
  const shared = await importFromPlugins<Shared>("_observations");
  if (shared === undefined) return observeAlone();
  return new shared.SharedObservations(directory, log);
}

/** A slot and what it was last used for. */
export type UsedSlot = {
  /** The file that is locked. */
  readonly file: string;
  /** What was built. */
  readonly derivation: string;
  /** Since when, in milliseconds since 1970. */
  readonly time: number;
  /** The file's device and inode then: another one by that name says nothing. */
  readonly inode: string;
};

// ---------------------------------------------------------------------------
// Sessions: SSH
// ---------------------------------------------------------------------------

/** How many keepalives may stay unanswered within their timeout. */
const KEEPALIVES = 3;

/** A connection to a build machine, and what is reached by it. */
export interface Session
  extends Omit<Connection, "openSocket" | "ended" | "exec"> {
  /** The machine at the other end. */
  readonly machine: Machine;
  /** Ends it because of an error. */
  fail(error: Error): void;
  /**
   * Rejects when it has failed, a while after what runs over it should have:
   * a plugin may not notice.
   */
  readonly lost: Promise<never>;
  /** How long nothing passed over its channels, in milliseconds. */
  idle(): number;
  /** Fails where the guix-daemon there gives no sign of life. */
  ping(): Promise<void>;
  /** Runs a shell command there; a short one reads and prints next to nothing. */
  exec(command: string, isShort?: boolean): Promise<StartedProcess>;
  /**
   * Told which daemon the login's own environment names, if it does; returns
   * whether that is another one than so far.
   */
  useSocket(socket: string | undefined): boolean;
  /** Does what may take long and let nothing pass meanwhile. */
  patiently<T>(work: () => Promise<T>): Promise<T>;
  /** Whether that is so now. */
  isPatient(): boolean;
  /** Connects to the guix-daemon there. */
  openDaemon(): Promise<StoreConnection>;
  /** Does so now, for the next who calls `openDaemon`, who may ask before. */
  greetDaemon(): Promise<StoreConnection>;
  /** Leaves one, on which nothing went wrong, to who opens one next. */
  leaveDaemon(store: StoreConnection): void;
  /** Has daemons that are connected to from now on be asked one by one. */
  askOneByOne(): void;
}

/** Splits a host key such as `ssh-ed25519 AAAA… comment`. */
export function parseHostKey(machine: Machine): { type: string; key: Buffer } {
  const [type = "", base64 = ""] = machine.hostKey.trim().split(/\s+/);
  const key = Buffer.from(base64, "base64");
  if (!(type in HOST_KEY_ALGORITHMS) || sshKeyType(key) !== type) {
    throw new OffloadError(
      `invalid host key '${machine.hostKey}' of '${machine.name}'`,
      {
        code: "host-key",
        hint: "expected '" + Object.keys(HOST_KEY_ALGORITHMS).join("', '") +
          "' and the key, as in /etc/ssh/ssh_host_ed25519_key.pub there",
      },
    );
  }
  return { type, key };
}

/** The type of an SSH public key, with which its blob begins (RFC 4253). */
export function sshKeyType(blob: Buffer): string | undefined {
  if (blob.length < 4) return undefined;
  return blob.subarray(4, 4 + blob.readUInt32BE()).toString("latin1");
}

/**
 * Reads an SSH private key.
 *
 * @throws {OffloadError} where there is none, it is of a form that is not
 * known, or it is protected by a passphrase, which nobody could type in.
 */
export function readPrivateKey(file: string): string {
  let locked = false;
  try {
    const pem = readFileSync(file, "latin1");
    locked = /ENCRYPTED/.test(pem);
    if (locked) throw new Error("it is protected by a passphrase");
    const key = convertPrivateKey(pem);
    const parsed = ssh2.utils.parseKey(key);
    if (parsed instanceof Error) throw parsed;
    if (!parsed.isPrivateKey()) throw new Error("it is a public key");
    return withoutSign(key, parsed);
  } catch (cause) {
    locked ||= /passphrase/.test(String(cause)); // ssh2's and OpenSSL's word
    const why = locked ? "it is protected by a passphrase" : reason(cause);
    const message = `failed to load SSH private key from '${file}': ${why}`;
    const hint = locked
      ? `nobody can type it in here: run 'ssh-keygen -p -f ${file}'`
      : undefined;
    throw new OffloadError(message, { cause, code: "private-key", hint });
  }
}

/** What ssh2 puts beside an error's message. */
export type SshError = Error & { readonly level?: string };

/** Why we ended a connection. */
export interface Refusal extends Error {
  /** The host key that was shown. */
  readonly shown?: Buffer;
  /** How else one is to log in beside by the key, which is accepted. */
  readonly wanted?: readonly string[];
}

function makeRefusal(message: string, its: Partial<Refusal>): Refusal {
  return Object.assign(new Error(message), its);
}

/** Says why a connection failed and, where plugins/ is, what may help. */
async function connectionError(
  machine: Machine,
  cause: SshError | Refusal,
): Promise<OffloadError> {
  if (cause instanceof OffloadError) return cause;
  type Explaining = { default(...its: [Machine, typeof cause]): OffloadError };
  const explaining = await importFromPlugins<Explaining>("_ssh_errors")
    .catch(() => undefined); // what it would explain is to be told
  if (explaining !== undefined) return explaining.default(machine, cause);
  const message = `failed to connect to '${machine.name}': ${reason(cause)}`;
  return new OffloadError(message, { cause, code: "connect" });
}

/** Logs in by the key alone; `refuse` gets the error where that won't do. */
function authenticateByKey(
  refuse: (error: Refusal) => void,
): NonNullable<ConnectConfig["authHandler"]> {
  let isTried = false;
  return (left, isPartial, next) => {
    if (!isTried) {
      isTried = true;
      return next("publickey");
    }
    if (isPartial) {
      refuse(makeRefusal("it wants more than the key", { wanted: left ?? [] }));
    }
    next(false as never);
  };
}

/** Everything ssh2 is told; `refuse` gets the error where we end it. */
function sshOptions(
  machine: Machine,
  { connectTimeout, keepaliveTimeout }: Settings,
  refuse: (error: Refusal) => void,
): ConnectConfig {
  const { type, key } = parseHostKey(machine);
  return {
    host: machine.name.replace(/^.*@|[[\]]/g, ""), // as libssh does
    port: machine.port,
    username: machine.user,
    privateKey: readPrivateKey(machine.privateKey),
    authHandler: authenticateByKey(refuse),
    algorithms: {
      cipher: ciphers(),
      serverHostKey: [...HOST_KEY_ALGORITHMS[type]!],
      // Archives are compressed where that pays, not every packet.
      compress: ["none"],
    },
    // Synchronous: ssh2 takes the promise of an answer for a yes.
    hostVerifier: (shown: Buffer) => {
      if (shown.equals(key)) return true;
      refuse(makeRefusal("it has another host key", { shown }));
      return false;
    },
    readyTimeout: connectTimeout * 1000,
    keepaliveInterval: keepaliveTimeout * 1000 / (KEEPALIVES + 1),
    keepaliveCountMax: KEEPALIVES,
  };
}

/**
 * Connects to a build machine, by the first plugin that does. It tells `reached`
 * how far it is.
 *
 * @throws {OffloadError} that says at which step it failed and what to do.
 */
export async function openSession(
  machine: Machine,
  context: HookContext & Pick<Context, "connect">,
  reached?: (what: Reached) => void,
): Promise<Session> {
  const { connect = connectByPlugin } = context;
  const connection = await connect(machine, context, reached);
  return makeSession(machine, connection, context);
}

/** The connection of the first plugin that has one. */
export async function connectByPlugin(
  machine: Machine,
  context: HookContext,
  reached?: (what: Reached) => void,
): Promise<Connection> {
  let opening: Awaitable<Connection | undefined>;
  const found = await firstAnswer(
    "connect",
    context,
    (plugin, own) => opening = plugin.connect(machine, own, reached),
  ).catch((error) => {
    // What comes too late would stay open.
    Promise.resolve(opening).then((late) => late?.close?.())
      .catch(() => {});
    throw error;
  });
  if (found !== undefined) return found;
  throw new OffloadError(`no plugin connects to '${machine.name}'`);
}

/** The part of a session that is about what runs over it. */
function channelMethods(link: Link) {
  let greeted: Promise<StoreConnection> | undefined;
  const leaveDaemon = (store: StoreConnection) => {
    LEFT.add(store);
    const { daemons } = link.kept;
    if (store.hasSigned) daemons.push(store);
    else daemons.unshift(store);
  };
  return {
    exec: async (...args: [command: string, isShort?: boolean]) =>
      (await demandRemote(link.machine)).executeThere(link, ...args),
    ping: async () => {
      const another = { ...link, kept: newKept() }; // it is no use of this
      const daemon = openRemoteDaemon(another);
      await daemon.then(({ stream }) => stream.destroy(), (error) => {
        // Who refuses, as where no second session may be opened, is alive.
        if (error.cause instanceof Late) throw error;
      });
    },
    openDaemon: () => {
      const daemon = greeted ?? takeDaemon(link);
      greeted = undefined;
      return daemon;
    },
    greetDaemon: () => {
      greeted?.then(({ stream }) => stream.destroy(), () => {});
      return greeted = takeDaemon(link);
    },
    leaveDaemon,
    leaveGreeted: () => void greeted?.then(leaveDaemon, () => {}),
    askOneByOne: () => void (link.pieceSize = 0),
    useSocket: (socket: string | undefined) => {
      const { socket: before, hasSocket } = link;
      if (!hasSocket) link.socket = socket ?? DAEMON_SOCKET;
      return link.socket !== before;
    },
  };
}

/** What is kept with a new connection. */
export function newKept(): Kept {
  return { daemons: [], used: performance.now() };
}

function makeLink(
  machine: Machine,
  connection: Connection,
  connectTimeout: number,
): Link {
  return {
    machine,
    connection,
    connectTimeout,
    kept: connection.kept ?? newKept(),
    socket: machine.daemonSocket,
    hasSocket: machine.daemonSocket !== DAEMON_SOCKET,
    pieceSize: connection.pieceSize ?? 0,
  };
}

/** The part of a session that is about how long nothing may pass. */
function patienceMethods(link: Link) {
  let patient = 0;
  return {
    idle: () => performance.now() - link.kept.used,
    patiently: <T>(work: () => Promise<T>) => {
      patient++;
      return work().finally(() => {
        patient--;
        link.kept.used = performance.now();
      });
    },
    isPatient: () => patient > 0,
  };
}

/** Makes a session of a connection. */
export function makeSession(
  machine: Machine,
  connection: Connection,
  context: Pick<PluginContext, "log" | "signal" | "settings">,
): Session {
  const { log, signal, settings: { connectTimeout } } = context;
  const link = makeLink(machine, connection, connectTimeout);
  const { leaveGreeted, ...channels } = channelMethods(link);
  const lost = Promise.withResolvers<never>();
  lost.promise.catch(() => {});
  let isClosed = false;
  let problem: Error | undefined;
  const failure = () => problem ?? connection.failure();
  const lose = () => {
    problem ??= connection.failure() ?? new Error("connection closed");
    setTimeout(() => lost.reject(problem), LOST_DELAY).unref();
  };
  connection.ended?.then(lose, lose);
  const fail = (error: Error) => {
    problem ??= connection.failure() ?? error;
    cleanUp(log, () => connection.close(error), lose);
  };
  const abort = () => fail(signal.reason);
  signal.addEventListener("abort", abort);
  if (signal.aborted) abort();
  return {
    machine,
    failure,
    fail,
    lost: lost.promise,
    ...patienceMethods(link),
    ...channels,
    close: () => {
      leaveGreeted();
      signal.removeEventListener("abort", abort);
      if (!isClosed) cleanUp(log, () => connection.close());
      isClosed = true;
    },
  };
}

/** Logs in to a build machine over SSH; a server that is crowded, later. */
async function openConnection(
  machine: Machine,
  context: PluginContext,
  reached?: (what: Reached) => void,
): Promise<Connection> {
  for (let retries = 0;; retries++) {
    try {
      return await connect(machine, context, reached);
    } catch (error) {
      const { cause } = error as Error;
      if (retries === CROWDED.retries || !CROWDED.error.test(String(cause))) {
        throw error;
      }
      await delay(CROWDED.delay * (1 + Math.random()) * (1 + retries));
    }
  }
}

/** What an sshd with too many logins under way (MaxStartups) does to a new one. */
const CROWDED = {
  error: /Connection lost before handshake|ECONNRESET/,
  retries: 4,
  delay: 100, // milliseconds, growing and with jitter
} as const;

/** Connects to a machine over SSH, logged in unless `others` say how. */
export async function connect(
  machine: Machine,
  { signal, settings }: PluginContext,
  reached?: (what: Reached) => void,
  others: Readonly<Record<string, unknown>> = {},
): Promise<Connection> {
  signal.throwIfAborted();
  const client = quicken(new ssh2.Client());
  const ended = Promise.withResolvers<void>();
  let failure: Error | undefined;
  const note = (error: Error) => void (failure ??= error);
  const fail = (error: Error) => {
    note(error);
    client.destroy(); // else it would wait for the other side to close
  };
  const options = sshOptions(machine, settings, note);
  const abort = () => fail(signal.reason);
  signal.addEventListener("abort", abort);
  await new Promise<void>((resolve, reject) => {
    if (reached !== undefined) tellReached(client, reached);
    client.on("ready", resolve).on("error", fail);
    client.on("close", () => {
      signal.removeEventListener("abort", abort);
      note(new Error("connection closed"));
      connectionError(machine, failure!).then(reject, reject);
      ended.resolve();
    });
    client.connect({ ...options, ...others });
  });
  return {
    failure: () => failure,
    ended: ended.promise,
    openSocket: (file) => openSocket(client, file),
    pieceSize: pieceSizeOf(client),
    exec: async (command) =>
      (await demandRemote(machine)).execute(client, command),
    close: (error) => error === undefined ? client.end() : fail(error),
  };
}

/** Milliseconds that what runs over a lost connection has to fail by itself. */
const LOST_DELAY = 1000;

/** A connection, and when something last passed over one of its channels. */
export interface Link {
  /** The machine at the other end. */
  readonly machine: Machine;
  /** What leads there. */
  readonly connection: Connection;
  /** Seconds that an answer may take. */
  readonly connectTimeout: number;
  /** What passes to and from there. */
  readonly kept: Kept;
  /** The socket of the daemon there: a file name or, as Guix takes it, a URI. */
  socket: string;
  /** Whether the machine file names it: else the login there may. */
  readonly hasSocket: boolean;
  /** The end of the last short command that was started. */
  short?: Promise<unknown>;
  /** As the connection's; 0 once that was found to be wrong. */
  pieceSize: number;
}

/** Takes note of what passes over a channel, either way. */
export function noteUse<T extends Duplex>(channel: T, link: Link): T {
  for (const name of ["push", "write"] as const) {
    const pass = channel[name] as (...args: unknown[]) => boolean;
    const noted = (...args: unknown[]) => {
      link.kept.used = performance.now();
      return pass.apply(channel, args);
    };
    Object.assign(channel, { [name]: noted });
  }
  return channel;
}

/** A command that has been started on a machine. */
export interface StartedProcess extends RemoteProcess {
  /** When the server told of it, by `performance.now()`. */
  readonly started: number;
}

/** What runs commands on build machines: `plugins/_remote.ts`. @internal */
export interface RemoteCommands {
  /** Runs a command by an SSH client. */
  execute(
    client: InstanceType<typeof ssh2.Client>,
    command: string,
  ): Promise<RemoteProcess>;
  /** Runs a command, which finds programs; see `Session`. */
  executeThere(
    link: Link,
    command: string,
    isShort?: boolean,
  ): Promise<StartedProcess>;
  /** Connects to the daemon there by a program; `direct`: why not without. */
  openRelay(link: Link, direct: unknown): Promise<StoreConnection>;
  /** Asks a machine for its facts. */
  probe(session: Session, context: Context): Promise<Facts>;
}

/** How that file hands it out. */
type RemoteModule = { readonly default: RemoteCommands };

/** Loads it for what can't be done without. */
async function demandRemote({ name }: Machine): Promise<RemoteCommands> {
  const what = `nothing here runs commands on '${name}'`;
  return (await demandFromPlugins<RemoteModule>("_remote", what)).default;
}

/** The file of a socket, which Guix takes as a URI, too; others have none. */
function socketFile(socket: string): string | undefined {
  const file = socket.replace(/^(unix|file):(\/\/)?/, "");
  return file.startsWith("/") ? file : undefined;
}

/** Says why there is no way to the daemon there, and what may help. */
export function remoteDaemonError(
  { machine: { name, user }, socket }: Link,
  cause: unknown,
  why: string = reason(cause),
  otherwise = "",
): OffloadError {
  const called = `guix-daemon on '${name}'`;
  return new OffloadError(`failed to connect to ${called}: ${why}`, {
    cause,
    code: "daemon",
    hint: `check that guix-daemon runs there, if not run 'systemctl ` +
      "start guix-daemon' ('herd start guix-daemon' on Guix System), " +
      `and that '${user}' may use '${socket}'${otherwise}`,
  });
}

/** Shakes hands with the daemon at the other end of a channel. */
export async function greetOver(
  link: Link,
  channel: Promise<Duplex>,
  pieceSize: number,
): Promise<StoreConnection> {
  const open = channel.then((stream) => {
    stream.on("error", () => {}); // who reads learns of it
    const called = `guix-daemon on '${link.machine.name}'`;
    const { connectTimeout } = link;
    return openStore(noteUse(stream, link), called, pieceSize, connectTimeout);
  });
  try {
    // The server may answer while the daemon behind it does not, or neither.
    return await within(link.connectTimeout, open, "no answer");
  } catch (error) {
    // Of a channel, that looks like its end.
    channel.then((stream) => stream.destroy(), () => {});
    throw error;
  }
}

/**
 * Connects to the socket of the daemon there: without a program's help, or by
 * a relay where the SSH server does not forward to such sockets.
 */
async function openRemoteDaemon(link: Link): Promise<StoreConnection> {
  try {
    const file = socketFile(link.socket);
    if (file === undefined) throw new Error("not forwarded to");
    const channel = link.connection.openSocket(file);
    return await greetOver(link, channel, link.pieceSize);
  } catch (error) {
    if (error instanceof Late) throw remoteDaemonError(link, error);
    // A server that forwards to no such socket gives the same answer as one
    // on which nobody listens there.
    const remote = await importFromPlugins<RemoteModule>("_remote");
    if (remote) return await remote.default.openRelay(link, error);
    const otherwise = "; if its SSH server does not forward to sockets, have " +
      "Offload's plugins/ beside mod.ts";
    throw remoteDaemonError(link, error, reason(error), otherwise);
  }
}

/** Takes a connection to the daemon there that was left, or makes one. */
async function takeDaemon(link: Link): Promise<StoreConnection> {
  return link.kept.daemons.pop() ?? await openRemoteDaemon(link);
}

/** Ends the use of a connection to this machine's daemon. */
export function closeLocalDaemon(
  store: StoreConnection,
  { localDaemons }: Context,
  isClean: boolean,
): void {
  if (!isClean || localDaemons === undefined) store.stream.destroy();
  else localDaemons.push(store);
}

/** Connects to this machine's daemon. */
export async function openLocalDaemon(
  { daemonSocket: path, localDaemons, settings: { connectTimeout } }: Context,
): Promise<StoreConnection> {
  for (let left; (left = localDaemons?.pop()) !== undefined;) {
    const { stream } = left;
    const answer = queryValidPaths(left, []);
    const alive = within(connectTimeout, answer, "no answer")
      .then(() => true, () => false);
    if (await alive) return left;
    stream.destroy();
  }
  const stream = createConnection({ path });
  await new Promise<void>((resolve, reject) => {
    stream.once("connect", resolve).once("error", (cause) => {
      const message = `failed to connect to '${path}': ${reason(cause)}`;
      const hint = "check that guix-daemon runs here, if not run " +
        "'systemctl start guix-daemon'";
      reject(new LocalError(message, { cause, hint }));
    });
  });
  try {
    const open = openStore(stream, "guix-daemon", READ_SIZE);
    return await within(connectTimeout, open, `no answer from '${path}'`);
  } catch (cause) {
    stream.destroy();
    throw new LocalError(reason(cause), { cause });
  }
}

// ---------------------------------------------------------------------------
// Scheduling
// ---------------------------------------------------------------------------

const REQUEST_LINE = /^([01]) ([a-z0-9_-]+) (\/\S+\.drv) (\S*)$/;

/**
 * Reads a request as the daemon writes it (`tryBuildHook` in its build.cc).
 *
 * @throws {OffloadError} where `line` is none.
 */
export function parseRequest(line: string): Request {
  const match = REQUEST_LINE.exec(line);
  if (match === null) {
    throw new OffloadError(
      `invalid request line: ${JSON.stringify(line)}`,
      { hint: "expected '0|1 SYSTEM DERIVATION FEATURE,…' from guix-daemon" },
    );
  }
  const [, wantsLocal, system, derivation, features] = match;
  return {
    wantsLocal: wantsLocal === "1",
    system: system!,
    derivation: derivation!,
    features: features!.split(",").filter((feature) => feature !== ""),
  };
}

/** What guix-daemon builds beside its own system (nix/libstore/build.cc). */
const COMPATIBLE: Readonly<Record<string, string>> = {
  "i686-linux": "x86_64-linux",
  "armhf-linux": "aarch64-linux",
};

/** Whether guix-daemon can build by itself now, and may. */
function mayBuildHere(
  { wantsLocal, system }: Request,
  context: Pick<Context, "system"> & Partial<Pick<Context, "settings">>,
): boolean {
  const isNative = [system, COMPATIBLE[system]].includes(context.system);
  return wantsLocal && isNative && context.settings?.buildLocally !== false;
}

/** Whether a machine builds for the system and has the features. */
export function machineMatches(machine: Machine, request: Request): boolean {
  return machine.systems.includes(request.system) &&
    request.features.every((feature) => machine.features.includes(feature));
}

/** The load as the reference normalizes it: 0 to 1, by the processors. */
export function normalizedLoad({ load, cores }: Facts): number | undefined {
  return load === undefined || cores === undefined
    ? undefined
    : Math.min(1, load / cores);
}

/** Why a machine file that a farm shares is no trouble on its machines. */
export const THIS_MACHINE: Exclusion = {
  why: "it is this machine, which sends itself no builds",
  isBusy: false,
};

/**
 * Whether the guix-daemon that is reached is that of this machine: a build that
 * is sent to it would wait for its own lock. `path` is an item of ours. Without
 * plugins/ none is taken for this one.
 */
export async function isThisMachine(
  machine: Machine,
  remote: StoreConnection,
  path: string,
  context: Context,
): Promise<boolean> {
  const known = context.observations.identity(machine);
  if (known !== undefined) return known;
  type OwnMachine = { default: typeof isThisMachine };
  const own = await importFromPlugins<OwnMachine>("_own_machine");
  return await own?.default(machine, remote, path, context) ?? false;
}

/** A machine that matches, and what is found out about it. */
export interface Prospect extends Candidate {
  /** What it said, once it did. */
  facts: Facts | undefined;
  /** Why it can't be reached, or is left alone. */
  problem: string | undefined;
  /** What is wrong here, so that it can't be reached. */
  obstacle?: Error;
  /** Why it is not even to be asked. */
  excluded?: Exclusion | undefined;
  /** Until when it is left alone, in milliseconds since 1970. */
  readonly until: number;
  /** Whether it only gets what no other machine can take. */
  readonly isDoubted: boolean;
  /** Kept for the build, where its guix-daemon has answered. */
  session?: Session;
  /** The same, where the build was accepted before that. */
  opening?: Promise<Session>;
  /** What it is asked about: who is to build that. */
  readonly derivation: string;
  /** Whether its server has said something. */
  hasGreeted: boolean;
  /** Who is to answer next, as messages call it. */
  awaited: string;
  /** Whether it is too late to answer. */
  dismissed: boolean;
}

/** For how many seconds others leave it to a process to ask a machine. */
const CLAIM = 1;

/** How many machines are asked at the same time. */
const PROBES_AT_ONCE = 32;

/**
 * For how many seconds a machine is believed to be well that can't log in while
 * others are waited for.
 */
const REMEMBERED = 300;

/**
 * How much longer than the first answer took others are waited for, in ms. The
 * first may come over a connection that a plugin keeps; a new one takes longer.
 */
const GRACE = { factor: 2, least: 250, most: 500 } as const;

/** Whether facts are of the last so many seconds, `factsLifetime` unless told. */
function isFresh(
  facts: Facts | undefined,
  { settings }: Context,
  lifetime: number = settings.factsLifetime,
): facts is Facts {
  const age = Date.now() - (facts?.time ?? 0);
  return age >= 0 && age < lifetime * 1000;
}

/** What still counts of what was noted of a machine. */
function recall(
  machine: Machine,
  record: MachineRecord | undefined,
  context: Context,
): Pick<Prospect, "facts" | "problem" | "until"> {
  const { factsLifetime } = context.settings;
  const facts = record?.facts;
  const isSlow = 1000 * (facts?.login ?? 0) > GRACE.most;
  const lifetime = isSlow ? Math.max(REMEMBERED, factsLifetime) : factsLifetime;
  const until = leftAloneUntil(machine, record, context.settings);
  return {
    facts: isFresh(facts, context, lifetime) ? facts : undefined,
    problem: until > Date.now() ? record?.problem : undefined,
    until,
  };
}

function makeProspect(
  machine: Machine,
  derivation: string,
  record: MachineRecord | undefined,
  lastUsed: number | undefined,
  running: Candidate["running"],
  context: Context,
): Prospect {
  const { observations, stateDirectory } = context;
  const id = machineId(machine);
  return {
    ...recall(machine, record, context),
    machine,
    id,
    derivation,
    hasGreeted: false,
    awaited: `'${machine.name}'`,
    dismissed: false,
    bandwidth: record?.bandwidth,
    quickness: record?.quickness,
    lastUsed,
    running,
    isDoubted: (record?.doubts ?? 0) >= DOUBTS,
    freeSlots: () => countFreeSlots(machine, stateDirectory),
    holds: (paths) => observations.held(id, paths),
  };
}

/** Whether a machine is to be asked, and nothing is known of it yet. */
function isUnknown({ facts, problem, excluded }: Prospect): boolean {
  return !facts && !problem && !excluded;
}

/**
 * Shakes hands with the guix-daemon of a machine, and beside that asks for its
 * facts, unless they are known; these may name another daemon.
 */
async function meetDaemon(
  session: Session,
  known: Facts | undefined,
  context: Context,
): Promise<{
  readonly remote: StoreConnection;
  readonly facts: Facts | undefined;
  /** When it answered, as `performance.now()` has it. */
  readonly answered: number;
}> {
  const start = performance.now();
  session.useSocket(known?.socket);
  const greeted = session.greetDaemon();
  // An account may be unable to run commands, or something there hang, and the
  // machine still be of use.
  const asked = known ??
    demandRemote(session.machine).then(({ probe }) => probe(session, context))
      .catch(() => undefined);
  const [greeting] = await Promise.allSettled([greeted]);
  const answered = performance.now();
  const took = (answered - start) / 1000;
  const patience = Math.max(took, context.settings.decisionTimeout);
  const facts = await within(patience, Promise.resolve(asked), "no answer")
    .catch(() => undefined);
  if (session.useSocket(facts?.socket)) {
    return { remote: await session.greetDaemon(), facts, answered };
  }
  if (greeting.status === "rejected") throw greeting.reason;
  return { remote: greeting.value, facts, answered };
}

/**
 * Logs in to a machine, and sees that its guix-daemon answers; beside that it
 * is asked for its facts, where they are not fresh, which are noted.
 */
async function logInTo(prospect: Prospect, context: Context): Promise<Session> {
  const { machine, id } = prospect;
  const start = performance.now();
  // What asks for facts is to be loaded by the time that it is needed.
  if (!isFresh(prospect.facts, context)) demandRemote(machine).catch(() => {});
  const session = await openSession(machine, context, (what) => {
    prospect.hasGreeted ||= what !== "connect";
  });
  prospect.awaited = `guix-daemon on '${machine.name}'`;
  try {
    const known = isFresh(prospect.facts, context) ? prospect.facts : undefined;
    const meeting = await meetDaemon(session, known, context);
    // A part of an answer is none.
    if (session.failure() !== undefined) throw session.failure();
    const { remote, facts, answered } = meeting;
    const { derivation } = prospect;
    if (await isThisMachine(machine, remote, derivation, context)) {
      prospect.excluded = THIS_MACHINE;
    }
    if (known ?? prospect.excluded) return session;
    const login = (answered - start) / 1000;
    prospect.facts = { ...facts ?? { time: Date.now() }, login };
    context.observations.saveFacts(id, prospect.facts);
    return session;
  } catch (error) {
    const lost = session.failure();
    session.fail(error as Error); // something may be under way
    session.close();
    throw lost === undefined ? error : await connectionError(machine, lost);
  }
}

/** Notes why a machine can't be used. */
function noteFailure(
  prospect: Prospect,
  error: unknown,
  { log, observations, settings, signal }: Context,
): void {
  signal.throwIfAborted();
  const { machine } = prospect;
  prospect.problem = reason(error);
  if (error instanceof LocalError) prospect.obstacle = error;
  else observations.saveFailure(machine, prospect.problem, settings);
  log.warn(error);
}

/** Connects to a machine and asks it; what is found out goes to `prospect`. */
async function askMachine(prospect: Prospect, context: Context): Promise<void> {
  try {
    const session = await logInTo(prospect, context);
    if (prospect.dismissed || prospect.excluded) session.close();
    else prospect.session = session;
  } catch (error) {
    noteFailure(prospect, error, context);
  }
}

/** Takes the answer that another of our processes has got meanwhile. */
function hasAnswer(prospect: Prospect, context: Context): boolean {
  const { id, machine } = prospect;
  const record = context.observations.machines(id).get(id);
  const { facts, problem } = recall(machine, record, context);
  Object.assign(prospect, { facts, problem });
  return facts !== undefined || problem !== undefined;
}

/** Finds out about a machine, or leaves that to another of our processes. */
async function consultMachine(
  prospect: Prospect,
  context: Context,
): Promise<void> {
  while (!prospect.dismissed) {
    // Whoever asked is gone, or slow, or has the answer now.
    const mine = context.observations.claim(prospect.id, CLAIM);
    if (hasAnswer(prospect, context)) break;
    if (mine) {
      await askMachine(prospect, context);
      break;
    }
    await delay(20);
  }
  if (prospect.facts === undefined) throw new Error(prospect.problem);
}

/** Whether a machine can take a build now, for all that is known of it. */
function isFree(prospect: Prospect, context: Context): boolean {
  return exclusion(prospect, context) === undefined && prospect.freeSlots() > 0;
}

/** How many milliseconds there are until a time of `performance.now()`. */
function timeUntil(end: number): number {
  return Math.max(0, end - performance.now());
}

/** Machines that are consulted, side by side. */
interface Consultation {
  /** Settles when one was found that can take a build. */
  readonly found: Promise<void>;
  /** Settles when all that were asked have answered. */
  readonly all: Promise<unknown>;
  /** Asks no further ones; returns those that were not asked. */
  stop(): Prospect[];
}

/** Consults so many at a time, and goes on until one can take a build. */
function startConsulting(
  prospects: readonly Prospect[],
  context: Context,
): Consultation {
  const left = [...prospects];
  let unasked: Prospect[] = [];
  const stop = () => unasked = unasked.concat(left.splice(0));
  const found = Promise.withResolvers<void>();
  const consultOne = async (prospect: Prospect) => {
    await consultMachine(prospect, context).catch(() => {});
    if (!isFree(prospect, context)) return;
    stop();
    found.resolve();
  };
  const answers: Promise<void>[] = [];
  const consultOn = async () => {
    for (let next; (next = left.shift()) !== undefined;) {
      const answer = consultOne(next);
      answers.push(answer);
      // Who is silent must not keep others from being asked.
      await Promise.race([answer, delay(GRACE.most)]);
    }
  };
  const all = Promise.all(Array.from({ length: PROBES_AT_ONCE }, consultOn))
    .then(() => Promise.all(answers));
  return { found: found.promise, all, stop };
}

/** Waits for those who have said something, as long as connecting may take. */
async function awaitGreeted(
  prospects: readonly Prospect[],
  context: Context,
): Promise<void> {
  const end = performance.now() + context.settings.connectTimeout * 1000;
  const isComing = (it: Prospect) => it.hasGreeted && isUnknown(it);
  while (timeUntil(end) > 0 && prospects.some(isComing)) {
    if (prospects.some((prospect) => isFree(prospect, context))) return;
    await delay(20);
    context.signal.throwIfAborted();
  }
}

/** Notes who has not answered: slow is not broken, so this doesn't grow. */
function noteUnanswered(prospect: Prospect, context: Context): void {
  const { machine, id, awaited, hasGreeted } = prospect;
  const { log, observations, settings } = context;
  // Another process may have had an answer since.
  const { facts } = observations.machines(id).get(id) ?? {};
  const before = prospect.facts?.time ?? 0;
  if (isFresh(facts, context) && facts.time > before) {
    prospect.facts = facts;
    return;
  }
  prospect.problem = UNANSWERED;
  const fixed = { ...settings, backoffLimit: settings.backoff };
  observations.saveFailure(machine, UNANSWERED, fixed);
  const hint = hasGreeted
    ? "if builds are to wait for it, raise the setting 'decisionTimeout'"
    : undefined;
  log.warn(new Late(`${awaited} has not answered yet`, { hint }));
}

/** What there is beside the machines that are consulted. */
type Alternative = "a free machine" | "something" | "nothing";

/**
 * Consults machines. Once one can take the build, the rest has little time
 * left, as all have where there is a free machine anyway; where there is
 * nothing else, those who have said something have more.
 */
async function consultMachines(
  prospects: readonly Prospect[],
  alternative: Alternative,
  context: Context,
): Promise<void> {
  const end = answerBy(context);
  const start = performance.now();
  const { found, all, stop } = startConsulting(prospects, context);
  const foundAndGrace = found.then(() => {
    const grace = GRACE.factor * (performance.now() - start);
    return delay(Math.min(Math.max(grace, GRACE.least), GRACE.most));
  });
  const grace = alternative === "a free machine"
    ? delay(GRACE.most)
    : foundAndGrace;
  await Promise.race([all, grace, delay(timeUntil(end))]);
  for (const prospect of stop()) prospect.problem = "not asked yet";
  if (alternative === "nothing") await awaitGreeted(prospects, context);
  for (const prospect of prospects.filter(isUnknown)) {
    noteUnanswered(prospect, context);
  }
}

/** Tells by their directories what runs in slots, and looks once. */
function tellRunning(
  { observations }: Context,
): (directory: string) => RunningBuild[] {
  let found: Map<string, RunningBuild[]> | undefined;
  const look = () => {
    const running = new Map<string, RunningBuild[]>();
    for (const { file, derivation, time } of observations.slots()) {
      const builds = running.get(dirname(file)) ?? [];
      builds.push({ name: derivationName(derivation), since: time });
      running.set(dirname(file), builds);
    }
    return running;
  };
  return (directory) => (found ??= look()).get(directory) ?? [];
}

/** What is known of machines, of which none is asked. */
export async function recallMachines(
  machines: readonly Machine[],
  derivation: string,
  context: Context,
): Promise<Prospect[]> {
  const records = context.observations.machines();
  const lastUsed = context.observations.lastUsed();
  const runningIn = tellRunning(context);
  const prospects = machines.map((machine) => {
    const id = machineId(machine);
    const [record, used] = [records.get(id), lastUsed.get(id)];
    const directory = slotDirectory(machine, context.stateDirectory);
    const running = () => runningIn(directory);
    return makeProspect(machine, derivation, record, used, running, context);
  });
  const exclusions = await firstExclusions(prospects, context);
  const own = context.observations.ownDefinitions();
  prospects.forEach((it, index) => {
    const isThis = own.size > 0 && own.has(definitionOf(it.machine));
    it.excluded = isThis ? THIS_MACHINE : exclusions[index];
  });
  return prospects;
}

/** Finds out about the machines, asking only those that nothing is known of. */
export async function surveyMachines(
  machines: readonly Machine[],
  request: Request,
  context: Context,
): Promise<Prospect[]> {
  const { derivation } = request;
  const prospects = await recallMachines(machines, derivation, context);
  const unknown = prospects
    .filter((prospect) => isUnknown(prospect) && prospect.freeSlots() > 0)
    .sort((a, b) => b.machine.speed - a.machine.speed);
  if (unknown.length > 0) {
    const known = prospects.filter((prospect) => !unknown.includes(prospect));
    const alternative = alternativeTo(known, request, context);
    await consultMachines(unknown, alternative, context);
  }
  context.signal.throwIfAborted();
  return prospects;
}

/** By when a request is to be answered that is served now. */
function answerBy({ settings }: Context): number {
  return performance.now() + settings.decisionTimeout * 1000;
}

/** What there is beside machines that nothing is known of. */
function alternativeTo(
  known: readonly Prospect[],
  request: Request,
  context: Context,
): Alternative {
  if (known.some((prospect) => isFree(prospect, context))) {
    return "a free machine";
  }
  const isComing = known.some((it) => exclusion(it, context)?.isBusy);
  return isComing || mayBuildHere(request, context) ? "something" : "nothing";
}

/** Says why a machine gets no build now, if it gets none. */
export function exclusion(
  { machine, facts, problem, until, excluded }: Prospect,
  { settings }: Context,
): Exclusion | undefined {
  if (excluded !== undefined) return excluded;
  if (machine.parallelBuilds === 0) {
    return { why: "its parallel-builds is 0", isBusy: false };
  }
  if (problem !== undefined) {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    const left = seconds > 0 ? `left alone for ${seconds} s: ` : "";
    return { why: left + problem, isBusy: false };
  }
  if (facts === undefined) {
    return { why: "all its slots are taken", isBusy: true };
  }
  const load = normalizedLoad(facts);
  const threshold = machine.overloadThreshold;
  const isBounded = threshold !== false && threshold < 1;
  if (load !== undefined && isBounded && load >= threshold) {
    const why = `overloaded: its normalized load is ${load.toFixed(2)}`;
    return { why, isBusy: true };
  }
  const free = facts.store?.bytes;
  if (free !== undefined && free < settings.minimumFreeSpace) {
    const why = `low on disk space: ${mebibytes(free)} MiB free`;
    return { why, isBusy: false };
  }
  return undefined;
}

/** What speaks for a machine. */
export interface Appraisal {
  /** The machine, and what is known of it. */
  readonly prospect: Prospect;
  /** What each plugin says. */
  readonly scores: Scores;
}

/** Scores the machines that may take a build; the best comes first. */
export async function rank(
  prospects: readonly Prospect[],
  request: ScoredRequest,
  context: Context,
): Promise<Appraisal[]> {
  const mayDefer = !request.isAccepted &&
    pluginsWith("defer", context).length > 0;
  const eligible = prospects.filter((prospect) => {
    // Who is not asked, for all its slots are taken, may be worth a wait.
    const isAble = prospect.machine.parallelBuilds > 0;
    if (mayDefer && isAble && isUnknown(prospect)) return true;
    const { why } = exclusion(prospect, context) ?? {};
    if (why) context.log.debug(`skipping '${prospect.machine.name}': ${why}`);
    return why === undefined;
  });
  const scores = await sumScores(eligible, request, context);
  return eligible
    .map((prospect, index) => ({
      prospect,
      scores: scores[index]!,
      chance: Math.random(), // among equals, as the reference does
      speed: prospect.machine.speed,
    }))
    .filter(({ scores }) => scores.total !== -Infinity)
    .sort((a, b) =>
      Number(a.prospect.isDoubted) - Number(b.prospect.isDoubted) ||
      b.scores.total - a.scores.total || b.speed - a.speed ||
      a.chance - b.chance
    );
}

/** A machine that takes a build, and the slot that is held for it. */
export interface Assignment {
  /** The machine. */
  readonly prospect: Prospect;
  /** The slot. */
  readonly slot: Slot;
}

/**
 * Takes a slot of the first machine that has one. Where one's slots can't be
 * locked, that is an error only if no other has one.
 */
function takeSlot(
  ranking: readonly Appraisal[],
  { log, queue, stateDirectory }: Context,
): Assignment | undefined {
  const problems: unknown[] = [];
  for (const { prospect } of ranking) {
    if (isUnknown(prospect)) continue; // its slot was freed since: it is asked
    try {
      const slot = acquireBuildSlot(prospect.machine, stateDirectory, log);
      if (slot === undefined) continue;
      problems.forEach((problem) => log.warn(problem));
      const release = () => {
        slot.release();
        queue?.tellFreed();
      };
      return { prospect, slot: { ...slot, release } };
    } catch (error) {
      problems.push(error);
    }
  }
  if (problems.length > 0) throw problems[0];
  return undefined;
}

/** Lets go of what was opened to ask, but for `chosen`. */
export function dismiss(
  prospects: readonly Prospect[],
  chosen?: Prospect,
): void {
  for (const prospect of prospects) {
    if (prospect === chosen) continue;
    prospect.dismissed = true; // who is still asked closes it himself
    prospect.session?.close();
  }
}

/** Waits until `end` for a slot to be free; returns whether one is. */
async function untilFree(
  isFree: () => boolean,
  end: number,
  signal: AbortSignal,
): Promise<boolean> {
  while (performance.now() < end) {
    await delay(25);
    signal.throwIfAborted();
    if (isFree()) return true;
  }
  return false;
}

/**
 * Waits until one of the machines has a free slot, as long as an answer may
 * take: that keeps short builds flowing, for the daemon comes back from a
 * "postpone" only after 5 s.
 *
 * Since the daemon does nothing else meanwhile, a wait in vain is the last one
 * until a slot was freed.
 */
async function waitForSlot(
  busy: readonly Prospect[],
  context: Context,
  end: number,
): Promise<boolean> {
  if (busy.length === 0 || !context.observations.mayWait()) return false;
  const isFree = () => busy.some((prospect) => prospect.freeSlots() > 0);
  const wait = context.queue?.untilFree ?? untilFree;
  if (await wait(isFree, end, context.signal)) return true;
  context.observations.saveVainWait();
  return false;
}

/** The first plugin's answer why a build is to wait; one that fails has none. */
export async function askToDefer(
  ranking: readonly Appraisal[],
  request: ScoredRequest,
  context: Context,
): Promise<Deferral | undefined> {
  if (request.isAccepted || ranking.length === 0) return undefined;
  const candidates = ranking.map(({ prospect, scores }) => (
    { candidate: prospect, score: scores.total }
  ));
  const answers = await allAnswers(
    "defer",
    context,
    (plugin, own) => plugin.defer(candidates, request, own),
    (error) => context.log.warn(error),
  );
  return answers.find(({ answer }) => answer !== undefined)?.answer;
}

/** The same, which others are told that wait as well. */
async function noteDeferral(
  ranking: readonly Appraisal[],
  request: ScoredRequest,
  context: Context,
): Promise<Deferral | undefined> {
  const deferral = await askToDefer(ranking, request, context);
  if (deferral === undefined || deferral.isHere) return deferral;
  const { why, rank, candidate } = deferral;
  const { derivation, system, features } = request;
  const order = { rank, system, features, machine: candidate?.id };
  context.log.debug(`'${derivation}' waits: ${why}`);
  context.observations.journal?.saveWait(derivation, why, order);
  return deferral;
}

/** Has a machine started, where one can be and none is being. */
async function startMachine(
  prospects: readonly Prospect[],
  { log, settings: { hookTimeout } }: Context,
): Promise<void> {
  if (prospects.some(({ excluded }) => excluded?.isStarting)) return;
  const [first] = prospects
    .filter(({ excluded }) => excluded?.isBusy && excluded.start)
    .sort((a, b) => b.machine.speed - a.machine.speed);
  if (first === undefined) return;
  log.info(`starting '${first.machine.name}'...`);
  try {
    const late = delay(hookTimeout * 1000); // it has the background
    await Promise.race([first.excluded!.start!(), late]);
  } catch (error) {
    log.warn(error);
  }
}

/** Why nobody takes a build; where it is deferred, that is noted already. */
export type Unassigned = "busy" | "deferred" | "here" | "unreachable";

/** Chooses who takes a build, waiting until `end`, or says why nobody does. */
export async function chooseBuildMachine(
  machines: readonly Machine[],
  request: ScoredRequest,
  context: Context,
  end: number = answerBy(context),
): Promise<Assignment | Unassigned> {
  for (;;) {
    const prospects = await surveyMachines(machines, request, context);
    let ranking: readonly Appraisal[] = [];
    let assignment: Assignment | undefined;
    let deferral: Deferral | undefined;
    try {
      ranking = await rank(prospects, request, context);
      deferral = await noteDeferral(ranking, request, context);
      if (deferral === undefined) assignment = takeSlot(ranking, context);
    } finally {
      dismiss(prospects, assignment?.prospect);
    }
    if (assignment !== undefined) return assignment;
    const refusal = deferral?.isHere ? "here" : deferral ? "deferred" : "busy";
    if (deferral?.isHeld === false) return refusal;
    const able = prospects.filter((prospect) =>
      ranking.some((it) => it.prospect === prospect) ||
      exclusion(prospect, context)?.isBusy
    );
    if (able.length === 0) {
      const obstacle = prospects.find((it) => it.obstacle)?.obstacle;
      if (obstacle !== undefined) throw obstacle;
      return "unreachable";
    }
    await startMachine(prospects, context);
    const busy = able.filter((prospect) =>
      deferral?.candidate !== undefined
        ? prospect === deferral.candidate
        : prospect.freeSlots() === 0 || (deferral === undefined &&
          ranking.some((it) => it.prospect === prospect)) // a moment ago
    );
    if (!await waitForSlot(busy, context, end)) return refusal;
  }
}

/** Gives a machine back that was to take a build. */
function letGo({ slot, prospect }: Assignment, { log }: Context): void {
  const { session, opening } = prospect;
  cleanUp(
    log,
    () => slot.release(),
    () => session?.close(),
    () => opening?.then((late) => late.close(), () => {}),
  );
}

/**
 * Makes sure that a machine can take the build that it was chosen for: nothing
 * excludes it now that the slot is taken, and its guix-daemon has answered. One
 * whose login takes longer than until `end` has answered another hook.
 */
async function makeReady(
  { prospect }: Assignment,
  end: number,
  context: Context,
): Promise<boolean> {
  const { facts } = prospect;
  const [excluded] = await firstExclusions([prospect], context);
  if (excluded !== undefined) return false;
  if (prospect.session !== undefined) return true;
  const { login = 0 } = facts ?? {};
  const isTooSlow = login > context.settings.decisionTimeout;
  const patience = Math.max(timeUntil(end), 2000 * login, GRACE.least);
  const late = delay(isTooSlow ? 0 : patience).then(() => "late" as const);
  prospect.opening = logInTo(prospect, context);
  prospect.opening.catch(() => {}); // whoever waits for it learns of it
  try {
    const answer = await Promise.race([prospect.opening, late]);
    if (answer === "late" && !isTooSlow) noteUnanswered(prospect, context);
    return exclusion(prospect, context) === undefined;
  } catch (error) {
    noteFailure(prospect, error, context);
    return false;
  }
}

/**
 * Chooses a machine that is ready to take a build, or says why none does.
 *
 * @throws {LocalError} where something is wrong here, and so for all of them.
 */
async function chooseReadyMachine(
  machines: readonly Machine[],
  request: ScoredRequest,
  context: Context,
): Promise<Assignment | Unassigned> {
  const end = answerBy(context);
  let obstacle: Error | undefined;
  let others = machines;
  for (;;) {
    const choice = await chooseBuildMachine(others, request, context, end);
    if (typeof choice === "string") {
      if (obstacle !== undefined) throw obstacle;
      return choice;
    }
    let isReady = false;
    try {
      isReady = await makeReady(choice, end, context);
    } finally {
      if (!isReady) letGo(choice, context);
    }
    if (isReady) return choice;
    if (timeUntil(end) === 0) return "unreachable";
    const { prospect } = choice;
    obstacle ??= prospect.obstacle;
    if (prospect.obstacle) {
      others = others.filter((it) => it !== prospect.machine);
    }
  }
}

/** Finds out more of a derivation, for a plugin that asks. */
async function findOut<T>(
  file: "_inputs" | "_dependents",
  derivation: string,
  context: Context,
): Promise<T> {
  type Module = { default(...its: [string, Context]): Promise<T> };
  const what = `nothing here tells what is about '${derivation}'`;
  const { default: find } = await demandFromPlugins<Module>(file, what);
  return await find(derivation, context);
}

/** A request as scores see it: with what is known of earlier builds. */
export function scoredRequest(
  request: Request,
  context: Context,
): ScoredRequest {
  const { derivation } = request;
  const { observations } = context;
  const name = derivationName(derivation);
  let inputs: Promise<InputItem[]> | undefined;
  let dependents: Promise<readonly Dependent[]> | undefined;
  return {
    ...request,
    name,
    wantsLocal: mayBuildHere(request, context),
    time: Date.now(),
    isAccepted: false,
    history: (of = name) => observations.history(of),
    similar: (beginning) => observations.similar(beginning),
    inputs: () => inputs ??= findOut("_inputs", derivation, context),
    dependents: () =>
      dependents ??= findOut("_dependents", derivation, context),
    waited: () => observations.journal?.waited(derivation) ?? 0,
    pace: () => observations.journal?.pace() ?? 0,
    waiting: () => observations.journal?.urgent() ?? [],
  };
}

// ---------------------------------------------------------------------------
// Offloading
// ---------------------------------------------------------------------------

/** Tells of a transfer, once a second, where it takes more than one. */
export function makeProgress(what: string, log: Log): (size: number) => void {
  const start = performance.now();
  let told = start;
  let total = 0;
  return (size) => {
    total += size;
    const now = performance.now();
    if (now - told < 1000) return;
    told = now;
    const rate = mebibytes(total / (now - start) * 1000);
    log.info(`${what}: ${mebibytes(total)} MiB, ${rate} MiB/s`);
  };
}

/** Passes on what is transferred; whoever is told of it may end that. */
export async function* passOn<T extends Uint8Array>(
  chunks: AsyncIterable<T>,
  ...told: readonly ((size: number) => void)[]
): AsyncGenerator<T, void> {
  for await (const chunk of chunks) {
    told.forEach((tell) => tell(chunk.length));
    yield chunk;
  }
}

/**
 * What is inline: what is missing goes as signed archives from daemon to daemon,
 * over the connections that are there.
 */
export function plainTransport(
  { exportBundle: exportHere, remote }: TransportContext,
): Transport {
  return {
    missing: async (paths) => {
      const valid = new Set(await queryValidPaths(remote, paths));
      return paths.filter((path) => !valid.has(path));
    },
    send: async (items) => {
      await importPaths(remote, exportHere([...items.keys()]));
    },
    retrieve: (paths) => exportBundle(remote, paths),
  };
}

/** What an attempt needs. */
export interface AttemptContext extends Context {
  /** Where it notes how far it is. */
  readonly course: Course;
}

/** What a build needs on a machine to which there are connections. */
export interface BuildContext extends AttemptContext, TransportContext {
  /** What goes with the build: its options, where they are not yet set. */
  readonly first: readonly Call[];
}

/** Thrown where others build on a machine as much as it may. */
class NotAdmitted extends OffloadError {}

/** Takes leave of all plugins to build on the machine. */
async function admit(context: BuildContext): Promise<void> {
  const { machine } = context;
  const isAdmitted = await allAgree(
    "admit",
    context,
    (plugin, own) => plugin.admit(machine, own),
  );
  if (isAdmitted) return;
  throw new NotAdmitted(`others use all slots of '${machine.name}'`);
}

/** The transport of the first plugin that has one for the machine. */
export async function chooseTransport(
  context: BuildContext,
): Promise<Transport> {
  const { machine } = context;
  const found = await firstAnswer(
    "transport",
    context,
    (plugin, own) => plugin.transport(machine, own),
  );
  if (found !== undefined) return found;
  throw new OffloadError(`no transport to '${machine.name}'`);
}

/** What the store here knows of items, each after those it refers to. */
export async function queryItems(
  paths: readonly string[],
  store: StoreConnection,
): Promise<Map<string, PathInfo>> {
  const items = await queryPathInfos(store, paths).catch((cause) => {
    throw new LocalError(reason(cause), { cause });
  });
  const sorted = new Map<string, PathInfo>();
  const seen = new Set<string>();
  // Without recursion: chains of references may be long.
  const left = [...items.keys()].reverse();
  for (let path; (path = left.at(-1)) !== undefined;) {
    const item = items.get(path)!;
    const isFirst = !seen.has(path);
    seen.add(path);
    const before = item.references
      .filter((it) => isFirst && items.has(it) && !seen.has(it));
    left.push(...before);
    if (before.length > 0) continue;
    left.pop();
    sorted.set(path, item);
  }
  return sorted;
}

/** Those of `paths` that a machine lacks; what else it asks for, it won't get. */
async function lackingItems(
  paths: readonly string[],
  transport: Transport,
): Promise<readonly string[]> {
  const missing = new Set(await transport.missing(paths));
  return paths.filter((path) => missing.has(path));
}

/**
 * Sends items that the machine lacks, and notes how fast that went. Of these
 * the derivation is left, which goes with the request to build it.
 */
async function sendItems(
  paths: readonly string[],
  derivation: string,
  transport: Transport,
  context: BuildContext,
): Promise<PathInfo | undefined> {
  const { course, machine, local, log, observations } = context;
  const sizeOf = (items: ReadonlyMap<string, PathInfo>) =>
    [...items.values()].reduce((sum, { narSize }) => sum + narSize, 0);
  let items = await queryItems(paths, local);
  const reserved = await transport.reserve?.(sizeOf(items));
  try {
    if (reserved !== undefined) {
      // Another process may just have sent some of it.
      const missing = await lackingItems([...items.keys()], transport);
      items = new Map(missing.map((path) => [path, items.get(path)!]));
    }
    if (items.size === 0) return undefined;
    const size = sizeOf(items);
    const what = `sending ${count(items.size)} (${mebibytes(size)} MiB)`;
    log.info(`${what} to '${machine.name}'...`);
    const recipe = items.get(derivation);
    items.delete(derivation);
    if (items.size === 0) return recipe;
    const start = performance.now();
    Object.assign(course, { moved: 0, total: size });
    const load = { derivation, bytes: size, inputs: [...items.keys()] };
    const isCarried = await context.carry?.(load, context);
    if (!isCarried) await transport.send(items);
    course.items = (course.items ?? 0) + items.size;
    course.bytesSent = (course.bytesSent ?? 0) + size;
    if (size > 2 ** 20) {
      const bandwidth = size / (performance.now() - start) * 1000;
      observations.saveBandwidth(machineId(machine), bandwidth);
    }
    return recipe;
  } finally {
    reserved?.release();
  }
}

/** Where an output waits until all of them are verified. */
export function temporaryName(output: string): string {
  // The collector spares this name as long as the output is a temporary root,
  // as it is while the daemon builds it, and no longer.
  return `${output}.chroot`;
}

/** Removes a file, or a directory with all that is in it. */
export function removeFile(file: string): void {
  rmSync(file, { recursive: true, force: true });
}

/** Checks that an item was asked for and is signed by whom we trust. */
export function checkItem(
  item: ItemMetadata,
  outputs: readonly string[],
  acl: Acl,
  reader: ByteReader,
): void {
  const { path, signature, hash } = item;
  if (!outputs.includes(path)) {
    throw reader.error(`unexpected store item '${path}'`);
  }
  const problem = signature === undefined
    ? "it lacks a signature"
    : checkSignature(signature, hash, acl);
  if (problem === undefined) return;
  throw new ProtocolError(`${reader.name}: '${path}': ${problem}`, {
    code: problem === UNAUTHORIZED ? "unauthorized" : "signature",
    hint: problem === UNAUTHORIZED
      ? "run 'guix archive --authorize' here with the machine's " +
        "/etc/guix/signing-key.pub"
      : undefined,
  });
}

/**
 * Restores and checks what a bundle holds, of `limit` bytes on the disk at the
 * most; returns where each output is.
 */
export async function restoreOutputs(
  reader: ByteReader,
  outputs: readonly string[],
  acl: Acl,
  limit: number = Infinity,
): Promise<ReadonlyMap<string, string>> {
  const restored = new Map<string, string>();
  const take = takeUpTo(limit);
  // An item's name comes after its contents, and in whatever order.
  while (await reader.number(1) === 1) {
    if (restored.size === outputs.length) {
      throw reader.error("more store items than were asked for");
    }
    const file = temporaryName(outputs[restored.size]!);
    removeFile(file); // an earlier hook may have been killed
    const item = await restoreItem(reader, file, take);
    checkItem(item, outputs, acl, reader);
    if (restored.has(item.path)) throw reader.error(`'${item.path}' twice`);
    restored.set(item.path, file);
  }
  const lacking = outputs.find((output) => !restored.has(output));
  if (lacking !== undefined) throw reader.error(`'${lacking}' is missing`);
  if (await reader.more()) throw reader.error("unexpected data at the end");
  return restored;
}

/**
 * Puts the outputs, of `size` bytes, at their paths: all of them, once each is
 * complete and its signature verified, or none.
 */
export async function retrieveOutputs(
  outputs: readonly string[],
  size: number,
  transport: Transport,
  context: BuildContext,
): Promise<void> {
  const { log, machine } = context;
  const retrieve = () =>
    putInPlace(outputs, transport.retrieve(outputs, size), context);
  log.info(`retrieving ${count(outputs.length)} from '${machine.name}'...`);
  await retrieve().catch((error) => {
    // Somebody else may have taken it for a killed hook's.
    if (error.cause?.code !== "ENOENT") throw error;
    context.signal.throwIfAborted();
    return retrieve();
  });
}

/** Restores, verifies and renames what is sent; or leaves the store as it was. */
async function putInPlace(
  outputs: readonly string[],
  sent: AsyncIterable<Uint8Array>,
  { configDirectory, course, log, machine, settings, signal }: BuildContext,
): Promise<void> {
  const limit = settings.maximumArchiveSize;
  const bundle = passOn(
    sent,
    () => signal.throwIfAborted(),
    takeUpTo(limit),
    (size) => course.moved += size,
    makeProgress(`retrieving from '${machine.name}'`, log),
  );
  const reader = new ByteReader(bundle, `archive from '${machine.name}'`);
  const acl = readAcl(configDirectory);
  try {
    const restored = await restoreOutputs(reader, outputs, acl, limit);
    signal.throwIfAborted(); // they may be another attempt's by now
    for (const [output, file] of restored) {
      removeFile(output);
      renameSync(file, output);
    }
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException;
    if (cause instanceof OffloadError || code === undefined) throw cause;
    const message = `failed to write to the store: ${reason(cause)}`;
    throw new LocalError(message, { cause });
  }
}

/**
 * Makes a bundle of items of ours: what fails is no fault of a machine. It has
 * a connection of its own, for it may be left before its end.
 */
async function* exportFromHere(
  paths: readonly string[],
  context: AttemptContext,
): AsyncGenerator<Buffer, void> {
  const local = await openLocalDaemon(context);
  let isDone = false;
  try {
    const { course } = context;
    const bundle = exportBundle(local, paths);
    yield* passOn(bundle, (size) => course.moved += size);
    isDone = true;
  } catch (cause) {
    throw new LocalError(`failed to export: ${reason(cause)}`, { cause });
  } finally {
    closeLocalDaemon(local, context, isDone);
  }
}

/** What the daemon sends for a build that was accepted. */
export interface Work {
  /** What is built. */
  readonly derivation: string;
  /** The derivation and all that it needs, its closure included. */
  readonly needed: readonly string[];
  /** What it is to make. */
  readonly outputs: readonly string[];
  /** When it was asked for, in milliseconds since 1970. */
  readonly asked: number;
  /** When it was accepted. */
  readonly accepted: number;
  /** How far each attempt has come. */
  readonly courses: Course[];
}

/** Whether an error is the build's or ours: no other machine would help. */
function isFinal(error: unknown): boolean {
  return error instanceof LocalError ||
    (error instanceof OffloadError && error.exitCode !== EXIT.transient);
}

/** What a build took, and made. */
interface Built {
  readonly seconds: number;
  /** The size of the outputs, in bytes. */
  readonly size: number;
}

/**
 * Says how a build failed there. What kills a builder is short of memory, or
 * ends the daemon there. The status says nothing of it, but the last piece of
 * the log is the daemon's own.
 */
function buildFailure(
  derivation: string,
  { name }: Machine,
  cause: DaemonError,
  last: Buffer | undefined,
): OffloadError {
  const { message, status } = cause;
  const killing = `builder for \`${derivation}' failed due to signal 9`;
  const isOver = status === EXIT.timedOut ||
    (status === EXIT.buildFailed && last?.indexOf(killing) !== 0);
  const wasKilled = !isOver && status === EXIT.buildFailed;
  return new (wasKilled ? Killed : OffloadError)(
    `derivation '${derivation}' offloaded to '${name}' failed: ${message}`,
    { cause, exitCode: isOver ? status : undefined },
  );
}

/**
 * Builds on the other side, all in a message; what fails there is told in its
 * exit code.
 */
async function buildRemotely(
  { derivation, outputs }: Work,
  recipe: PathInfo | undefined,
  prepare: () => void,
  { buildLog, first, log, machine, remote }: BuildContext,
): Promise<Built> {
  log.info(`offloading '${derivation}' to '${machine.name}'...`);
  log.trace(`@ build-remote ${derivation} ${machine.name}`);
  let last: Buffer | undefined;
  const take = (text: Buffer) => {
    last = text;
    return buildLog(text);
  };
  let size = 0;
  const calls = [
    buildCall([derivation]),
    ...outputs.map((output) =>
      pathInfoCall(output, ({ narSize }) => size += narSize)
    ),
  ];
  if (recipe !== undefined) {
    const text = readFileSync(derivation);
    const name = itemName(derivation);
    // Were it made into another item, it could not be built.
    const request = addTextRequest(name, text, recipe.references);
    calls.unshift(addCall(request, prepare));
  } else prepare();
  const start = performance.now();
  try {
    await operateAll(remote, [...first, ...calls], { log: take });
    return { seconds: (performance.now() - start) / 1000, size };
  } catch (cause) {
    if (!(cause instanceof DaemonError)) throw cause;
    throw buildFailure(derivation, machine, cause, last);
  }
}

/**
 * Sends what the machine lacks, and builds; what is collected there before the
 * build has begun is sent once more.
 */
async function sendAndBuild(
  work: Work,
  transport: Transport,
  context: BuildContext,
): Promise<Built> {
  const { derivation, needed } = work;
  const { log, machine, patiently } = context;
  const prepare = () => {
    try {
      transport.prepare?.(derivation);
    } catch (error) { // it is no more than a hint
      log.warn(error);
    }
  };
  let missing = await lackingItems(needed, transport);
  for (let isAgain = false;; isAgain = true) {
    try {
      const recipe = await sendItems(missing, derivation, transport, context);
      missing = recipe === undefined ? [] : [derivation];
      context.course.sent = Date.now();
      return await patiently(() =>
        buildRemotely(work, recipe, prepare, context)
      );
    } catch (error) {
      if (isAgain || isFinal(error) || isOutOfStep(error)) throw error;
      const lacking = await lackingItems(needed, transport)
        .catch((): string[] => []);
      const lost = lacking.filter((path) => !missing.includes(path));
      if (lost.length === 0) throw error;
      log.info(`'${machine.name}' has lost ${count(lost.length)}...`);
      missing = lacking;
    }
  }
}

/** Thrown where a connection that was left proves to be gone. */
class Gone extends OffloadError {}

/**
 * Sets the options of a build. What is sent for that alone tells how far the
 * machine is; where that is known, they go with the build.
 */
async function setOptions(
  remote: StoreConnection,
  machine: Machine,
  { buildOptions, observations, settings: { substitutes } }: Context,
): Promise<Pick<BuildContext, "first" | "roundTrip">> {
  const id = machineId(machine);
  const { facts } = observations.machines(id).get(id) ?? {};
  const options = optionsCall(buildOptions, substitutes);
  const known = facts?.roundTrip;
  // Those that say whether it may fetch are for what comes before, too.
  if (LEFT.has(remote) && known !== undefined && !substitutes) {
    return { roundTrip: known, first: [options] };
  }
  const before = performance.now();
  await operateAll(remote, [options]);
  const took = performance.now() - before;
  // Of two looks at a busy machine, the shorter one says how far it is.
  return { roundTrip: Math.min(took, known ?? took), first: [] };
}

/** Connects the stores of both sides, and tells what their connection is like. */
export async function connectStores(
  session: Session,
  remote: StoreConnection,
  local: Promise<StoreConnection>,
  derivation: string,
  context: AttemptContext,
): Promise<BuildContext> {
  const { machine, openDaemon, leaveDaemon, exec, patiently } = session;
  // It may not have been asked, or not to the end.
  if (await isThisMachine(machine, remote, derivation, context)) {
    throw new OffloadError(`'${machine.name}': ${THIS_MACHINE.why}`);
  }
  return {
    ...contextFor(guixPlugin, context),
    machine,
    remote,
    ...await setOptions(remote, machine, context),
    local: await local,
    openDaemon,
    leaveDaemon,
    exec,
    patiently,
    exportBundle: (paths) => exportFromHere(paths, context),
  };
}

/** What is known of the way to a machine, should a build go it once more. */
interface Way {
  /** Whether all plugins have given leave. */
  isAdmitted: boolean;
  /** Whether the daemon there is asked one by one. */
  isOneByOne: boolean;
}

/** Sends the inputs, builds, and retrieves the outputs. */
async function buildThere(
  work: Work,
  way: Way,
  context: BuildContext,
): Promise<void> {
  if (!way.isAdmitted) await admit(context);
  way.isAdmitted = true;
  const transport = await chooseTransport(context);
  const { derivation, needed, outputs } = work;
  const { seconds, size } = await sendAndBuild(work, transport, context);
  const { course } = context;
  Object.assign(course, { built: Date.now(), moved: 0, total: size });
  const load = { derivation, bytes: size, outputs };
  const isCarried = await context.carry?.(load, context);
  if (!isCarried) await retrieveOutputs(outputs, size, transport, context);
  Object.assign(course, { retrieved: Date.now(), bytesRetrieved: size });
  context.observations.saveBuild(
    context.machine,
    derivationName(derivation),
    seconds,
    [...needed, ...outputs],
  );
  context.log.info(`done with offloaded '${derivation}'`);
}

/** Connects the stores of both sides, builds, and leaves them to others. */
async function transferAndOffload(
  work: Work,
  session: Session,
  context: AttemptContext,
  way: Way,
): Promise<void> {
  readAcl(context.configDirectory); // without one, why build
  const local = openLocalDaemon(context);
  local.catch(() => {}); // it is told below
  let isDone = false;
  let remote: StoreConnection | undefined;
  try {
    const { derivation } = work;
    remote = await session.openDaemon();
    context.course.connected = Date.now();
    const own = connectStores(session, remote, local, derivation, context);
    await buildThere(work, way, await own);
    session.leaveDaemon(remote);
    isDone = true;
  } catch (cause) {
    remote?.stream.destroy();
    const isGone = remote && LEFT.has(remote) && remote.stream.readableEnded;
    if (!isGone || isFinal(cause) || cause instanceof NotAdmitted) throw cause;
    throw new Gone(reason(cause), { cause });
  } finally {
    local.then((it) => closeLocalDaemon(it, context, isDone), () => {});
  }
}

/**
 * The same; anew, where it was over a connection that was gone, and a message at
 * a time, where the daemon's socket is some relay's that breaks them into pieces.
 */
async function transferInStep(
  work: Work,
  session: Session,
  context: AttemptContext,
  way: Way = { isAdmitted: false, isOneByOne: false },
): Promise<void> {
  try {
    await transferAndOffload(work, session, context, way);
  } catch (error) {
    const isGone = error instanceof Gone && session.failure() === undefined;
    context.signal.throwIfAborted();
    const mayGoOn = isOutOfStep(error) && !way.isOneByOne;
    if (!isGone && !mayGoOn) throw error;
    if (!isGone) session.askOneByOne();
    way.isOneByOne ||= !isGone;
    await transferInStep(work, session, context, way);
  }
}

/**
 * Gives a session up over which nothing passes for too long, unless that may
 * be, or at whose end the daemon is dead.
 */
export function watchSession(session: Session, settings: Settings): () => void {
  const [step, keepalive] = [settings.stepTimeout, settings.keepaliveTimeout];
  let seen = performance.now();
  let asking = false;
  const start = seen;
  const check = () => {
    const now = performance.now();
    const idle = Math.min(session.idle(), now - start);
    if (idle >= step * 1000 && !session.isPatient()) {
      return session.fail(new Error(`nothing moved for ${step} s`));
    }
    if (asking || Math.min(idle, now - seen) < keepalive * 1000) return;
    asking = true;
    session.ping().catch(session.fail).finally(() => {
      asking = false;
      seen = performance.now();
    });
  };
  const timer = setInterval(check, 250);
  return () => clearInterval(timer);
}

/** Says that the connection was lost, where an error came of that. */
function lossOf(
  error: unknown,
  { machine, session }: Prospect,
  { signal }: Context,
): unknown {
  signal.throwIfAborted();
  const cause = session?.failure();
  if (cause === undefined || isFinal(error)) return error;
  const message = `lost connection to '${machine.name}': ${reason(cause)}`;
  return new OffloadError(message, { cause });
}

/** Begins the course of an attempt. */
function beginCourse(
  { courses }: Work,
  { prospect, slot }: Assignment,
): Course {
  const its = { machine: prospect.id, slot: Number(basename(slot.file)) };
  const course = { ...its, began: Date.now(), moved: 0 };
  courses.push(course);
  return course;
}

/** Runs the build on the machine that took it, and lets go of that. */
async function attempt(
  work: Work,
  { prospect, slot }: Assignment,
  context: AttemptContext,
): Promise<void> {
  const { course, log, observations } = context;
  // What is given up must not go on beside the next attempt.
  const over = new AbortController();
  const signal = AbortSignal.any([context.signal, over.signal]);
  let unwatch = () => {};
  let unfollow: (() => void) | undefined;
  try {
    await clearLeftovers(slot, work.derivation, context);
    observations.useSlot(prospect.id, slot, work.derivation);
    unfollow = observations.journal?.follow(slot, course, prospect);
    const { machine } = prospect;
    const open = () => prospect.opening ?? openSession(machine, context);
    const what = `connecting to '${machine.name}'`;
    const session = prospect.session ??= await remind(what, log, open);
    session.useSocket(prospect.facts?.socket);
    unwatch = watchSession(session, context.settings);
    const done = transferInStep(work, session, { ...context, signal });
    await Promise.race([done, session.lost]);
  } catch (error) {
    throw lossOf(error, prospect, context);
  } finally {
    cleanUp(
      log,
      unwatch,
      () => unfollow?.(),
      () => over.abort(),
      ...work.outputs.map((output) => () => removeFile(temporaryName(output))),
      // As long as the lock is held, nobody else notes anything of the slot.
      () => observations.releaseSlot(slot.file, work.derivation),
    );
    letGo({ prospect, slot }, context);
  }
}

/** Removes what killed hooks left in the store, where some may have. */
async function clearLeftovers(
  mine: Slot,
  derivation: string,
  context: Context,
): Promise<void> {
  if (context.observations.slots().length === 0) return;
  type Leftovers = { default: typeof clearLeftovers };
  await useAside<Leftovers>(
    "_leftovers",
    context,
    (it) => it.default(mine, derivation, context),
  );
  context.signal.throwIfAborted();
}

/**
 * Chooses who takes a build that was let down. The daemon, which asks again
 * what it is refused, would not ask for this one.
 */
async function chooseAnother(
  machines: readonly Machine[],
  resting: Attempts["resting"],
  request: ScoredRequest,
  context: Context,
): Promise<Assignment | string> {
  const { log, observations, settings: { outageTimeout }, signal } = context;
  const isLeft = (machine: Machine) => resting.get(machine) !== Infinity;
  if (!machines.some(isLeft)) return "unreachable";
  const end = performance.now() + outageTimeout * 1000;
  const accepted = { ...request, wantsLocal: false, isAccepted: true };
  let told = "";
  const tell = (what: string) => {
    if (told !== what) log.info(`${what}...`);
    told = what;
  };
  return await remind("waiting for a machine", log, async () => {
    for (;;) {
      const others = machines.filter((machine) =>
        !(resting.get(machine)! > performance.now())
      );
      const asked = { ...accepted, time: Date.now() };
      const choice = await chooseBuildMachine(others, asked, context);
      if (typeof choice !== "string") return choice;
      const isWaiting = machines.some((it) =>
        isLeft(it) && !others.includes(it)
      );
      if (choice === "busy" || isWaiting) tell("waiting for a free slot");
      else if (timeUntil(end) === 0) return choice;
      else tell(`no machine can be reached: waiting for ${outageTimeout} s`);
      observations.journal?.saveWait(request.derivation, choice);
      await delay(1000);
      signal.throwIfAborted();
    }
  });
}

/** For how many seconds a build leaves a machine at most that refuses it. */
const LONGEST_REST = 8;

/** What came of a build on the machines so far. */
interface Attempts {
  /** Why it failed. */
  readonly causes: string[];
  /** Where that may be its own doing. */
  readonly doubted: Machine[];
  /** How often a plugin has refused it a machine. */
  readonly refusals: Map<Machine, number>;
  /** Which machines are not tried, and until when, by `performance.now()`. */
  readonly resting: Map<Machine, number>;
}

function noAttempts(): Attempts {
  return { causes: [], doubted: [], refusals: new Map(), resting: new Map() };
}

/**
 * Notes why a build failed on a machine. One that a user's build can make fail
 * as it likes is not to blame: once others failed there that did well
 * elsewhere, it comes last.
 */
function noteAttempt(
  machine: Machine,
  error: unknown,
  { causes, doubted, resting }: Attempts,
  { course, log, observations, settings }: AttemptContext,
): void {
  const problem = reason(error);
  causes.push(problem);
  Object.assign(course, { ended: Date.now(), problem });
  const isDoubtful = error instanceof Killed || error instanceof Excess;
  if (isDoubtful) doubted.push(machine);
  else observations.saveFailure(machine, problem, settings);
  const rest = isDoubtful ? settings.backoff : 0;
  const isForGood = error instanceof ProtocolError;
  resting.set(machine, isForGood ? Infinity : performance.now() + 1000 * rest);
  log.warn(error);
  log.info(`'${machine.name}' failed: trying another machine...`);
}

/** Leaves a machine to others, each time for longer. */
function noteRefusal(
  machine: Machine,
  { message }: NotAdmitted,
  { refusals, resting }: Attempts,
  log: Log,
): void {
  const before = refusals.get(machine) ?? 0;
  refusals.set(machine, before + 1);
  const rest = Math.min(2 ** before, LONGEST_REST);
  resting.set(machine, performance.now() + 1000 * rest);
  log.info(message);
}

/** Notes who failed at a build that did well in the end. */
function noteDoubts(
  { derivation }: Work,
  { doubted }: Attempts,
  winner: Machine,
  { observations }: Context,
): void {
  doubted.filter((machine) => machine !== winner)
    .forEach((it) => observations.saveDoubt(machineId(it), derivation));
}

/** What to type where no machine does a build that was accepted. */
function instead(
  derivation: string,
  { system }: Request,
  context: Context,
): string {
  const request = { wantsLocal: true, system, derivation, features: [] };
  if (!mayBuildHere(request, context)) return "";
  return "; guix-daemon can build it here: run " +
    `'guix build --no-offload --max-jobs=1 ${derivation}'`;
}

/**
 * Runs the build on the machine that took it and, where that machine fails
 * rather than the build, on others.
 */
async function offload(
  work: Work,
  request: ScoredRequest,
  machines: readonly Machine[],
  first: Assignment,
  context: Context,
): Promise<void> {
  const { log, settings } = context;
  const attempts = noAttempts();
  const { causes, resting } = attempts;
  for (let assignment: Assignment | string = first;;) {
    if (typeof assignment === "string") {
      const why = `no other machine can take '${work.derivation}': ` +
        assignment;
      const hint = instead(work.derivation, request, context);
      throw new OffloadError(causes.join("; "), { hint: why + hint });
    }
    const { machine } = assignment.prospect;
    const own = { ...context, course: beginCourse(work, assignment) };
    try {
      await attempt(work, assignment, own);
      return noteDoubts(work, attempts, machine, context);
    } catch (error) {
      context.signal.throwIfAborted();
      if (isFinal(error)) throw error;
      if (error instanceof NotAdmitted) {
        noteRefusal(machine, error, attempts, log);
      } else noteAttempt(machine, error, attempts, own);
      if (causes.length >= settings.attempts) {
        const hint = instead(work.derivation, request, context).slice(2);
        throw new OffloadError(causes.join("; "), { cause: error, hint });
      }
    }
    assignment = await chooseAnother(machines, resting, request, context);
  }
}

/** Does a build, and notes in the end what became of it. */
async function offloadNoted(
  work: Work,
  context: Context,
  offload: () => Promise<void>,
): Promise<void> {
  let error: unknown;
  try {
    await offload();
  } catch (thrown) {
    error = thrown;
    throw thrown;
  } finally {
    const build = context.observations.journal?.end(work, error, context);
    if (build !== undefined) await tellEndedLater(build, context);
  }
}

/** The daemon's end of a hook: what it says, and how it is answered. */
export interface Conversation {
  /** The next line from the daemon, `undefined` at the end. */
  readLine(): Promise<string | undefined>;
  /** Answers the request. */
  answer(word: "accept" | "decline" | "postpone"): Awaitable<void>;
}

/** Reads what the daemon says after an accept: two lines of store paths. */
async function readWork(
  derivation: string,
  asked: number,
  conversation: Conversation,
): Promise<Work> {
  const accepted = Date.now();
  const inputs = await conversation.readLine();
  const outputs = await conversation.readLine();
  if (inputs === undefined || outputs === undefined) {
    throw new OffloadError(`guix-daemon gave up '${derivation}'`);
  }
  const paths = (line: string) => line.split(" ").filter((path) => path !== "");
  const needed = [...new Set([derivation, ...paths(inputs)])];
  const own = { derivation, needed, outputs: paths(outputs) };
  return { ...own, asked, accepted, courses: [] };
}

/**
 * Answers while something is wrong here. The daemon fails a build for good
 * that is declined and that it can't do itself, so that has to wait.
 */
async function answerAnyway(
  request: Request,
  { answer }: Conversation,
  context: Parameters<typeof mayBuildHere>[1] & Pick<Context, "log">,
): Promise<void> {
  if (mayBuildHere(request, context)) return await answer("decline");
  context.log.warn(`'${request.derivation}' waits until that is corrected`);
  await answer("postpone");
}

/**
 * Serves a request; returns whether it was accepted, and so is built.
 *
 * @throws {OffloadError} with the exit code that tells the daemon what came
 * of an accepted build.
 */
export async function processRequest(
  request: Request,
  conversation: Conversation,
  context: Context,
): Promise<boolean> {
  const asked = Date.now();
  const { derivation } = request;
  const { machines: listed, areAll } = await concatMachines(context);
  const machines = listed.filter((machine) => machineMatches(machine, request));
  if (machines.length === 0) {
    if (areAll) await conversation.answer("decline"); // none will ever match
    else await answerAnyway(request, conversation, context);
    return false;
  }
  const scored = scoredRequest(request, context);
  const choice = await chooseReadyMachine(machines, scored, context);
  const { journal } = context.observations;
  if (typeof choice === "string") {
    const stays = scored.wantsLocal && /here|unreachable/.test(choice);
    if (stays) journal?.endWait(derivation);
    else if (choice !== "deferred") journal?.saveWait(derivation, choice);
    await conversation.answer(stays ? "decline" : "postpone");
    journal?.watch(listed, scored, context);
    return false;
  }
  let work;
  try {
    await conversation.answer("accept");
    work = await readWork(derivation, asked, conversation);
  } catch (error) {
    letGo(choice, context);
    throw error;
  }
  journal?.watch(listed, scored, context);
  const build = () => offload(work, scored, machines, choice, context);
  await offloadNoted(work, context, build);
  return true;
}

/**
 * Serves what the daemon asks in a line; returns whether that is built. What is
 * wrong here, such as in `start`, must not fail the builds.
 */
export async function serveRequest(
  line: string,
  { readLine, answer }: Conversation,
  start: () => Promise<Context>,
  { system, log, signal }: Pick<Context, "system" | "log" | "signal">,
): Promise<boolean> {
  const request = parseRequest(line);
  let isAnswered = false;
  const conversation: Conversation = {
    readLine,
    answer: (word) => {
      isAnswered = true;
      return answer(word);
    },
  };
  let context: Context | undefined;
  try {
    context = await start();
    return await processRequest(request, conversation, context);
  } catch (error) {
    if (isAnswered || signal.aborted) throw error;
    log.error(error);
    await answerAnyway(request, conversation, context ?? { system, log });
    return false;
  }
}

// ---------------------------------------------------------------------------
// Commands
// ---------------------------------------------------------------------------

/** A command: help, completion and manual page are made of this. */
export interface Command {
  /** Where help lists it, before those that do not say; then by name. */
  readonly order?: number;
  /** What may follow: `[` begins what needn't. */
  readonly usage: string;
  /** What it does, in a line: a verb first. */
  readonly summary: string;
  /** What else there is to know about it, a paragraph each. */
  readonly description: readonly string[];
  /** Its options, with the name of the value that one takes; meanings. */
  readonly options: readonly (readonly [usage: string, meaning: string])[];
  /** Command lines, and what each does. */
  readonly examples: readonly (readonly [line: string, meaning: string])[];
  /** Does it: with its arguments, and its options by their names. */
  run(
    args: readonly string[],
    options: CommandOptions,
    makeContext: (machineFile?: string, log?: Log) => Promise<Context>,
    screen: Screen,
  ): Promise<CommandResult>;
  /** Stands around the run, even of one that was called wrongly. */
  around?(
    options: CommandOptions,
    run: () => Promise<CommandResult>,
  ): Promise<CommandResult>;
}

/** The options of a command, as cac names them. */
export type CommandOptions = Readonly<
  Record<string, string | number | boolean | undefined>
>;

/** What a command has to say, and its exit code. */
export interface CommandResult {
  /** What is printed; empty: nothing. */
  readonly output: string;
  /** What the program exits with. */
  readonly exitCode: number;
  /** What is wrong beside it: told after the output. */
  readonly problem?: unknown;
}

// ---------------------------------------------------------------------------
// Entry
// ---------------------------------------------------------------------------

/** Descriptor of the standard output. */
export const STANDARD_OUTPUT = 1;

/** Descriptor of the standard error. */
export const STANDARD_ERROR = 2;

/** Writes all of `text` at once, so that nothing is lost at the exit. */
export function writeText(file: number, text: string): void {
  try {
    writeFileSync(file, text);
  } catch {
    // The client is gone; the build goes on until the daemon ends it.
  }
}

/** How much is kept that a client does not read, in bytes. */
const LARGEST_BACKLOG = 2 ** 21;

/** What keeping a piece costs beside its bytes. */
const PIECE = 64;

/** The parent of a process. */
export function parentOf(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, "latin1");
  return Number(stat.slice(stat.lastIndexOf(")")).split(" ")[2]);
}

/** The process of guix-daemon, whose child or grandchild this hook is. */
function daemonProcess(): number {
  const { ppid, env: { OFFLOAD_SHIM } } = process;
  return OFFLOAD_SHIM === String(ppid) ? parentOf(ppid) : ppid;
}

/** The places in the kernel where a process waits for what comes next. */
const IDLE =
  /^(poll_|ep_poll|do_(select|poll|epoll_wait|wait)|(anon_)?pipe_(read|wait))/;

/**
 * Asks again and again whether guix-daemon still reads, or waits for its client
 * to: what is in the pipe of a hook that has ended, it forgets. Where it waits
 * for what comes next, it has read all.
 */
export function* whileReading(daemon: () => number): Generator<void> {
  for (let unknown = 0; unknown < 200;) {
    let place = "0";
    try {
      place = readFileSync(`/proc/${daemon()}/wchan`, "latin1").trim();
    } catch {
      // It is gone, or another's.
    }
    if (IDLE.test(place)) return;
    unknown = place === "0" ? unknown + 1 : 0;
    yield;
  }
}

/** Where a client reads, who may stop: nothing here waits for that. */
export class Outlet {
  readonly #file: number;
  readonly #left: Uint8Array[] = [];
  #size = 0;
  #wasFull = false;
  #isClosed = false;
  /** Why what was written last is lost, if it is. */
  problem: unknown;

  /** Writes to an open file which, where it can, refuses rather than waits. */
  constructor(file: number) {
    this.#file = file;
  }

  /** Whether nothing is left to write. */
  get isEmpty(): boolean {
    return this.#left.length === 0;
  }

  /** Whether it was refused something. */
  get wasFull(): boolean {
    return this.#wasFull;
  }

  /** Whether as much is kept as may be. */
  get isFull(): boolean {
    return this.#size + PIECE * this.#left.length > LARGEST_BACKLOG;
  }

  /** Writes no more: the file is about to be closed. */
  close(): void {
    this.#isClosed = true;
    this.#left.length = this.#size = 0;
  }

  /** Writes, in order, what there is room for, and keeps the rest. */
  write(text: Uint8Array): void {
    if (this.#isClosed) return;
    this.#left.push(text);
    this.#size += text.length;
    if (this.#left.length === 1) this.#flush(); // else a timer does
  }

  /** Writes all that is left, however long that takes. */
  drain(): void {
    while (!this.#pass()) sleep(5);
  }

  #flush(pause = 1): void {
    const before = this.#size;
    if (this.#pass()) return;
    const next = this.#size < before ? 1 : Math.min(2 * pause, 50);
    setTimeout(() => this.#flush(next), pause);
  }

  /** Writes what there is room for; returns whether that was all. */
  #pass(): boolean {
    try {
      for (let text; (text = this.#left[0]) !== undefined;) {
        const written = writeSync(this.#file, text);
        this.#size -= written;
        if (written === text.length) this.#left.shift();
        else this.#left[0] = text.subarray(written);
      }
    } catch (error) {
      this.#wasFull = (error as NodeJS.ErrnoException).code === "EAGAIN";
      if (this.#wasFull) return false;
      this.problem = error;
      this.#left.length = this.#size = 0;
    }
    return true;
  }
}

/** An outlet which, when this process ends, first waits for who reads there. */
function drainAtExit(outlet: Outlet): Outlet {
  process.on("exit", () => {
    outlet.drain();
    if (!outlet.wasFull) return;
    // After the end, guix-daemon may read no more.
    for (const _ of whileReading(daemonProcess)) sleep(5);
  });
  return outlet;
}

/** Standard error; what else than a pipe it is, such as a terminal, may wait. */
function openMessages(): Outlet {
  let file = STANDARD_ERROR;
  try {
    if (fstatSync(file).isFIFO()) file = reopen(file);
  } catch {
    // It is closed, or another account's.
  }
  return drainAtExit(new Outlet(file));
}

/**
 * Makes a log on standard error, which the daemon shows to the client, or for
 * what else `write` does with its lines, where `paint` may colour them.
 */
export function makeLog(
  environment: Variables,
  write = (text: string): void => writeText(STANDARD_ERROR, text),
  paint: Screen["paint"] = (_, text) => text,
): Log {
  const line = (...parts: readonly (string | Styled)[]) => {
    const texts = parts.map((it) =>
      typeof it === "string"
        ? printable(it)
        : paint(it.style, printable(it.text))
    );
    write(`${texts.join("")}\n`);
  };
  const report = (kind: string, problem: unknown) => {
    line(`offload: ${kind}: ${reason(problem)}`);
    if (problem instanceof OffloadError && problem.hint !== undefined) {
      line(`hint: ${problem.hint}`);
    }
    if (environment.OFFLOAD_DEBUG && problem instanceof Error) {
      line(problem.stack ?? "");
    }
  };
  return {
    info: line,
    trace: line,
    warn: (problem) => report("warning", problem),
    error: (problem) => report("error", problem),
    debug: (text) => {
      if (environment.OFFLOAD_DEBUG) line(`offload: debug: ${text}`);
    },
  };
}

/** Writes the log of a build to an outlet. */
export function buildLogTo(outlet: Outlet): Context["buildLog"] {
  return async (text) => {
    outlet.write(text);
    const { problem: cause } = outlet;
    if (cause !== undefined) {
      const message = `failed to write the build log: ${reason(cause)}`;
      throw new LocalError(message, { cause });
    }
    while (outlet.isFull) await delay(10);
  };
}

/** Opens the log of the build, file descriptor 4. */
function openBuildLog(): Context["buildLog"] {
  let file = STANDARD_ERROR;
  try {
    file = reopen(4);
  } catch (error) {
    // It is run by hand, unless that is what Deno was not allowed.
    if ((error as Error).name === "NotCapable") throw error;
  }
  return buildLogTo(drainAtExit(new Outlet(file)));
}

/** What the daemon tells the hook when it starts it. */
export type HookArguments = Pick<Context, "system" | "buildOptions">;

/** Reads the daemon's four arguments; `undefined` where it is a command. */
export function parseHookArguments(
  args: readonly string[],
): HookArguments | undefined {
  const [system = ""] = args;
  const [, maxSilentTime = NaN, , buildTimeout = NaN] = args.map(Number);
  const isHook = args.length === 4 && /^[a-z]/.test(system) &&
    Number.isInteger(maxSilentTime) && Number.isInteger(buildTimeout);
  if (!isHook) return undefined;
  return { system, buildOptions: { maxSilentTime, buildTimeout } };
}

/** Evaluates a machine file once a change; a missing one lists no machines. */
function machineFileReader(file: string): () => MachineFile {
  let last: { content: Buffer; result: MachineFile } | undefined;
  return () => {
    let content;
    try {
      content = readFileSync(file);
    } catch (cause) {
      if ((cause as NodeJS.ErrnoException).code === "ENOENT") {
        return { file, machines: [], problems: [] };
      }
      const message = `failed to open machine file '${file}': ${reason(cause)}`;
      throw new OffloadError(message, { cause });
    }
    if (last?.content.equals(content)) return last.result;
    const result = evaluateMachineFile(content, file, userInfo().homedir);
    last = { content, result };
    return result;
  };
}

/** Where plugins and settings are. */
export function pluginDirectory(environment: Variables): string {
  return environment.OFFLOAD_PLUGINS ??
    `${configDirectory(environment)}/offload`;
}

/** Where Guix's configuration is: /etc/guix. */
export function configDirectory(environment: Variables): string {
  return environment.GUIX_CONFIGURATION_DIRECTORY ?? "/etc/guix";
}

/** Where Guix has what, as its own variables say. */
function placesOf(
  environment: Variables,
): Pick<
  Context,
  "configDirectory" | "stateDirectory" | "storeDirectory" | "daemonSocket"
> {
  const stateDirectory = environment.GUIX_STATE_DIRECTORY ?? "/var/guix";
  const socket = environment.GUIX_DAEMON_SOCKET ??
    `${stateDirectory}/daemon-socket/socket`;
  return {
    configDirectory: configDirectory(environment),
    stateDirectory,
    storeDirectory: environment.NIX_STORE ?? "/gnu/store",
    daemonSocket: socket.replace(/^unix:(\/\/)?/, ""),
  };
}

/** Makes what notes problems, and tells them. */
export function makeReport(log: Log): Pick<Context, "problems" | "report"> {
  const problems: Problem[] = [];
  const report = (problem: Problem) => {
    problems.push(problem);
    const { severity, message, hint, toldAs = severity } = problem;
    const error = new OffloadError(message, { hint });
    log[toldAs === "error" ? "error" : "warn"](error);
  };
  return { problems, report };
}

/** A log whose warnings are problems: a plugin that is gone may list machines. */
function reporting(log: Log, report: Context["report"]): Log {
  const warn = (problem: unknown) =>
    report({
      severity: "error",
      message: reason(problem),
      toldAs: "warning",
      code: "plugin",
    });
  return { ...log, warn };
}

/** Makes what is the same for all requests of a process. */
export async function makeContext(
  hook: HookArguments,
  environment: Variables,
  log: Log,
  signal: AbortSignal,
  machineFile?: string,
): Promise<Context> {
  const places = placesOf(environment);
  const { configDirectory, stateDirectory } = places;
  const plugins = pluginDirectory(environment);
  const settings = readSettings(plugins, environment);
  const machines = machineFile ?? `${configDirectory}/machines.scm`;
  const { problems, report } = makeReport(log);
  const loading = machineFile === undefined ? reporting(log, report) : log;
  return {
    ...hook,
    log,
    signal,
    settings,
    options: {}, // each plugin gets its own
    environment,
    ...places,
    buildLog: openBuildLog(),
    guix: environment.OFFLOAD_GUIX ?? "guix",
    asOwner,
    writable: writableDirectory,
    machineFile: machineFileReader(machines),
    machineFromFields,
    problems,
    report,
    plugins: await loadPlugins(plugins, settings, loading),
    observations: await openObservations(`${stateDirectory}/offload`, log),
  };
}

/** Refuses a runtime that is too old, on which things fail in odd ways. */
export function checkRuntime(): void {
  const problem = runtimeProblem();
  if (problem !== undefined) throw new OffloadError(problem);
}

/**
 * A log that tells what is wrong once, for the daemon asks again every few
 * seconds, until `isOver`.
 */
export function tellOnce(log: Log, isOver: () => boolean): Log {
  const told = new Set<string>();
  const once = (tell: (problem: unknown) => void) => (problem: unknown) => {
    const text = reason(problem);
    if (told.has(text) && !isOver()) return;
    told.add(text);
    tell(problem);
  };
  return { ...log, warn: once(log.warn), error: once(log.error) };
}

/**
 * Tells the shim, which hands requests over to `guix offload` where nobody
 * reads them, that they are read from now on; its end is ours.
 */
function tellShim({ OFFLOAD_SHIM }: Variables): void {
  const shim = process.ppid;
  if (OFFLOAD_SHIM !== String(shim)) return;
  process.kill(shim, "SIGUSR1");
  setInterval(() => {
    if (process.ppid !== shim) process.kill(process.pid, "SIGTERM");
  }, 1000).unref();
}

/** Serves the daemon's requests until one is built; returns by what it was. */
async function runHook(
  { system }: HookArguments,
  start: (log: Log) => Promise<Context>,
  everything: Log,
  messages: Outlet,
  signal: AbortSignal,
): Promise<Context | undefined> {
  const input = createInterface({ input: process.stdin, signal });
  const lines = input[Symbol.asyncIterator]();
  let answered: string | undefined;
  const log = tellOnce(everything, () => answered === "accept");
  const conversation: Conversation = {
    readLine: async () => {
      const { value } = await lines.next();
      signal.throwIfAborted(); // that ended the lines
      return value;
    },
    answer: (word) => {
      answered = word;
      messages.drain(); // they come first
      writeText(STANDARD_OUTPUT, `# ${word}\n`);
    },
  };
  let context: Context | undefined;
  const begin = async () => context ??= await start(log);
  const own = { system, log, signal };
  // One that the shim has read.
  let line = process.env.OFFLOAD_REQUEST ?? await conversation.readLine();
  delete process.env.OFFLOAD_REQUEST; // it is for nobody that we start
  while (line !== undefined) {
    if (await serveRequest(line, conversation, begin, own)) return context;
    line = await conversation.readLine();
  }
  return undefined;
}

/** Ends the work, and with it what it holds, when a signal comes. */
export function abortOnSignals(): AbortSignal {
  const controller = new AbortController();
  for (const name of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(name, () => {
      controller.abort(new OffloadError(`interrupted by ${name}`));
    });
  }
  return controller.signal;
}

/** Runs the hook that guix-daemon has started; returns its exit code. */
async function serveDaemon(
  hook: HookArguments,
  environment: Variables,
): Promise<number> {
  const messages = openMessages();
  const log = makeLog(environment, (text) => {
    if (!messages.isFull) messages.write(Buffer.from(text));
  });
  try {
    checkRuntime();
    const signal = abortOnSignals();
    // What a plugin prints, or throws out of turn, must not answer the daemon,
    // which listens to both outputs, or end the build.
    const print = (...values: unknown[]) =>
      log.info(`plugin: ${format(...values)}`);
    const methods = ["debug", "dir", "error", "info", "log"] as const;
    for (const name of [...methods, "table", "trace", "warn"] as const) {
      console[name] = print;
    }
    process.on("unhandledRejection", (error) => log.warn(error));
    process.on("uncaughtException", (error) => log.warn(error));
    const start = (log: Log) => makeContext(hook, environment, log, signal);
    tellShim(environment);
    const built = await runHook(hook, start, log, messages, signal);
    if (built?.settings.resident) await startResident(built);
    return 0;
  } catch (error) {
    log.error(error);
    return exitCodeOf(error);
  }
}

/** Starts the process that stays and serves the next hooks. */
async function startResident(context: Context): Promise<void> {
  type Module = { start(context: Context): void };
  await useAside<Module>("_resident_start", context, (it) => it.start(context));
}

/** What the program exits with because of an error. */
export function exitCodeOf(error: unknown): number {
  return error instanceof OffloadError ? error.exitCode : EXIT.transient;
}

/** What main() calls of the commands. */
interface Commands {
  serve(args: readonly string[], environment: Variables): Promise<number>;
}

/** Runs the program and returns its exit code. */
async function main(args: readonly string[]): Promise<number> {
  const { env } = process;
  const hook = parseHookArguments(args);
  if (hook !== undefined) return await serveDaemon(hook, env);
  try {
    const what = `there are no commands here, such as '${args[0] ?? "help"}'`;
    const commands = await demandFromPlugins<Commands>("_commands", what);
    return await commands.serve(args, env);
  } catch (error) {
    makeLog(env).error(error);
    return EXIT.usage;
  }
}

if (isProgram(import.meta)) {
  // Should nothing be left to wait for, that is no success.
  process.exitCode = EXIT.transient;
  main(process.argv.slice(2)).then((code) => process.exit(code));
}

/**
 * Keeps what Guile said of machine files, with the state of all that it depends
 * on: as long as nothing of that changes, nobody waits for Guile. Where that is
 * not all that it may depend on, it is kept for seconds only.
 *
 * @module
 */

import { existsSync, readFileSync, realpathSync, statSync } from "node:fs";
import { hostname, userInfo } from "node:os";
import { delimiter, dirname, join } from "node:path";
import type { PluginContext } from "../mod.ts";
import { evaluate } from "./_guile.ts";
import type { Outcome } from "./_guile.ts";
import { digest, ownDirectory, writePrivately } from "./_programs.ts";

/** For how many milliseconds it is left at that when Guile took too long. */
const PATIENCE = 600_000;

/** For how many milliseconds an outcome is used that may change by itself. */
const FRESHNESS = 5000;

/** By how much, in milliseconds, a file may seem to have changed too early. */
const CLOCK_STEP = 20;

/** What a module or a default is looked up with, besides. */
const VARIABLES = ["GUILE_LOAD_PATH", "GUILE_LOAD_COMPILED_PATH"];

/** Of how many machine files the outcome is kept. */
const MAXIMUM_ENTRIES = 16;

/** An outcome and what it was made from. */
interface Entry {
  readonly inputs: readonly (readonly [kind: string, name: string])[];
  readonly digests: readonly string[];
  readonly outcome: Outcome;
  /** Until when it may be used, in milliseconds since 1970; if unset, for ever. */
  readonly until?: number;
}

/** Finds a program the way a shell does. */
function findProgram(context: PluginContext): string {
  if (context.guix.includes("/")) return context.guix;
  const directories = (context.environment.PATH ?? "").split(delimiter);
  const files = directories.map((directory) => join(directory, context.guix));
  return files.find((file) => existsSync(file)) ?? context.guix;
}

/** What tells whether a file that is too large to read often has changed. */
function stamp(file: string): string {
  const { dev, ino, size, mtimeNs, ctimeNs } = statSync(file, {
    bigint: true,
  });
  return [realpathSync(file), dev, ino, size, mtimeNs, ctimeNs].join(" ");
}

/** What tells whether a file has changed, which is none without an end. */
function contentOf(file: string): string {
  return statSync(file).isFile() ? digest(readFileSync(file)) : "no file";
}

/** Whether a file is other than it was at a time, or may soon be. */
function changedSince(file: string, time: number): boolean {
  try {
    const stat = statSync(file, { throwIfNoEntry: false });
    const isPlain = stat?.isFile() !== false || stat.isDirectory();
    return !isPlain || /^\/(proc|sys)\//.test(file) ||
      // Not every runtime has both.
      Math.max(stat?.mtimeMs ?? 0, stat?.ctimeMs ?? 0) >= time - CLOCK_STEP;
  } catch {
    return true;
  }
}

/** The state of something that an evaluation depends on. */
function stateOf(context: PluginContext, kind: string, name: string): string {
  try {
    if (kind === "file") return contentOf(name);
    if (kind === "module") return stamp(name);
    if (kind === "guix") return stamp(findProgram(context));
  } catch (error) {
    return (error as NodeJS.ErrnoException).code ?? "unreadable";
  }
  if (kind === "host") return digest(hostname());
  if (kind === "home") return digest(userInfo().homedir);
  if (kind === "time") return String(Math.floor(Date.now() / PATIENCE));
  const value = context.environment[name];
  return value === undefined ? "unset" : digest(value);
}

/** Where outcomes are kept. */
function cacheFile(context: PluginContext): string {
  return join(ownDirectory(context), "guile-machines.json");
}

/** Reads the outcomes that are kept, by machine file. */
function readEntries(context: PluginContext): Record<string, Entry> {
  try {
    const { version, entries } = JSON.parse(
      readFileSync(cacheFile(context), "utf8"),
    );
    return version === 2 ? entries : {};
  } catch {
    return {};
  }
}

/** Keeps an outcome; where that is not possible, work goes on without. */
function writeEntry(context: PluginContext, file: string, entry: Entry): void {
  const others = Object.entries(readEntries(context)).filter(([name]) =>
    name !== file
  );
  const kept = [...others, [file, entry]].slice(-MAXIMUM_ENTRIES);
  const entries = Object.fromEntries(kept);
  try {
    writePrivately(cacheFile(context), JSON.stringify({ version: 2, entries }));
  } catch (error) {
    const reason = (error as Error).message;
    context.log.debug(`failed to keep what Guile said of '${file}': ${reason}`);
  }
}

/** Lists what an outcome depends on. */
function inputsOf(file: string, outcome: Outcome): Entry["inputs"] {
  return [
    ["guix", ""],
    ["home", ""],
    ["file", file],
    ...outcome.files.map((name) => ["file", name] as const),
    ...outcome.modules.map((name) => ["module", name] as const),
    ...[...VARIABLES, ...outcome.variables].map((name) =>
      ["variable", name] as const
    ),
    ...(outcome.host ? [["host", ""] as const] : []),
    ...(outcome.isLate ? [["time", ""] as const] : []),
  ];
}

/** The outcome that is kept for a file, if nothing it depends on changed. */
function keptOutcome(
  context: PluginContext,
  file: string,
): Outcome | undefined {
  const entry = readEntries(context)[file];
  // Further off than it can be, it is of before the clock was set back.
  const left = (entry?.until ?? Infinity) - Date.now();
  if (left <= 0 || (left > 4 * FRESHNESS && left < Infinity)) return undefined;
  const same = entry?.inputs.every(([kind, name], i) =>
    stateOf(context, kind, name) === entry.digests[i]
  );
  return same ? entry?.outcome : undefined;
}

/** Whether an outcome may change, or has, although nothing known does. */
function isVolatile(file: string, outcome: Outcome, start: number): boolean {
  const files = [file, ...outcome.files, ...outcome.modules];
  // What was removed meanwhile shows at its directory.
  return outcome.volatile ||
    files.some((name) =>
      changedSince(name, start) || changedSince(dirname(name), start)
    );
}

/** Evaluates a file, or takes what came out the last time. */
export async function outcomeOf(
  context: PluginContext,
  file: string,
): Promise<Outcome> {
  const kept = keptOutcome(context, file);
  if (kept) return kept;
  const start = Date.now();
  const before = stateOf(context, "file", file);
  const outcome = await evaluate(context, file);
  // A file that changed under Guile's eyes is for the next time.
  if (stateOf(context, "file", file) !== before) return outcome;
  const inputs = inputsOf(file, outcome);
  const digests = inputs.map(([kind, name]) => stateOf(context, kind, name));
  const entry = { inputs, digests, outcome };
  // What takes long is not done more than half of the time.
  const until = Math.max(start + FRESHNESS, 2 * Date.now() - start);
  writeEntry(
    context,
    file,
    isVolatile(file, outcome, start) ? { ...entry, until } : entry,
  );
  return outcome;
}

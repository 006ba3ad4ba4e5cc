/**
 * Keeps what Guile said of machine files, with the state of all that it depends
 * on: as long as nothing of that changes, nobody waits for Guile. It is no
 * plugin.
 *
 * @module
 */

import { existsSync, readFileSync, realpathSync, statSync } from "node:fs";
import { hostname } from "node:os";
import { delimiter, join } from "node:path";
import type { PluginContext } from "../mod.ts";
import { evaluate } from "./guile.ts";
import type { Outcome } from "./guile.ts";
import { digest, sharedDirectory, writePrivately } from "./programs.ts";

/** For how many milliseconds it is left at that when Guile took too long. */
const PATIENCE = 600_000;

/** Of how many machine files the outcome is kept. */
const MAXIMUM_ENTRIES = 16;

/** An outcome and what it was made from. */
interface Entry {
  readonly inputs: readonly (readonly [kind: string, name: string])[];
  readonly digests: readonly string[];
  readonly outcome: Outcome;
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

/** The state of something that an evaluation depends on. */
function stateOf(context: PluginContext, kind: string, name: string): string {
  try {
    if (kind === "file") return digest(readFileSync(name));
    if (kind === "module") return stamp(name);
    if (kind === "guix") return stamp(findProgram(context));
  } catch (error) {
    return (error as NodeJS.ErrnoException).code ?? "unreadable";
  }
  if (kind === "host") return digest(hostname());
  if (kind === "time") return String(Math.floor(Date.now() / PATIENCE));
  const value = context.environment[name];
  return value === undefined ? "unset" : digest(value);
}

/** Where outcomes are kept. */
function cacheFile(context: PluginContext): string {
  return join(context.stateDirectory, "offload", "guile-machines.json");
}

/** Reads the outcomes that are kept, by machine file. */
function readEntries(context: PluginContext): Record<string, Entry> {
  try {
    const { version, entries } = JSON.parse(
      readFileSync(cacheFile(context), "utf8"),
    );
    return version === 1 ? entries : {};
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
    sharedDirectory(context);
    writePrivately(cacheFile(context), JSON.stringify({ version: 1, entries }));
  } catch (error) {
    const reason = (error as Error).message;
    context.log.debug(`failed to keep what Guile said of '${file}': ${reason}`);
  }
}

/** Lists what an outcome depends on. */
function inputsOf(file: string, outcome: Outcome): Entry["inputs"] {
  return [
    ["guix", ""],
    ["file", file],
    ...outcome.files.map((name) => ["file", name] as const),
    ...outcome.modules.map((name) => ["module", name] as const),
    ...outcome.variables.map((name) => ["variable", name] as const),
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
  const same = entry?.inputs.every(([kind, name], i) =>
    stateOf(context, kind, name) === entry.digests[i]
  );
  return same ? entry?.outcome : undefined;
}

/** Evaluates a file, or takes what came out the last time. */
export async function outcomeOf(
  context: PluginContext,
  file: string,
): Promise<Outcome> {
  const kept = keptOutcome(context, file);
  if (kept) return kept;
  const before = stateOf(context, "file", file);
  const outcome = await evaluate(context, file);
  // A file that changed under Guile's eyes is for the next time.
  if (outcome.volatile || stateOf(context, "file", file) !== before) {
    return outcome;
  }
  const inputs = inputsOf(file, outcome);
  const digests = inputs.map(([kind, name]) => stateOf(context, kind, name));
  writeEntry(context, file, { inputs, digests, outcome });
  return outcome;
}

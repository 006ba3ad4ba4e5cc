// Holds what we make of the machine files in corpus/ against what the real Guix
// makes of them: as it was recorded in corpus/expected.json, and, in the lab,
// as it is now.

import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import {
  evaluateMachineFile,
  type MachineFile,
  machineFromFields,
  machineToJson,
  type Problem,
} from "../mod.ts";
import { makeContext } from "./context.ts";
import plugin from "../plugins/guile_machines.ts";

/** What the real Guix says of a machine file. */
export interface Expected {
  /** The machines, or `false` where it ends with an error. */
  readonly machines: Record<string, unknown>[] | false;
  /** What it prints. */
  readonly log: string;
  /** What evaluation throws. */
  readonly exception:
    | { readonly key: string; readonly message: string }
    | false;
}

/** What we say of a machine file. */
export interface Found {
  readonly machines: Record<string, unknown>[];
  readonly problems: readonly Problem[];
  /** The error, if the file can't be evaluated. */
  readonly error?: string | undefined;
  /** Why Guile has to evaluate it, if it has to and has not. */
  readonly needsGuile?: string | undefined;
}

const here = dirname(fileURLToPath(import.meta.url));

/** Where the machine files are. */
export const corpus = join(here, "corpus");

/** Where they are in the lab, and in what they name. */
export const corpusInLab = "/etc/offload-corpus";

/** The names of the machine files. */
export function corpusNames(): string[] {
  return readdirSync(corpus).filter((file) => file.endsWith(".scm")).map((
    file,
  ) => file.slice(0, -4)).sort();
}

/** What was recorded of the real Guix. */
export function recorded(): Record<string, Expected> {
  return JSON.parse(readFileSync(join(corpus, "expected.json"), "utf8"));
}

/** Home of root, on the lab's host 'head'. */
export const HOME = "/root";

/** Evaluates a machine file of the corpus without Guile. */
export function find(name: string): Found {
  const text = readFileSync(join(corpus, `${name}.scm`));
  const file = `${corpusInLab}/${name}.scm`;
  try {
    const found = evaluateMachineFile(text, file, HOME);
    return { ...found, machines: found.machines.map(machineToJson) };
  } catch (error) {
    return { machines: [], problems: [], error: (error as Error).message };
  }
}

/** Tells how a machine differs from what the real Guix says of it. */
function differencesOfMachine(
  expected: Record<string, unknown>,
  found: Record<string, unknown> | undefined,
): string[] {
  return Object.entries(expected).flatMap(([field, value]) => {
    const [a, b] = [JSON.stringify(value), JSON.stringify(found?.[field])];
    return a === b ? [] : [`${field} is ${b}, not ${a}`];
  });
}

/** Tells how machines differ; those with a bad field are to be left out. */
function differencesOfMachines(
  expected: Record<string, unknown>[],
  found: Found,
): string[] {
  const machines = expected.map((fields) => machineFromFields(fields, ""));
  const rejected = machines.filter((machine) => "severity" in machine);
  // What the reference works with may be taken for another value.
  const good = machines.flatMap((machine) =>
    "severity" in machine ? [] : [machineToJson(machine)]
  );
  const reported = found.problems.filter(({ severity }) =>
    severity === "error"
  );
  const differences = good.flatMap((fields, i) =>
    differencesOfMachine(fields, found.machines[i])
  );
  if (good.length !== found.machines.length) {
    differences.push(`${found.machines.length} machines, not ${good.length}`);
  }
  if (rejected.length !== reported.length) {
    differences.push(`${reported.length} rejected, not ${rejected.length}`);
  }
  return differences;
}

/** Tells how an error differs from what the real Guix throws. */
function differencesOfError(
  { key, message }: { key: string; message: string },
  error: string | undefined,
): string[] {
  if (error === undefined) return [`no error, but ${message}`];
  const place = /^\/[^:]*:\d+:\d+: /.exec(error)?.[0] ?? "";
  const same = key === "read-error" || key === "syntax-error"
    ? error === message || (message.startsWith("<unknown") && place !== "")
    : key === "system-error"
    ? error.includes("failed to open '")
    : key === "quit" ||
      error.slice(place.length).endsWith(message) && place !== "" ||
      // Guile prints what it can't know the name of.
      message.includes("#<");
  return same ? [] : [`error: ${error}, not ${message}`];
}

/** Tells how warnings differ. */
function differencesOfWarnings(expected: Expected, found: Found): string[] {
  const ours = found.problems.filter(({ severity }) => severity === "warning");
  const theirs = [...expected.log.matchAll(/^(\/.*?): warning: (The .*)$/gm)]
    .map(([, place, message]) => `${place}: ${message}`);
  // The reference takes a machine that names no system for one with 'system';
  // to us it is an error.
  const none = (expected.machines || []).filter(({ systems }) =>
    JSON.stringify(systems) === "[false]"
  );
  const same = ours.every(({ message }) => theirs.includes(message)) &&
    ours.length + none.length === theirs.length;
  if (same) return [];
  const list = ours.map(({ message }) => message).join("; ");
  return [`warnings: ${list}, not ${theirs.join("; ")}`];
}

/** Tells how what we say of a file differs from what the real Guix says. */
export function differences(expected: Expected, found: Found): string[] {
  if (found.needsGuile !== undefined) {
    const place = /^\/[^:]*:\d+:\d+: /.test(found.needsGuile);
    return place ? [] : [`needsGuile without place: ${found.needsGuile}`];
  }
  if (expected.exception) {
    const error = found.error ??
      found.problems.find(({ severity }) => severity === "error")?.message;
    return differencesOfError(expected.exception, error);
  }
  if (found.error !== undefined) return [`error: ${found.error}`];
  if (
    / did not return a list of build machines; ignoring it/.test(expected.log)
  ) {
    const [problem] = found.problems;
    const same = expected.log.includes(problem?.message ?? "none") &&
      found.machines.length === 0 && problem?.severity === "error";
    return same ? [] : [`${problem?.message}, not ${expected.log}`];
  }
  return [
    ...differencesOfMachines(expected.machines || [], found),
    ...differencesOfWarnings(expected, found),
  ];
}

/** Evaluates a file as on a real host, with Guile where it is needed. */
async function findWithGuile(file: string): Promise<Found> {
  const problems: Problem[] = [];
  try {
    const inline: MachineFile = evaluateMachineFile(
      readFileSync(file),
      file,
      process.env.HOME,
    );
    problems.push(...inline.problems);
    const { context } = makeContext({
      machineFile: () => inline,
      report: (problem) => problems.push(problem),
      environment: process.env,
    });
    const machines = await plugin.machines?.(context) ?? [];
    return {
      machines: [...inline.machines, ...machines].map(machineToJson),
      problems,
    };
  } catch (error) {
    return { machines: [], problems, error: (error as Error).message };
  }
}

/** Prints, in the lab, what we say of the files that are named. */
async function printFindings(files: string[]): Promise<void> {
  const found: Record<string, Found> = {};
  for (const file of files) {
    found[file.replace(/^.*\/|\.scm$/g, "")] = await findWithGuile(file);
  }
  console.log(JSON.stringify(found));
}

/**
 * Runs the real Guix and us, Guile included, on the corpus in the lab and gives
 * the differences between the two and from what was recorded. RUN is the
 * command that runs this file on the lab's host 'head'.
 */
export function conformInLab(lab: string, run: readonly string[]): string[] {
  const options = { encoding: "utf8", maxBuffer: 1 << 26 } as const;
  const now: Record<string, Expected> = JSON.parse(execFileSync(
    join(corpus, "generate"),
    { ...options, env: { ...process.env, LAB: lab } },
  ));
  const before = recorded();
  const files = corpusNames().map((name) => `${corpusInLab}/${name}.scm`);
  const environment = ["env", "OFFLOAD_CORPUS=set", "LANG=C.UTF-8"];
  const found: Record<string, Found> = JSON.parse(execFileSync(
    lab,
    ["in", "head", ...environment, ...run, ...files],
    options,
  ));
  return corpusNames().flatMap((name) => {
    const [expected, ours] = [now[name], found[name]];
    if (!expected || !ours) return [`${name}: no result`];
    const changed = JSON.stringify(expected) !== JSON.stringify(before[name]);
    return [
      ...(changed ? ["the recording is out of date"] : []),
      ...differences(expected, ours),
    ].map((difference) => `${name}: ${difference}`);
  });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await printFindings(process.argv.slice(2));
}

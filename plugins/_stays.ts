/**
 * Builds that stay here, which guix-daemon does itself. No hook is told when one
 * ends; but for as long as it runs, guix-daemon holds the locks of its outputs.
 *
 * @module
 */

import {
  existsSync,
  lstatSync,
  readFileSync,
  renameSync,
  writeFileSync,
} from "node:fs";
import { setTimeout as delay } from "node:timers/promises";
import { asOwner, isLocked, lockFile, makeStateDirectory } from "../mod.ts";
import type { PluginContext, Slot } from "../mod.ts";
import { adjustQuickness } from "./_expectation.ts";
import { outputsOf } from "./_local_store.ts";
import { checkAll } from "./_records.ts";

/** A build that was left here. */
export interface Stay {
  /** File name of the derivation. */
  readonly derivation: string;
  /** When guix-daemon was told, in milliseconds since 1970. */
  readonly since: number;
  /** How long it should take, in seconds, were this machine as quick as told. */
  readonly expected: number;
}

/** What is noted of builds here. */
export interface Stays {
  /** Those that were not seen to end. */
  readonly builds: readonly Stay[];
  /** How quick this machine was seen to be: a multiple of what is told. */
  readonly quickness: number;
}

/** What the hooks of all clients keep. */
type Place = Pick<PluginContext, "stateDirectory">;

/** How often, and how many ms apart, it is tried to have the notes alone. */
const TRIES = { most: 20, pause: 10 } as const;

const STAYS_TYPES = { builds: "object", quickness: "number" } as const;

const STAY_TYPES = {
  derivation: "string",
  since: "time",
  expected: "number",
} as const;

function directoryOf({ stateDirectory }: Place): string {
  return `${stateDirectory}/offload/here`;
}

/** What is noted; where nothing is, or none of it makes sense, nothing. */
function readNotes(directory: string): Stays {
  try {
    const text = asOwner(
      directory,
      () => readFileSync(`${directory}/builds.json`, "utf8"),
    );
    const notes = checkAll<Stays>(Object(JSON.parse(text)), STAYS_TYPES);
    const builds = [...notes.builds]
      .map((it) => checkAll<Stay>(Object(it), STAY_TYPES));
    return { builds, quickness: notes.quickness };
  } catch {
    return { builds: [], quickness: 1 };
  }
}

/** Writes that down so that who reads it sees all or nothing of that. */
function writeNotes(directory: string, notes: Stays): void {
  const file = `${directory}/builds.json`;
  writeFileSync(`${file}.new`, JSON.stringify(notes));
  renameSync(`${file}.new`, file);
}

/** The outputs of a derivation; none where it is gone. */
function knownOutputs({ derivation }: Stay): string[] {
  try {
    return outputsOf(derivation);
  } catch {
    return [];
  }
}

function isRunning(stay: Stay): boolean {
  return knownOutputs(stay).some((output) => isLocked(`${output}.lock`));
}

/**
 * For how many seconds a build ran here that did well, as far as can be told:
 * guix-daemon has last touched an output that is a directory at its end. Of one
 * that failed there may be some as well, but it leaves the files of its locks.
 */
function tookOf(stay: Stay): number | undefined {
  const [output] = knownOutputs(stay);
  if (output === undefined || existsSync(`${output}.lock`)) return undefined;
  const stat = lstatSync(output, { throwIfNoEntry: false });
  // A file's time changes whenever another one like it comes.
  if (!stat?.isDirectory()) return undefined;
  return (stat.ctimeMs - stay.since) / 1000;
}

/** How quick this machine is, now that a build has ended, if it did well. */
function learnFrom(stay: Stay, before: number): number {
  const took = tookOf(stay);
  if (took === undefined) return before;
  return adjustQuickness(before, stay.expected / took, took);
}

/** How quick this machine was seen to be: a multiple of what is told. */
export function quicknessHere(context: Place): number {
  return readNotes(directoryOf(context)).quickness;
}

/** Builds that stay here and run, and how quick this machine was seen to be. */
export function staysHere(context: Place): Stays {
  const notes = readNotes(directoryOf(context));
  return { ...notes, builds: notes.builds.filter(isRunning) };
}

/** What is noted once it was seen which builds have ended. */
function withoutEnded(notes: Stays, asked: string): Stays {
  let { quickness } = notes;
  const builds = notes.builds.filter((stay) => {
    // Who asks for one again holds its locks himself.
    const runs = stay.derivation !== asked && isRunning(stay);
    if (!runs) quickness = learnFrom(stay, quickness);
    return runs;
  });
  return { builds, quickness };
}

async function lockNotes(directory: string): Promise<Slot | undefined> {
  asOwner(directory, () => makeStateDirectory(directory));
  for (let tries = 0; tries < TRIES.most; tries++) {
    const lock = lockFile(`${directory}/lock`);
    if (lock !== undefined) return lock;
    await delay(TRIES.pause);
  }
  return undefined;
}

/**
 * Notes that a build stays here, unless as many do already as may; returns
 * whether it does. Without `expected`, notes that it does not.
 */
export async function noteStay(
  derivation: string,
  expected: number | undefined,
  most: number,
  context: Place,
): Promise<boolean> {
  const directory = directoryOf(context);
  const { builds } = readNotes(directory);
  const isNoted = builds.some((it) => it.derivation === derivation);
  if (expected === undefined && !isNoted) return false;
  const lock = await lockNotes(directory);
  if (lock === undefined) return false;
  try {
    const notes = withoutEnded(readNotes(directory), derivation);
    const stays = expected !== undefined && notes.builds.length < most;
    const own = stays ? [{ derivation, since: Date.now(), expected }] : [];
    const now = { ...notes, builds: [...notes.builds, ...own] };
    asOwner(directory, () => writeNotes(directory, now));
    return stays;
  } finally {
    lock.release();
  }
}

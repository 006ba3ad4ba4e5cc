/**
 * Removes what hooks that were killed have left in the store.
 *
 * @module
 */

import { setTimeout as delay } from "node:timers/promises";
import {
  inodeOf,
  lockFile,
  reason,
  remind,
  removeFile,
  temporaryName,
} from "../mod.ts";
import type { Context, Log, Slot, UsedSlot } from "../mod.ts";
import { outputsOf } from "./_local_store.ts";

/** What it takes to see to what was left. */
type Leaving = Pick<Context, "observations" | "log" | "signal" | "settings">;

/** Removes what the hook of a derivation left in the store. */
function removeLeftovers(derivation: string, log: Log): void {
  try {
    for (const output of outputsOf(derivation)) {
      removeFile(temporaryName(output));
    }
  } catch (error) { // where it is gone, so are they
    log.debug(`leftovers of '${derivation}': ${reason(error)}`);
  }
}

/**
 * Removes what a hook left that was killed; returns whether it was. Who holds
 * the lock of the slot knows, for as long as that is held.
 */
function clearSlot(
  use: UsedSlot,
  mine: Slot,
  { observations, log, settings }: Leaving,
): boolean {
  const { file, derivation, inode } = use;
  if (inodeOf(file) !== inode) {
    // Nobody can tell whether it is dead: the garbage collector will.
    observations.releaseSlot(file, derivation);
    return true;
  }
  const lock = file === mine.file ? mine : lockFile(file);
  if (lock === undefined) return false;
  try {
    // Another hook may have had the slot since that was read, or the build, if
    // the end of this one could not be noted.
    const uses = observations.slots()
      .filter((it) => it.derivation === derivation);
    if (!uses.some((it) => it.file === file)) return true;
    if (uses.length === 1) {
      removeLeftovers(derivation, log);
      observations.journal?.saveKilled(use, settings);
    }
    observations.releaseSlot(file, derivation);
    return true;
  } finally {
    if (lock !== mine) lock.release();
  }
}

/**
 * Removes what killed hooks left in the store, before `mine` is used for a
 * derivation. One that has a hook still, which is ending or being cleared, is
 * waited for, but not for ever.
 */
export default async function clearLeftovers(
  mine: Slot,
  derivation: string,
  context: Leaving,
): Promise<void> {
  const { observations, log, signal, settings } = context;
  const end = performance.now() + settings.connectTimeout * 1000;
  for (const slot of observations.slots()) {
    try {
      if (clearSlot(slot, mine, context)) continue;
      if (slot.derivation !== derivation) continue;
      await remind("waiting for another hook of this build", log, async () => {
        while (!clearSlot(slot, mine, context) && performance.now() < end) {
          await delay(20);
          signal.throwIfAborted();
        }
      });
    } catch (error) { // its file is gone, say
      signal.throwIfAborted();
      log.debug(`leftovers in '${slot.file}': ${reason(error)}`);
    }
  }
}

/**
 * Has plugins told of a build that is over by a process of its own: that of the
 * build ends with it.
 *
 * @module
 */

import type { Context, JournalEntry } from "../mod.ts";
import { spawnApart } from "./_resident_start.ts";

/** The variable that hands a build over. */
export const ENDED = "OFFLOAD_ENDED";

/** Starts what tells them, where the shim can be started once more. */
export function tellApart(
  build: JournalEntry,
  { environment, stateDirectory }: Context,
): void {
  if (environment.OFFLOAD_SELF === undefined) return;
  const log = `${stateDirectory}/offload/ended.log`;
  const own = { ...environment, [ENDED]: JSON.stringify(build) };
  spawnApart(["ended"], log, own);
}

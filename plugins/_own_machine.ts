/**
 * Finds out whether a build machine is this one, as where a farm shares a
 * machine file: a store of which that is not known yet is looked at, and only
 * what looks like ours is asked for an item that was made for that.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { randomUUID } from "node:crypto";
import { basename } from "node:path";
import {
  addCall,
  addTextRequest,
  HASH_PART_LENGTH,
  openLocalDaemon,
  operateAll,
  queryPathInfos,
  queryValidPaths,
  reason,
  THIS_MACHINE,
  within,
} from "../mod.ts";
import type {
  Context,
  isThisMachine,
  Machine,
  StoreConnection,
} from "../mod.ts";

/** When a store got an item. */
async function registeredIn(
  store: StoreConnection,
  path: string,
): Promise<number | undefined> {
  return (await queryPathInfos(store, [path])).get(path)?.registered;
}

/** When ours did, if that can be told. */
async function registeredHere(
  path: string,
  context: Context,
): Promise<number | undefined> {
  let local: StoreConnection | undefined;
  try {
    local = await openLocalDaemon(context);
    return await registeredIn(local, path);
  } catch (error) { // that is nobody else's fault
    context.log.debug(`'${path}': ${reason(error)}`);
    return undefined;
  } finally {
    local?.stream.destroy();
  }
}

/** Whether a store has got an item of ours at the very time we did. */
async function hasSince(
  remote: StoreConnection,
  path: string,
  context: Context,
): Promise<boolean> {
  const [valid] = await queryValidPaths(remote, [path]);
  const ours = valid === path ? await registeredHere(path, context) : undefined;
  return ours !== undefined && ours === await registeredIn(remote, path);
}

/** Adds a text to the store and returns its path. */
export async function addTextToStore(
  store: StoreConnection,
  name: string,
  text: Uint8Array,
  references: readonly string[],
): Promise<string> {
  let added = "";
  const request = addTextRequest(name, text, references);
  await operateAll(store, [addCall(request, (path) => added = path)]);
  return added;
}

/** Makes a store item here that no other store has. */
async function makeToken(context: Context): Promise<string> {
  const local = await openLocalDaemon(context);
  try {
    const text = Buffer.from(randomUUID());
    return await addTextToStore(local, "offload-identity", text, []);
  } finally {
    local.stream.destroy();
  }
}

/** Whether a store holds an item, and not just any other as well. */
async function holdsItem(
  store: StoreConnection,
  path: string,
): Promise<boolean> {
  const hash = basename(path).slice(0, HASH_PART_LENGTH);
  const other = path.replace(hash, [...hash].reverse().join(""));
  const valid = await queryValidPaths(store, [path, other]);
  return valid.includes(path) && !valid.includes(other);
}

/**
 * Whether a store is ours, whatever way leads there. Of another one a look at
 * `path`, an item of ours, mostly shows it; only what looks like ours is asked
 * for an item that was made for that.
 */
export async function isOurStore(
  remote: StoreConnection,
  path: string,
  context: Context,
): Promise<boolean> {
  return await hasSince(remote, path, context) &&
    await holdsItem(remote, await makeToken(context));
}

/** Finds out whether a guix-daemon is that of this machine, and notes it. */
async function findOut(
  machine: Machine,
  remote: StoreConnection,
  path: string,
  context: Context,
): Promise<boolean> {
  const { log, observations, settings } = context;
  const isThis = await within(
    settings.connectTimeout,
    isOurStore(remote, path, context),
    `guix-daemon on '${machine.name}' or here: no answer`,
  );
  observations.saveIdentity(machine, isThis);
  if (isThis) log.info(`leaving out '${machine.name}': ${THIS_MACHINE.why}`);
  return isThis;
}

export default findOut satisfies typeof isThisMachine;

/**
 * The operations of a guix-daemon that only the quick transport asks for.
 *
 * @module
 */

import {
  buildCall,
  encode,
  operateAll,
  OPERATION,
  readExport,
  writeMessage,
} from "../mod.ts";
import type { ByteReader, StoreConnection } from "../mod.ts";

/** Protects items from garbage collection while the connection is open. */
export async function addTempRoots(
  store: StoreConnection,
  paths: Iterable<string>,
): Promise<void> {
  const calls = function* () {
    for (const path of paths) {
      const request = encode(OPERATION.addTempRoot, path);
      yield { request, result: (reader: ByteReader) => reader.number() };
    }
  };
  await operateAll(store, calls());
}

/** The request that adds a nar, or the file that it is, to the store. */
export function addNarRequest(
  name: string,
  recursive: boolean,
  nar: Buffer,
): Buffer {
  const request = [OPERATION.addToStore, name, true, recursive, "sha256"];
  return Buffer.concat([encode(...request), nar]);
}

/** Returns those of `paths` that the substitute servers of the store have. */
export async function querySubstitutablePaths(
  store: StoreConnection,
  paths: readonly string[],
): Promise<string[]> {
  let found: string[] = [];
  const request = encode(OPERATION.querySubstitutablePaths, paths);
  const result = async (reader: ByteReader) => {
    found = await reader.strings();
  };
  await operateAll(store, [{ request, result }]);
  return found;
}

/**
 * Builds derivations and substitutes other items, handing each piece of the
 * log to `log` as it comes.
 *
 * @throws {DaemonError} with status 100 where a build failed.
 */
export async function buildThings(
  store: StoreConnection,
  things: readonly string[],
  log: (text: Buffer) => void,
): Promise<void> {
  await operateAll(store, [buildCall(things)], { log });
}

/** Exports an item: nar, metadata and, where a daemon is to sign, signature. */
export async function* exportPath(
  store: StoreConnection,
  path: string,
  sign = true,
): AsyncGenerator<Buffer, void> {
  const request = encode(OPERATION.exportPath, path, sign);
  await writeMessage(store, [{ request }]);
  yield* readExport(store, path);
}

/**
 * What plugins ask of the store here.
 *
 * @module
 */

import { readFileSync } from "node:fs";
import {
  closeLocalDaemon,
  encode,
  openLocalDaemon,
  operateAll,
} from "../mod.ts";
import type { ByteReader, Context, StoreConnection } from "../mod.ts";

/** The outputs of a derivation, by its file; fails where that is gone. */
export function outputsOf(derivation: string): string[] {
  // It begins with its outputs: (NAME,PATH,...) each (guix/derivations.scm).
  const [outputs = ""] = readFileSync(derivation, "utf8").split("]", 1);
  return [...outputs.matchAll(/\("[^"]*","([^"]+)"/g)].map(([, path]) => path!);
}

/** Uses a connection to the daemon here, and leaves it to others. */
export async function withLocalDaemon<T>(
  context: Context,
  use: (store: StoreConnection) => Promise<T>,
): Promise<T> {
  const store = await openLocalDaemon(context);
  let isClean = false;
  try {
    const result = await use(store);
    isClean = true;
    return result;
  } finally {
    closeLocalDaemon(store, context, isClean);
  }
}

/** Asks for a list for each path, all at once. */
export async function queryLists(
  store: StoreConnection,
  operation: number,
  paths: readonly string[],
): Promise<string[][]> {
  const lists: string[][] = [];
  await operateAll(
    store,
    paths.map((path, index) => ({
      request: encode(operation, path),
      result: async (reader: ByteReader) => {
        lists[index] = await reader.strings();
      },
    })),
  );
  return lists;
}

/**
 * Tells scores what a build needs, where one asks for it.
 *
 * @module
 */

import {
  encode,
  openLocalDaemon,
  operateAll,
  OPERATION,
  queryPathInfos,
  queryValidPaths,
} from "../mod.ts";
import type {
  ByteReader,
  Context,
  InputItem,
  StoreConnection,
} from "../mod.ts";

/** Returns the outputs of all derivations. */
async function queryDerivationOutputs(
  store: StoreConnection,
  derivations: readonly string[],
): Promise<string[]> {
  const outputs: string[] = [];
  const calls = derivations.map((derivation) => ({
    request: encode(OPERATION.queryDerivationOutputs, derivation),
    result: async (reader: ByteReader) =>
      outputs.push(...await reader.strings()),
  }));
  await operateAll(store, calls);
  return outputs;
}

/** Finds out what a derivation needs, without the daemon's telling. */
export default async function queryInputs(
  derivation: string,
  context: Context,
): Promise<InputItem[]> {
  const store = await openLocalDaemon(context);
  try {
    const items = new Map<string, InputItem>();
    const infos = await queryPathInfos(store, [derivation]);
    const { references } = infos.get(derivation)!;
    const derivations = references.filter((path) => path.endsWith(".drv"));
    const outputs = await queryDerivationOutputs(store, derivations);
    let paths = await queryValidPaths(store, [...references, ...outputs]);
    while (paths.length > 0) {
      const next = new Set<string>();
      for (const [path, info] of await queryPathInfos(store, paths)) {
        items.set(path, { path, size: info.narSize });
        info.references.forEach((reference) => next.add(reference));
      }
      paths = [...next].filter((path) => !items.has(path));
    }
    return [...items.values()];
  } finally {
    store.stream.destroy();
  }
}

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
async function findOut(
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

/** How many answers are kept, and for how long, in ms. */
const KEPT = { most: 16, lifetime: 60_000 } as const;

/** What was found out last, by derivation: guix-daemon asks again. */
const kept = new Map<string, { time: number; items: Promise<InputItem[]> }>();

/** Finds out what a derivation needs, or has done so. */
export default function queryInputs(
  derivation: string,
  context: Context,
): Promise<InputItem[]> {
  const now = Date.now();
  const known = kept.get(derivation);
  const age = now - (known?.time ?? -Infinity);
  if (known && age >= 0 && age < KEPT.lifetime) return known.items;
  const items = findOut(derivation, context);
  kept.delete(derivation);
  kept.set(derivation, { time: now, items });
  items.catch(() => kept.delete(derivation));
  for (const [oldest] of kept) {
    if (kept.size > KEPT.most) kept.delete(oldest);
  }
  return items;
}

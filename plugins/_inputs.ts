/**
 * Tells scores what a build needs, where one asks for it.
 *
 * @module
 */

import { OPERATION, queryPathInfos, queryValidPaths } from "../mod.ts";
import type { Context, InputItem } from "../mod.ts";
import { queryLists, withLocalDaemon } from "./_local_store.ts";

/** Finds out what a derivation needs, without the daemon's telling. */
async function findOut(
  derivation: string,
  context: Context,
): Promise<InputItem[]> {
  return await withLocalDaemon(context, async (store) => {
    const items = new Map<string, InputItem>();
    const infos = await queryPathInfos(store, [derivation]);
    const { references } = infos.get(derivation)!;
    const derivations = references.filter((path) => path.endsWith(".drv"));
    const { queryDerivationOutputs } = OPERATION;
    const outputs = await queryLists(
      store,
      queryDerivationOutputs,
      derivations,
    );
    let paths = await queryValidPaths(store, [
      ...references,
      ...outputs.flat(),
    ]);
    while (paths.length > 0) {
      const next = new Set<string>();
      for (const [path, info] of await queryPathInfos(store, paths)) {
        items.set(path, { path, size: info.narSize });
        info.references.forEach((reference) => next.add(reference));
      }
      paths = [...next].filter((path) => !items.has(path));
    }
    return [...items.values()];
  });
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

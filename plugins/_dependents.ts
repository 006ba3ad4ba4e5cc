/**
 * Tells plugins what needs a derivation and is not there: who waits for it.
 *
 * @module
 */

import { derivationName, OPERATION, queryValidPaths } from "../mod.ts";
import type { Context, Dependent, StoreConnection } from "../mod.ts";
import { queryLists, withLocalDaemon } from "./_local_store.ts";

/** How many derivations are looked at, and for how many ms, at the most. */
const LIMITS = { derivations: 500, time: 150 } as const;

/** For how long what was found is believed, in ms. */
const LIFETIME = 60_000;

/** A derivation whose outputs are not there, while it is found out. */
interface Node extends Dependent {
  readonly dependents: Node[];
  /** When it was asked what needs it. */
  time: number;
}

/** What a process that stays has found out, by the derivation's file name. */
const nodes = new Map<string, Node>();

/** What is being found out: whoever asks again waits for the same. */
const asked = new Map<string, Promise<readonly Dependent[]>>();

function nodeOf(derivation: string): Node {
  const known = nodes.get(derivation);
  if (known !== undefined) return known;
  const node = { name: derivationName(derivation), dependents: [], time: 0 };
  nodes.set(derivation, node);
  return node;
}

/** Those of derivations of which an output is not there. */
async function withoutOutputs(
  store: StoreConnection,
  derivations: readonly string[],
): Promise<string[]> {
  const { queryDerivationOutputs } = OPERATION;
  const outputs = await queryLists(store, queryDerivationOutputs, derivations);
  const valid = new Set(await queryValidPaths(store, outputs.flat()));
  return derivations.filter((_, index) =>
    outputs[index]!.some((output) => !valid.has(output))
  );
}

/** Finds out what needs derivations; returns those of which that is not known. */
async function lookOnce(
  store: StoreConnection,
  derivations: readonly string[],
  most: number,
  now: number,
): Promise<string[]> {
  const { queryReferrers } = OPERATION;
  const lists = await queryLists(store, queryReferrers, derivations);
  const needing = [...new Set(lists.flat())]
    .filter((path) => path.endsWith(".drv")).slice(0, most);
  const unbuilt = new Set(await withoutOutputs(store, needing));
  derivations.forEach((derivation, index) => {
    const node = nodeOf(derivation);
    node.time = now;
    const its = lists[index]!
      .filter((path) => path !== derivation && unbuilt.has(path));
    node.dependents.splice(0, Infinity, ...its.map(nodeOf));
  });
  return [...unbuilt].filter((path) => !isFresh(nodeOf(path), now));
}

function isFresh({ time }: Node, now: number): boolean {
  return time <= now && now - time < LIFETIME;
}

async function findOut(
  derivation: string,
  now: number,
  context: Context,
): Promise<readonly Dependent[]> {
  if (nodes.size > 10 * LIMITS.derivations) nodes.clear();
  await withLocalDaemon(context, async (store) => {
    let left = [derivation];
    for (let looked = 0; left.length > 0;) {
      looked += left.length;
      const most = LIMITS.derivations - looked;
      if (most <= 0 || Date.now() - now > LIMITS.time) break;
      left = await lookOnce(store, left, most, now);
    }
  });
  return nodeOf(derivation).dependents;
}

/**
 * Finds out what needs a derivation, as far as there is time for it: that is
 * what all clients had Guix compute, wanted or not.
 */
export default async function queryDependents(
  derivation: string,
  context: Context,
): Promise<readonly Dependent[]> {
  const now = Date.now();
  const node = nodeOf(derivation);
  if (isFresh(node, now)) return node.dependents;
  const found = asked.get(derivation) ?? findOut(derivation, now, context);
  asked.set(derivation, found);
  try {
    return await found;
  } finally {
    asked.delete(derivation);
  }
}

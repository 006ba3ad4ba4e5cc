/**
 * Makes a workload of what real packages take to build from nothing, which
 * scripts/lab/graph.scm has taken from a Guix, and test/data keeps.
 *
 * What a graph doesn't tell is made up, with a seed, after this model. Builds of
 * one name are alike. What only copies, patches or compiles a module takes 1 s;
 * the compilers and libraries that everybody waits for (`GIANTS`) take some
 * minutes, the rest half a minute: the median of numbers whose logarithms are
 * spread evenly on both sides, by a factor of 3.3 where sigma is 1.2. What takes
 * over a minute keeps 1, 2 or 4 processors busy, the rest one. Of what a build
 * needs it is sent what it names, not all that this refers to. Downloads are
 * there from the start, since guix-daemon does those itself.
 *
 * @module
 */

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { gunzipSync } from "node:zlib";
import { fail, list, makeChances, makeMachine } from "./_workload.ts";
import type { Chances, Workload, WorkloadBuild } from "./_workload.ts";

const FILE = fileURLToPath(
  new URL("../test/data/derivations.gz", import.meta.url),
);

/** What takes no time, as far as one can tell by its name. */
const SMALL =
  /-(builder|import|compiled|source|checkout|modules?|wrapper)\b|^module-import|\.(patch|scm|drv)$|\.tar\./;

/** What takes long. */
const GIANTS = RegExp(
  "^(binutils|boost|cmake|gcc|ghostscript|glib|glibc|gtk|guile|icu4c|llvm|mesa|" +
    "mozjs|node|perl|python|qtbase|qtdeclarative|rust|samba|webkitgtk)" +
    "(-(cross|boot|minimal|final|mesboot)\\w*)*-[0-9]",
);

/** A derivation, and those that it needs. */
interface Derivation {
  readonly name: string;
  /** Whether guix-daemon builds it itself. */
  readonly isLocal: boolean;
  /** Numbers of others, all lower. */
  readonly needs: readonly number[];
}

/** Reads what graph.scm printed: derivations, and the packages' numbers. */
function readGraph(): [Derivation[], Map<string, number>] {
  const text = gunzipSync(readFileSync(FILE)).toString();
  const derivations: Derivation[] = [];
  const packages = new Map<string, number>();
  for (const line of text.trim().split("\n")) {
    const [name = "", kind, numbers = ""] = line.split("\t");
    const needs = numbers.split(" ").filter(Boolean).map(Number);
    if (kind === "=") packages.set(name, needs[0]!);
    else derivations.push({ name, isLocal: kind === "local", needs });
  }
  return [derivations, packages];
}

/** Those that a derivation needs, itself included. */
function closure(
  derivations: readonly Derivation[],
  last: number,
): Set<number> {
  const found = new Set([last]);
  for (const number of found) {
    for (const other of derivations[number]!.needs) found.add(other);
  }
  return found;
}

/** What a build of a name is like: the same, however often it is asked for. */
function makeKinds({ pick, heavyTailed }: Chances) {
  const kinds = new Map<string, Omit<WorkloadBuild, "name">>();
  return (name: string) => {
    const known = kinds.get(name);
    if (known !== undefined) return known;
    const median = SMALL.test(name) ? 0 : GIANTS.test(name) ? 240 : 30;
    const seconds = median > 0 ? heavyTailed(median, 1.2) : 1;
    const cores = [1, 2, 4][seconds > 60 ? pick(3) : 0]!;
    const kind = { seconds, cores, output: heavyTailed(2e6, 1.5) };
    kinds.set(name, kind);
    return kind;
  };
}

/** What is sent for a build: of what guix-daemon makes itself, all it is of. */
function makeInputs(derivations: readonly Derivation[]) {
  const known = new Map<number, readonly string[]>();
  const idsOf = (number: number): readonly string[] => {
    const { isLocal, needs } = derivations[number]!;
    if (!isLocal) return [String(number)];
    const ids = known.get(number) ?? [`item-${number}`].concat(
      needs.flatMap(idsOf).filter((id) => !id.startsWith("item-")),
    );
    known.set(number, ids);
    return ids;
  };
  return (number: number) => [
    ...new Set(derivations[number]!.needs.flatMap(idsOf)),
  ];
}

/**
 * Makes up a workload of packages, each of a client's of its own where
 * `clients` says so: what several need is the first's.
 *
 * @throws {OffloadError} where one is none that is kept.
 */
export function ofPackages(
  names: readonly string[],
  machineCount: number,
  clients: number,
  seed: number,
): Workload {
  const [derivations, packages] = readGraph();
  const chances = makeChances(seed);
  const kindOf = makeKinds(chances);
  const inputsOf = makeInputs(derivations);
  const items: Record<string, number> = {};
  const builds = new Map<number, WorkloadBuild>();
  names.forEach((wanted, index) => {
    const last = packages.get(wanted) ??
      fail(wanted, `expected one of ${[...packages.keys()].join(", ")}`);
    const client = `client-${index % clients}`;
    for (const number of closure(derivations, last)) {
      const { name, isLocal } = derivations[number]!;
      if (isLocal) items[`item-${number}`] ??= chances.heavyTailed(1e6, 1.5);
      if (isLocal || builds.has(number)) continue;
      const [id, inputs] = [String(number), inputsOf(number)];
      builds.set(number, { id, name, client, inputs, ...kindOf(name) });
    }
  });
  const machines = list(machineCount, (index) => ({
    ...makeMachine(index, "x86_64-linux", chances),
    cores: [4, 8, 16][chances.pick(3)]!,
  }));
  // Those that others need have lower numbers.
  const sorted = [...builds].sort(([a], [b]) => a - b).map(([, it]) => it);
  return { machines, items, builds: sorted };
}

/** The packages that are kept, the small ones first. */
export function knownPackages(): string[] {
  return [...readGraph()[1].keys()];
}

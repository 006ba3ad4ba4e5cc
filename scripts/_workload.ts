/**
 * What a simulated farm is to do: read and checked, or made up.
 *
 * @module
 */

import { OffloadError, reason } from "../mod.ts";

/** A build machine of a workload. */
export interface WorkloadMachine {
  /** Host name; no other machine has it. */
  readonly name: string;
  /** System types that it builds for: x86_64-linux unless told. */
  readonly systems?: readonly string[];
  /** Features that builds may require: none unless told. */
  readonly features?: readonly string[];
  /** Relative speed: 1 unless told. */
  readonly speed?: number;
  /** Its slots: 1 unless told. */
  readonly parallelBuilds?: number;
  /** Logical processors, which its slots share: 4 unless told. */
  readonly cores?: number;
  /** Bytes a second, in each direction: 50 MB unless told. */
  readonly bandwidth?: number;
  /** Seconds that a build there takes longer than all that: 0 unless told. */
  readonly overhead?: number;
  /** When it joins the farm: from the start unless told. */
  readonly joins?: number;
  /** When it leaves: it takes no more builds, but ends those it has. */
  readonly leaves?: number;
  /** When it fails, once, and loses what it builds: never unless told. */
  readonly fails?: number;
  /** When it could be reached again: never unless told. */
  readonly returns?: number;
}

/** A build of a workload. */
export interface WorkloadBuild {
  /** Name of the derivation, the same where a package is built again. */
  readonly name: string;
  /** Names it among the inputs of other builds: its name unless told. */
  readonly id?: string;
  /** How long it takes on a machine of speed 1, in seconds. */
  readonly seconds: number;
  /** How many processors it keeps busy: 1 unless told. */
  readonly cores?: number;
  /** Who wants it: "client" unless told. */
  readonly client?: string;
  /** System type: x86_64-linux unless told. */
  readonly system?: string;
  /** Features that it requires: none unless told. */
  readonly features?: readonly string[];
  /** What must be there: items, and the outputs of builds before it. */
  readonly inputs?: readonly string[];
  /** Size of its output, in bytes: 0 unless told. */
  readonly output?: number;
}

/** What a workload file holds, as JSON. */
export interface Workload {
  /** The farm. */
  readonly machines: readonly WorkloadMachine[];
  /** Sizes of the store items that are there from the start, in bytes. */
  readonly items?: Readonly<Record<string, number>>;
  /** When clients begin, in seconds: at once unless told. */
  readonly clients?: Readonly<Record<string, number>>;
  /** What is to be built, each behind those that it needs. */
  readonly builds: readonly WorkloadBuild[];
}

/** The same, with all that is told or assumed. */
export interface CompleteWorkload {
  /** The farm. */
  readonly machines: readonly Required<WorkloadMachine>[];
  /** Sizes of items, in bytes. */
  readonly items: Readonly<Record<string, number>>;
  /** When clients begin, in seconds. */
  readonly clients: Readonly<Record<string, number>>;
  /** What is to be built. */
  readonly builds: readonly Required<WorkloadBuild>[];
}

/** What is assumed of a machine; "" and NaN must be told, and a field "" stands for any. */
const MACHINE: Required<WorkloadMachine> = {
  name: "",
  systems: ["x86_64-linux"],
  features: [],
  speed: 1,
  parallelBuilds: 1,
  cores: 4,
  bandwidth: 50e6,
  overhead: 0,
  joins: 0,
  leaves: Infinity,
  fails: Infinity,
  returns: Infinity,
};

/** The same of a build. */
export const BUILD: Required<WorkloadBuild> = {
  name: "",
  id: "its name",
  seconds: NaN,
  cores: 1,
  client: "client",
  system: "x86_64-linux",
  features: [],
  inputs: [],
  output: 0,
};

/** What a workload that tells nothing else is. */
export const WORKLOAD: CompleteWorkload = {
  machines: [MACHINE],
  items: { "": 0 },
  clients: { "": 0 },
  builds: [BUILD],
};

/** Says in a few words what a problem is, as Guix begins them. */
export function describe(problem: unknown): string {
  return reason(problem)
    .replace(/^[A-Z](?=[a-z ])/, (letter) => letter.toLowerCase());
}

/** Says what is wrong in a workload or an option, and where. */
export function fail(place: string, problem: string): never {
  throw new OffloadError(`${place}: ${problem}`);
}

/** Says what a value should be, where it is not of the kind of `model`. */
function mismatch(value: unknown, model: unknown): string | false {
  if (Array.isArray(model)) return !Array.isArray(value) && "a list";
  if (typeof model === "object") {
    return value?.constructor !== Object && "an object";
  }
  if (typeof model === "string") {
    return (typeof value !== "string" || value === "") && "a name";
  }
  // JSON has no such number: it is what nobody told.
  if (value === Infinity) return model !== Infinity && "a number";
  const number = Number.isFinite(value) ? Number(value) : -1;
  if (Number(model) > 0) return number <= 0 && "a number above 0";
  return number < 0 && "a number, 0 or more";
}

/**
 * Checks `told` against `model`, and takes from that what was not told.
 *
 * @throws {OffloadError} that names the place, which begins with `place`.
 */
export function complete<T>(told: unknown, model: T, place: string): T {
  const required = Array.isArray(model) && typeof model[0] === "object";
  const value = told === undefined && !required ? model : told;
  const kind = mismatch(value, model);
  const got = kind && (JSON.stringify(told)?.slice(0, 60) ?? "nothing");
  if (kind) fail(place, `expected ${kind}, got ${got}`);
  if (Array.isArray(value)) {
    const part = (model as unknown[])[0] ?? "a name";
    return value.map((v, i) => complete(v, part, `${place}[${i}]`)) as T;
  }
  if (typeof value !== "object") return value as T;
  const values = value as Record<string, unknown>;
  const models = model as Record<string, unknown>;
  const names = Object.keys("" in models ? values : models);
  const unknown = Object.keys(values).find((name) =>
    !("" in models || names.includes(name))
  );
  if (unknown) {
    fail(`${place}.${unknown}`, `the fields are ${names.join(", ")}`);
  }
  return Object.fromEntries(names.map((name) => {
    const part = models[name] ?? models[""];
    return [name, complete(values[name], part, `${place}.${name}`)];
  })) as T;
}

/** Makes a generator of numbers from 0 to 1 (mulberry32). */
export function makeRandom(seed: number): () => number {
  let state = seed;
  return () => {
    state = state + 0x6d2b79f5 | 0;
    let bits = Math.imul(state ^ state >>> 15, state | 1);
    bits ^= bits + Math.imul(bits ^ bits >>> 7, bits | 61);
    return ((bits ^ bits >>> 14) >>> 0) / 2 ** 32;
  };
}

/** Chances that repeat themselves with their seed. */
export interface Chances {
  /** An index below `length`; with a skew above 1, a low one more often. */
  pick(length: number, skew?: number): number;
  /** A whole number, half of the time above the median, and then far above. */
  heavyTailed(median: number, sigma: number): number;
}

/** Makes chances of a seed. */
export function makeChances(seed: number): Chances {
  const random = makeRandom(seed);
  return {
    pick: (length, skew = 1) => Math.floor(random() ** skew * length),
    heavyTailed(median, sigma) {
      const radius = Math.sqrt(-2 * Math.log(1 - random()));
      const normal = radius * Math.cos(2 * Math.PI * random());
      return Math.ceil(median * Math.exp(sigma * normal));
    },
  };
}

/** Makes a list of so many. */
export function list<T>(length: number, make: (index: number) => T): T[] {
  return Array.from({ length }, (_, index) => make(index));
}

/** Makes a machine up. */
export function makeMachine(
  index: number,
  system: string,
  { pick }: Chances,
): WorkloadMachine {
  return {
    name: `machine-${index}`,
    systems: [system],
    speed: [1, 1.5, 2, 3][pick(4)]!,
    parallelBuilds: [1, 2, 4][pick(3)]!,
    bandwidth: [1e7, 5e7, 1e8][pick(3)]!,
  };
}

/** Chooses parents of a build: below it are 4 * `below` builds. */
function chooseParents(
  index: number,
  below: number,
  { pick }: Chances,
): string[] {
  if (below === 0) return [];
  // Of every four builds one may be a parent: that of the same system.
  return list(1 + pick(3), () => `build-${pick(below, 2) * 4 + index % 4}`);
}

/**
 * Makes a workload up: eight layers of builds, with heavy-tailed durations and
 * sizes, that share inputs.
 */
export function synthesize(
  machineCount: number,
  buildCount: number,
  seed: number,
): Workload {
  const chances = makeChances(seed);
  const { pick, heavyTailed } = chances;
  // Every fourth machine and build is of another system.
  const system = (index: number) =>
    index % 4 === 3 && machineCount > 3 ? "aarch64-linux" : "x86_64-linux";
  const machines = list(
    machineCount,
    (index) => makeMachine(index, system(index), chances),
  );
  const items: Record<string, number> = {};
  const shared = Math.ceil(8 + Math.sqrt(buildCount));
  for (let i = 0; i < shared; i++) items[`shared-${i}`] = heavyTailed(2e7, 1.2);
  const packages = list(Math.ceil(buildCount / 4), (index) => {
    items[`source-${index}`] = heavyTailed(1e6, 1.5);
    return { seconds: heavyTailed(40, 0.9), output: heavyTailed(2e6, 1.5) };
  });
  const layer = Math.ceil(buildCount / 8);
  const builds = list(buildCount, (index) => {
    const number = pick(packages.length);
    const below = Math.floor((index - index % layer) / 4);
    const inputs = list(3, () => `shared-${pick(shared, 3)}`);
    inputs.push(...chooseParents(index, below, chances), `source-${number}`);
    const name = `package${number}`; // no version of another
    const id = `build-${index}`;
    return { id, name, system: system(index), inputs, ...packages[number]! };
  });
  return { machines, items, builds };
}

/** Makes up what several clients want of the same machines, a minute apart. */
export function synthesizeClients(
  machineCount: number,
  buildCount: number,
  clientCount: number,
  seed: number,
): Workload {
  const each = Math.ceil(buildCount / clientCount);
  const parts = list(
    clientCount,
    (index) => synthesize(machineCount, each, seed + 1000 * index),
  );
  if (clientCount === 1) return parts[0]!;
  const name = (index: number, id: string) =>
    id.startsWith("shared-") ? id : `${index}-${id}`;
  const items = parts.flatMap((part, index) =>
    Object.entries(part.items!).map(([id, size]) => [name(index, id), size])
  );
  const builds = parts.flatMap((part, index) =>
    part.builds.map((build) => ({
      ...build,
      client: `client-${index}`,
      id: name(index, build.id!),
      name: name(index, build.name),
      inputs: build.inputs!.map((id) => name(index, id)),
    }))
  );
  return {
    machines: parts[0]!.machines,
    items: Object.fromEntries(items),
    clients: Object.fromEntries(
      parts.map((_, index) => [`client-${index}`, 60 * index]),
    ),
    builds,
  };
}

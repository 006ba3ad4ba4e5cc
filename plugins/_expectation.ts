/**
 * What is to be expected of a build, going by earlier ones: how long it takes on
 * a machine, with what must be sent first and what runs there now.
 *
 * @module
 */

import { machineId, within } from "../mod.ts";
import type {
  Candidate,
  InputItem,
  Machine,
  PastBuild,
  RunningBuild,
  ScoredRequest,
} from "../mod.ts";

/** Of how many builds the latest ones count. */
const LATEST = 5;

/** What is assumed of machines that were sent nothing yet, in bytes/second. */
const USUAL_BANDWIDTH = 50e6;

/**
 * From how long a build is, in seconds, what it needs is asked for: to find that
 * out takes some milliseconds, and a build that is shorter tells little of how
 * quick a machine is.
 */
const SHORTEST = 1;

/** Of how many machines what they lack is looked up: those that may be best. */
const COMPARED = 16;

/** How long what it needs may take to be found out, in seconds. */
const PATIENCE = 0.15;

/** How much of what was known a build changes. */
const LEARNING = 0.2;

/** How far a machine may be from its `speed`, either way. */
const QUICKEST = 16;

/** The middle one of numbers, or the mean of the two there; of none, none. */
export function median(numbers: readonly number[]): number | undefined {
  if (numbers.length === 0) return undefined;
  const sorted = numbers.toSorted((a, b) => a - b);
  const half = (sorted.length - 1) / 2;
  return (sorted[Math.floor(half)]! + sorted[Math.ceil(half)]!) / 2;
}

/** The mean of numbers; of none, none. */
function mean(numbers: readonly number[]): number | undefined {
  if (numbers.length === 0) return undefined;
  return numbers.reduce((sum, it) => sum + it, 0) / numbers.length;
}

/** How long a build would have taken at speed 1, in seconds. */
function workOf({ seconds, speed = 1 }: PastBuild): number {
  return seconds * speed;
}

/**
 * How quick a machine is, now that a build of so many seconds was seen there: as
 * `before`, and a little as it was `seen` to be.
 */
export function adjustQuickness(
  before: number,
  seen: number,
  seconds: number,
): number {
  if (seconds < SHORTEST || seen <= 0) return before;
  const learned = before ** (1 - LEARNING) * seen ** LEARNING;
  return Math.min(Math.max(learned, 1 / QUICKEST), QUICKEST);
}

/**
 * How quick a machine is, a multiple of its `speed`, now that a build took so
 * many seconds there: as `before`, and a little as beside other machines.
 */
export function learnQuickness(
  machine: Machine,
  before: number,
  seconds: number,
  past: readonly PastBuild[],
): number {
  const id = machineId(machine);
  const elsewhere = past.filter((build) => build.machine !== id);
  const work = median(elsewhere.slice(0, LATEST).map(workOf));
  if (work === undefined || machine.speed <= 0) return before;
  return adjustQuickness(before, work / seconds / machine.speed, seconds);
}

/** The name without the version, as far as one is told from the other. */
export function nameOfPackage(name: string): string {
  return name.replace(/-\d.*$/, "");
}

/** How long a build takes at speed 1, and how that is known. */
export interface Work {
  /** So many seconds. */
  readonly seconds: number;
  /** By builds of that name, or of another version, or of anything. */
  readonly source: "this name" | "another version" | "any build";
  /** The builds that tell, where it is this name. */
  readonly past: readonly PastBuild[];
}

/** What was found out of builds for a request, by their names. */
const works = new WeakMap<ScoredRequest, Map<string, Work | undefined>>();

/** What is known of how long a build takes; undefined where nothing is. */
export function expectWork(
  name: string,
  request: ScoredRequest,
): Work | undefined {
  const known = works.get(request) ?? new Map<string, Work | undefined>();
  works.set(request, known);
  if (!known.has(name)) known.set(name, findWork(name, request));
  return known.get(name);
}

function findWork(
  name: string,
  { history, similar }: ScoredRequest,
): Work | undefined {
  const sources = [
    ["this name", () => history(name)],
    ["another version", () => similar(nameOfPackage(name))],
    ["any build", () => similar("")],
  ] as const;
  for (const [source, find] of sources) {
    const past = find();
    const isAny = source === "any build";
    const latest = isAny ? past : past.slice(0, LATEST);
    // Of any build, the few that are long matter more than the many short ones.
    const seconds = (isAny ? mean : median)(latest.map(workOf));
    if (seconds !== undefined) return { seconds, source, past: latest };
  }
  return undefined;
}

/** Whether a build is over so soon that it is not worth a look or a wait. */
export function isShort({ seconds }: Work): boolean {
  return seconds < SHORTEST;
}

/** What a promise comes to, if it does so soon: guix-daemon waits. */
export function inTime<T>(promise: Promise<T>): Promise<T | undefined> {
  return within(PATIENCE, promise, "too late").catch(() => undefined);
}

/** How quick a machine is taken to be. */
export function speedOf(
  { machine, quickness }: Candidate,
  learns: boolean,
): number {
  return Math.max(machine.speed * (learns ? quickness ?? 1 : 1), 1e-9);
}

/** Seconds until a build there is done, and what they are made of. */
export interface Expectation {
  /** Until a slot is free. */
  readonly wait: number;
  /** Until it has what it lacks. */
  readonly transfer: number;
  /** To build it. */
  readonly build: number;
  /** All of that. */
  readonly total: number;
}

/** What was expected of machines last. */
const expectations = new WeakMap<Candidate, Expectation>();

/** What was expected of a machine when it was scored last. */
export function expectationOf(candidate: Candidate): Expectation | undefined {
  return expectations.get(candidate);
}

/** Notes that for others. */
export function noteExpectation(
  candidate: Candidate,
  expectation: Expectation | undefined,
): void {
  if (expectation) expectations.set(candidate, expectation);
  else expectations.delete(candidate);
}

/**
 * Seconds until each build that runs somewhere ends, the first first. One that
 * takes longer than it should is given as long again as it is late; one of which
 * nothing is known, as long again as it has taken: the long ones are left.
 */
function expectEnds(
  running: readonly RunningBuild[],
  speed: number,
  request: ScoredRequest,
): number[] {
  return running.map((build) => {
    const elapsed = Math.max(0, request.time - build.since) / 1000;
    const { seconds = 0, source } = usualWork(build, request) ?? {};
    const usual = seconds / speed;
    if (source === "any build") return Math.max(usual, elapsed);
    const left = usual - elapsed;
    return left > 0 ? left : Math.max(usual / 10, -left);
  }).sort((a, b) => a - b);
}

/** How long builds that run take, where somebody asks again. */
const usualWorks = new WeakMap<RunningBuild, Work>();

function usualWork(
  build: RunningBuild,
  request: ScoredRequest,
): Work | undefined {
  const known = usualWorks.get(build) ?? expectWork(build.name, request);
  if (known !== undefined) usualWorks.set(build, known);
  return known;
}

/** Whether all slots of a machine are taken, as far as was noted. */
export function isFull({ machine, running }: Candidate): boolean {
  return running().length >= machine.parallelBuilds;
}

/** A machine, how quick it is, and how long a build takes there in itself. */
export interface Place {
  readonly candidate: Candidate;
  readonly speed: number;
  readonly build: number;
}

/**
 * Seconds until a slot is free for a build, while so many others wait for one
 * there that go first, and take as long as it does.
 */
export function expectSlot(
  { candidate, speed, build }: Place,
  ahead: number,
  request: ScoredRequest,
): number {
  const running = candidate.running();
  const free = candidate.machine.parallelBuilds - running.length;
  if (ahead < free) return 0;
  const ends = expectEnds(running, speed, request);
  if (ends.length === 0) return 0;
  const turn = Math.max(0, ahead - Math.max(0, free));
  const rounds = Math.floor(turn / ends.length);
  return ends[turn % ends.length]! + rounds * build;
}

/** How many of the bytes of what a build needs a machine lacks. */
function lackOf(candidate: Candidate, inputs: readonly InputItem[]): number {
  const held = new Set(candidate.holds(inputs.map(({ path }) => path)));
  return inputs.reduce(
    (sum, { path, size }) => held.has(path) ? sum : sum + size,
    0,
  );
}

/**
 * Adds what must be sent, where it may matter: to those that may be the first
 * to be done. The others are taken to lack all of it.
 */
function addTransfers(
  expectations: Map<Candidate, Expectation>,
  inputs: readonly InputItem[],
): void {
  const known = [...expectations.keys()].map(({ bandwidth }) => bandwidth)
    .filter((bandwidth) => bandwidth !== undefined);
  const usual = median(known) ?? USUAL_BANDWIDTH;
  const all = inputs.reduce((sum, { size }) => sum + size, 0);
  const byTime = [...expectations].sort(([, a], [, b]) => a.total - b.total);
  let best = Infinity;
  for (const [index, [candidate, expected]] of byTime.entries()) {
    const mayBeBest = index < COMPARED && expected.total < best;
    const lack = mayBeBest ? lackOf(candidate, inputs) : all;
    const transfer = lack / (candidate.bandwidth ?? usual);
    const total = expected.total + transfer;
    expectations.set(candidate, { ...expected, transfer, total });
    best = Math.min(best, total);
  }
}

/** How long a build of some work takes on a machine, in seconds. */
function expectBuild(
  { id }: Candidate,
  speed: number,
  { seconds, source, past }: Work,
): number {
  const here = source === "this name"
    ? past.filter(({ machine }) => machine === id)
    : [];
  return median(here.map((build) => build.seconds)) ?? seconds / speed;
}

/**
 * Seconds until machines whose slots are all taken have one, in the order of
 * `full`: looked up of those that are quick enough for it to matter.
 */
function expectSlots(
  full: readonly Place[],
  best: number,
  request: ScoredRequest,
): ReadonlyMap<Place, number> {
  const compared = full.filter(({ build }) => build < best)
    .sort((a, b) => a.build - b.build).slice(0, COMPARED);
  const waits = new Map(compared.map((place) => [
    place,
    expectSlot(place, 0, request),
  ]));
  const usual = median([...waits.values()]) ?? 0;
  return new Map(full.map((place) => [place, waits.get(place) ?? usual]));
}

/**
 * What is to be expected of each machine that may take a build, with what must
 * be sent if that `isCompared`; undefined where nothing is known of it, or that
 * it is over at once.
 */
export async function expect(
  candidates: readonly Candidate[],
  request: ScoredRequest,
  learns: boolean,
  isCompared: boolean = candidates.length > 1,
): Promise<ReadonlyMap<Candidate, Expectation> | undefined> {
  const work = expectWork(request.name, request);
  if (work === undefined || isShort(work)) return undefined;
  const places = candidates.map((candidate): Place => {
    const speed = speedOf(candidate, learns);
    return { candidate, speed, build: expectBuild(candidate, speed, work) };
  });
  const { full = [], free = [] } = Object.groupBy(
    places,
    ({ candidate }) => isFull(candidate) ? "full" : "free",
  );
  const best = Math.min(...free.map(({ build }) => build));
  const waits = expectSlots(full, best, request);
  const expectations = new Map(places.map((place) => {
    const { candidate, build } = place;
    const wait = waits.get(place) ?? 0;
    return [candidate, { wait, transfer: 0, build, total: wait + build }];
  }));
  if (isCompared) {
    const inputs = await inTime(request.inputs());
    if (inputs !== undefined) addTransfers(expectations, inputs);
  }
  return expectations;
}

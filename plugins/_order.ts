/**
 * Which of the builds that wait goes first: that on which the longest chain of
 * builds waits.
 *
 * @module
 */

import type {
  Candidate,
  Dependent,
  PluginContext,
  ScoredRequest,
  WaitingBuild,
} from "../mod.ts";
import {
  expectationOf,
  expectSlot,
  expectWork,
  inTime,
  speedOf,
} from "./_expectation.ts";

/** What is assumed of a build where nothing is known of any, in seconds. */
const USUAL_WORK = 60;

/** For how long the length of a chain is believed, in ms. */
const LIFETIME = 60_000;

/** What is known of how long chains are. */
const lengths = new WeakMap<Dependent, { seconds: number; time: number }>();

function workOf(name: string, request: ScoredRequest): number {
  return expectWork(name, request)?.seconds ?? USUAL_WORK;
}

/** How long the longest of chains takes at speed 1, in seconds. */
function longestChain(
  dependents: readonly Dependent[],
  request: ScoredRequest,
): number {
  let longest = 0;
  for (const dependent of dependents) {
    longest = Math.max(longest, chainLength(dependent, request));
  }
  return longest;
}

/** The same of a derivation and what waits for it. */
function chainLength(dependent: Dependent, request: ScoredRequest): number {
  const { time } = request;
  const known = lengths.get(dependent);
  const age = time - (known?.time ?? -Infinity);
  if (known && age >= 0 && age < LIFETIME) return known.seconds;
  lengths.set(dependent, { seconds: 0, time }); // what is in a circle ends
  const { name, dependents } = dependent;
  const seconds = workOf(name, request) + longestChain(dependents, request);
  lengths.set(dependent, { seconds, time });
  return seconds;
}

/**
 * How urgent a build is: seconds at speed 1 until the last of the longest chain
 * that begins with it is built.
 */
export async function rankOf(request: ScoredRequest): Promise<number> {
  const dependents = await inTime(request.dependents()) ?? [];
  return workOf(request.name, request) + longestChain(dependents, request);
}

/** How urgent another build is by now: who waits gains, and is not left. */
export function urgencyOf(
  { rank = 0, since }: WaitingBuild,
  { time }: ScoredRequest,
): number {
  return rank + Math.max(0, time - since) / 1000;
}

/** Those of builds that wait that are others, and more urgent. */
export function aheadOf(
  urgency: number,
  waiting: readonly WaitingBuild[],
  request: ScoredRequest,
): WaitingBuild[] {
  return waiting.filter((other) =>
    other.derivation !== request.derivation &&
    urgencyOf(other, request) > urgency
  );
}

/** A build that is asked about, and how it stands. */
export interface Standing {
  /** It. */
  readonly request: ScoredRequest;
  /** How urgent it is in itself. */
  readonly rank: number;
  /** That, and how long it has waited. */
  readonly urgency: number;
  /** The others that go first. */
  readonly ahead: readonly WaitingBuild[];
  /** What the plugin is given. */
  readonly context: PluginContext;
}

/** How a build stands among those that wait. */
export async function standingOf(
  request: ScoredRequest,
  context: PluginContext,
): Promise<Standing> {
  const rank = await rankOf(request);
  const urgency = rank + request.waited();
  const ahead = aheadOf(urgency, request.waiting(), request);
  return { request, rank, urgency, ahead, context };
}

/** Whether a build waits that a machine could do. */
export function couldDo(
  { machine }: Candidate,
  { system = "", features = [] }: WaitingBuild,
): boolean {
  return machine.systems.includes(system) &&
    features.every((feature) => machine.features.includes(feature));
}

/** When a machine would be done, after the others that wait for it. */
export function expectAfter(
  candidate: Candidate,
  { request, ahead, context }: Pick<Standing, "request" | "ahead" | "context">,
): { slot: number; total: number } | undefined {
  const expectation = expectationOf(candidate);
  if (expectation === undefined) return undefined;
  const { transfer, build } = expectation;
  const before = ahead.filter((other) =>
    other.machine === candidate.id ||
    (other.machine === undefined && couldDo(candidate, other))
  ).length;
  const speed = speedOf(candidate, context.options.learn === true);
  const slot = expectSlot({ candidate, speed, build }, before, request);
  return { slot, total: slot + transfer + build };
}

/**
 * Scores machines by when a build would be done there, in seconds: what runs
 * there now, what must be sent, and how long builds took before. Where nothing
 * is known yet, or a build is over at once, it is the reference's choice, the
 * fastest.
 *
 * A build waits where a machine that is busy will be done with it sooner than
 * one that is free, and where others that wait are more urgent.
 *
 * @module
 */

import type {
  Awaitable,
  Candidate,
  Deferral,
  Plugin,
  PluginContext,
  ScoredCandidate,
  ScoredRequest,
  WaitingBuild,
} from "../mod.ts";
import {
  expect,
  expectationOf,
  expectSlot,
  expectWork,
  isFull,
  isShort,
  noteExpectation,
  speedOf,
} from "./_expectation.ts";
import type { Expectation } from "./_expectation.ts";
import { aheadOf, rankOf, urgencyOf } from "./_order.ts";

/** How much sooner it must be done for a build to wait: seconds, and a share. */
const GAIN = { seconds: 5, share: 0.1 } as const;

/** How much more urgent another one must be for a build to leave it a slot. */
const PRECEDENCE = 10;

/** After how many seconds guix-daemon asks again. */
const POLL = 5;

/** What is expected of machines that were scored together. */
const expectations = new WeakMap<
  readonly Candidate[],
  Awaitable<ReadonlyMap<Candidate, Expectation> | undefined>
>();

/** A build that is asked about, and how it stands. */
interface Standing {
  readonly request: ScoredRequest;
  readonly rank: number;
  /** That, and how long it has waited. */
  readonly urgency: number;
  /** The others that go first. */
  readonly ahead: readonly WaitingBuild[];
  readonly context: PluginContext;
}

/** Whether a build waits that a machine could do. */
function couldDo(
  { machine }: Candidate,
  { system = "", features = [] }: WaitingBuild,
): boolean {
  return machine.systems.includes(system) &&
    features.every((feature) => machine.features.includes(feature));
}

/** Leaves the slots that are free to others, where these are more urgent. */
function yieldToOthers(
  idle: readonly Candidate[],
  { rank, urgency, request, ahead }: Standing,
): Deferral | undefined {
  const isUrgent = (other: WaitingBuild) =>
    other.machine === undefined &&
    urgencyOf(other, request) > urgency + PRECEDENCE &&
    idle.some((candidate) => couldDo(candidate, other));
  const urgent = ahead.filter(isUrgent).length;
  if (urgent === 0) return undefined;
  const slots = idle.reduce(
    (sum, { machine, running }) =>
      sum + machine.parallelBuilds - running().length,
    0,
  );
  if (urgent < slots + POLL * request.pace()) return undefined;
  return { why: "more urgent builds go first", rank, isHeld: false };
}

/** When a busy machine would be done, after the others that wait for it. */
function expectAfter(
  candidate: Candidate,
  { request, ahead, context }: Standing,
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

/** Waits for a busy machine that will be done sooner than one that is free. */
function awaitBetter(
  ranking: readonly ScoredCandidate[],
  standing: Standing,
): Deferral | undefined {
  const { rank, context: { options, settings } } = standing;
  const free = ranking.findIndex(({ candidate }) => !isFull(candidate));
  const alternative = expectationOf(ranking[free]!.candidate);
  if (alternative === undefined) return undefined;
  const { total } = alternative;
  let best = Math.min(total - GAIN.seconds, total * (1 - GAIN.share));
  let deferral: Deferral | undefined;
  for (const { candidate } of ranking.slice(0, free)) {
    const there = expectAfter(candidate, standing);
    if (there === undefined || there.total >= best) continue;
    if (there.slot > Number(options.longestWait)) continue;
    best = there.total;
    if (candidate.freeSlots() > 0) return undefined; // for all that was noted
    const { name } = candidate.machine;
    const why = `'${name}' will have a slot soon, and be done sooner`;
    const isHeld = there.slot < settings.decisionTimeout;
    deferral = { why, rank, isHeld, candidate };
  }
  return deferral;
}

const plugin = {
  name: "expected",
  options: {
    learn: {
      default: true,
      description: "whether it counts how quick machines were seen to be, " +
        "beside their `speed`",
    },
    longestWait: {
      ...{ default: 1800, minimum: 0, maximum: 86400 },
      description: "seconds for which a build waits at most where a machine " +
        "is free",
    },
  },
  async score(candidate, request, { options }, all = [candidate]) {
    const learns = options.learn === true;
    const known = expectations.get(all) ?? expect(all, request, learns);
    expectations.set(all, known);
    const expectation = (await known)?.get(candidate);
    noteExpectation(candidate, expectation);
    return expectation ? -expectation.total : speedOf(candidate, learns);
  },
  async defer(ranking, request, context) {
    const idle = ranking.map(({ candidate }) => candidate)
      .filter((candidate) => !isFull(candidate));
    const work = expectWork(request.name, request);
    if (work !== undefined && isShort(work)) return undefined;
    const waiting = request.waiting();
    const isFirstFree = ranking[0]!.candidate === idle[0];
    if (isFirstFree && waiting.length === 0) return undefined;
    const waited = request.waited();
    const isOver = waited > Number(context.options.longestWait);
    if (idle.length > 0 && isOver) return undefined;
    const rank = await rankOf(request);
    const urgency = rank + waited;
    const ahead = aheadOf(urgency, waiting, request);
    if (idle.length === 0) {
      // What was noted of a hook that was killed keeps no slot.
      const isFreed = ranking.some((it) => it.candidate.freeSlots() > 0);
      if (isFreed) return undefined;
      const before = ahead.filter((other) =>
        ranking.some(({ candidate }) => couldDo(candidate, other))
      );
      // Who is more urgent has asked, and gets a slot that is freed till then.
      const isHeld = before.length <= POLL * request.pace();
      return { why: "busy", rank, isHeld };
    }
    const standing = { request, rank, urgency, ahead, context };
    const runs = ranking.some(({ candidate }) =>
      candidate.running().length > 0
    );
    // Where nothing runs, nothing is waited for.
    const isYielding = runs && yieldToOthers(idle, standing);
    return isYielding || awaitBetter(ranking, standing);
  },
} satisfies Plugin;

export default plugin as Plugin;

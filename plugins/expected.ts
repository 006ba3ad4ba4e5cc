/**
 * Scores machines by when a build would be done there, in seconds: what runs
 * there now, what must be sent, and how long builds took before. Where nothing
 * is known yet, or a build is over at once, it is the reference's choice, the
 * fastest.
 *
 * A build waits where a machine that is busy will be done with it sooner than
 * one that is free, and where others that wait are more urgent. It stays here
 * where that is sooner, and a site has said how quick this machine is.
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
  expectWork,
  isFull,
  isShort,
  noteExpectation,
  speedOf,
} from "./_expectation.ts";
import type { Expectation } from "./_expectation.ts";
import { considerHere } from "./_here.ts";
import { couldDo, expectAfter, standingOf, urgencyOf } from "./_order.ts";
import type { Standing } from "./_order.ts";
import { noteStay } from "./_stays.ts";

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

/** Waits for a slot where all are taken. */
function awaitAny(
  ranking: readonly ScoredCandidate[],
  { rank, ahead, request }: Standing,
): Deferral | undefined {
  // What was noted of a hook that was killed keeps no slot.
  const isFreed = ranking.some((it) => it.candidate.freeSlots() > 0);
  if (isFreed) return undefined;
  // Who is more urgent has asked, and gets a slot that is freed till then: also
  // one of other machines, which nobody could ask for meanwhile.
  const isHeld = ahead.length <= POLL * request.pace();
  return { why: "busy", rank, isHeld };
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

/** Has guix-daemon build here what it is done with sooner, as far as it may. */
async function stayHere(
  ranking: readonly ScoredCandidate[],
  request: ScoredRequest,
  context: PluginContext,
): Promise<Deferral | undefined> {
  if (!request.wantsLocal) return undefined;
  const { derivation } = request;
  const candidates = ranking.map(({ candidate }) => candidate);
  const here = await considerHere(candidates, request, context);
  const { why } = here;
  const told = here.isBetter ? here.told : undefined;
  const most = Number(context.options.localBuilds);
  if (!await noteStay(derivation, told, most, context)) return undefined;
  context.log.info(`'${derivation}' stays here: ${why}`);
  return { why, rank: 0, isHeld: false, isHere: true };
}

/** Has a build wait for a better machine, or others; or take a slot now. */
async function takeTurn(
  ranking: readonly ScoredCandidate[],
  request: ScoredRequest,
  context: PluginContext,
): Promise<Deferral | undefined> {
  const work = expectWork(request.name, request);
  if (work !== undefined && isShort(work)) return undefined;
  const idle = ranking.map(({ candidate }) => candidate)
    .filter((candidate) => !isFull(candidate));
  const isFirstFree = ranking[0]!.candidate === idle[0];
  if (isFirstFree && request.waiting().length === 0) return undefined;
  const isOver = request.waited() > Number(context.options.longestWait);
  if (idle.length > 0 && isOver) return undefined;
  const standing = await standingOf(request, context);
  if (idle.length === 0) return awaitAny(ranking, standing);
  const runs = ranking.some(({ candidate }) => candidate.running().length > 0);
  // Where nothing runs, nothing is waited for.
  const isYielding = runs && yieldToOthers(idle, standing);
  return isYielding || awaitBetter(ranking, standing);
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
    localSpeed: {
      ...{ default: 0, minimum: 0, maximum: 1000 },
      description: "the `speed` of this machine beside the others, where " +
        "builds stay here that guix-daemon is done with sooner; 0: none do",
    },
    localBuilds: {
      ...{ default: 1, minimum: 0, maximum: 1000 },
      description: "how many such builds run here at a time",
    },
  },
  async score(candidate, request, { options }, all = [candidate]) {
    const learns = options.learn === true;
    const isCompared = all.length > 1 || Number(options.localSpeed) > 0;
    const known = expectations.get(all) ??
      expect(all, request, learns, isCompared);
    expectations.set(all, known);
    const expectation = (await known)?.get(candidate);
    noteExpectation(candidate, expectation);
    return expectation ? -expectation.total : speedOf(candidate, learns);
  },
  async defer(ranking, request, context) {
    const isOn = Number(context.options.localSpeed) > 0;
    return isOn && await stayHere(ranking, request, context) ||
      await takeTurn(ranking, request, context);
  },
} satisfies Plugin;

export default plugin as Plugin;

/**
 * This machine beside the build machines: whether guix-daemon, were it to build
 * something itself, would be done with it sooner.
 *
 * @module
 */

import type { Candidate, PluginContext, ScoredRequest } from "../mod.ts";
import { expectWork, isShort } from "./_expectation.ts";
import type { Expectation } from "./_expectation.ts";
import { expectAfter, standingOf } from "./_order.ts";
import { formatTook } from "./_screen.ts";
import { quicknessHere } from "./_stays.ts";

/** What there is to say for and against a build's staying here. */
export interface Prospects {
  /** Seconds until it is done here, where that can be told. */
  readonly expectation?: Expectation;
  /** Seconds that it takes here, were this machine as quick as told. */
  readonly told?: number;
  /** Why it had better stay here, or not: as users read it. */
  readonly why: string;
  /** Whether it had. */
  readonly isBetter: boolean;
}

/** When it would be done elsewhere at the earliest, and where. */
async function expectElsewhere(
  candidates: readonly Candidate[],
  request: ScoredRequest,
  context: PluginContext,
): Promise<readonly [seconds: number, name: string] | undefined> {
  const isAlone = request.waiting().length === 0;
  const standing = isAlone
    ? { request, ahead: [], context }
    : await standingOf(request, context);
  return candidates.flatMap((candidate) => {
    const { total } = expectAfter(candidate, standing) ?? {};
    const { name } = candidate.machine;
    return total === undefined ? [] : [[total, name] as const];
  }).sort(([a], [b]) => a - b)[0];
}

/** Says whether a build of so many seconds had better stay here, and why. */
async function compare(
  seconds: number,
  ...elsewhere: Parameters<typeof expectElsewhere>
): Promise<Pick<Prospects, "why" | "isBetter">> {
  const best = await expectElsewhere(...elsewhere);
  if (best === undefined) {
    return { why: "nothing is known of the machines", isBetter: false };
  }
  const [there, name] = best;
  const isBetter = seconds < there;
  const why = `it takes about ${formatTook(seconds)} here, and ` +
    `${formatTook(there)} on '${name}'`;
  return { why, isBetter };
}

/** Finds out whether a build had better stay here; takes no place. */
export async function considerHere(
  candidates: readonly Candidate[],
  request: ScoredRequest,
  context: PluginContext,
): Promise<Prospects> {
  const { localSpeed, learn } = context.options;
  const not = (why: string) => ({ why, isBetter: false });
  if (request.features.length > 0) return not("it requires features");
  const work = expectWork(request.name, request);
  if (work === undefined) return not("nothing is known of builds yet");
  const told = work.seconds / Number(localSpeed);
  const build = told / (learn === true ? quicknessHere(context) : 1);
  const expectation = { wait: 0, transfer: 0, build, total: build };
  const known = { told, expectation };
  if (!isShort(work)) {
    return { ...known, ...await compare(build, candidates, request, context) };
  }
  const isBetter = isShort({ ...work, seconds: build });
  const why = isBetter ? "it is over at once" : "it is over at once elsewhere";
  return { ...known, why, isBetter };
}

/**
 * Why machines take no build.
 *
 * @module
 */

import {
  exclusion,
  machineMatches,
  recallMachines,
  sumScores,
} from "../mod.ts";
import type { Context, Log, Machine, Prospect, ScoredRequest } from "../mod.ts";
import { LOOKING } from "./_absences.ts";
import type { Reasons } from "./_absences.ts";
import { inOneLine } from "./_screen.ts";

/**
 * Why a machine takes nothing now, if it doesn't: in words that do not change
 * with each look, but where a plugin's do. Who has not been asked could take
 * something, for all that is known.
 */
export function idleReason(
  prospect: Prospect,
  context: Context,
): string | undefined {
  const facts = prospect.facts ?? { time: 0 };
  const { why } = exclusion({ ...prospect, facts }, context) ?? {};
  if (why !== undefined) {
    return prospect.excluded ? inOneLine(why) : withoutNumbers(inOneLine(why));
  }
  return prospect.freeSlots() > 0 ? undefined : "all its slots are taken";
}

/** Leaves out of a reason what changes with each look. */
export function withoutNumbers(why: string): string {
  return why.replace(/ for \d+ s: .*$|: .*\d.*$/, "");
}

/** A log of nothing: whoever looks in passing has nobody to tell. */
const SILENCE: Log = {
  info: () => {},
  trace: () => {},
  warn: () => {},
  error: () => {},
  debug: () => {},
};

/** Which plugins would give none of some machines a build, by the machine. */
async function vetoes(
  prospects: readonly Prospect[],
  request: ScoredRequest,
  context: Context,
): Promise<Map<Prospect, string>> {
  const asked = prospects.filter(({ facts, machine }) =>
    facts !== undefined && machineMatches(machine, request)
  );
  const scores = await sumScores(asked, request, context);
  return new Map(asked.flatMap((prospect, index) => {
    const names = Object.entries(scores[index]!.byPlugin)
      .flatMap(([name, score]) => score === -Infinity ? [`'${name}'`] : []);
    if (names.length === 0) return [];
    return [[prospect, `vetoed by plugin ${names.join(", ")}`] as const];
  }));
}

/** What looks in passing is done with. */
function inPassing(context: Context): Context {
  const { settings } = context;
  // What a machine said is believed for as long as nobody asks it again.
  const factsLifetime = Math.max(
    settings.factsLifetime,
    LOOKING.lifetime / 1000,
  );
  return {
    ...context,
    settings: { ...settings, factsLifetime },
    log: SILENCE,
    report: () => {},
    signal: new AbortController().signal, // the build may be over by now
  };
}

/**
 * Looks why machines take nothing, such as this build; those could that have
 * begun one since somebody may have looked. Those that failed are left out: when
 * these are left alone is known anyway. None is asked.
 */
export async function lookAtMachines(
  machines: readonly Machine[],
  request: ScoredRequest,
  context: Context,
): Promise<Reasons> {
  const own = inPassing(context);
  const { derivation } = request;
  const prospects = await recallMachines(machines, derivation, own);
  const recent = Date.now() - LOOKING.interval;
  const idle = prospects.filter(({ lastUsed = 0 }) => lastUsed <= recent);
  const reasons = new Map(idle.map((it) => [it, idleReason(it, own)] as const));
  const free = idle.filter((it) => reasons.get(it) === undefined);
  const vetoed = await vetoes(free, request, own);
  return new Map(
    prospects.filter(({ problem }) => problem === undefined)
      .map((it) => [it.id, reasons.get(it) ?? vetoed.get(it)]),
  );
}

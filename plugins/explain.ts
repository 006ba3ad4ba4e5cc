/**
 * `offload explain`: says which machine would build a derivation, and why.
 *
 * @module
 */

import { readFileSync } from "node:fs";
import { machine as architecture } from "node:os";
import {
  askToDefer,
  contextFor,
  countFreeSlots,
  dismiss,
  exclusion,
  EXIT,
  listMachines,
  machineId,
  machineMatches,
  mebibytes,
  normalizedLoad,
  OffloadError,
  pluginsWith,
  rank,
  reason,
  scoredRequest,
  surveyMachines,
} from "../mod.ts";
import type {
  Appraisal,
  CommandOptions,
  CommandResult,
  Context,
  Facts,
  Machine,
  Plugin,
  Prospect,
  Request,
  ScoredRequest,
  Scores,
  Screen,
} from "../mod.ts";
import { expectationOf, expectWork } from "./_expectation.ts";
import type { Expectation } from "./_expectation.ts";
import { warnOfGaps } from "./_first_steps.ts";
import { considerHere } from "./_here.ts";
import { JSON_OPTION, systemOf } from "./_machines.ts";
import { formatDuration, formatJson, formatTable } from "./_screen.ts";
import { staysHere } from "./_stays.ts";

/**
 * Reads from a derivation what decides on the machine (guix/derivations.scm).
 *
 * Its syntax is JSON's but for a word and the parentheses.
 */
export function readDerivation(
  text: string,
): Pick<Request, "system" | "features"> & {
  readonly prefersLocal: boolean;
} {
  const json = text.replace(/^Derive/, "").replace(
    /"(?:[^"\\]|\\[^])*"|[()]/g,
    (token) =>
      ({ "(": "[", ")": "]" })[token] ??
        // JSON has no such characters as they are.
        token.replace(
          /\p{Cc}/gu,
          (it) => `\\u${it.charCodeAt(0).toString(16).padStart(4, "0")}`,
        ),
  );
  const [, , , system, , , variables] = JSON.parse(json);
  const environment = new Map<string, string>(variables);
  const features = environment.get("requiredSystemFeatures") ?? "";
  return {
    system,
    features: features.split(" ").filter(Boolean),
    prefersLocal: environment.get("preferLocalBuild") === "1",
  };
}

/** A machine as `offload explain` shows it. */
interface Explanation {
  readonly machine: string;
  /** Whether it would be chosen. */
  readonly chosen: boolean;
  /** Why it would not, were it the only one. */
  readonly excluded?: string | undefined;
  readonly scores?: Scores | undefined;
  /** Seconds until it would be done there, by earlier builds. */
  readonly expectation?: Expectation | undefined;
  readonly freeSlots: number;
  readonly slots: number;
  readonly facts?: Facts | undefined;
}

/** Why a machine can't build what is asked for, if so. */
function mismatch(machine: Machine, request: Request): string | undefined {
  if (machineMatches(machine, request)) return undefined;
  if (!machine.systems.includes(request.system)) {
    return `does not build for ${request.system}`;
  }
  const lacking = request.features
    .filter((feature) => !machine.features.includes(feature));
  return `lacks the features ${lacking.join(", ")}`;
}

/** What guix-daemon builds beside what is of its own system. */
const ALSO_BUILT: Readonly<Record<string, string>> = {
  "x86_64-linux": "i686-linux",
  "aarch64-linux": "armhf-linux",
};

/** Whether guix-daemon builds for a system on this machine (nix/libstore). */
function isBuiltHere(system: string): boolean {
  const own = systemOf(architecture());
  return system === own || system === ALSO_BUILT[own];
}

/** Says what to type next where machines failed. */
function warnOfFailures(
  prospects: readonly Prospect[],
  { log }: Context,
): void {
  const failed = prospects.filter(({ problem }) => problem !== undefined);
  if (failed.length === 0) return;
  const hint = "'offload test' says what to do about each";
  const message = `${failed.length} of ${prospects.length} machines failed`;
  log.warn(new OffloadError(message, { hint }));
}

/**
 * Finds out who would build a derivation; takes no slot. `never` says why the
 * hook is not asked, if so: no machine is, either.
 */
async function explain(
  machines: readonly Machine[],
  request: Request,
  context: Context,
  never?: string,
): Promise<Explanation[]> {
  const matching = machines.filter((machine) =>
    never === undefined && machineMatches(machine, request)
  );
  const prospects = await surveyMachines(matching, request, context);
  const asked = scoredRequest(request, context);
  const ranking = await rank(prospects, asked, context);
  const here = await explainHere(ranking, asked, context);
  await tellExpected(ranking, asked, here, context);
  dismiss(prospects);
  if (ranking.length === 0) warnOfFailures(prospects, context);
  const chosen = ranking.find(({ prospect }) =>
    !here?.chosen && prospect.freeSlots() > 0
  );
  const others = machines.map((machine): Explanation => {
    const prospect = prospects.find((it) => it.machine === machine);
    const freeSlots = countFreeSlots(machine, context.stateDirectory);
    const scores = ranking.find((it) => it.prospect === prospect)?.scores;
    return {
      machine: machineId(machine),
      chosen: prospect !== undefined && prospect === chosen?.prospect,
      excluded: never ?? mismatch(machine, request) ??
        exclusion(prospect!, context)?.why ??
        (scores === undefined ? "vetoed by a plugin" : undefined) ??
        (freeSlots === 0 ? "all its slots are taken" : undefined),
      scores,
      expectation: prospect && expectationOf(prospect),
      freeSlots,
      slots: machine.parallelBuilds,
      facts: prospect?.facts,
    };
  });
  return here ? [here, ...others] : others;
}

/** How this machine is shown; a build machine's name has its port, too. */
const HERE = "here";

/** Says whether the build would stay here, where that may be. */
async function explainHere(
  ranking: readonly Appraisal[],
  request: ScoredRequest,
  context: Context,
): Promise<Explanation | undefined> {
  const plugin = pluginsWith("defer", context)
    .find(({ options = {} }) => "localSpeed" in options);
  const own = plugin && contextFor(plugin, context);
  const isOn = own !== undefined && Number(own.options.localSpeed) > 0 &&
    own.settings.buildLocally;
  if (!isOn || ranking.length === 0 || !isBuiltHere(request.system)) {
    return undefined;
  }
  const candidates = ranking.map(({ prospect }) => prospect);
  const here = await considerHere(candidates, request, own);
  const { expectation, isBetter, why } = here;
  const running = staysHere(own).builds.length;
  const most = Number(own.options.localBuilds);
  const isFull = running >= most;
  const full = isFull ? "as many builds stay here as may" : undefined;
  const chosen = isBetter && !isFull;
  if (chosen) {
    context.log.info(`it would stay here, if guix-daemon has a slot: ${why}`);
  }
  return {
    machine: HERE,
    chosen,
    excluded: chosen ? undefined : full ?? why,
    expectation,
    freeSlots: Math.max(0, most - running),
    slots: most,
  };
}

/** Says by what a build is expected, and what it would wait for elsewhere. */
async function tellExpected(
  ranking: readonly Appraisal[],
  request: ScoredRequest,
  here: Explanation | undefined,
  context: Context,
): Promise<void> {
  const isExpected = ranking.some(({ prospect }) =>
    expectationOf(prospect) !== undefined
  );
  const { log } = context;
  if (isExpected) {
    const { source, past } = expectWork(request.name, request)!;
    log.info(`expectations go by ${past.length} builds of ${source}`);
  }
  if (here?.chosen) return;
  const deferral = await askToDefer(ranking, request, context);
  const why = deferral?.why === "busy" ? "all slots are taken" : deferral?.why;
  if (why !== undefined) log.info(`it would wait: ${why}`);
}

/** Says what an expectation is made of. */
function formatExpectation({ wait, transfer, build }: Expectation): string {
  const parts = [
    wait > 0 ? `slot ${formatDuration(wait)}` : "",
    transfer > 0 ? `transfer ${formatDuration(transfer)}` : "",
    `build ${formatDuration(build)}`,
  ];
  return `(${parts.filter(Boolean).join(", ")})`;
}

function formatExplanation(
  explanations: readonly Explanation[],
  screen: Screen,
): string {
  const rows = explanations.map((explanation) => {
    const { machine, chosen, excluded, scores, expectation, facts } =
      explanation;
    const load = facts && normalizedLoad(facts);
    const free = facts?.store?.bytes;
    const byPlugin = Object.entries(scores?.byPlugin ?? {})
      .map(([name, score]) => `${name} ${score}`);
    return [
      machine,
      `${explanation.freeSlots} of ${explanation.slots}`,
      load === undefined ? "-" : load.toFixed(2),
      free === undefined ? "-" : `${mebibytes(free)} MiB`,
      scores === undefined ? "-" : formatScore(scores.total),
      chosen ? "takes it" : excluded ?? "another one is as good or better",
      [
        byPlugin.length > 1 ? `(${byPlugin.join(", ")})` : "",
        expectation ? formatExpectation(expectation) : "",
      ].filter(Boolean).join(" "),
    ];
  });
  const header = ["machine", "free slots", "load", "disk space", "score", ""];
  return formatTable([header, ...rows], screen);
}

/** A score without digits that tell nothing. */
function formatScore(score: number): string {
  return String(Number(score.toPrecision(4)));
}

/** What to do where a name is not that of a derivation. */
const HOW_TO_NAME_ONE = "'guix build -d PACKAGE' prints the name of one";

/** Reads a derivation that somebody has named. */
function parseDerivation(text: string, file: string) {
  try {
    return readDerivation(text);
  } catch (cause) {
    const message = `'${file}' is no derivation`;
    const options = { hint: HOW_TO_NAME_ONE, exitCode: EXIT.usage };
    throw new OffloadError(message, { cause, ...options });
  }
}

/** `offload explain DERIVATION`. */
export async function explainCommand(
  derivation: string,
  options: CommandOptions,
  context: Context,
  screen: Screen,
): Promise<CommandResult> {
  let text;
  try {
    text = readFileSync(derivation, "utf8");
  } catch (cause) {
    const message = `failed to read '${derivation}': ${reason(cause)}`;
    throw new OffloadError(message, { cause, hint: HOW_TO_NAME_ONE });
  }
  const { system, features, prefersLocal } = parseDerivation(text, derivation);
  const request = { wantsLocal: false, derivation, system, features };
  const never = prefersLocal && isBuiltHere(system)
    ? "guix-daemon builds it itself, for its preferLocalBuild is set"
    : undefined;
  if (never !== undefined) context.log.info(`'${derivation}': ${never}`);
  const machines = await listMachines(context);
  await warnOfGaps(machines, context);
  const explanations = await explain(machines, request, context, never);
  const output = options.json
    ? formatJson(explanations, 2)
    : formatExplanation(explanations, screen);
  const found = explanations.some(({ chosen }) => chosen);
  return { output, exitCode: found ? 0 : 1 };
}

const plugin = {
  name: "explain",
  command: {
    order: 4,
    usage: "DERIVATION",
    summary: "Say which machine would build it, and why",
    description: [
      "The exit code is 1 when no machine would. What has preferLocalBuild " +
      "set, guix-daemon builds itself, even with --max-jobs=0, without asking.",
    ],
    options: [JSON_OPTION],
    examples: [
      ['offload explain "$(guix build -d hello)"', "says who would build it"],
    ],
    run: async ([derivation], options, makeContext, screen) =>
      explainCommand(derivation!, options, await makeContext(), screen),
  },
} satisfies Plugin;

export default plugin as Plugin;

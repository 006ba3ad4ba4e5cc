/**
 * How plugins decide in a simulation: what the hook would do, by the scores of
 * the machines that may take a build.
 *
 * @module
 */

import process from "node:process";
import { contextFor, Late, machineFromFields, within } from "../mod.ts";
import type {
  Awaitable,
  Candidate,
  InputItem,
  Options,
  PastBuild,
  Plugin,
  PluginContext,
  ScoredRequest,
  Settings,
} from "../mod.ts";
import type { Host, Job } from "./_host.ts";
import { describe } from "./_workload.ts";

/** What there is to wait for, and instead of it. */
interface Choice {
  /** The best machine, which has no free slot. */
  readonly busy: Candidate;
  readonly busyScore: number;
  /** The best of those that have one. */
  readonly idle: Candidate | undefined;
  readonly idleScore: number;
  /** For how many seconds the build has waited. */
  readonly waited: number;
}

/** A plugin that may rather have a build wait than go to the best idle one. */
type Patient = Plugin & {
  wait?(
    choice: Choice,
    request: ScoredRequest,
    context: PluginContext & { readonly options: Options },
  ): Awaitable<number | undefined>;
};

/** Who takes a build: nobody now, or nobody that may. */
export type Decision = Host | "busy" | "vetoed";

/** What a policy may know beside the machines. */
interface Knowledge {
  readonly settings: Settings;
  /** The plugins' context, without their own options. */
  readonly context: PluginContext;
  /** A number from 0 to 1. */
  readonly random: () => number;
  /** Earlier builds of a name, the latest first. */
  readonly history: (name: string) => readonly PastBuild[];
  readonly report: (problem: string) => void;
}

/** Checks a score; that of a plugin that abstains is 0. */
function checkScore(score: unknown): number {
  if (typeof score === "number" && score < Infinity) return score;
  if (score === undefined) return 0;
  throw new Error(`expected a number, got ${String(score)}`);
}

/** Adds a plugin's scores up, if all are valid. */
function addScores(totals: Float64Array, scores: readonly unknown[]): void {
  const checked = scores.map(checkScore);
  for (let index = 0; index < totals.length; index++) {
    totals[index]! += checked[index]!;
  }
}

/** How two of a ranking stand to each other: by score, then by speed. */
function compare(
  hosts: readonly Host[],
  totals: Float64Array,
  one: number,
  other: number,
): number {
  const [a, b] = [totals[one]!, totals[other]!];
  return a !== b ? a - b : hosts[one]!.machine.speed -
    hosts[other]!.machine.speed;
}

/** The index of the best of those that are free, or not; -1 if none is. */
function findBest(
  hosts: readonly Host[],
  totals: Float64Array,
  isFree: boolean,
  random: () => number,
): number {
  let best = -1;
  let equals = 0;
  for (let index = 0; index < hosts.length; index++) {
    if (hosts[index]!.free > 0 !== isFree) continue;
    if (totals[index] === -Infinity) continue;
    const order = best < 0 ? 1 : compare(hosts, totals, index, best);
    if (order < 0) continue;
    equals = order > 0 ? 1 : equals + 1;
    if (random() * equals < 1) best = index;
  }
  return best;
}

/** The plugins whose scores are summed, and who may have builds wait. */
export class Policy {
  readonly #active: Map<Plugin, PluginContext>;
  readonly #knowledge: Knowledge;
  decisions = 0;

  constructor(plugins: readonly Plugin[], knowledge: Knowledge) {
    this.#knowledge = knowledge;
    this.#active = new Map(
      plugins.map((plugin) => [plugin, contextFor(plugin, knowledge.context)]),
    );
  }

  /** Decides as the hook does who takes a build that has waited. */
  async decide(job: Job, waited: number): Promise<Decision> {
    const { present, free } = job.group;
    // Who would be the best makes no difference where nobody has a slot, nor
    // who is busy to those that do not wait.
    if (free.size === 0) return present.length === 0 ? "vetoed" : "busy";
    this.decisions++;
    const hosts = this.#isPatient() ? present : [...free];
    const request = this.#request(job);
    const totals = await this.#score(hosts, request);
    const { random } = this.#knowledge;
    const idle = findBest(hosts, totals, true, random);
    const busy = findBest(hosts, totals, false, random);
    // Where a busy one is as good, nothing speaks for waiting.
    if (busy < 0 || !(totals[idle]! < totals[busy]! || idle < 0)) {
      return hosts[idle] ?? (present.length > free.size ? "busy" : "vetoed");
    }
    const seconds = await this.#wait({
      busy: hosts[busy]!,
      busyScore: totals[busy]!,
      idle: hosts[idle],
      idleScore: totals[idle] ?? -Infinity,
      waited,
    }, request);
    return seconds > 0 ? "busy" : hosts[idle] ?? "busy";
  }

  /** Whether there is a plugin that may have a build wait. */
  #isPatient(): boolean {
    for (const plugin of this.#active.keys()) {
      if ((plugin as Patient).wait !== undefined) return true;
    }
    return false;
  }

  #request({ request, build: { name }, inputs }: Job): ScoredRequest {
    const past = this.#knowledge.history(name);
    const items: Promise<readonly InputItem[]> = Promise.resolve(inputs);
    return { ...request, name, history: () => past, inputs: () => items };
  }

  /** Calls a plugin; one that fails is passed over, one that hangs for good. */
  async #call<T>(
    plugin: Plugin,
    hook: string,
    call: (context: PluginContext) => Awaitable<T>,
  ): Promise<T | undefined> {
    const { settings: { hookTimeout }, report } = this.#knowledge;
    const late = `no answer within ${hookTimeout} s`;
    try {
      const answer = call(this.#active.get(plugin)!);
      return answer instanceof Promise
        ? await within(hookTimeout, answer, late)
        : answer;
    } catch (error) {
      if (error instanceof Late) this.#active.delete(plugin);
      report(`plugin '${plugin.name}': ${hook}: ${describe(error)}`);
      return undefined;
    }
  }

  /** The sums of the plugins' scores. */
  async #score(
    hosts: readonly Host[],
    request: ScoredRequest,
  ): Promise<Float64Array> {
    const totals = new Float64Array(hosts.length);
    for (const plugin of [...this.#active.keys()]) {
      if (plugin.score === undefined) continue;
      await this.#call(plugin, "score", (context) => {
        const answers: unknown[] = new Array(hosts.length);
        let isPromised = false;
        for (let index = 0; index < hosts.length; index++) {
          const answer = plugin.score!(hosts[index]!, request, context);
          answers[index] = answer;
          isPromised ||= typeof answer === "object";
        }
        return isPromised
          ? Promise.all(answers).then((scores) => addScores(totals, scores))
          : addScores(totals, answers);
      });
    }
    return totals;
  }

  /** For how many seconds it would rather wait; the first answer counts. */
  async #wait(choice: Choice, request: ScoredRequest): Promise<number> {
    for (const plugin of [...this.#active.keys()] as Patient[]) {
      const answer = await this.#call(plugin, "wait", (context) => {
        const seconds = plugin.wait?.(choice, request, context);
        return seconds;
      });
      if (answer !== undefined) return answer;
    }
    return 0;
  }
}

/** What plugins are given in a simulation. */
export function makeContext(
  settings: Settings,
  hosts: readonly Host[],
  report: (problem: string) => void,
): PluginContext {
  const warn = (problem: unknown) => report(describe(problem));
  const log = { info() {}, trace() {}, debug() {}, warn, error: warn };
  const machines = hosts.map(({ machine }) => machine);
  const file = "/etc/guix/machines.scm";
  return {
    log,
    signal: new AbortController().signal,
    settings,
    options: {},
    environment: process.env,
    configDirectory: "/etc/guix",
    stateDirectory: "/var/guix",
    guix: "guix",
    machineFile: () => ({ file, machines, problems: [] }),
    asOwner: (_file, action) => action(),
    writable: (directory) => directory,
    machineFromFields,
    report: ({ message }) => report(message),
  };
}

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
  Deferral,
  PastBuild,
  Plugin,
  PluginContext,
  ScoredCandidate,
  ScoredRequest,
  Settings,
} from "../mod.ts";
import type { Host, Job } from "./_host.ts";
import { Waiting } from "./_waiting.ts";
import { describe } from "./_workload.ts";

/** Who takes a build: nobody now, or nobody that may. */
export type Decision = Host | "held" | "postponed";

/** What a policy may know beside the machines. */
interface Knowledge {
  readonly settings: Settings;
  /** The plugins' context, without their own options. */
  readonly context: PluginContext;
  /** A number from 0 to 1. */
  readonly random: () => number;
  /** How many builds a second have ended in the last minute. */
  readonly pace: () => number;
  /** Earlier builds of a name, the latest first. */
  readonly history: (name: string) => readonly PastBuild[];
  /** The same of names that differ in their version; of all for "". */
  readonly similar: (name: string) => readonly PastBuild[];
  readonly report: (problem: string) => void;
}

/** Checks a score; that of a plugin that abstains is 0. */
function checkScore(score: unknown): number {
  if (typeof score === "number" && score < Infinity) return score;
  if (score === undefined) return 0;
  throw new Error(`expected a number, got ${String(score)}`);
}

/** Asks a plugin about all machines: at once, unless it takes its time. */
function askAll(
  hosts: readonly Host[],
  ask: (host: Host) => unknown,
): Awaitable<Float64Array> {
  const scores = new Float64Array(hosts.length);
  for (let index = 0; index < hosts.length; index++) {
    const answer = ask(hosts[index]!);
    if (answer instanceof Promise) {
      const others = hosts.slice(index + 1).map(async (it) => await ask(it));
      return Promise.all([...scores.subarray(0, index), answer, ...others])
        .then((answers) => Float64Array.from(answers, checkScore));
    }
    scores[index] = checkScore(answer);
  }
  return scores;
}

function addTo(totals: Float64Array, scores: Float64Array): void {
  for (let index = 0; index < totals.length; index++) {
    totals[index]! += scores[index]!;
  }
}

/** Ranks as the hook does: by score, then speed, then chance. */
function rank(
  hosts: readonly Host[],
  totals: Float64Array,
  random: () => number,
): ScoredCandidate[] {
  return hosts.map((candidate, index) => (
    { candidate, score: totals[index]!, chance: random() }
  )).filter(({ score }) => score > -Infinity).sort((a, b) =>
    b.score - a.score ||
    b.candidate.machine.speed - a.candidate.machine.speed ||
    a.chance - b.chance
  );
}

/** The plugins whose scores are summed, and who may have builds wait. */
export class Policy {
  readonly #active: Map<Plugin, PluginContext>;
  readonly #knowledge: Knowledge;
  readonly #waiting = new Waiting();
  decisions = 0;

  constructor(plugins: readonly Plugin[], knowledge: Knowledge) {
    this.#knowledge = knowledge;
    this.#active = new Map(
      plugins.map((plugin) => [plugin, contextFor(plugin, knowledge.context)]),
    );
  }

  /**
   * Decides as the hook does who takes a build, which nobody waits for where it
   * was lost by another machine.
   */
  async decide(job: Job, isAccepted: boolean): Promise<Decision> {
    const { present, free } = job.group;
    const request = this.#request(job, isAccepted);
    if (present.length === 0) return "postponed";
    // Who would be the best makes no difference where nobody has a slot, nor
    // who is busy to those that do not wait.
    const isPatient = !isAccepted && this.#isPatient();
    const hosts = isPatient ? present : [...free];
    const ranking = free.size > 0
      ? await this.#rank(hosts, request)
      : [{ candidate: present[0]!, score: 0 }];
    if (ranking.length === 0) {
      return present.length > hosts.length ? "held" : "postponed";
    }
    const deferral = isPatient
      ? await this.#defer(ranking, request)
      : undefined;
    if (deferral !== undefined) {
      this.#waiting.note(job, deferral, request.time);
      return deferral.isHeld ? "held" : "postponed";
    }
    const first = ranking.find(({ candidate }) => (candidate as Host).free > 0);
    if (first === undefined) return "held";
    this.#waiting.forget(job);
    return first.candidate as Host;
  }

  /** Whether there is a plugin that may have a build wait. */
  #isPatient(): boolean {
    for (const { defer } of this.#active.keys()) if (defer) return true;
    return false;
  }

  async #rank(
    hosts: readonly Host[],
    request: ScoredRequest,
  ): Promise<ScoredCandidate[]> {
    this.decisions++;
    const totals = await this.#score(hosts, request);
    return rank(hosts, totals, this.#knowledge.random);
  }

  #request(job: Job, isAccepted: boolean): ScoredRequest {
    const { request, name, inputs } = job;
    const { history, similar, pace } = this.#knowledge;
    const time = Date.now();
    return {
      ...request,
      ...{ name, time, isAccepted, similar },
      history: (of = name) => history(of),
      inputs: () => Promise.resolve(inputs),
      dependents: () => Promise.resolve(job.dependents),
      waited: () => Math.max(0, time - (job.waiting?.since ?? time)) / 1000,
      pace: () => pace(),
      waiting: () => this.#waiting.urgent(time),
    };
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
    const all = [...hosts]; // another one each time, as the hook has it
    for (const plugin of [...this.#active.keys()]) {
      if (plugin.score === undefined) continue;
      const scores = await this.#call(
        plugin,
        "score",
        (context) =>
          askAll(hosts, (host) => plugin.score!(host, request, context, all)),
      );
      if (scores !== undefined) addTo(totals, scores);
    }
    return totals;
  }

  /** Why it would rather wait; the first answer counts. */
  async #defer(
    ranking: readonly ScoredCandidate[],
    request: ScoredRequest,
  ): Promise<Deferral | undefined> {
    for (const plugin of [...this.#active.keys()]) {
      if (plugin.defer === undefined) continue;
      const answer = await this.#call(
        plugin,
        "defer",
        (context) => plugin.defer!(ranking, request, context),
      );
      if (answer !== undefined) return answer;
    }
    return undefined;
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

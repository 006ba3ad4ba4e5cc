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

/** Finds the best, one after another: by score, then by speed, then by chance. */
class Best {
  host: Host | undefined = undefined;
  score = -Infinity;
  #equals = 0;
  readonly #random: () => number;

  constructor(random: () => number) {
    this.#random = random;
  }

  offer(host: Host, score: number): void {
    if (score < this.score || score === -Infinity) return;
    const order = score - this.score ||
      host.machine.speed - this.host!.machine.speed;
    if (order < 0) return;
    this.#equals = order > 0 ? 1 : this.#equals + 1;
    if (this.#equals > 1 && this.#random() * this.#equals >= 1) return;
    this.host = host;
    this.score = score;
  }
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
    const [idle, busy] = [new Best(random), new Best(random)];
    for (let index = 0; index < hosts.length; index++) {
      const host = hosts[index]!;
      (host.free > 0 ? idle : busy).offer(host, totals[index]!);
    }
    // Where a busy one is as good, nothing speaks for waiting.
    if (busy.host === undefined || idle.score >= busy.score) {
      return idle.host ?? (present.length > free.size ? "busy" : "vetoed");
    }
    const seconds = await this.#wait({
      busy: busy.host,
      busyScore: busy.score,
      idle: idle.host,
      idleScore: idle.score,
      waited,
    }, request);
    return seconds > 0 ? "busy" : idle.host ?? "busy";
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
      const scores = await this.#call(
        plugin,
        "score",
        (context) =>
          askAll(hosts, (host) => plugin.score!(host, request, context)),
      );
      if (scores !== undefined) addTo(totals, scores);
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

/**
 * Has all happen that does in a simulated farm, from the first request to the
 * last build.
 *
 * @module
 */

import type { PastBuild, Plugin, Settings } from "../mod.ts";
import { learnQuickness, nameOfPackage } from "../plugins/_expectation.ts";
import { Client } from "./_client.ts";
import type { Answer } from "./_client.ts";
import { EPOCH } from "./_events.ts";
import type { Events } from "./_events.ts";
import type { Layout } from "./_farm.ts";
import type { Host, Job, Run } from "./_host.ts";
import { makeContext, Policy } from "./_policy.ts";
import { makeRandom } from "./_workload.ts";

/** In seconds. */
const MINUTE = 60;

/** For how long all may stand still before that is taken for the end. */
const STANDSTILL = 3600;

/** How many builds of a name are remembered, as the hook does. */
const REMEMBERED = 20;

/** What came of a machine, or of all. */
export interface Work {
  /** How many builds it did. */
  readonly builds: number;
  /** Slot-seconds used, of all that there were: 0 to 1. */
  readonly utilisation: number;
  /** Bytes sent to it and brought back. */
  readonly bytesMoved: number;
}

/** What came of a simulation. */
export interface Outcome extends Work {
  /** Names of the plugins whose scores were summed. */
  readonly policy: string;
  /** When all was built, in seconds; null where something never was. */
  readonly makespan: number | null;
  /** How often machines were scored for a build. */
  readonly decisions: number;
  /** And that in a second of real time. */
  readonly decisionsPerSecond: number;
  /** What went wrong, and how often. */
  readonly problems: Readonly<Record<string, number>>;
  /** By the machine's name. */
  readonly machines: Readonly<Record<string, Work>>;
}

/** What is known from before. */
export interface Experience {
  /** Builds by their name, the latest first. */
  readonly history: Map<string, readonly PastBuild[]>;
  /** The same by their name without the version, and all under "". */
  readonly similar: Map<string, readonly PastBuild[]>;
  /** The machines whose bandwidth was seen. */
  readonly measured: Set<string>;
}

/** A request that is to be answered when a slot is free. */
interface Held {
  readonly job: Job;
  /** Who waits for the answer; nobody where the build was lost elsewhere. */
  readonly client: Client | undefined;
}

function sum<T>(list: Iterable<T>, value: (element: T) => number): number {
  let total = 0;
  for (const element of list) total += value(element);
  return total;
}

/** Notes a build, of which the latest ones of a name are kept. */
function remember(
  builds: Map<string, readonly PastBuild[]>,
  name: string,
  build: PastBuild,
): void {
  const past = builds.get(name)?.slice(0, REMEMBERED - 1) ?? [];
  builds.set(name, [build, ...past]);
}

/** A farm at work. */
export class Simulation {
  readonly #layout: Layout;
  readonly #events: Events;
  readonly #settings: Settings;
  readonly #policy: Policy;
  readonly #name: string;
  readonly #experience: Experience;
  readonly #clients = new Map<string, Client>();
  /** The clients that have something to do. */
  readonly #awake = new Set<Client>();
  #held: Held[] = [];
  /** Whether a slot or a machine came since who is held has looked. */
  #isFreed = false;
  /** Whether waiting was in vain since the last slot was freed. */
  #isVain = false;
  #left: number;
  #running = 0;
  #lastChange = 0;
  #makespan = 0;
  /** When the builds of the last minute have ended. */
  #ends: number[] = [];
  readonly #problems: Record<string, number> = {};

  constructor(
    layout: Layout,
    events: Events,
    plugins: readonly Plugin[],
    seed: number,
    settings: Settings,
    experience: Experience = {
      history: new Map(),
      similar: new Map(),
      measured: new Set(),
    },
  ) {
    this.#layout = layout;
    this.#events = events;
    this.#settings = settings;
    this.#left = layout.jobs.length;
    this.#experience = experience;
    this.#name = plugins.map(({ name }) => name).join(" + ");
    const report = (problem: string) => this.#report(problem);
    this.#policy = new Policy(plugins, {
      settings,
      report,
      context: makeContext(settings, layout.hosts, report),
      random: makeRandom(seed),
      history: (name) => experience.history.get(name) ?? [],
      similar: (name) => experience.similar.get(name) ?? [],
      pace: () => this.#pace(),
    });
  }

  /** Has all happen, once. */
  async run(): Promise<Outcome> {
    const start = performance.now();
    const { now } = Date;
    // Plugins know no other clock.
    Date.now = () => EPOCH + this.#events.now * 1000;
    try {
      this.#layout.hosts.forEach((host) => this.#planHost(host));
      this.#planClients();
      while (this.#left > 0 && this.#events.goOn()) {
        await this.#settle();
        if (this.#isStill()) break;
      }
    } finally {
      Date.now = now;
    }
    this.#reportLeft();
    return this.#outcome(performance.now() - start);
  }

  #report(problem: string, times = 1): void {
    this.#problems[problem] = (this.#problems[problem] ?? 0) + times;
  }

  #isStill(): boolean {
    return this.#running === 0 &&
      this.#events.now - this.#lastChange > STANDSTILL;
  }

  /** Tells what was never built though it could have been. */
  #reportLeft(): void {
    const left = this.#layout.jobs.filter(({ asked, pending, isDone }) =>
      asked !== undefined && pending === 0 && !isDone
    );
    if (left.length === 0) return;
    const problem = `all machines are vetoed for '${left[0]!.build.name}'`;
    this.#report(`plugin '${this.#name}': ${problem}`, left.length);
  }

  #planHost(host: Host): void {
    const { joins, leaves, fails, returns } = host.told;
    if (this.#experience.measured.has(host.id)) host.measured = -Infinity;
    const appear = (isThere: boolean) => {
      host.appear(isThere);
      this.#change();
    };
    this.#plan(joins, () => appear(true));
    this.#plan(leaves, () => appear(false));
    this.#plan(fails, () => {
      const lost = host.fail();
      this.#running -= lost.length;
      this.#change();
      // Its hook looks for another machine, which no client waits for.
      this.#held.push(...lost.map((job) => ({ job, client: undefined })));
    });
    const back = this.#untilTried(fails, returns);
    if (back < leaves) this.#plan(back, () => appear(true));
  }

  /** When a machine is tried again that can be reached from `returns` on. */
  #untilTried(fails: number, returns: number): number {
    if (!(returns < Infinity)) return Infinity;
    const { backoff, backoffLimit } = this.#settings;
    let tried = fails;
    for (let pause = backoff; tried < returns && pause > 0; pause *= 2) {
      tried += Math.min(pause, backoffLimit);
    }
    return Math.max(tried, returns);
  }

  #change(): void {
    this.#lastChange = Math.max(this.#lastChange, this.#events.now);
    this.#isFreed = true;
    this.#isVain = false;
  }

  #client(name: string): Client {
    const known = this.#clients.get(name);
    if (known !== undefined) return known;
    const client: Client = new Client(
      this.#events,
      () => this.#awake.add(client),
    );
    this.#clients.set(name, client);
    return client;
  }

  #planClients(): void {
    const { clients, jobs } = this.#layout;
    for (const [name, own] of Map.groupBy(jobs, clientOf)) {
      const client = this.#client(name);
      const ready = own.filter(({ pending }) => pending === 0);
      this.#plan(clients[name] ?? 0, () => client.want(ready));
    }
  }

  /** Has something happen that is no standstill before it is due. */
  #plan(time: number, happen: () => void): void {
    if (time === Infinity) return;
    this.#lastChange = Math.max(this.#lastChange, time);
    this.#events.plan(time, happen);
  }

  /** Answers what can be, until nothing more happens at this time. */
  async #settle(): Promise<void> {
    if (this.#isFreed) {
      this.#isFreed = false;
      await this.#look();
    }
    for (const client of this.#awake) {
      this.#awake.delete(client); // it may have itself woken again
      await client.work(
        (job) => this.#ask(job, client),
        (job) => this.#unlock(job),
      );
    }
  }

  /** Has who is held look again, the first first. */
  async #look(): Promise<void> {
    const held = this.#held;
    this.#held = [];
    for (const it of held) {
      if (await this.#takes(it)) it.client?.answer(it.job, "accepted");
      else this.#held.push(it);
    }
  }

  /** Answers a request: at once, unless waiting for a slot may be of use. */
  #ask(job: Job, client: Client): Answer | Promise<Answer> {
    job.asked ??= this.#events.now;
    return this.#askPolicy(job, client);
  }

  async #askPolicy(job: Job, client: Client): Promise<Answer> {
    const decision = await this.#policy.decide(job, false);
    if (typeof decision !== "string") {
      this.#start(job, decision);
      return "accepted";
    }
    return decision === "held" ? this.#hold(job, client) : "postponed";
  }

  /** Holds an answer for a while, unless that was in vain just now. */
  #hold(job: Job, client: Client): Answer {
    if (this.#isVain) return "postponed";
    const held = { job, client };
    this.#held.push(held);
    const end = this.#events.now + this.#settings.decisionTimeout;
    this.#events.plan(end, () => {
      if (!this.#held.includes(held)) return;
      this.#held = this.#held.filter((it) => it !== held);
      this.#isVain = true;
      client.answer(job, "postponed");
    });
    return "held";
  }

  async #takes({ job, client }: Held): Promise<boolean> {
    const decision = await this.#policy.decide(job, client === undefined);
    if (typeof decision === "string") return false;
    this.#start(job, decision);
    return true;
  }

  #start(job: Job, host: Host): void {
    this.#running++;
    host.start(job, (run, seconds) => this.#finish(run, seconds));
  }

  #finish({ job, host }: Run, seconds: number): void {
    const { history, similar } = this.#experience;
    const { name } = job.build;
    const past = history.get(name) ?? [];
    const before = host.quickness ?? 1;
    host.quickness = learnQuickness(host.machine, before, seconds, past);
    const speed = host.machine.speed * host.quickness;
    const build = { machine: host.id, seconds, speed };
    remember(history, name, build);
    for (const other of [nameOfPackage(name), ""]) {
      remember(similar, other, build);
    }
    if (host.bandwidth !== undefined) this.#experience.measured.add(host.id);
    this.#running--;
    this.#ends.push(this.#events.now);
    this.#left--;
    this.#makespan = this.#events.now;
    job.isDone = true;
    this.#change();
    this.#client(clientOf(job)).tellEnded(job);
  }

  /** How many builds a second have ended in the last minute. */
  #pace(): number {
    const start = this.#events.now - MINUTE;
    const old = this.#ends.findIndex((time) => time >= start);
    if (old > 0) this.#ends.splice(0, old);
    return this.#ends.length / MINUTE;
  }

  /** Those that a client can go on with, now that it learns of a build. */
  #unlock(job: Job): Job[] {
    const ready = job.children.filter((child) => --child.pending === 0);
    const [own, others] = [[] as Job[], [] as Job[]];
    for (const child of ready) {
      (clientOf(child) === clientOf(job) ? own : others).push(child);
    }
    for (const child of others) {
      this.#client(clientOf(child)).tellUnlocked(child);
    }
    return own;
  }

  #outcome(milliseconds: number): Outcome {
    const now = this.#makespan;
    const work = (hosts: readonly Host[]): Work => ({
      builds: sum(hosts, ({ builds }) => builds),
      utilisation: sum(hosts, ({ slotSeconds }) => slotSeconds) /
        (now * sum(hosts, ({ machine }) => machine.parallelBuilds) || 1),
      bytesMoved: sum(hosts, ({ bytesMoved }) => bytesMoved),
    });
    const { hosts } = this.#layout;
    const { decisions } = this.#policy;
    return {
      policy: this.#name,
      makespan: this.#left === 0 ? now : null,
      ...work(hosts),
      decisions,
      decisionsPerSecond: Math.round(decisions / milliseconds * 1000),
      problems: this.#problems,
      machines: Object.fromEntries(
        hosts.map((host) => [host.machine.name, work([host])]),
      ),
    };
  }
}

function clientOf({ build }: Job): string {
  return build.client;
}

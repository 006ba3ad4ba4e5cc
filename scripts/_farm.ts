/**
 * A simulated farm: a daemon and its machines. Times are in seconds.
 *
 * Whenever a slot became free, the daemon offers the builds that are ready, one
 * after another. A build holds its slot while the machine is sent what it
 * lacks, while it is built and while its output is brought back. Transfers
 * don't share bandwidth, builds don't slow each other down, no machine is
 * overloaded. A veto holds until a build ends on that machine. The clock of
 * facts starts at 0.
 *
 * @module
 */

import {
  contextFor,
  Late,
  machineFromFields,
  machineMatches,
  reason,
  within,
} from "../mod.ts";
import type {
  Candidate,
  Facts,
  InputItem,
  Machine,
  PastBuild,
  Plugin,
  PluginContext,
  Request,
  ScoredRequest,
  Settings,
} from "../mod.ts";
import { BUILD, complete, fail, makeRandom, WORKLOAD } from "./_workload.ts";
import type { WorkloadBuild, WorkloadMachine } from "./_workload.ts";

/** A machine, with what plugins are not told. */
class Host implements Candidate {
  readonly id: string;
  readonly machine: Machine;
  readonly told: Required<WorkloadMachine>;
  readonly clock: { now: number };
  /** From when on it has items, and from when on its bandwidth is known. */
  readonly store = new Map<string, number>();
  measured = Infinity;
  /** What it was seen to hold: what its builds needed and made. */
  readonly seen = new Set<string>();
  lastUsed: number | undefined = undefined;
  running = 0;
  builds = 0;
  slotSeconds = 0;
  bytesMoved = 0;

  constructor(told: Required<WorkloadMachine>, clock: { now: number }) {
    const { name, systems, features, speed, parallelBuilds } = told;
    this.told = told;
    this.clock = clock;
    this.id = `${name}:22`;
    this.machine = {
      name,
      systems,
      features,
      speed,
      parallelBuilds,
      port: 22,
      user: "offload",
      privateKey: "",
      hostKey: "",
      compression: "none",
      compressionLevel: 3,
      overloadThreshold: false,
      daemonSocket: "/var/guix/daemon-socket/socket",
    };
  }

  get facts(): Facts {
    const { cores, parallelBuilds } = this.told;
    const load = this.running * cores / parallelBuilds;
    return { time: this.clock.now * 1000, load, cores };
  }

  get bandwidth(): number | undefined {
    return this.measured <= this.clock.now ? this.told.bandwidth : undefined;
  }

  freeSlots = (): number => this.told.parallelBuilds - this.running;
  holds = (paths: readonly string[]): string[] =>
    paths.filter((path) => this.seen.has(path));
}

/** The builds that the same machines can do. */
class Group {
  readonly hosts: ReadonlySet<Host>;
  /** Those with a free slot. */
  readonly free: Set<Host>;
  /** The speed of the fastest. */
  readonly fastest: number;
  /** How long all its builds take at speed 1. */
  seconds = 0;

  constructor(hosts: readonly Host[]) {
    this.hosts = new Set(hosts);
    this.free = new Set(hosts);
    this.fastest = Math.max(...hosts.map(({ machine }) => machine.speed));
  }
}

/** A build. */
class Job {
  readonly build: Required<WorkloadBuild>;
  readonly request: Request;
  readonly output: InputItem;
  readonly group: Group;
  readonly inputs: InputItem[] = [];
  /** The builds that need it, and how many it waits for. */
  readonly children: Job[] = [];
  pending = 0;
  host: Host | undefined = undefined;
  /** When it ends there; until it runs, when it could at best. */
  end = 0;

  constructor(
    build: Required<WorkloadBuild>,
    request: Request,
    group: Group,
  ) {
    this.build = build;
    this.request = request;
    this.group = group;
    const path = request.derivation.replace(/\.drv$/, "");
    this.output = { path, size: build.output };
  }

  addInput(input: InputItem | Job): void {
    this.inputs.push(input instanceof Job ? input.output : input);
    if (!(input instanceof Job)) return;
    input.children.push(this);
    this.pending++;
    this.end = Math.max(this.end, input.end);
  }
}

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

/** Says in a few words what a problem is, as Guix begins them. */
export function describe(problem: unknown): string {
  return reason(problem)
    .replace(/^[A-Z](?=[a-z ])/, (letter) => letter.toLowerCase());
}

function sum<T>(list: Iterable<T>, value: (element: T) => number): number {
  let total = 0;
  for (const element of list) total += value(element);
  return total;
}

/** Makes a file name in the store. */
function storePath(number: number, name: string): string {
  return `/gnu/store/${String(number).padStart(32, "0")}-${name}`;
}

/** Adds a plugin's scores up, if all are valid. */
function addScores(totals: Float64Array, scores: readonly unknown[]): void {
  for (const score of scores) {
    if (score === undefined || score === -Infinity) continue;
    if (Number.isFinite(score)) continue;
    throw new Error(`expected a number, got ${String(score)}`);
  }
  for (let index = 0; index < scores.length; index++) {
    totals[index]! += scores[index] as number | undefined ?? 0;
  }
}

/** The index of one of the highest scores, by chance; -1 where all veto. */
function chooseBest(scores: Float64Array, random: () => number): number {
  let best = -1;
  let highest = -Infinity;
  let equals = 0;
  for (let index = 0; index < scores.length; index++) {
    const score = scores[index]!;
    if (score < highest || score === -Infinity) continue;
    equals = score > highest ? 1 : equals + 1;
    highest = score;
    if (random() * equals < 1) best = index;
  }
  return best;
}

/** A daemon and its machines, for one simulation. */
export class Farm {
  readonly #clock = { now: 0 };
  readonly #hosts: readonly Host[];
  readonly #jobs: readonly Job[];
  readonly #groups = new Map<string, Group>();
  /** The builds that run; the last ends first. */
  readonly #running: Job[] = [];
  /** The builds that are ready, from the index `#first` on. */
  readonly #ready: Job[] = [];
  #first = 0;
  readonly #history = new Map<string, readonly PastBuild[]>();
  readonly #problems: Record<string, number> = {};
  /** How long the longest chain of builds takes at best. */
  #longest = 0;
  #decisions = 0;

  /**
   * Checks a workload.
   *
   * @throws {OffloadError} that names `file` and the place in it.
   */
  constructor(workload: unknown, file: string) {
    const root = `${file}: $`;
    const { machines, items, builds } = complete(workload, WORKLOAD, root);
    this.#hosts = machines.map((told) => new Host(told, this.#clock));
    const names = machines.map(({ name }) => name);
    for (const [index, { name, parallelBuilds }] of machines.entries()) {
      const place = `${root}.machines[${index}]`;
      if (names.indexOf(name) < index) fail(place, `'${name}' is taken`);
      if (!Number.isInteger(parallelBuilds)) {
        fail(`${place}.parallelBuilds`, "expected a whole number");
      }
    }
    const known = new Map<string, InputItem | Job>();
    for (const [name, size] of Object.entries(items)) {
      known.set(name, { path: storePath(known.size, name), size });
    }
    this.#jobs = builds.map((build, index) => {
      const place = `${root}.builds[${index}]`;
      const job = this.#makeJob(build, known, place);
      const id = build.id === BUILD.id ? build.name : build.id;
      if (known.has(id)) fail(place, `'${id}' is taken`);
      known.set(id, job);
      return job;
    });
  }

  #makeJob(
    build: Required<WorkloadBuild>,
    known: ReadonlyMap<string, InputItem | Job>,
    place: string,
  ): Job {
    const { name, system, features, inputs } = build;
    const derivation = storePath(known.size, `${name}.drv`);
    const request = { wantsLocal: false, system, derivation, features };
    const key = [system, ...features].join(" ");
    const group = this.#groups.get(key) ?? new Group(
      this.#hosts.filter(({ machine }) => machineMatches(machine, request)),
    );
    this.#groups.set(key, group);
    if (group.hosts.size === 0) fail(place, `no machine builds for '${key}'`);
    const job = new Job(build, request, group);
    for (const name of new Set(inputs)) {
      job.addInput(
        known.get(name) ?? fail(
          `${place}.inputs[${inputs.indexOf(name)}]`,
          `no item or build '${name}' before it`,
        ),
      );
    }
    job.end += build.seconds / group.fastest;
    group.seconds += build.seconds;
    this.#longest = Math.max(this.#longest, job.end);
    return job;
  }

  /**
   * The makespan that no policy can fall below, in seconds: that of the longest
   * chain of builds on the fastest machines, or of all work on all slots.
   */
  lowerBound(): number {
    const groups = [...this.#groups.values()];
    const speed = (hosts: Iterable<Host>) =>
      sum(hosts, ({ machine }) => machine.speed * machine.parallelBuilds);
    return Math.max(
      ...groups.map(({ seconds, hosts }) => seconds / speed(hosts)),
      sum(groups, ({ seconds }) => seconds) / speed(this.#hosts),
      this.#longest,
    );
  }

  /**
   * Simulates, once, how plugins decide whose scores are summed. The seed
   * decides among equals.
   */
  async run(
    plugins: readonly Plugin[],
    seed: number,
    settings: Settings,
  ): Promise<Outcome> {
    const start = performance.now();
    const policy = plugins.map(({ name }) => name).join(" + ");
    const context = this.#makeContext(settings);
    const active = new Set(plugins);
    const random = makeRandom(seed);
    const judge = async (job: Job, hosts: readonly Host[]) => {
      const scores = await this.#score(job, hosts, active, context);
      return hosts[chooseBest(scores, random)];
    };
    let ended: Job[] = [];
    let arrived = this.#jobs.filter(({ pending }) => pending === 0);
    for (;;) {
      const changed = new Set(ended.map(({ host }) => host!));
      await this.#offer(arrived, [...changed], judge);
      if (this.#running.length === 0) break;
      ended = this.#finishNext();
      arrived = ended.flatMap(({ children }) =>
        children.filter((child) => --child.pending === 0)
      );
    }
    const left = this.#ready.slice(this.#first);
    if (left.length > 0) {
      const problem = `all machines are vetoed for '${left[0]!.build.name}'`;
      this.#report(`plugin '${policy}': ${problem}`, left.length);
    }
    return this.#outcome(policy, performance.now() - start);
  }

  #outcome(policy: string, milliseconds: number): Outcome {
    const { now } = this.#clock;
    const work = (hosts: readonly Host[]): Work => ({
      builds: sum(hosts, ({ builds }) => builds),
      utilisation: sum(hosts, ({ slotSeconds }) => slotSeconds) /
        (now * sum(hosts, ({ machine }) => machine.parallelBuilds) || 1),
      bytesMoved: sum(hosts, ({ bytesMoved }) => bytesMoved),
    });
    const all = work(this.#hosts);
    return {
      policy,
      makespan: all.builds === this.#jobs.length ? now : null,
      ...all,
      decisions: this.#decisions,
      decisionsPerSecond: Math.round(this.#decisions / milliseconds * 1000),
      problems: this.#problems,
      machines: Object.fromEntries(
        this.#hosts.map((host) => [host.machine.name, work([host])]),
      ),
    };
  }

  #report(problem: string, times = 1): void {
    this.#problems[problem] = (this.#problems[problem] ?? 0) + times;
  }

  #makeContext(settings: Settings): PluginContext {
    const warn = (problem: unknown) => this.#report(describe(problem));
    const log = { info() {}, trace() {}, debug() {}, warn, error: warn };
    const machines = this.#hosts.map(({ machine }) => machine);
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
      report: ({ message }) => this.#report(message),
    };
  }

  /**
   * Offers the builds that are ready. Those that were before are vetoed where
   * no build ended just now.
   */
  async #offer(
    arrived: readonly Job[],
    changed: readonly Host[],
    judge: (job: Job, hosts: readonly Host[]) => Promise<Host | undefined>,
  ): Promise<void> {
    const ready = this.#ready;
    let old = ready.length;
    for (const job of arrived) ready.push(job);
    for (let index = this.#first; index < ready.length;) {
      if (index < old && !changed.some((host) => host.freeSlots() > 0)) {
        index = old;
        continue;
      }
      const job = ready[index]!;
      const { free } = job.group;
      const hosts = free.size > 0 && index < old
        ? changed.filter((host) => free.has(host))
        : [...free];
      const host = hosts.length > 0 ? await judge(job, hosts) : undefined;
      if (host !== undefined) this.#start(job, host);
      if (host === undefined) index++;
      else if (index === this.#first) this.#first = ++index;
      else {
        ready.splice(index, 1);
        if (index < old) old--;
      }
    }
  }

  /** The sums of the plugins' scores; a plugin that fails is passed over. */
  async #score(
    { build: { name }, request, inputs }: Job,
    hosts: readonly Host[],
    plugins: Set<Plugin>,
    context: PluginContext,
  ): Promise<Float64Array> {
    this.#decisions++;
    const totals = new Float64Array(hosts.length);
    const past = this.#history.get(name) ?? [];
    const items = Promise.resolve(inputs);
    const asked: ScoredRequest = {
      ...request,
      name,
      history: () => past,
      inputs: () => items,
    };
    const { hookTimeout } = context.settings;
    const late = `no answer within ${hookTimeout} s`;
    for (const plugin of plugins) {
      try {
        const own = contextFor(plugin, context);
        const answers: unknown[] = hosts.map((host) =>
          plugin.score!(host, asked, own)
        );
        const promised = answers.some((answer) => typeof answer === "object");
        const scores = promised
          ? await within(hookTimeout, Promise.all(answers), late)
          : answers;
        addScores(totals, scores);
      } catch (error) {
        if (error instanceof Late) plugins.delete(plugin);
        this.#report(`plugin '${plugin.name}': score: ${describe(error)}`);
      }
    }
    return totals;
  }

  #start(job: Job, host: Host): void {
    const { now } = this.#clock;
    const { told: { speed, bandwidth, parallelBuilds }, store } = host;
    const missing = job.inputs.filter(({ path }) => !(store.get(path)! <= now));
    const bytes = sum(missing, ({ size }) => size);
    const sent = now + bytes / bandwidth;
    for (const { path } of missing) {
      store.set(path, Math.min(store.get(path) ?? sent, sent));
    }
    // Of less, the real one doesn't tell the bandwidth.
    if (bytes > 2 ** 20) host.measured = Math.min(host.measured, sent);
    job.host = host;
    job.end = sent + job.build.seconds / speed + job.output.size / bandwidth;
    host.lastUsed = now * 1000;
    host.bytesMoved += bytes + job.output.size;
    host.slotSeconds += job.end - now;
    host.running++;
    if (host.running === parallelBuilds) {
      for (const { free } of this.#groups.values()) free.delete(host);
    }
    const later = this.#running.findIndex(({ end }) => end <= job.end);
    this.#running.splice(later < 0 ? this.#running.length : later, 0, job);
  }

  /** Goes on to when the next builds end; returns these. */
  #finishNext(): Job[] {
    const { end } = this.#running.at(-1)!;
    const first = this.#running.findLastIndex((job) => job.end > end) + 1;
    this.#clock.now = end;
    const ended = this.#running.splice(first).reverse();
    for (const { build: { name, seconds }, inputs, output, host } of ended) {
      const { id, store, seen, told: { speed } } = host!;
      host!.running--;
      host!.builds++;
      store.set(output.path, end);
      for (const { path } of [...inputs, output]) seen.add(path);
      for (const { hosts, free } of this.#groups.values()) {
        if (hosts.has(host!)) free.add(host!);
      }
      const past = this.#history.get(name)?.slice(0, 19) ?? [];
      const build = { machine: id, seconds: seconds / speed };
      this.#history.set(name, [build, ...past]);
    }
    return ended;
  }
}

/**
 * A simulated build machine. A build holds a slot while the machine is sent
 * what it lacks, while it is built and while its output is brought back; what
 * is built at the same time shares the processors, transfers share nothing.
 *
 * @module
 */

import { machineMatches } from "../mod.ts";
import type {
  Candidate,
  Dependent,
  Facts,
  InputItem,
  Machine,
  Request,
  RunningBuild,
  Settings,
  WaitingBuild,
} from "../mod.ts";
import { EPOCH } from "./_events.ts";
import type { Events } from "./_events.ts";
import type { WorkloadBuild, WorkloadMachine } from "./_workload.ts";

/** The builds that the same machines can do. */
export class Group {
  /** All of them. */
  hosts: readonly Host[] = [];
  /** Those that are there. */
  present: readonly Host[] = [];
  /** Of these, those with a free slot. */
  readonly free = new Set<Host>();
  readonly #request: Request;

  constructor(request: Request) {
    this.#request = request;
  }

  /** Finds its machines; none is there yet. */
  find(hosts: readonly Host[]): void {
    this.hosts = hosts.filter(({ machine }) =>
      machineMatches(machine, this.#request)
    );
    for (const host of this.hosts) host.groups.push(this);
    this.present = [];
    this.free.clear();
  }
}

/** A build, and what needs it: all of that was computed before. */
export class Job implements Dependent {
  readonly build: Required<WorkloadBuild>;
  readonly request: Request;
  readonly output: InputItem;
  readonly group: Group;
  readonly inputs: InputItem[] = [];
  /** The builds that it needs, those that need it. */
  readonly parents: Job[] = [];
  readonly children: Job[] = [];
  /** How many of them it waits for. */
  pending = 0;
  /** Its place in the order of names, in which guix-daemon goes on. */
  order = 0;
  /** When guix-daemon first asked who builds it. */
  asked: number | undefined = undefined;
  isDone = false;
  /** As it waits, what others are told of it. */
  waiting: WaitingBuild | undefined = undefined;

  get name(): string {
    return this.build.name;
  }

  get dependents(): readonly Job[] {
    return this.children;
  }

  constructor(build: Required<WorkloadBuild>, request: Request, group: Group) {
    this.build = build;
    this.request = request;
    this.group = group;
    const path = request.derivation.replace(/\.drv$/, "");
    this.output = { path, size: build.output };
  }

  /** Forgets what happened. */
  reset(): void {
    this.pending = this.parents.length;
    this.asked = undefined;
    this.isDone = false;
  }

  /** Notes something that it needs. */
  addInput(input: InputItem | Job): void {
    this.inputs.push(input instanceof Job ? input.output : input);
    if (!(input instanceof Job)) return;
    this.parents.push(input);
    input.children.push(this);
    this.pending++;
  }
}

/** A build that runs. */
export interface Run {
  readonly job: Job;
  readonly host: Host;
  /** What plugins are told of it. */
  readonly told: RunningBuild;
  /** When the slot was taken. */
  readonly since: number;
  /** When it began to build, once it has. */
  began?: number;
  /** How much is left to build since `updated`: seconds at speed 1. */
  left: number;
  updated: number;
  /** Counts when that was planned anew. */
  plans: number;
  isLost: boolean;
}

/** What is told of a build that is over. */
type Tell = (run: Run, seconds: number) => void;

/** How long an average of the load lasts, in seconds. */
const MINUTE = 60;

/** A machine, with what plugins are not told. */
export class Host implements Candidate {
  readonly id: string;
  readonly machine: Machine;
  readonly told: Required<WorkloadMachine>;
  readonly groups: Group[] = [];
  /** From when on it has items. */
  readonly store = new Map<string, number>();
  /** What it was seen to hold: what its builds needed and made. */
  readonly seen = new Set<string>();
  /** From when on its bandwidth is known. */
  measured = Infinity;
  lastUsed: number | undefined = undefined;
  /** How quick it was seen to be. */
  quickness: number | undefined = undefined;
  isThere = false;
  /** How many slots are free. */
  free: number;
  builds = 0;
  slotSeconds = 0;
  bytesMoved = 0;
  readonly #events: Events;
  readonly #lifetime: number;
  readonly #runs = new Set<Run>();
  #told: readonly RunningBuild[] = [];
  /** Those of them that are being built, and how fast: 1 is a second each. */
  readonly #building = new Set<Run>();
  #rate = 0;
  #facts: Facts | undefined = undefined;
  #load = 0;
  #loadTime = 0;

  constructor(
    told: Required<WorkloadMachine>,
    events: Events,
    settings: Pick<Settings, "factsLifetime">,
  ) {
    const { name, systems, features, speed, parallelBuilds } = told;
    this.told = told;
    this.#events = events;
    this.#lifetime = settings.factsLifetime * 1000;
    this.free = parallelBuilds;
    this.id = `${name}:22`;
    this.machine = {
      ...{ name, systems, features, speed, parallelBuilds, port: 22 },
      ...{ user: "offload", privateKey: "", hostKey: "" },
      ...{ compression: "none", compressionLevel: 3 },
      overloadThreshold: false,
      daemonSocket: "/var/guix/daemon-socket/socket",
    };
  }

  /** As the hook has them: a machine without a free slot is not asked. */
  get facts(): Facts | undefined {
    const time = EPOCH + this.#events.now * 1000;
    const age = time - (this.#facts?.time ?? -Infinity);
    if (age < this.#lifetime) return this.#facts;
    if (this.free === 0) return undefined;
    this.#noteLoad();
    return this.#facts = { time, load: this.#load, cores: this.told.cores };
  }

  /** Bytes a second, once it was sent a lot. */
  get bandwidth(): number | undefined {
    return this.measured <= this.#events.now ? this.told.bandwidth : undefined;
  }

  freeSlots = (): number => this.free;

  holds = (paths: readonly string[]): string[] =>
    paths.filter((path) => this.seen.has(path));

  running = (): readonly RunningBuild[] => this.#told;

  /** Is there from now on, or no more. */
  appear(isThere: boolean): void {
    this.isThere = isThere;
    for (const group of this.groups) {
      group.present = group.hosts.filter((host) => host.isThere);
    }
    this.#tellFree();
  }

  #tellFree(): void {
    this.free = this.told.parallelBuilds - this.#runs.size;
    const isFree = this.isThere && this.free > 0;
    for (const { free } of this.groups) {
      if (isFree) free.add(this);
      else free.delete(this);
    }
  }

  /** Builds something, and tells when that is over; is sent what it lacks. */
  start(job: Job, tell: Tell): void {
    const { now } = this.#events;
    const { store, told: { bandwidth, overhead } } = this;
    let bytes = 0;
    const missing = job.inputs.filter(({ path, size }) => {
      if (store.get(path)! <= now) return false;
      bytes += size;
      return true;
    });
    const sent = now + overhead + bytes / bandwidth;
    for (const { path } of missing) {
      store.set(path, Math.min(store.get(path) ?? sent, sent));
    }
    // Of less, the real one doesn't tell the bandwidth.
    if (bytes > 2 ** 20) this.measured = Math.min(this.measured, sent);
    this.lastUsed = EPOCH + now * 1000;
    this.bytesMoved += bytes;
    const left = job.build.seconds;
    const told = { name: job.build.name, since: EPOCH + now * 1000 };
    const run = { job, host: this, told, since: now, left, updated: now };
    this.#follow({ ...run, plans: 0, isLost: false }, sent, tell);
  }

  #follow(run: Run, sent: number, tell: Tell): void {
    this.#runs.add(run);
    this.#told = [...this.#told, run.told];
    this.#tellFree();
    this.#events.plan(sent, () => {
      if (run.isLost) return;
      run.began = run.updated = this.#events.now;
      this.#noteLoad();
      this.#building.add(run);
      this.#share(run, tell);
    });
  }

  /** Shares the processors; `changed` is new there. */
  #share(changed: Run | undefined, tell: Tell): void {
    const { speed, cores } = this.told;
    let wanted = 0;
    for (const { job } of this.#building) wanted += job.build.cores;
    const before = this.#rate;
    this.#rate = speed * Math.min(1, cores / wanted);
    const isSame = this.#rate === before;
    for (const run of isSame ? changed ? [changed] : [] : this.#building) {
      const { now } = this.#events;
      run.left = Math.max(0, run.left - (now - run.updated) * before);
      run.updated = now;
      const plan = ++run.plans;
      this.#events.plan(now + run.left / this.#rate, () => {
        if (!run.isLost && run.plans === plan) this.#retrieve(run, tell);
      });
    }
  }

  #retrieve(run: Run, tell: Tell): void {
    const { now } = this.#events;
    const { output } = run.job;
    this.#noteLoad();
    this.#building.delete(run);
    this.#share(undefined, tell);
    this.#events.plan(now + output.size / this.told.bandwidth, () => {
      if (run.isLost) return;
      this.#end(run);
      this.builds++;
      this.bytesMoved += output.size;
      this.store.set(output.path, this.#events.now);
      for (const { path } of run.job.inputs) this.seen.add(path);
      this.seen.add(output.path);
      tell(run, now - run.began!);
    });
  }

  #end(run: Run): void {
    this.#runs.delete(run);
    this.#told = this.#told.filter((it) => it !== run.told);
    this.slotSeconds += this.#events.now - run.since;
    this.#tellFree();
  }

  /** Fails: loses what runs, and what was on its way. */
  fail(): Job[] {
    const { now } = this.#events;
    const lost = [...this.#runs];
    this.#noteLoad();
    this.#building.clear();
    for (const run of lost) {
      run.isLost = true;
      this.#end(run);
    }
    for (const [path, time] of this.store) {
      if (time > now) this.store.delete(path);
    }
    this.appear(false);
    return lost.map(({ job }) => job);
  }

  /** The load of the last minute follows what is being built. */
  #noteLoad(): void {
    const { now } = this.#events;
    let wanted = 0;
    for (const { job } of this.#building) wanted += job.build.cores;
    const kept = Math.exp((this.#loadTime - now) / MINUTE);
    this.#load = wanted + (this.#load - wanted) * kept;
    this.#loadTime = now;
  }
}

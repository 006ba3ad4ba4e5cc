/**
 * A simulated farm: the clients of a guix-daemon and its machines. Times are in
 * seconds. _client.ts says what is asked for when, _policy.ts who gets it,
 * _host.ts how long that takes, _simulation.ts has all that happen.
 *
 * @module
 */

import type { InputItem, Plugin, Settings } from "../mod.ts";
import { lowerBound } from "./_bound.ts";
import { Events } from "./_events.ts";
import { Group, Host, Job } from "./_host.ts";
import { Simulation } from "./_simulation.ts";
import type { Experience, Outcome } from "./_simulation.ts";
import { BUILD, complete, fail, WORKLOAD } from "./_workload.ts";
import type { CompleteWorkload, WorkloadBuild } from "./_workload.ts";

/** The machines and builds of a simulation, or of a bound. */
export interface Layout {
  readonly hosts: readonly Host[];
  /** Each behind those that it needs. */
  readonly jobs: readonly Job[];
  readonly clients: Readonly<Record<string, number>>;
}

/** Makes a file name in the store. */
function storePath(number: number, name: string): string {
  return `/gnu/store/${String(number).padStart(32, "0")}-${name}`;
}

/** Makes the machines, and checks what the fields alone don't tell. */
function makeHosts(
  { machines }: CompleteWorkload,
  events: Events,
  settings: Pick<Settings, "factsLifetime">,
  root: string,
): Host[] {
  const names = new Set<string>();
  return machines.map((told, index) => {
    const place = `${root}.machines[${index}]`;
    const { name, parallelBuilds } = told;
    if (names.has(name)) fail(place, `'${name}' is taken`);
    names.add(name);
    if (!Number.isInteger(parallelBuilds)) {
      fail(`${place}.parallelBuilds`, "expected a whole number");
    }
    return new Host(told, events, settings);
  });
}

/** Makes builds, of what they need. */
class Builder {
  readonly known = new Map<string, InputItem | Job>();
  readonly #hosts: readonly Host[];
  readonly groups = new Map<string, Group>();

  constructor(hosts: readonly Host[]) {
    this.#hosts = hosts;
  }

  make(build: Required<WorkloadBuild>, place: string): Job {
    const { name, system, features, inputs } = build;
    const derivation = storePath(this.known.size, `${name}.drv`);
    const request = { wantsLocal: false, system, derivation, features };
    const key = [system, ...features].join(" ");
    let group = this.groups.get(key);
    if (group === undefined) {
      group = new Group(request);
      group.find(this.#hosts);
      this.groups.set(key, group);
    }
    if (group.hosts.length === 0) fail(place, `no machine builds for '${key}'`);
    const job = new Job(build, request, group);
    for (const name of new Set(inputs)) {
      job.addInput(
        this.known.get(name) ?? fail(
          `${place}.inputs[${inputs.indexOf(name)}]`,
          `no item or build '${name}' before it`,
        ),
      );
    }
    const id = build.id === BUILD.id ? build.name : build.id;
    if (this.known.has(id)) fail(place, `'${id}' is taken`);
    this.known.set(id, job);
    return job;
  }
}

/** Puts the builds in the order in which guix-daemon goes on: by name. */
function order(jobs: readonly Job[]): void {
  const key = (job: Job) => `${job.build.name}$${job.request.derivation}`;
  const keys = jobs.map((job) => [key(job), job] as const);
  keys.sort(([a], [b]) => a < b ? -1 : 1)
    .forEach(([, job], index) => job.order = index);
}

/** When the last simulation has ended: plugins see one clock. */
let turn: Promise<unknown> = Promise.resolve();

/** Builds that clients want of machines. */
export class Farm {
  readonly #workload: CompleteWorkload;
  readonly #root: string;
  readonly #groups: readonly Group[];
  #hosts: readonly Host[];
  readonly #jobs: readonly Job[];

  /**
   * Checks a workload.
   *
   * @throws {OffloadError} that names `file` and the place in it.
   */
  constructor(workload: unknown, file: string) {
    this.#root = `${file}: $`;
    this.#workload = complete(workload, WORKLOAD, this.#root);
    const { items, builds } = this.#workload;
    this.#hosts = this.#makeHosts(new Events(), { factsLifetime: 0 });
    const builder = new Builder(this.#hosts);
    const { known } = builder;
    for (const [name, size] of Object.entries(items)) {
      known.set(name, { path: storePath(known.size, name), size });
    }
    this.#jobs = builds.map((build, index) =>
      builder.make(build, `${this.#root}.builds[${index}]`)
    );
    order(this.#jobs);
    this.#groups = [...builder.groups.values()];
  }

  #makeHosts(
    events: Events,
    settings: Pick<Settings, "factsLifetime">,
  ): Host[] {
    return makeHosts(this.#workload, events, settings, this.#root);
  }

  /** Has all be as it is in the beginning. */
  #layOut(events: Events, settings: Pick<Settings, "factsLifetime">): Layout {
    const hosts = this.#hosts = this.#makeHosts(events, settings);
    for (const group of this.#groups) group.find(hosts);
    for (const job of this.#jobs) job.reset();
    return { hosts, jobs: this.#jobs, clients: this.#workload.clients };
  }

  /** The makespan that no policy can fall below, in seconds. */
  lowerBound(): number {
    return lowerBound({
      hosts: this.#hosts,
      jobs: this.#jobs,
      clients: this.#workload.clients,
    });
  }

  /**
   * Simulates, once, how plugins decide whose scores are summed. The seed
   * decides among equals; `experience` is what is known from before.
   */
  async run(
    plugins: readonly Plugin[],
    seed: number,
    settings: Settings,
    experience?: Experience,
  ): Promise<Outcome> {
    return await this.#takeTurn(() => {
      const events = new Events();
      const layout = this.#layOut(events, settings);
      return new Simulation(layout, events, plugins, seed, settings, experience)
        .run();
    });
  }

  /** Does something when all else is done. */
  #takeTurn<T>(work: () => T | Promise<T>): Promise<T> {
    const done = turn.then(work);
    turn = done.catch(() => {});
    return done;
  }
}

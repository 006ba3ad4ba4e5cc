/**
 * The makespan that no policy can fall below, whatever it knows. It is the best
 * of bounds that are proved here; times are in seconds.
 *
 * A build j that machine h does holds a slot there for at least
 *
 *     cost(j, h) = overhead + seconds / speed + (output + own inputs) / bandwidth
 *
 * where its own inputs are those that no other build needs and no build makes:
 * they have to be sent there. Seconds count more where it keeps more processors
 * busy than there are.
 *
 * **The chain.** A build starts no sooner than `head`: its client's beginning,
 * or the longest chain of builds before it, each at its least cost. Its end is
 * at least `tail` before the last: the longest chain behind it. So head + least
 * cost + tail of any build is a bound.
 *
 * **The work.** Let A be the builds whose head is at least r and whose tail is
 * at least q. All of them run within r and T - q, so no machine has more than
 * (T - q - r) * slots of slot-seconds, and * processors of processor-seconds,
 * for them. Take any weights of a slot and of a processor of each machine,
 * w and u, none below 0, that add up to 1 over all slots and processors. Then
 *
 *     T - q - r >= sum over h of (w * slot-seconds used there for A)
 *                + sum over h of (u * processor-seconds used there for A)
 *               >= sum over j in A of min over h of
 *                  (w * cost(j, h) + u * processors * seconds / speed)
 *
 * for each build is done somewhere, at best where that is least. An input that
 * several builds need, all of A, is sent to one machine at least that can do
 * one of them: that adds min over h of w * size / bandwidth. This holds for all
 * weights, r and q; which are good is found by trying (`improve`): by duality,
 * the best weights give just what an optimal division of the work takes.
 *
 * @module
 */

import type { Layout } from "./_farm.ts";
import type { Group, Host, Job } from "./_host.ts";

/** Machines that are the same in all that a bound knows. */
interface Kind {
  readonly host: Host;
  /** Slots and processors of all together. */
  slots: number;
  processors: number;
}

/** What a build needs of each kind of machine that can do it. */
interface Task {
  readonly kinds: readonly number[];
  /** The slot-seconds that it takes there. */
  readonly slots: readonly number[];
  /** The processor-seconds that it takes there. */
  readonly processors: readonly number[];
  readonly head: number;
  readonly tail: number;
}

/** Weights of a slot and of a processor, by the kind of machine. */
interface Weights {
  readonly slots: Float64Array;
  readonly processors: Float64Array;
}

/** An r and a q. */
type Times = Pick<Task, "head" | "tail">;

/** How often weights are changed, for how many tasks, and r and q chosen. */
const TRIES = { weights: 150, tasks: 3000, times: 30, rounds: 3 } as const;

/** Sorts machines by their kind; tells the kinds of a group. */
function findKinds(
  hosts: readonly Host[],
): [Kind[], (group: Group) => readonly number[]] {
  const groups = [...new Set(hosts.flatMap((host) => host.groups))];
  const kinds = new Map<string, Kind>();
  for (const host of hosts) {
    const { speed, bandwidth, overhead, cores, parallelBuilds } = host.told;
    const able = groups.map((group) => Number(host.groups.includes(group)));
    const key = [speed, bandwidth, overhead, cores, ...able].join();
    const kind = kinds.get(key) ?? { host, slots: 0, processors: 0 };
    kinds.set(key, kind);
    kind.slots += parallelBuilds;
    kind.processors += cores;
  }
  const list = [...kinds.values()];
  const byGroup = new Map(groups.map((group) => {
    const able = list.flatMap(({ host }, index) =>
      host.groups.includes(group) ? [index] : []
    );
    return [group, able];
  }));
  return [list, (group) => byGroup.get(group)!];
}

/** Who needs what has to be sent, whoever does the builds, by its path. */
function findSent(jobs: readonly Job[]): Map<string, Job[]> {
  const makers = new Map(jobs.map((job) => [job.output.path, job.group]));
  const sent = new Map<string, Job[]>();
  for (const job of jobs) {
    for (const { path } of job.inputs) {
      const maker = makers.get(path);
      if (maker && sharesMachine(maker, job.group)) continue;
      const needed = sent.get(path);
      if (needed === undefined) sent.set(path, [job]);
      else needed.push(job);
    }
  }
  return sent;
}

function sharesMachine(one: Group, other: Group): boolean {
  return one === other || one.hosts.some((host) => host.groups.includes(other));
}

/** Adds the chains before and behind the builds to what they take. */
function addChains(
  jobs: readonly Job[],
  clients: Layout["clients"],
  least: (job: Job) => number,
): Map<Job, Times> {
  const ends = new Map<Job, number>();
  const heads = jobs.map((job) => {
    const begin = clients[job.build.client] ?? 0;
    const head = Math.max(begin, ...job.parents.map((it) => ends.get(it)!));
    ends.set(job, head + least(job));
    return head;
  });
  const tails = new Map<Job, number>();
  for (const job of jobs.toReversed()) {
    const behind = job.children.map((it) => tails.get(it)! + least(it));
    tails.set(job, Math.max(0, ...behind));
  }
  return new Map(
    jobs.map((job, i) => [job, { head: heads[i]!, tail: tails.get(job)! }]),
  );
}

/** What a build takes on a machine: slot-seconds and processor-seconds. */
function taken({ build }: Job, bytes: number, host: Host): [number, number] {
  const { speed, bandwidth, overhead, cores } = host.told;
  const work = build.seconds / speed;
  const slower = Math.max(1, build.cores / cores);
  const moved = (build.output + bytes) / bandwidth;
  return [overhead + work * slower + moved, work * build.cores];
}

/** What tells which kinds of machines there are, and of which a group is. */
type Kinds = ReturnType<typeof findKinds>;

/** What the builds take, each on the machines that can do it. */
function findWork(
  jobs: readonly Job[],
  own: ReadonlyMap<Job, number>,
  [kinds, kindsOf]: Kinds,
): Map<Job, Omit<Task, keyof Times>> {
  return new Map(jobs.map((job) => {
    const able = kindsOf(job.group);
    const all = able.map((it) =>
      taken(job, own.get(job) ?? 0, kinds[it]!.host)
    );
    const slots = all.map(([it]) => it);
    return [job, { kinds: able, slots, processors: all.map(([, it]) => it) }];
  }));
}

/** What sending an input that several builds need takes at least. */
function inputTask(
  size: number,
  needed: readonly Job[],
  chains: ReadonlyMap<Job, Times>,
  [kinds, kindsOf]: Kinds,
): Task {
  const able = [...new Set(needed.flatMap(({ group }) => kindsOf(group)))]
    .sort((a, b) => a - b);
  return {
    kinds: able,
    slots: able.map((it) => size / kinds[it]!.host.told.bandwidth),
    processors: able.map(() => 0),
    head: Math.min(...needed.map((job) => chains.get(job)!.head)),
    tail: Math.min(...needed.map((job) => chains.get(job)!.tail)),
  };
}

/** The builds, and the inputs that several of them need. */
function findTasks({ jobs, clients }: Layout, kinds: Kinds): Task[] {
  const sizes = new Map(
    jobs.flatMap(({ inputs }) => inputs.map(({ path, size }) => [path, size])),
  );
  const shared: [size: number, needed: readonly Job[]][] = [];
  const own = new Map<Job, number>();
  for (const [path, needed] of findSent(jobs)) {
    const [job] = needed;
    const size = sizes.get(path)!;
    if (needed.length > 1) shared.push([size, needed]);
    else own.set(job!, (own.get(job!) ?? 0) + size);
  }
  const work = findWork(jobs, own, kinds);
  const least = (job: Job) => Math.min(...work.get(job)!.slots);
  const chains = addChains(jobs, clients, least);
  return jobs.map((job): Task => ({ ...work.get(job)!, ...chains.get(job)! }))
    .concat(shared.map((it) => inputTask(...it, chains, kinds)));
}

/** Tasks in a row, so that they are gone through quickly. */
class Row {
  readonly length: number;
  /** Where those of a task begin among the following. */
  readonly #starts: Int32Array;
  readonly #kinds: Int32Array;
  readonly #slots: Float64Array;
  readonly #processors: Float64Array;

  constructor(tasks: readonly Task[]) {
    this.length = tasks.length;
    let total = 0;
    const starts = tasks.map(({ kinds }) => (total += kinds.length));
    this.#starts = Int32Array.from([0, ...starts]);
    this.#kinds = Int32Array.from(tasks.flatMap(({ kinds }) => kinds));
    this.#slots = Float64Array.from(tasks.flatMap(({ slots }) => slots));
    this.#processors = Float64Array.from(
      tasks.flatMap(({ processors }) => processors),
    );
  }

  /** What each weighs at least, and what the machines then have to do. */
  divide(weights: Weights): Division {
    const least = new Float64Array(this.length);
    const slots = new Float64Array(weights.slots.length);
    const processors = new Float64Array(weights.slots.length);
    for (let task = 0; task < this.length; task++) {
      const index = this.#best(task, weights);
      const kind = this.#kinds[index]!;
      least[task] = this.#weigh(index, weights);
      slots[kind]! += this.#slots[index]!;
      processors[kind]! += this.#processors[index]!;
    }
    const sum = least.reduce((total, it) => total + it, 0);
    return { least, sum, slots, processors };
  }

  #weigh(index: number, { slots, processors }: Weights): number {
    const kind = this.#kinds[index]!;
    return slots[kind]! * this.#slots[index]! +
      processors[kind]! * this.#processors[index]!;
  }

  #best(task: number, weights: Weights): number {
    let best = this.#starts[task]!;
    let least = Infinity;
    for (let index = best; index < this.#starts[task + 1]!; index++) {
      const weight = this.#weigh(index, weights);
      if (weight < least) [least, best] = [weight, index];
    }
    return best;
  }
}

/** Tasks that are divided among machines as costs least by some weights. */
interface Division extends Weights {
  /** What each task weighs. */
  readonly least: Float64Array;
  /** What all weigh. */
  readonly sum: number;
}

/** Has the weights of all slots and processors add up to 1. */
function normalize(weights: Weights, kinds: readonly Kind[]): Weights {
  let total = 0;
  kinds.forEach(({ slots, processors }, kind) => {
    total += slots * weights.slots[kind]! +
      processors * weights.processors[kind]!;
  });
  return {
    slots: weights.slots.map((weight) => weight / total),
    processors: weights.processors.map((weight) => weight / total),
  };
}

/** Makes those weights larger where more is to be done than elsewhere. */
function shift(
  weights: Weights,
  { sum, slots, processors }: Division,
  kinds: readonly Kind[],
  step: number,
): Weights {
  // Where all is divided best, each that counts is busy for `sum`.
  const factor = (used: number, there: number) =>
    Math.exp(step * Math.max(-1, Math.min(1, used / there / sum - 1)));
  return normalize({
    slots: weights.slots.map((it, kind) =>
      it * factor(slots[kind]!, kinds[kind]!.slots)
    ),
    processors: weights.processors.map((it, kind) =>
      it * factor(processors[kind]!, kinds[kind]!.processors)
    ),
  }, kinds);
}

/** Tries to find better weights: for some of the tasks, where they are many. */
function improve(
  first: Weights,
  tasks: readonly Task[],
  kinds: readonly Kind[],
): Weights {
  const each = Math.ceil(tasks.length / TRIES.tasks);
  const some = new Row(tasks.filter((_, index) => index % each === 0));
  let best = first;
  let most = 0;
  let weights = first;
  for (let index = 0; index < TRIES.weights; index++) {
    const divided = some.divide(weights);
    if (divided.sum > most) [most, best] = [divided.sum, weights];
    weights = shift(weights, divided, kinds, 1 / (1 + index / 10));
  }
  return best;
}

/** Some of the values, from the lowest on, evenly as to their number. */
function quantiles(values: readonly number[]): number[] {
  const sorted = values.toSorted((a, b) => a - b);
  const chosen = Array.from(
    { length: TRIES.times },
    (_, index) => sorted[Math.floor(index * sorted.length / TRIES.times)]!,
  );
  return [...new Set(chosen)];
}

/** How many of the values, from the lowest on, are not above `value`. */
function rankOf(value: number, values: readonly number[]): number {
  let rank = 0;
  while (rank < values.length && values[rank]! <= value) rank++;
  return rank;
}

/** The bound of the work, with the best of some r and q. */
function bestTimes(
  tasks: readonly Task[],
  least: Float64Array,
  heads: readonly number[],
  tails: readonly number[],
): Times & { bound: number } {
  const sums = heads.map(() => new Float64Array(tails.length + 1));
  sums.push(new Float64Array(tails.length + 1));
  tasks.forEach(({ head, tail }, index) => {
    const [h, t] = [rankOf(head, heads) - 1, rankOf(tail, tails) - 1];
    sums[h]![t]! += least[index]!;
  });
  let best = { head: 0, tail: 0, bound: 0 };
  for (let h = heads.length - 1; h >= 0; h--) {
    let row = 0; // what is in this row from here on
    for (let t = tails.length - 1; t >= 0; t--) {
      row += sums[h]![t]!;
      const sum = sums[h]![t] = row + sums[h + 1]![t]!;
      const [head, tail] = [heads[h]!, tails[t]!];
      const bound = head + tail + sum;
      // Where there is no such build, that is none of anything.
      if (sum > 0 && bound > best.bound) best = { head, tail, bound };
    }
  }
  return best;
}

/** The weights to begin with: by speed, of all machines and of each group. */
function firstWeights(
  kinds: readonly Kind[],
  tasks: readonly Task[],
): Weights[] {
  const all = kinds.map((_, kind) => kind);
  const groups = new Map(tasks.map((task) => [task.kinds.join(), task.kinds]));
  return [all, ...groups.values()].map((able) => {
    const slots = Float64Array.from(
      kinds,
      ({ host }, kind) => able.includes(kind) ? host.told.speed : 1e-6,
    );
    return normalize({ slots, processors: slots.map((it) => it / 1e3) }, kinds);
  });
}

/** The makespan that no policy can fall below, in seconds. */
export function lowerBound(layout: Layout): number {
  const { hosts, jobs } = layout;
  if (jobs.length === 0) return 0;
  const sorted = findKinds(hosts);
  const [kinds] = sorted;
  const tasks = findTasks(layout, sorted);
  let bound = 0;
  for (const { head, tail, slots } of tasks) {
    bound = Math.max(bound, head + tail + Math.min(...slots));
  }
  const row = new Row(tasks);
  const heads = quantiles(tasks.map(({ head }) => head));
  const tails = quantiles(tasks.map(({ tail }) => tail));
  for (let weights of firstWeights(kinds, tasks)) {
    let chosen: readonly Task[] = tasks;
    for (let round = 0; round < TRIES.rounds; round++) {
      weights = improve(weights, chosen, kinds);
      const best = bestTimes(tasks, row.divide(weights).least, heads, tails);
      bound = Math.max(bound, best.bound);
      chosen = tasks.filter(({ head, tail }) =>
        head >= best.head && tail >= best.tail
      );
    }
  }
  return bound;
}

/**
 * The builds that wait in a simulation, as the hook's processes tell each other.
 *
 * @module
 */

import type { Deferral, WaitingBuild } from "../mod.ts";
import type { Job } from "./_host.ts";

/** How many are told, and after how many ms without a word no more. */
const TOLD = { most: 64, lifetime: 15_000 } as const;

/** What does not change while a build waits and gains by that. */
function keyOf({ rank = 0, since }: WaitingBuild): number {
  return rank - since / 1000;
}

/** The builds that wait. */
export class Waiting {
  /** The most urgent first. */
  readonly #builds: WaitingBuild[] = [];

  /** The place of the first one that is less urgent. */
  #placeOf(key: number): number {
    let [low, high] = [0, this.#builds.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (keyOf(this.#builds[middle]!) >= key) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** Notes that a build waits, at a time in milliseconds. */
  note(job: Job, { why, rank, candidate }: Deferral, now: number): void {
    const { derivation, system, features } = job.request;
    const since = job.waiting?.since ?? now;
    const build = { derivation, since, seen: now, why, rank, system, features };
    const noted = { ...build, machine: candidate?.id };
    if (job.waiting && keyOf(job.waiting) === keyOf(noted)) {
      Object.assign(job.waiting, noted); // it keeps its place among thousands
      return;
    }
    this.forget(job);
    job.waiting = noted;
    this.#builds.splice(this.#placeOf(keyOf(job.waiting)), 0, job.waiting);
  }

  /** Notes that a build waits no more. */
  forget(job: Job): void {
    if (job.waiting === undefined) return;
    const place = this.#placeOf(keyOf(job.waiting)) - 1;
    const index = this.#builds.lastIndexOf(job.waiting, place);
    this.#builds.splice(index, 1);
    job.waiting = undefined;
  }

  /** The most urgent ones. */
  urgent(now: number): WaitingBuild[] {
    const urgent: WaitingBuild[] = [];
    for (const build of this.#builds) {
      if (urgent.length === TOLD.most) break;
      if (now - build.seen <= TOLD.lifetime) urgent.push(build);
    }
    return urgent;
  }
}

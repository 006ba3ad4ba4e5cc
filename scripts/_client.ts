/**
 * A simulated client of guix-daemon: the process that serves it, as it decides
 * what to ask its hook (nix/libstore/build.cc: `Worker::run`, `waitForInput`).
 *
 * What can be built is asked for in the order of names, one after another; while
 * an answer is awaited, nothing else happens, nor is it noticed that a build has
 * ended. What was postponed is asked for again once 5 s have passed since that
 * was done last, and the process has nothing else to do; the end of a build, as
 * that of any output, only makes it look at the clock.
 *
 * @module
 */

import type { Awaitable } from "../mod.ts";
import type { Events } from "./_events.ts";
import type { Job } from "./_host.ts";

/** After how many seconds guix-daemon asks again, and waits at least. */
const POLL = { interval: 5, least: 1 } as const;

/** What became of a request. */
export type Answer = "accepted" | "postponed" | "held";

/** A client and its builds. */
export class Client {
  readonly #events: Events;
  /** Tells that there is something to do. */
  readonly #wake: () => void;
  /** What is asked for now, from the index `#next` on. */
  #batch: Job[] = [];
  #next = 0;
  /** What is asked for after that. */
  #awake: Job[] = [];
  #postponed: Job[] = [];
  #ended: Job[] = [];
  #hasBegun = false;
  #isHeld = false;
  #isAsleep = false;
  /** When it last asked again, and until when it sleeps. */
  #polled = -Infinity;
  #until = Infinity;

  constructor(events: Events, wake: () => void) {
    this.#events = events;
    this.#wake = wake;
  }

  /** Begins, and wants what can be built already. */
  want(jobs: readonly Job[]): void {
    this.#hasBegun = true;
    for (const job of jobs) this.#awake.push(job);
    this.#wake();
  }

  /** Learns that one of its builds has ended, once it can. */
  tellEnded(job: Job): void {
    this.#ended.push(job);
    if (!this.#isHeld) this.#wake();
  }

  /** Learns that another client has built something: its lock is free. */
  tellUnlocked(job: Job): void {
    this.#postponed.push(job);
    this.#isAsleep = false;
    if (!this.#isHeld) this.#wake();
  }

  /** Gets the answer to what was held. */
  answer(job: Job, answer: Answer): void {
    this.#isHeld = false;
    if (answer === "postponed") this.#postponed.push(job);
    this.#wake();
  }

  /** Has work done until there is none, or the hook has it wait. */
  async work(
    ask: (job: Job) => Awaitable<Answer>,
    unlock: (job: Job) => Job[],
  ): Promise<void> {
    while (this.#hasBegun) {
      while (!this.#isHeld && this.#next < this.#batch.length) {
        const job = this.#batch[this.#next++]!;
        const asked = ask(job);
        const answer = typeof asked === "string" ? asked : await asked;
        if (answer === "postponed") this.#postponed.push(job);
        this.#isHeld = answer === "held";
      }
      if (this.#isHeld) return;
      if (this.#awake.length === 0) {
        if (this.#sleeps()) return;
        this.#wakeUp(unlock);
      }
      this.#batch = this.#awake.splice(0).sort((a, b) => a.order - b.order);
      this.#next = 0;
    }
  }

  /** Goes to sleep, or on sleeping, until it is time or a build has ended. */
  #sleeps(): boolean {
    const { now } = this.#events;
    if (!this.#isAsleep) {
      this.#isAsleep = true;
      this.#until = Infinity;
      if (this.#postponed.length === 0) this.#polled = -Infinity;
      else {
        if (this.#polled === -Infinity) this.#polled = now;
        const next = this.#polled + POLL.interval;
        this.#until = Math.max(now + POLL.least, next);
        this.#events.plan(this.#until, this.#wake);
      }
    }
    return this.#ended.length === 0 && now < this.#until;
  }

  #wakeUp(unlock: (job: Job) => Job[]): void {
    const { now } = this.#events;
    this.#isAsleep = false;
    for (const job of this.#ended.splice(0)) this.#awake.push(...unlock(job));
    if (this.#postponed.length === 0) return;
    if (this.#polled + POLL.interval > now) return;
    this.#polled = now;
    for (const job of this.#postponed.splice(0)) this.#awake.push(job);
  }
}

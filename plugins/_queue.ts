/**
 * Those who wait for a slot in a process that serves many hooks.
 *
 * @module
 */

import type { SlotQueue } from "../mod.ts";

/** When to look for a slot that another process frees, in milliseconds. */
const LOOKS = { each: 25, longest: 250 } as const;

/** Who waits. */
interface Waiter {
  /** Has it look; where no slot is free for it, it has `next` look. */
  wake(next: () => void): void;
}

const IS_AWAKE: Waiter["wake"] = (next) => next();

/** Those who wait, the first first. */
export class Queue implements SlotQueue {
  readonly #waiters = new Set<Waiter>();

  /** Has those look who wait, until one finds a slot free for it. */
  tellFreed([first, ...others] = [...this.#waiters]): void {
    first?.wake(() => this.tellFreed(others));
  }

  /** Waits until `end` for a slot to be free; returns whether one is. */
  readonly untilFree = async (
    isFree: () => boolean,
    end: number,
    signal: AbortSignal,
  ): Promise<boolean> => {
    const waiter = { wake: IS_AWAKE };
    this.#waiters.add(waiter);
    try {
      while (performance.now() < end) {
        const next = await this.#untilLook(waiter, end);
        const isMine = !signal.aborted && isFree();
        if (!isMine) next();
        signal.throwIfAborted();
        if (isMine) return true;
      }
      return false;
    } finally {
      this.#waiters.delete(waiter);
    }
  };

  /** Waits until it is to look; returns who is next, if anybody. */
  #untilLook(waiter: Waiter, end: number): Promise<() => void> {
    return new Promise((resolve) => {
      // Many who look often would do nothing else.
      const usual = Math.min(LOOKS.each * this.#waiters.size, LOOKS.longest);
      const pause = Math.min(usual, end - performance.now());
      const timer = setTimeout(() => waiter.wake(() => {}), pause);
      waiter.wake = (next) => {
        clearTimeout(timer);
        waiter.wake = IS_AWAKE;
        resolve(next);
      };
    });
  }
}

/**
 * The clock of a simulation, and what is going to happen: the time only moves
 * from one event to the next.
 *
 * @module
 */

/** When time 0 of a simulation is, in milliseconds since 1970. */
export const EPOCH = Date.UTC(2026, 0, 1);

/** Something that happens. */
interface Event {
  readonly time: number;
  /** Of those at the same time, the one that was planned first comes first. */
  readonly order: number;
  readonly happen: () => void;
}

function isBefore(a: Event, b: Event): boolean {
  return a.time < b.time || (a.time === b.time && a.order < b.order);
}

/** What is going to happen, in a binary heap. */
export class Events {
  /** Seconds since the simulation began. */
  now = 0;
  readonly #heap: Event[] = [];
  #planned = 0;

  /** Has something happen, once. */
  plan(time: number, happen: () => void): void {
    const heap = this.#heap;
    const event = { time, order: this.#planned++, happen };
    let index = heap.push(event) - 1;
    while (index > 0) {
      const parent = (index - 1) >> 1;
      if (!isBefore(event, heap[parent]!)) break;
      heap[index] = heap[parent]!;
      index = parent;
    }
    heap[index] = event;
  }

  /** Goes on to the next time at which something happens; false at the end. */
  goOn(): boolean {
    const first = this.#heap[0];
    if (first === undefined) return false;
    this.now = first.time;
    while (this.#heap[0]?.time === this.now) this.#take().happen();
    return true;
  }

  #take(): Event {
    const heap = this.#heap;
    const first = heap[0]!;
    const last = heap.pop()!;
    if (last !== first) this.#sink(last);
    return first;
  }

  #sink(event: Event): void {
    const heap = this.#heap;
    let index = 0;
    for (;;) {
      let child = 2 * index + 1;
      if (child >= heap.length) break;
      const other = heap[child + 1];
      if (other !== undefined && isBefore(other, heap[child]!)) child++;
      if (isBefore(event, heap[child]!)) break;
      heap[index] = heap[child]!;
      index = child;
    }
    heap[index] = event;
  }
}

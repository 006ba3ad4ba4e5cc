/** Who waits for a slot in a process that serves many hooks. */

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { Queue } from "../plugins/_queue.ts";
import { settled } from "./helpers.ts";

const test = suite("queue");

const never = new AbortController().signal;

/** Long from now: where a test waits for it, it fails. */
const LATE = Infinity;

/** Counts looks, the first of which is by a timer or by who frees a slot. */
function makeWaiter(queue: Queue, isFree: () => boolean, signal = never) {
  const waiter = { looks: 0, result: Promise.resolve(false) };
  waiter.result = queue.untilFree(
    () => {
      waiter.looks++;
      return isFree();
    },
    LATE,
    signal,
  );
  return waiter;
}

/** Lets all go on that waits for no timer. */
async function turn(): Promise<void> {
  for (let i = 0; i < 100; i++) await null;
}

test("tellFreed() wakes the first who has a use for the slot", async () => {
  const queue = new Queue();
  const order: string[] = [];
  let free = "";
  for (const name of ["other", "first", "first", "other"]) {
    queue.untilFree(() => free === name, LATE, never)
      .then(() => order.push(name));
  }
  for (const name of ["first", "other", "first"]) {
    free = name;
    queue.tellFreed();
    await turn();
    assert.is(order.shift(), name);
    assert.equal(order, []);
  }
  free = "other";
  queue.tellFreed();
  await turn();
});

test("each slot that is freed wakes another", async () => {
  const queue = new Queue();
  let free = 0;
  const waiters = Array.from(
    { length: 8 },
    () => makeWaiter(queue, () => free > 0 && free-- > 0),
  );
  free = 8;
  for (let freed = 0; freed < 8; freed++) queue.tellFreed();
  await turn();
  assert.equal(waiters.map(({ looks }) => looks), Array(8).fill(1));
  await settled(Promise.all(waiters.map(({ result }) => result)));
});

test("who was interrupted takes nobody's turn", async () => {
  const queue = new Queue();
  const abort = new AbortController();
  let isFree = false;
  const first = makeWaiter(queue, () => isFree, abort.signal);
  const second = makeWaiter(queue, () => isFree);
  first.result.catch(() => {});
  abort.abort(new Error("interrupted"));
  isFree = true;
  queue.tellFreed();
  await turn();
  assert.is(second.looks, 1);
  assert.is(await settled(second.result), true);
  assert.is(first.looks, 0);
  assert.match(
    String(await settled(first.result.catch(String))),
    "interrupted",
  );
});

test("what another process frees is seen, too", async () => {
  const queue = new Queue();
  let looks = 0;
  const waits = Array.from(
    { length: 3 },
    () => queue.untilFree(() => ++looks > 9, LATE, never),
  );
  assert.equal(await settled(Promise.all(waits)), [true, true, true]);
});

test("untilFree() ends in time", async () => {
  const queue = new Queue();
  const end = performance.now() + 60;
  const waits = [1, 2].map(() => queue.untilFree(() => false, end, never));
  assert.equal(await settled(Promise.all(waits)), [false, false]);
  assert.ok(performance.now() >= end);
  queue.tellFreed(); // nobody waits
});

test.run();

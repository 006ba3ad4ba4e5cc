/** What `offload status` says of builds that are under way. */

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { acquireBuildSlot, machineId } from "../mod.ts";
import type { Context, Course, Screen, Slot } from "../mod.ts";
import {
  describeBuild,
  describeWaiting,
  findWaiting,
  findWork,
  formatWork,
} from "../plugins/_at_work.ts";
import { drawBar } from "../plugins/_screen.ts";
import { machine, makeContext } from "./context.ts";
import { until } from "./helpers.ts";

const test = suite("at work");

const only = machine({ name: "w1", parallelBuilds: 3 });

/** A terminal that shows no Unicode, and colours as tags. */
const SCREEN: Screen = {
  isTerminal: true,
  paint: (style, text) => `<${style}>${text}</>`,
  size: () => [80, 24],
  bar: (share, columns) => drawBar(share, columns - 2, false, "-"),
  print: () => {},
  progress: () => ({ step: () => {}, end: () => {} }),
};

/** The file name of a derivation. */
function derivationOf(name: string): string {
  return `/gnu/store/${"0".repeat(32)}-${name}.drv`;
}

/** A build that has a slot. */
interface Held {
  readonly slot: Slot;
  /** Ends what tells how far it is. */
  unfollow(): void;
  /** Ends it. */
  end(): void;
}

/** Takes a slot for a build, which tells how far it is. */
async function hold(
  name: string,
  course: Partial<Course>,
  { observations, stateDirectory }: Context,
): Promise<Held> {
  const slot = acquireBuildSlot(only, stateDirectory)!;
  observations.useSlot(machineId(only), slot, derivationOf(name));
  const whole = { machine: "w1:22", slot: 0, began: 0, moved: 0, ...course };
  const { journal } = observations;
  const unfollow = journal!.follow(slot, whole);
  const shared = journal as typeof journal & { courses(): Map<string, Course> };
  await until("its course", () => shared.courses().has(slot.file));
  const end = () => {
    unfollow();
    observations.releaseSlot(slot.file, derivationOf(name));
    slot.release();
  };
  return { slot, unfollow, end };
}

test("builds tell what they are at, and for how long still", async () => {
  const { context } = makeContext();
  const { observations } = context;
  const seconds = [3, 1000, 4, 100, ...Array(20).fill(7)];
  for (const [index, each] of seconds.toReversed().entries()) {
    const id = index % 2 ? "w1" : "w2";
    observations.saveBuild(machine({ name: id }), "a-1", each, []);
  }
  observations.saveBuild(machine({ name: "w2" }), "b-1", 50, []);
  const now = Date.now();
  const sent = { connected: now - 4000, sent: now - 3000 };
  const moving = { connected: now - 2000, moved: 2 ** 20, total: 2 ** 22 };
  const held = [
    await hold("a-1", { ...sent, slot: 0 }, context),
    await hold("b-1", { ...moving, slot: 1 }, context),
    await hold("c-1", { ...sent, ...moving, built: now, slot: 2 }, context),
  ];
  const work = findWork(only, context);
  const [building, sending, retrieving] = work;
  assert.is(building!.phase, "building");
  assert.is(building!.derivation, derivationOf("a-1"));
  assert.ok(building!.building! >= 3);
  assert.is(building!.usual, 7, "there, the last ten at most");
  assert.is(sending!.phase, "sending");
  assert.is(sending!.usual, 50, "elsewhere, for none was there");
  assert.is(sending!.total, 2 ** 22);
  assert.ok(
    sending!.rate! > 0 && sending!.rate! <= 2 ** 19,
    `${sending!.rate}`,
  );
  assert.is(retrieving!.phase, "retrieving");
  assert.is(retrieving!.usual, undefined);
  const lines = work.map(describeBuild);
  assert.match(lines[0]!, /^building a-1 for \d s \((about )?\d s l/);
  assert.match(
    lines[1]!,
    /^building b-1 for \d s \(sending, 1.0 of 4.0 MiB, 0/,
  );
  held.forEach(({ end }) => end());
  assert.equal(findWork(only, context), []);
});

test("what a build has told that was killed is not another's", async () => {
  const { context } = makeContext();
  const { observations, stateDirectory } = context;
  const killed = await hold("killed", { connected: 1, sent: 2 }, context);
  killed.slot.release();
  assert.equal(findWork(only, context), [], "it holds no slot");
  const slot = acquireBuildSlot(only, stateDirectory)!;
  assert.is(slot.file, killed.slot.file);
  const now = Date.now();
  await until("another millisecond", () => Date.now() > now);
  observations.useSlot("w1:22", slot, derivationOf("next"));
  const [{ phase, derivation }, ...more] = findWork(only, context) as [
    ReturnType<typeof findWork>[number],
  ];
  assert.equal([phase, derivation], [undefined, derivationOf("next")]);
  assert.equal(more, []);
  observations.releaseSlot(slot.file, derivationOf("next"));
  const [others] = findWork(only, context);
  assert.is(describeBuild(others!), "a build of another program's");
  slot.release();
  killed.unfollow();
});

test("builds that wait are told of until they have a slot", () => {
  const { context } = makeContext();
  const { journal } = context.observations;
  journal!.saveWait(derivationOf("a-1"), "busy");
  journal!.saveWait(derivationOf("b-1"), "unreachable");
  const work = [{ derivation: derivationOf("a-1") }];
  assert.equal(
    describeWaiting(findWaiting([], context)),
    ["a-1 waits for a free slot for 0 s", "b-1 waits for a machine for 0 s"],
  );
  assert.equal(
    findWaiting(work, context).map(({ derivation }) => derivation),
    [derivationOf("b-1")],
  );
});

test("formatWork() fits: long names, many builds, odd ones", () => {
  const since = new Date().toISOString();
  const of = (name: string) => ({ derivation: derivationOf(name), since });
  const building = { phase: "building", building: 5, usual: 10 } as const;
  const late = { phase: "building", building: 20, usual: 10 } as const;
  const moving = { phase: "sending", moved: 2 ** 20, total: 2 ** 21 } as const;
  const work = new Map([
    ["w1:22", [{ ...of("a-1"), slot: 0, ...building }, {}]],
    ["w2:22", [
      { ...of("b".repeat(200)), slot: 1, ...moving, rate: 2 ** 19 },
      { ...of("\x1b[2J\r\n"), ...late },
    ]],
  ]);
  const waiting = [{
    ...{ derivation: derivationOf("d-1"), since: Date.now() - 7e6 },
    ...{ seen: Date.now(), why: "busy" },
  }];
  const text = formatWork(work, waiting, 10, SCREEN);
  const lines = text.split("\n");
  assert.match(lines[0]!, /^<heading>build +machine +at +for<\/>$/);
  assert.match(
    lines[1]!,
    /^a-1 +w1:22\/0 +building +0 s +\[#{6}-{6}\] +about 5 s/,
  );
  assert.match(lines[2]!, /^another's +w1:22$/);
  assert.match(
    lines[3]!,
    /^b{37}\.\.\. +w2:22\/1 +sending +0 s +\[#{6}-{6}\] +1\.0 of 2\.0 MiB, 0\.5/,
  );
  assert.match(lines[4]!, /\[#{12}\] +10 s longer than usual$/);
  assert.match(lines[5]!, /^d-1 +waits for a free slot +2 h$/);
  assert.not.match(text.replaceAll("\n", ""), /\p{Cc}/u);
  const few = formatWork(work, waiting, 3, SCREEN).split("\n");
  assert.is(few.length, 4);
  assert.is(few[3], "and 3 more");
  assert.is(formatWork(new Map(), [], 3, SCREEN), "");
});

test.run();

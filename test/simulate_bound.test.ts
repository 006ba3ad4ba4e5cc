/** The bound of a simulated farm: no policy falls below it, and some reach it. */

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { readSettings } from "../mod.ts";
import type { Plugin } from "../mod.ts";
import locality from "../plugins/locality.ts";
import { Farm } from "../scripts/_farm.ts";
import { list, makeChances, makeRandom } from "../scripts/_workload.ts";
import type {
  Workload,
  WorkloadBuild,
  WorkloadMachine,
} from "../scripts/_workload.ts";

const test = suite("simulate_bound");

const settings = readSettings("/nonexistent", {});

function bound(workload: Workload): number {
  return new Farm(workload, "test").lowerBound();
}

/** Asserts that two times are the same, but for what searching leaves. */
function assertNear(actual: number, expected: number): void {
  const text = `expected ${expected}, got ${actual}`;
  assert.ok(actual <= expected * (1 + 1e-9), text);
  assert.ok(actual >= expected * 0.995, text);
}

/** Makes up a small workload, in which anything may be. */
function makeUp(seed: number): Workload {
  const { pick } = makeChances(seed);
  const some = (...values: number[]) => values[pick(values.length)]!;
  const systems = ["x86_64-linux", "aarch64-linux"];
  const machines = list(1 + pick(4), (index): WorkloadMachine => ({
    name: `m${index}`,
    systems: index === 0 ? systems : [systems[pick(2)]!],
    features: index === 0 || pick(2) ? ["kvm"] : [],
    speed: some(1, 1.5, 2, 4),
    parallelBuilds: some(1, 2, 4),
    cores: some(1, 2, 4),
    bandwidth: some(1e6, 1e7, 1e8),
    overhead: some(0, 0, 0.5),
    ...index > 0 && pick(3) === 0 && { fails: some(3, 20), returns: 30 },
    ...index > 0 && pick(4) === 0 && { joins: some(2, 10) },
    ...index > 0 && pick(4) === 0 && { leaves: some(15, 60) },
  }));
  const items = Object.fromEntries(
    list(4, (index) => [`i${index}`, some(0, 1e6, 2e7)]),
  );
  const builds = list(1 + pick(14), (index): WorkloadBuild => ({
    name: `b${index}`,
    seconds: some(0, 1, 3, 10, 40),
    cores: some(1, 1, 2, 4),
    client: `c${pick(2)}`,
    system: systems[pick(4) === 0 ? 1 : 0]!,
    features: pick(5) === 0 ? ["kvm"] : [],
    output: some(0, 1e5, 3e7),
    inputs: [
      ...list(pick(3), () => `i${pick(4)}`),
      ...list(Math.min(index, pick(3)), () => `b${pick(index)}`),
    ],
  }));
  return { machines, items, clients: { c1: some(0, 0, 7) }, builds };
}

test("no policy falls below the bound", async () => {
  const random = makeRandom(1);
  const policies: Plugin[] = [
    { name: "guix", score: ({ machine }) => machine.speed },
    { name: "chance", score: () => random() },
    locality,
  ];
  for (let seed = 1; seed <= 400; seed++) {
    const workload = makeUp(seed);
    const least = bound(workload);
    for (const policy of policies) {
      const farm = new Farm(workload, "test");
      const { makespan } = await farm.run([policy], seed, settings);
      const text = `seed ${seed}, ${policy.name}: ${makespan} < ${least}`;
      assert.ok(makespan! >= least * (1 - 1e-9), text);
    }
  }
});

/** The least makespan of builds that need nothing, by trying all ways. */
function optimum(
  speeds: readonly number[],
  seconds: readonly number[],
): number {
  const [first, ...others] = seconds;
  if (first === undefined) return 0;
  const place = (
    [next, ...left]: readonly number[],
    ends: readonly number[],
  ): number =>
    next === undefined ? Math.max(...ends) : Math.min(
      ...speeds.map((speed, index) =>
        place(left, ends.with(index, ends[index]! + next / speed))
      ),
    );
  return place([first, ...others], speeds.map(() => 0));
}

test("the bound is not above what trying all ways finds", () => {
  const { pick } = makeChances(3);
  for (let round = 0; round < 150; round++) {
    const speeds = list(1 + pick(3), () => [1, 2, 3][pick(3)]!);
    const seconds = list(1 + pick(5), () => 1 + pick(12));
    const machines = speeds.map((speed, index) => ({
      name: `m${index}`,
      speed,
    }));
    const builds = seconds.map((it, index) => ({
      name: `b${index}`,
      seconds: it,
    }));
    const least = bound({ machines, builds });
    const best = optimum(speeds, seconds);
    const work = seconds.reduce((sum, it) => sum + it, 0);
    const speed = speeds.reduce((sum, it) => sum + it, 0);
    const chain = Math.max(...seconds) / Math.max(...speeds);
    assert.ok(least <= best * (1 + 1e-9), `${least} > ${best}`);
    assert.ok(least >= Math.max(chain, work / speed) * 0.995, `${least}`);
  }
});

test("the bound is what is possible where work can be divided", () => {
  const machines = [{ name: "fast", speed: 2 }, { name: "slow" }];
  const equal = list(6, (index) => ({ name: `b${index}`, seconds: 4 }));
  assertNear(
    bound({ machines, builds: equal }),
    optimum([2, 1], Array(6).fill(4)),
  );
  // A fast machine that is badly connected, a slow one that is well: each has
  // what suits it.
  const ways = [
    { name: "fast", speed: 4, bandwidth: 1e6 },
    { name: "near", bandwidth: 1e9 },
  ];
  const kinds = [
    { name: "long", seconds: 40 },
    { name: "large", seconds: 9.8, output: 2e8 },
  ];
  assertNear(bound({ machines: ways, builds: kinds }), 10);
  // Those with a feature have one machine.
  const able = [{ name: "kvm", features: ["kvm"] }, {
    name: "other",
    speed: 9,
  }];
  const builds = list(3, (index) => ({
    ...{ name: `b${index}`, seconds: 7, features: ["kvm"] },
  }));
  assertNear(bound({ machines: able, builds }), 21);
});

test("the bound counts what has to be sent, and processors", () => {
  const machines = [
    { name: "m", parallelBuilds: 4, cores: 4, bandwidth: 1e6 },
    { name: "n", parallelBuilds: 4, cores: 4, bandwidth: 1e6 },
  ];
  const builds = list(8, (index) => ({
    ...{ name: `b${index}`, seconds: 10, cores: 2 },
  }));
  assertNear(bound({ machines, builds }), 20);
  const one = { name: "m", bandwidth: 1e6, overhead: 1 };
  const items = { own: 2e6, shared: 4e6 };
  const needy = [
    { name: "x", seconds: 1, inputs: ["own", "shared"], output: 1e6 },
    { name: "y", seconds: 1, inputs: ["x", "shared"] },
  ];
  // Two overheads, two builds, each input once, and an output.
  assertNear(bound({ machines: [one], items, builds: needy }), 2 + 2 + 6 + 1);
  // What is made for another system has to be sent there.
  const across = [
    { name: "x", seconds: 1, output: 5e6 },
    { name: "y", seconds: 1, system: "aarch64-linux", inputs: ["x"] },
  ];
  const both = [
    { name: "x86", bandwidth: 1e6 },
    { name: "arm", systems: ["aarch64-linux"], bandwidth: 1e6 },
  ];
  assertNear(bound({ machines: both, builds: across }), 1 + 5 + 5 + 1);
});

test("the bound is a chain, then work, then a chain", () => {
  const machines = [{ name: "m", parallelBuilds: 2 }, { name: "n" }];
  const first = { name: "first", seconds: 10 };
  const wide = list(9, (index) => ({
    ...{ name: `b${index}`, seconds: 5, inputs: ["first"] },
  }));
  const inputs = wide.map(({ name }) => name);
  const last = { name: "last", seconds: 20, inputs };
  const builds = [first, ...wide, last];
  assertNear(bound({ machines, builds }), 10 + 15 + 20);
  const client = { ...first, client: "late" };
  const clients = { late: 3 };
  assertNear(bound({ machines, clients, builds: [client] }), 13);
  assert.is(bound({ machines, builds: [] }), 0);
});

test.run();

/** The built-in plugins that score and exclude machines. */

import {
  mkdirSync,
  mkdtempSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { contextFor } from "../mod.ts";
import type { Candidate, Facts, Plugin, Settings } from "../mod.ts";
import drain from "../plugins/drain.ts";
import leases from "../plugins/leases.ts";
import pressure from "../plugins/pressure.ts";
import roundRobin from "../plugins/round_robin.ts";
import { candidate, machine, makeContext, request } from "./context.ts";

const test = suite("scores");

/** The context of a plugin that has these options. */
function contextOf(plugin: Plugin, options: Settings["use"][string] = {}) {
  const { context } = makeContext();
  const settings = { ...context.settings, use: { [plugin.name]: options } };
  return contextFor(plugin, { ...context, settings });
}

test("drain excludes what its file lists, at once", () => {
  const directory = mkdtempSync(`${tmpdir()}/offload-`);
  const file = `${directory}/drain`;
  const context = contextOf(drain, { file });
  const why = (name: string, port = 22) => {
    const answer = drain.exclude!(machine({ name, port }), context);
    return (answer as { why: string } | undefined)?.why;
  };
  assert.is(why("w1"), undefined);
  writeFileSync(file, "# none\n\nw2:2222 # new disk\n  w1 being moved\nw10\n");
  assert.is(why("w1"), `drained by '${file}': being moved`);
  assert.is(why("w1", 2222), `drained by '${file}': being moved`);
  assert.is(why("w2"), undefined);
  assert.is(why("w2", 2222), `drained by '${file}': new disk`);
  assert.is(why("w10"), `drained by '${file}'`);
  assert.is(why("w3"), undefined);
  writeFileSync(file, "#w1\n");
  assert.is(why("w1"), undefined);
  rmSync(directory, { recursive: true });
});

test("round-robin prefers what was not used for the longest time", () => {
  const context = contextOf(roundRobin);
  const now = Date.now();
  const scores = [undefined, now - 5000, now - 1000, now].map((lastUsed) =>
    roundRobin.score!({ ...candidate(), lastUsed }, request(), context)
  ) as number[];
  assert.equal(scores, scores.toSorted((a, b) => b - a));
  assert.is(new Set(scores).size, 4);
});

test("round-robin takes a time in the future for none", () => {
  const context = contextOf(roundRobin);
  const [future, past] = [3_600_000, -3_600_000].map((time) => {
    const lastUsed = Date.now() + time;
    return roundRobin.score!({ ...candidate(), lastUsed }, request(), context);
  }) as number[];
  assert.ok(future! > past!, `${future}`);
});

test("leases excludes what was full a moment ago, not in the future", () => {
  const stateDirectory = mkdtempSync(`${tmpdir()}/offload-`);
  try {
    const context = { ...contextOf(leases), stateDirectory };
    const each = machine();
    const directory = `${stateDirectory}/offload/${each.name}:${each.port}`;
    mkdirSync(directory, { recursive: true });
    assert.is(leases.exclude!(each, context), undefined);
    writeFileSync(`${directory}/full`, "");
    for (const [ahead, isFull] of [[0, true], [-60, false], [3600, false]]) {
      const time = Date.now() / 1000 + Number(ahead);
      utimesSync(`${directory}/full`, time, time);
      assert.is(leases.exclude!(each, context) !== undefined, isFull);
    }
  } finally {
    rmSync(stateDirectory, { recursive: true });
  }
});

/** The score of a machine that says so of itself. */
function underPressure(
  facts: Partial<Facts> | undefined,
  options: Settings["use"][string] = {},
) {
  const told = facts && { time: Date.now(), cores: 4, ...facts };
  const asked: Candidate = { ...candidate(), facts: told };
  const context = contextOf(pressure, options);
  return pressure.score!(asked, request(), context);
}

const stalls = (cpu: number, io: number, memory: number) => ({
  pressure: { cpu, io, memory },
});

test("pressure takes off what waits most", () => {
  assert.is(underPressure(stalls(0, 0, 0)), -0);
  assert.is(underPressure(stalls(50, 10, 0)), -0.5);
  assert.is(underPressure(stalls(5, 25, 0), { weight: 8 }), -2);
});

test("pressure vetoes where memory is short", () => {
  assert.is(underPressure(stalls(0, 0, 21)), -Infinity);
  assert.is(underPressure(stalls(0, 0, 21), { limit: 30 }), -0.21);
  const small = { ...stalls(0, 0, 0), memory: 2 ** 27 };
  assert.is(underPressure(small), -Infinity);
  assert.is(underPressure(small, { memory: 2 ** 26 }), -0);
});

test("pressure makes do with the load where the kernel says no more", () => {
  assert.is(underPressure({ load: 3 }), -0);
  assert.is(underPressure({ load: 8 }), -0.5);
  assert.is(underPressure({}), -0);
  assert.is(underPressure(undefined), undefined);
});

test.run();

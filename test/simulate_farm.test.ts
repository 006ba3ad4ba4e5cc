/** What happens in a simulated farm: clients, held answers, failures, sharing. */

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { readSettings } from "../mod.ts";
import type { Plugin } from "../mod.ts";
import { ofPackages } from "../scripts/_derivations.ts";
import { EPOCH } from "../scripts/_events.ts";
import { Farm } from "../scripts/_farm.ts";
import type { Host } from "../scripts/_host.ts";
import type { Experience, Outcome } from "../scripts/_simulation.ts";
import { list, synthesizeClients } from "../scripts/_workload.ts";
import type { Workload } from "../scripts/_workload.ts";
import { throws } from "./helpers.ts";

const test = suite("simulate_farm");

const settings = readSettings("/nonexistent", {});
const guix: Plugin = { name: "guix", score: ({ machine }) => machine.speed };

function simulate(
  workload: Workload,
  plugins: readonly Plugin[] = [guix],
  experience?: Experience,
): Promise<Outcome> {
  return new Farm(workload, "test").run(plugins, 1, settings, experience);
}

/** Notes when builds are asked about, in seconds. */
function observe(): [Plugin, [name: string, time: number][]] {
  const seen: [string, number][] = [];
  const plugin: Plugin = {
    name: "observer",
    score: (_candidate, { name }) => {
      seen.push([name, (Date.now() - EPOCH) / 1000]);
      return 0;
    },
  };
  return [plugin, seen];
}

test("what is postponed is asked for again every 5 s, not when a build ends", async () => {
  const [observer, seen] = observe();
  const builds = [
    { name: "a", seconds: 4 },
    { name: "b", seconds: 1 },
    { name: "c", seconds: 1 },
  ];
  await simulate({ machines: [{ name: "m" }], builds }, [observer]);
  // b is held until 3 s, c postponed at once after that; a ends at 4 s. At 8 s
  // b gets the slot and c is held, until 9 s.
  assert.equal(seen, [["a", 0], ["b", 8], ["c", 9]]);
});

test("a held answer is given when a slot is free, and holds up one client", async () => {
  const [observer, seen] = observe();
  await simulate({
    machines: [{ name: "m" }, { name: "n", systems: ["aarch64-linux"] }],
    clients: { two: 0.5 },
    builds: [
      { name: "a", seconds: 2, client: "one" },
      { name: "b", seconds: 1, client: "one" },
      { name: "c", seconds: 1, client: "one", system: "aarch64-linux" },
      { name: "d", seconds: 1, client: "two", system: "aarch64-linux" },
    ],
  }, [observer]);
  assert.equal(seen, [["a", 0], ["d", 0.5], ["b", 2], ["c", 2]]);
});

test("a client learns at its next turn what another has built", async () => {
  const [observer, seen] = observe();
  const { makespan } = await simulate({
    machines: [{ name: "m", parallelBuilds: 2 }],
    builds: [
      { name: "a", seconds: 7, client: "one" },
      { name: "b", seconds: 1, client: "two", inputs: ["a"] },
    ],
  }, [observer]);
  assert.equal(seen, [["a", 0], ["b", 12]]);
  assert.is(makespan, 13);
});

test("builds share the processors of a machine", async () => {
  const machines = [{ name: "m", parallelBuilds: 2, cores: 4 }];
  const build = { seconds: 8, cores: 4 };
  const builds = [{ name: "a", ...build }, { name: "b", ...build, seconds: 4 }];
  // Each at half the speed until b is done, at 8 s; then a has all.
  assert.is((await simulate({ machines, builds })).makespan, 12);
  const few = builds.map((it) => ({ ...it, cores: 2 }));
  assert.is((await simulate({ machines, builds: few })).makespan, 8);
});

test("history is what builds took, with what ran beside them", async () => {
  const machines = [{ name: "m", parallelBuilds: 2, cores: 4 }];
  const build = { name: "a", seconds: 8, cores: 4 };
  const builds = list(30, (index) => ({ ...build, id: `a${index}` }));
  const experience: Experience = {
    ...{ history: new Map(), similar: new Map(), measured: new Set() },
  };
  await simulate({ machines, builds }, [guix], experience);
  assert.equal([...experience.history.keys()], ["a"]);
  assert.equal(
    experience.history.get("a"),
    list(20, () => ({ machine: "m:22", seconds: 16, speed: 1 })),
  );
});

test("a machine that fails loses its builds, and comes back in time", async () => {
  const builds = [{ name: "a", seconds: 12 }, { name: "b", seconds: 12 }];
  const outcome = await simulate({
    machines: [{
      name: "m",
      speed: 2,
      parallelBuilds: 2,
      fails: 5,
      returns: 8,
    }],
    builds,
  });
  // It is left alone for 10 s, and nobody else is there.
  assert.is(outcome.makespan, 15 + 6);
  assert.is(outcome.builds, 2);
  const other = await simulate({
    machines: [{ name: "m", speed: 2, fails: 5 }, { name: "n" }],
    builds,
  });
  // b is on n until 12 s, and a, which was lost at 5 s, after that.
  assert.is(other.makespan, 24);
  assert.is(other.machines.m?.builds, 0);
});

test("machines join and leave, but end what they have", async () => {
  const outcome = await simulate({
    machines: [{ name: "m", leaves: 1 }, { name: "n", joins: 30 }],
    builds: [{ name: "a", seconds: 10 }, { name: "b", seconds: 10 }],
  });
  assert.is(outcome.machines.m?.builds, 1);
  assert.is(outcome.machines.n?.builds, 1);
  // b is postponed at 3 s, and then every 5 s.
  assert.is(outcome.makespan, 33 + 10);
});

/** Waits for the best machine for so many seconds, and notes what it is told. */
function patient(seconds: number, told: unknown[] = []): Plugin {
  return {
    ...guix,
    defer(ranking, request) {
      const [best] = ranking;
      const { candidate } = best!;
      if ((candidate as Host).free > 0) return undefined;
      const names = ranking.map((it) => it.candidate.machine.name);
      const waited = request.waited();
      told.push([names, waited, candidate.running()]);
      if (waited >= seconds) return undefined;
      return { why: "it is patient", rank: 0, isHeld: true, candidate };
    },
  };
}

test("a plugin may have a build wait for a better machine", async () => {
  const machines = [{ name: "fast", speed: 10 }, { name: "slow" }];
  const workload = {
    machines,
    builds: [{ name: "a", seconds: 20 }, { name: "b", seconds: 40 }],
  };
  assert.is((await simulate(workload)).makespan, 40);
  const told: unknown[] = [];
  assert.is((await simulate(workload, [patient(60, told)])).makespan, 2 + 4);
  const running = [{ name: "a", since: EPOCH }];
  assert.equal(told, [[["fast", "slow"], 0, running]]);
});

test("a build that waits in vain goes elsewhere", async () => {
  const machines = [{ name: "fast", speed: 10 }, { name: "slow" }];
  const builds = [{ name: "a", seconds: 400 }, { name: "b", seconds: 1 }];
  const told: unknown[][] = [];
  const policy = patient(10, told);
  const { machines: done } = await simulate({ machines, builds }, [policy]);
  assert.is(done.slow?.builds, 1);
  assert.equal(told.map(([, waited]) => waited), [0, 8, 13]);
});

test("clients of a made-up workload have names of their own", async () => {
  const workload = synthesizeClients(5, 90, 3, 1);
  assert.is(workload.builds.length, 90);
  assert.equal(workload.clients, {
    "client-0": 0,
    "client-1": 60,
    "client-2": 120,
  });
  assert.is((await simulate(workload)).builds, 90);
});

test("real packages need what they need", async () => {
  const hello = ofPackages(["hello"], 5, 1, 1);
  assert.is(hello.builds.length, 115);
  assert.match(hello.builds.at(-1)!.name, /^hello-/);
  assert.is((await simulate(hello)).builds, 115);
  const both = ofPackages(["hello", "git"], 5, 2, 1);
  const clients = Map.groupBy(both.builds, ({ client }) => client);
  assert.is(clients.get("client-0")?.length, 115);
  assert.ok(clients.get("client-1")!.length > 100);
  assert.equal(ofPackages(["hello"], 5, 1, 1), hello);
  throws(
    () => ofPackages(["none"], 5, 1, 1),
    /^none: expected one of hello, git, .*, gnome$/,
  );
});

test.run();

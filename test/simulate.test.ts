/** The simulation of a farm: what it computes, and what it reports. */

import { chmodSync, readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { readSettings } from "../mod.ts";
import type { Candidate, Plugin } from "../mod.ts";
import locality from "../plugins/locality.ts";
import { Farm } from "../scripts/_farm.ts";
import type { Outcome } from "../scripts/_simulation.ts";
import { synthesize } from "../scripts/_workload.ts";
import type { Workload } from "../scripts/_workload.ts";
import { ROOT, run, throws, withDirectory } from "./helpers.ts";

const test = suite("simulate");

const settings = { ...readSettings("/nonexistent", {}), hookTimeout: 0.1 };
const guix: Plugin = { name: "guix", score: ({ machine }) => machine.speed };

/** `c` needs `a`. */
const TINY: Workload = {
  machines: [
    { name: "fast", speed: 2, bandwidth: 1e6 },
    { name: "slow", bandwidth: 2e6 },
  ],
  items: { source: 4e6 },
  builds: [
    { name: "a", seconds: 10, inputs: ["source"], output: 2e6 },
    { name: "b", seconds: 20, inputs: ["source"] },
    { name: "c", seconds: 6, inputs: ["a", "source"], output: 1e6 },
  ],
};

function simulate(
  workload: Workload,
  plugins: readonly Plugin[] = [guix],
  seed = 1,
): Promise<Outcome> {
  return new Farm(workload, "test").run(plugins, seed, settings);
}

/** All but what depends on the machine that it runs on. */
function comparable(outcome: Outcome): Partial<Outcome> {
  return { ...outcome, decisionsPerSecond: 0, policy: "" };
}

test("run() computes a tiny workload as one does by hand", async () => {
  // a: 4 s + 5 s + 2 s on fast; b: 2 s + 20 s on slow; c: 0 + 3 s + 1 s on
  // fast, which has both inputs, from 11 s on.
  const outcome = await simulate(TINY);
  assert.is(outcome.makespan, 22);
  assert.is(outcome.bytesMoved, 11e6);
  assert.is(outcome.utilisation, (15 + 22) / 44);
  assert.is(outcome.decisions, 3);
  assert.equal(outcome.machines, {
    fast: { builds: 2, utilisation: 15 / 22, bytesMoved: 7e6 },
    slow: { builds: 1, utilisation: 1, bytesMoved: 4e6 },
  });
  assert.equal(outcome.problems, {});
});

test("run() sends an item once, unless it is still on its way", async () => {
  const build = { seconds: 1, inputs: ["source"] };
  const outcome = await simulate({
    machines: [{ name: "m", parallelBuilds: 2, bandwidth: 1e6 }],
    items: { source: 3e6 },
    builds: [
      { name: "x", ...build },
      { name: "y", ...build },
      { name: "z", ...build },
    ],
  });
  assert.is(outcome.bytesMoved, 6e6);
  // z was held from 0 s to 3 s, when it was postponed, for 5 s.
  assert.is(outcome.makespan, 9);
});

test("run() asks in the order of names, and holds answers", async () => {
  const outcome = await simulate({
    machines: [
      { name: "kvm", features: ["kvm"], speed: 2 },
      { name: "arm", systems: ["aarch64-linux", "x86_64-linux"] },
    ],
    builds: [
      { name: "x", seconds: 5, features: ["kvm"] },
      { name: "y", seconds: 6, features: ["kvm"] },
      { name: "z", seconds: 9, system: "aarch64-linux" },
      { name: "w", seconds: 2 },
    ],
  });
  // w gets kvm until 1 s, x until 3.5 s, y until 6.5 s; z could have had arm at
  // once, but was not asked for while the answers for x and y were held.
  assert.is(outcome.makespan, 3.5 + 9);
  assert.is(outcome.machines.kvm?.builds, 3);
});

test("run() shows plugins what the real one would", async () => {
  const seen: unknown[] = [];
  const spy: Plugin = {
    name: "spy",
    async score(candidate: Candidate, request) {
      const paths = (await request.inputs()).map(({ path }) => path);
      const { facts, bandwidth, id } = candidate;
      seen.push({
        asked: request.name,
        free: candidate.freeSlots(),
        load: facts?.load,
        held: candidate.holds(paths).length,
        bandwidth,
        past: request.history(),
        id,
      });
      return 0;
    },
  };
  await simulate({
    machines: [{ name: "m", speed: 2, parallelBuilds: 2, bandwidth: 2e6 }],
    items: { source: 2e6 },
    builds: [
      { name: "x", seconds: 8, inputs: ["source"] },
      { name: "y", seconds: 2 },
      { name: "x", id: "x2", seconds: 8, inputs: ["source"] },
      { name: "x", id: "x3", seconds: 1, inputs: ["source", "x", "x2"] },
    ],
  }, [spy]);
  const common = { bandwidth: undefined, held: 0, id: "m:22", past: [] };
  const past = { machine: "m:22", seconds: 4, speed: 2 };
  // What was built from 1 s to 5 s, seen as the load of a minute is.
  const later = { bandwidth: 2e6, load: 2 * (1 - Math.exp(-4 / 60)) };
  assert.equal(seen, [
    { ...common, asked: "x", free: 2, load: 0 },
    // What it said is believed for some seconds.
    { ...common, asked: "x", free: 1, load: 0 },
    // At 5 s: the first two are done. y was postponed at 3 s, until 8 s.
    { ...common, ...later, asked: "x", free: 2, held: 3, past: [past, past] },
    { ...common, ...later, asked: "y", free: 2 },
  ]);
});

test("run() decides among equals by chance, which the seed repeats", async () => {
  const workload = synthesize(12, 300, 7);
  assert.equal(workload, synthesize(12, 300, 7));
  assert.not.equal(workload, synthesize(12, 300, 8));
  const [first, again, other] = await Promise.all(
    [1, 1, 2].map((seed) => simulate(workload, [guix], seed)),
  );
  assert.equal(comparable(first!), comparable(again!));
  assert.not.equal(comparable(first!), comparable(other!));
  const equals = {
    machines: [{ name: "m0" }, { name: "m1" }, { name: "m2" }],
    builds: [{ name: "x", seconds: 1 }],
  };
  const chosen = new Map<string, number>();
  for (let seed = 0; seed < 300; seed++) {
    const { machines } = await simulate(equals, [guix], seed);
    const name = Object.keys(machines).find((key) => machines[key]!.builds)!;
    chosen.set(name, (chosen.get(name) ?? 0) + 1);
  }
  for (const times of chosen.values()) assert.ok(times > 60, `${times}`);
  assert.is(chosen.size, 3);
});

test("lowerBound() is the longest chain, or all the work", async () => {
  const { machines } = TINY;
  const chain = {
    machines,
    builds: [
      { name: "x", seconds: 10 },
      { name: "y", seconds: 10, inputs: ["x"] },
    ],
  };
  assert.is(new Farm(chain, "test").lowerBound(), 10);
  for (const seed of [1, 2, 3]) {
    const workload = synthesize(5, 200, seed);
    const bound = new Farm(workload, "test").lowerBound();
    for (const plugin of [guix, locality]) {
      const { makespan } = await simulate(workload, [plugin]);
      assert.ok(bound > 0 && bound <= makespan!, `${bound} > ${makespan}`);
    }
  }
});

test("locality moves less than the reference where inputs are shared", async () => {
  const names = ["a", "b", "c", "d"];
  const workload = {
    machines: names.map((name) => ({ name, bandwidth: 1e7 })),
    items: Object.fromEntries(names.map((name) => [`big-${name}`, 1e9])),
    builds: Array.from({ length: 24 }, (_, index) => {
      const name = names[index % 4]!;
      const earlier = index < 4 ? [] : [`build-${index - 4}`];
      const inputs = [`big-${name}`, ...earlier];
      return { id: `build-${index}`, name, seconds: 10, inputs };
    }),
  };
  const reference = await simulate(workload);
  const ours = await simulate(workload, [locality]);
  assert.is(ours.bytesMoved, 4e9);
  assert.ok(reference.bytesMoved > ours.bytesMoved);
  assert.ok(reference.makespan! > ours.makespan!);
});

test("run() sums scores, and lets plugins abstain and veto", async () => {
  const abstain: Plugin = { name: "abstain", score: () => undefined };
  assert.equal(
    comparable(await simulate(TINY, [abstain, guix])),
    comparable(await simulate(TINY)),
  );
  const opposite: Plugin = {
    name: "opposite",
    score: ({ machine }) => -2 * machine.speed,
  };
  // a on slow until 13 s, b on fast until 14 s, c on slow.
  const { makespan } = await simulate(TINY, [opposite, guix]);
  assert.is(makespan, 13 + 6 + 0.5);
  // All on fast: a until 11 s, c 3 s + 1 s, b 10 s.
  const veto: Plugin = {
    name: "veto",
    score: ({ machine }) => machine.name === "slow" ? -Infinity : 0,
  };
  const outcome = await simulate(TINY, [veto, guix]);
  assert.is(outcome.makespan, 25);
  assert.is(outcome.bytesMoved, 7e6);
  // b was asked for at 0 s, 8 s, 13 s and, held, at 15 s.
  assert.is(outcome.decisions, 6);
  assert.equal(outcome.problems, {});
});

test("run() reports a plugin that vetoes all machines", async () => {
  const never: Plugin = { name: "never", score: () => -Infinity };
  const outcome = await simulate(TINY, [never]);
  assert.is(outcome.makespan, null);
  assert.is(outcome.builds, 0);
  assert.is(outcome.utilisation, 0);
  assert.equal(outcome.problems, {
    "plugin 'never': all machines are vetoed for 'a'": 2,
  });
});

test("run() reports a plugin that fails, and passes it over", async () => {
  const failures: Record<string, [unknown, times: number]> = {
    "boom": [() => {
      throw new Error("Boom");
    }, 3],
    "no number": [() => Promise.reject(new Error("no number")), 3],
    "expected a number, got NaN": [() => NaN, 3],
    "expected a number, got Infinity": [() => Promise.resolve(Infinity), 3],
    "expected a number, got null": [() => null, 3],
    "expected a number, got 1": [() => "1", 3],
    "no answer within 0.1 s": [() => new Promise(() => {}), 1],
  };
  const expected = comparable(await simulate(TINY));
  for (const [message, [score, times]] of Object.entries(failures)) {
    const plugin = { name: "bad", score } as Plugin;
    const outcome = await simulate(TINY, [plugin, guix]);
    const problems = { [`plugin 'bad': score: ${message}`]: times };
    assert.equal(outcome.problems, problems);
    assert.equal(comparable(outcome), { ...expected, problems });
  }
});

test("Farm() names file and place of what is wrong", () => {
  const machines = [{ name: "m" }];
  const x = { name: "x", seconds: 1 };
  const cases: [workload: unknown, message: RegExp][] = [
    [[], /^test: \$: expected an object, got \[\]$/],
    [{ machines }, /^test: \$\.builds: expected a list, got nothing$/],
    [{ machines, builds: [1] }, /\$\.builds\[0\]: expected an object, got 1$/],
    [
      { machines, builds: [{ name: "x" }] },
      /\$\.builds\[0\]\.seconds: expected a number, 0 or more, got nothing$/,
    ],
    [
      { machines, builds: [x, { ...x, output: "1" }] },
      /\$\.builds\[1\]\.output: expected a number, 0 or more, got "1"$/,
    ],
    [
      { machines, builds: [{ ...x, second: 1 }] },
      /\$\.builds\[0\]\.second: the fields are name, id, seconds/,
    ],
    [
      { machines, builds: [{ ...x, inputs: ["x"] }] },
      /\$\.builds\[0\]\.inputs\[0\]: no item or build 'x' before it$/,
    ],
    [
      { machines, builds: [{ ...x, inputs: [1] }] },
      /\$\.builds\[0\]\.inputs\[0\]: expected a name, got 1$/,
    ],
    [{ machines, builds: [x, x] }, /\$\.builds\[1\]: 'x' is taken$/],
    [
      { machines, builds: [{ ...x, system: "i586-gnu" }] },
      /\$\.builds\[0\]: no machine builds for 'i586-gnu'$/,
    ],
    [
      { machines: [...machines, { name: "m" }], builds: [x] },
      /\$\.machines\[1\]: 'm' is taken$/,
    ],
    [
      { machines: [{ name: "m", speed: 0 }], builds: [x] },
      /\$\.machines\[0\]\.speed: expected a number above 0, got 0$/,
    ],
    [
      { machines: [{ name: "m", parallelBuilds: 1.5 }], builds: [x] },
      /\$\.machines\[0\]\.parallelBuilds: expected a whole number/,
    ],
    [
      { machines, builds: [x], items: { gcc: -1 } },
      /\$\.items\.gcc: expected a number, 0 or more, got -1$/,
    ],
  ];
  for (const [workload, message] of cases) {
    throws(() => new Farm(workload, "test"), message);
  }
});

/** Calls the script on the runtime of these tests. */
async function call(...args: readonly string[]) {
  const { code, stdout, stderr } = await run(`${ROOT}scripts/simulate`, args, {
    env: {
      ...process.env,
      OFFLOAD_RUNTIME: process.execPath,
      OFFLOAD_PLUGINS: "/nonexistent",
    },
  });
  return { code, stdout: stdout.toString(), stderr };
}

test("simulate explains itself by an example that works", async () => {
  const { code, stdout } = await call("--help");
  assert.is(code, 0);
  const [example] = /^ {2}\{.*^ {2}\}$/ms.exec(stdout) ?? [];
  const { makespan } = await simulate(JSON.parse(example!));
  assert.ok(makespan! > 0);
});

test("simulate compares, and records what it made up", () =>
  withDirectory(async (directory) => {
    const file = `${directory}/workload.json`;
    const common = ["--score", "locality", "--json"];
    const size = ["--machines", "5", "--builds", "60", "--seed", "3"];
    const made = await call(...common, ...size, "--record", file);
    const again = await call(...common, "--workload", file, "--seed", "3");
    const strip = (text: string) => {
      const { reference, plugin, ...rest } = JSON.parse(text);
      assert.is(reference.policy, "guix");
      assert.is(plugin.policy, "locality");
      return [comparable(reference), comparable(plugin), rest];
    };
    assert.equal(strip(made.stdout), strip(again.stdout));
    assert.equal(JSON.parse(readFileSync(file, "utf8")), synthesize(5, 60, 3));
    const { stdout } = await call("--machines", "5", "--builds", "60");
    assert.match(stdout, /\nlower bound +[\d.]+ +1\.00\nguix \(reference\) /);
  }));

test("simulate sums up several seeds, of clients, packages and repetitions", async () => {
  const common = ["--score", "locality", "--json", "--seeds", "2-4"];
  const size = ["--machines", "5", "--builds", "60", "--clients", "2"];
  const { stdout } = await call(...common, ...size, "--warm");
  const { seeds, reference, plugin } = JSON.parse(stdout);
  assert.equal(seeds.map(({ seed }: { seed: number }) => seed), [2, 3, 4]);
  const ratios = seeds.map((
    it: Record<"plugin", Outcome> & {
      readonly lowerBound: number;
    },
  ) => it.plugin.makespan! / it.lowerBound);
  assert.is(plugin.worst, Math.max(...ratios));
  const sum = ratios.reduce((total: number, it: number) => total + it, 0);
  assert.ok(Math.abs(plugin.average - sum / 3) < 1e-9);
  assert.ok(reference.average >= 1);
  const cold = JSON.parse((await call(...common, ...size)).stdout);
  assert.not.equal(cold.plugin, plugin);
  const table = await call("--packages", "hello,git", "--seeds", "1-2");
  assert.match(table.stdout, /^ +seed +lower bound +guix \(s\) /);
  assert.match(table.stdout, /\n +worst +[\d.]+ +[\d.]+\n$/);
});

test("simulate takes a site's plugin, and fails where that does", () =>
  withDirectory(async (directory) => {
    const file = `${directory}/site.ts`;
    const size = ["--machines", "3", "--builds", "10", "--plugin", file];
    const write = (score: string) =>
      writeFileSync(file, `export default { name: "site", score: ${score} };`);
    write("({ machine }: { machine: { speed: number } }) => -machine.speed");
    const good = await call(...size);
    assert.is(good.code, 0);
    assert.match(good.stdout, /\nsite \+ guix /);
    write("() => NaN");
    const bad = await call(...size);
    assert.is(bad.code, 1);
    assert.is(
      bad.stderr,
      "simulate: warning: plugin 'site': score: expected a number, got NaN " +
        "(10 times)\n",
    );
    write("1");
    const odd = await call(...size);
    assert.is(odd.code, 1);
    assert.match(
      odd.stderr,
      /^simulate: error: .*site\.ts: 'score' is no function\n$/,
    );
    chmodSync(file, 0o666);
    const open = await call(...size);
    assert.is(open.code, 1);
    assert.match(open.stderr, /others than root .* can write it\nhint: /);
  }));

test("simulate says what is wrong with its options", () =>
  withDirectory(async (directory) => {
    const file = `${directory}/workload.json`;
    writeFileSync(file, "{");
    const cases: [args: string[], message: RegExp][] = [
      [["--workload", file], /workload\.json: .*JSON/],
      [["--workload", "/nonexistent"], /'?\/nonexistent'?: no such file/],
      [["--workload", file, "--builds", "1"], /--builds: it does not go with/],
      [["--builds", "0"], /--builds: expected a whole number above 0, got '0'/],
      [["--seed", "x"], /--seed: expected a whole number/],
      [["--seeds", "3-1"], /--seeds: expected FROM-TO, got '3-1'/],
      [["--seeds", "2"], /--seeds: expected FROM-TO, got '2'/],
      [["--packages", "emacs"], /emacs: expected one of hello, git/],
      [["--packages", "git", "--builds", "1"], /--builds: it does not go/],
      [["--score", "best"], /there is no built-in score 'best', only 'guix'/],
      [["--plugin", "/nonexistent.ts"], /nonexistent\.ts: /],
      [["--frob"], /unknown option `--frob`/],
    ];
    for (const [args, message] of cases) {
      const { code, stdout, stderr } = await call(...args);
      assert.is(code, 1);
      assert.is(stdout, "");
      assert.match(stderr, /^simulate: error: /);
      assert.match(stderr, message);
    }
  }));

test.run();

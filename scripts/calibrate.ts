/**
 * Compares the simulated farm with a real one: 60 builds that keep a processor
 * busy, on three hosts of the lab that may use 15 %, 30 % and 60 % of one.
 *
 *     node scripts/calibrate.ts [TURNS]
 *
 * With TURNS, it then has the same done through `guix offload` and through
 * Offload, which has seen builds of these names, so many times in turns.
 *
 * How fast the hosts are, and what a build takes there beside its work, is found
 * by builds of one host alone: one short build, three of them, and a long one.
 * It needs two processors that nothing else uses for some minutes, and takes
 * down the hosts when it is done.
 *
 * @module
 */

import { execFileSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { readSettings } from "../mod.ts";
import type { Plugin } from "../mod.ts";
import { median } from "../plugins/_expectation.ts";
import { build, hostOf, lab, makeWork } from "./_bench_lab.ts";
import { Farm } from "./_farm.ts";
import { makeChances } from "./_workload.ts";
import type { WorkloadMachine } from "./_workload.ts";

/** What Offload runs on. */
const NODE = "/offload/node_modules/node/bin/node";

/** The hosts, and what they may use of a processor, in percent. */
const SHARES: Readonly<Record<string, number>> = { w1: 15, w2: 30, w3: 60 };

/** How far the simulated makespan may be from the real one. */
const TOLERANCE = 0.1;

/** What Offload's makespan may be, as a share of others. */
const GOALS = { ofReference: 0.75, ofBound: 1.2 } as const;

/** How many builds, and the median of their seconds with a processor alone. */
const WORK = { builds: 60, seconds: 0.8, sigma: 0.8 } as const;

/** What the machines took for builds. */
interface Measured {
  readonly machine: WorkloadMachine;
  /** Seconds before the first build and after the last. */
  readonly around: number;
}

/** Has head use these hosts, as fast as their share says. */
function useHosts(names: readonly string[]): void {
  let index = 0;
  const speed = () => `(speed ${SHARES[names[index++]!]}.0)`;
  const text = lab("machines", "head", ...names)
    .replace(/\(parallel-builds \d+\)/g, "(parallel-builds 1)")
    .replace(/\(speed [\d.]+\)/g, "")
    .replace(/\(build-machine/g, () => `(build-machine ${speed()}`);
  const { pid } = hostOf("head");
  writeFileSync(`/proc/${pid}/root/etc/guix/machines.scm`, text);
}

/** Builds, each of so many turns of a loop; returns the seconds it took. */
function buildLoops(...loops: readonly number[]): number {
  const list = loops.map((it) => Math.round(it)).join();
  return build(makeWork([`--count=${loops.length}`, `--loops=${list}`]));
}

/** How many turns of a loop a processor does in a second. */
function findRate(): number {
  const script = "n=0; while [ $n -lt 1000000 ]; do n=$((n + 1)); done";
  const start = performance.now();
  lab("in", "head", "/opt/work/busybox/bin/sh", "-c", script);
  return 1e6 / (performance.now() - start) * 1000;
}

/** Finds out how fast a host is, and what a build takes beside its work. */
function measure(name: string, rate: number): Measured {
  useHosts([name]);
  buildLoops(1); // the builder is sent, connections are made
  const [short, long] = [0.3 * rate, 1.5 * rate];
  const one = buildLoops(short);
  const three = buildLoops(short, short, short);
  const other = buildLoops(long);
  const each = (other - one) / (long - short);
  const overhead = Math.max(0, (three - one) / 2 - each * short);
  const around = one - each * short - overhead;
  const speed = 1 / (each * rate);
  const machine = { name, speed, overhead, parallelBuilds: 1 };
  console.log(
    `${name}: speed ${speed.toFixed(3)}, ${overhead.toFixed(2)} s a build, ` +
      `${around.toFixed(2)} s around them`,
  );
  return { machine, around };
}

/** What the simulation says, in seconds. */
interface Simulated {
  readonly makespan: number;
  readonly bound: number;
}

/** What the simulation says of builds that take so many seconds. */
async function simulate(
  seconds: readonly number[],
  measured: readonly Measured[],
): Promise<Simulated> {
  const machines = measured.map(({ machine }) => machine);
  const builds = seconds.map((it, i) => ({ name: `work-${i}`, seconds: it }));
  const farm = new Farm({ machines, builds }, "calibration");
  const guix: Plugin = {
    name: "guix",
    score: ({ machine }) => machine.speed,
  };
  const settings = readSettings("/nonexistent", {});
  const { makespan } = await farm.run([guix], 1, settings);
  const bound = farm.lowerBound();
  console.log(`lower bound: ${bound.toFixed(1)} s`);
  const around = measured.reduce((sum, { around }) => sum + around, 0);
  return { makespan: makespan! + around / measured.length, bound };
}

/** Has head offload through `guix offload`, or through Offload. */
function useHook(isOurs: boolean, ...variables: readonly string[]): void {
  const ours = ["GUIX=/offload/scripts/guix", `OFFLOAD_RUNTIME=${NODE}`];
  lab("daemon", "head", ...isOurs ? ours : [], ...variables);
}

/** The seconds that builds take through the reference, and through Offload. */
function compare(turns: number, work: () => number): [number[], number[]] {
  useHook(true);
  work(); // which is what Offload knows of them
  const times: [number[], number[]] = [[], []];
  for (let turn = 0; turn < turns; turn++) {
    for (const [index, name] of ["guix offload", "Offload"].entries()) {
      useHook(index === 1);
      const seconds = work();
      times[index]!.push(seconds);
      console.log(`${name}: ${seconds.toFixed(1)} s`);
    }
  }
  return times;
}

/** Tells how two ways compare, by their medians; returns whether that will do. */
function judge([theirs, ours]: [number[], number[]], bound: number): boolean {
  const own = median(ours)!;
  const [ofReference, ofBound] = [own / median(theirs)!, own / bound];
  console.log(
    `Offload takes ${ofReference.toFixed(2)} of the time of guix offload, ` +
      `${ofBound.toFixed(2)} x the lower bound`,
  );
  return ofReference <= GOALS.ofReference && ofBound <= GOALS.ofBound;
}

async function main(turns: number): Promise<number> {
  const names = Object.keys(SHARES);
  lab("up", "head", ...names);
  // The simulation has no history, and the machines' speeds are as they are.
  useHook(true, "OFFLOAD_SCORE=guix");
  for (const name of names) lab("cpu", name, String(SHARES[name]));
  const rate = findRate();
  const measured = names.map((name) => measure(name, rate));
  const { heavyTailed } = makeChances(1);
  const seconds = Array.from(
    { length: WORK.builds },
    () => heavyTailed(1000 * WORK.seconds, WORK.sigma) / 1000,
  );
  const work = () => buildLoops(...seconds.map((it) => it * rate));
  const { makespan, bound } = await simulate(seconds, measured);
  useHosts(names);
  const real = work();
  const off = makespan / real - 1;
  console.log(
    `simulated: ${makespan.toFixed(1)} s, real: ${real.toFixed(1)} s ` +
      `(${(off * 100).toFixed(1)} % off)`,
  );
  const isGood = turns === 0 || judge(compare(turns, work), bound);
  return Math.abs(off) <= TOLERANCE && isGood ? 0 : 1;
}

/** Takes down what is up, also where something went wrong. */
async function mainAndDown(turns: number): Promise<number> {
  try {
    return await main(turns);
  } finally {
    const program = fileURLToPath(new URL("lab/lab", import.meta.url));
    execFileSync(program, ["down"], { stdio: "ignore" });
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  mainAndDown(Number(process.argv[2] ?? 0)).then((code) => process.exit(code));
}

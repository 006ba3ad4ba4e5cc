/**
 * Measures Offload beside `guix offload`: the same builds on the same hosts of
 * the lab in the same run, in turns. Compare the ratios; the times depend on
 * the machine and on what else it does.
 *
 * @module
 */

import { execFileSync } from "node:child_process";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { cac } from "../deps.ts";

/** Something to measure: builds, all started at once. */
interface Case {
  readonly name: string;
  /** Options of scripts/lab/work.scm. */
  readonly work: readonly string[];
  /** How often, with each hook. */
  readonly runs: number;
  /** Whether `--quick` leaves it out. */
  readonly slow?: boolean;
  /** Seconds that it would take if builds alone took time. */
  readonly ideal?: number;
}

const CASES: readonly Case[] = [
  { name: "one trivial build", work: [], runs: 5 },
  {
    name: "20 builds of 2 s, 4 slots",
    work: ["--count=20", "--seconds=2"],
    runs: 1,
    ideal: 10,
  },
  { name: "100 small inputs", work: ["--inputs=100"], runs: 2, slow: true },
  { name: "1,000 small inputs", work: ["--inputs=1000"], runs: 2, slow: true },
  {
    name: "one input of 400 MiB",
    work: ["--inputs=1", `--input-size=${400 * 2 ** 20}`],
    runs: 2,
    slow: true,
  },
  {
    name: "an output of 300 MiB",
    work: [`--output-size=${300 * 2 ** 20}`],
    runs: 2,
    slow: true,
  },
];

/** The hooks, each with the environment of guix-daemon that selects it. */
const HOOKS: Readonly<Record<string, readonly string[]>> = {
  "guix offload": [],
  "offload, Node": ["GUIX=/offload/scripts/guix", "OFFLOAD_RUNTIME=node"],
  "offload, Deno": ["GUIX=/offload/scripts/guix", "OFFLOAD_RUNTIME=deno"],
};

const LAB = fileURLToPath(new URL("lab/lab", import.meta.url));

function lab(...args: readonly string[]): string {
  return execFileSync(LAB, args, {
    encoding: "utf8",
    stdio: ["ignore", "pipe", "pipe"],
    maxBuffer: 1 << 28,
  });
}

/** Makes new derivations on head; returns their file names. */
function makeWork(options: readonly string[]): string[] {
  const script = "/offload/scripts/lab/work.scm";
  return lab("in", "head", "guix", "repl", "--", script, ...options)
    .trim().split("\n");
}

/** Builds on the other machines alone; returns the seconds it took. */
function build(derivations: readonly string[]): number {
  const start = performance.now();
  lab("in", "head", "guix", "build", "--max-jobs=0", ...derivations);
  return (performance.now() - start) / 1000;
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1
    ? sorted[middle]!
    : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** Measures a case with each hook in turns; medians in seconds, by hook. */
function measure({ work, runs }: Case): Record<string, number> {
  const times: Record<string, number[]> = {};
  for (let run = 0; run < runs; run++) {
    for (const [hook, variables] of Object.entries(HOOKS)) {
      lab("daemon", "head", ...variables);
      // The first build after a start pays for what is there only then.
      build(makeWork([]));
      (times[hook] ??= []).push(build(makeWork(work)));
    }
  }
  return Object.fromEntries(
    Object.entries(times).map(([hook, values]) => [hook, median(values)]),
  );
}

function formatRow(name: string, medians: Record<string, number>, ideal = NaN) {
  const reference = medians["guix offload"]!;
  const cells = Object.entries(medians).map(([hook, seconds]) =>
    hook === "guix offload"
      ? `${seconds.toFixed(2)} s`
      : `${seconds.toFixed(2)} s (${(reference / seconds).toFixed(1)}x)`
  );
  const bound = Number.isNaN(ideal) ? "" : `${ideal} s`;
  return `| ${[name, ...cells, bound].join(" | ")} |`;
}

/** Brings the hosts up and sends the builder to the machines. */
function prepare(): void {
  lab("up", "head", "w1", "w2");
  for (let i = 0; i < 4; i++) build(makeWork([]));
}

function main(args: readonly string[]): void {
  const cli = cac("bench");
  cli.option("--quick", "Leave out what takes long");
  cli.option("--case <name>", "Measure only the cases whose names hold this");
  cli.help();
  const { options } = cli.parse(["", "bench", ...args]);
  if (options.help) return;
  const cases = CASES.filter(({ name, slow }) =>
    !(options.quick && slow) && name.includes(options.case ?? "")
  );
  prepare();
  console.log(`| work | ${Object.keys(HOOKS).join(" | ")} | ideal |`);
  console.log(`| --- |${" --- |".repeat(Object.keys(HOOKS).length + 1)}`);
  for (const each of cases) {
    console.log(formatRow(each.name, measure(each), each.ideal));
  }
}

main(process.argv.slice(2));

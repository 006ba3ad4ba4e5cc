/**
 * Measures Offload beside `guix offload` and a local build: the same builds on
 * the same hosts of the lab in the same run, in turns. Compare the ratios; the
 * times depend on the machine and on what else it does. _bench_work.ts says
 * what is measured, _bench_lab.ts how it is run.
 *
 * @module
 */

import { execFileSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import process from "node:process";
import { cac } from "../deps.ts";
import {
  ask,
  build,
  hostOf,
  lab,
  makeWork,
  Resident,
  useMachines,
  withRelay,
} from "./_bench_lab.ts";
import { drawChart, formatRow, tableHead, tableLine } from "./_bench_table.ts";
import type { ByColumn, Measured } from "./_bench_table.ts";
import { CASES, COLUMNS, countFor } from "./_bench_work.ts";
import type { Case, Column } from "./_bench_work.ts";

/** How many builds the machines do at a time, unless told. */
const SLOTS = 4;

/** How often all slots are used before the process that stays is warm. */
const ROUNDS = 2;

function median(values: readonly number[]): number {
  if (values.some(Number.isNaN)) return NaN;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1
    ? sorted[middle]!
    : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** How many builds head does at a time by itself. */
function localSlots({ kind }: Column, slots: number): number {
  return kind === "local" ? slots : 0;
}

/**
 * Has builds done as a column says, and done with what the first ones pay;
 * returns new derivations.
 */
async function begin(
  column: Column,
  resident: Resident,
  { work = [], slots = SLOTS, bulk = false }: Partial<Case>,
): Promise<string[]> {
  resident.status(); // which is the one to end
  lab("daemon", "head", ...column.variables);
  // What a daemon's database has not yet put in order slows it down, and so
  // does memory that was not in use lately.
  for (const host of ["w1", "w2"]) lab("daemon", host);
  await resident.waitForEnd();
  const hosts = bulk ? ["head", "w1", "w2"] : [];
  for (const host of hosts) lab("in", host, "guix", "gc");
  // That may take longer than connections are kept, or facts believed.
  const derivations = makeWork(work);
  // The first build after a start pays for what is there only then.
  build(makeWork(), localSlots(column, slots));
  if (column.kind !== "warm") return derivations;
  await resident.waitForStart();
  // So long that all are under way at once, and leave as many connections.
  const filling = [`--count=${slots}`, "--seconds=0.5"];
  for (let round = 0; round < ROUNDS; round++) build(makeWork(filling));
  await resident.waitUntilServed(ROUNDS * slots);
  return derivations;
}

/** Measures a case once in a column, and sees to it that it is what it says. */
async function take(
  each: Case,
  column: Column,
  resident: Resident,
): Promise<number> {
  const { slots = SLOTS, isAnswer = false } = each;
  const work = [`--count=${countFor(each, column)}`, ...each.work];
  const derivations = await begin(column, resident, { ...each, work });
  const { served } = resident;
  const check = async () => {
    if (column.kind !== "warm") return;
    await resident.waitUntilServed(served + derivations.length);
  };
  if (isAnswer) return await ask(column, derivations[0]!, check);
  const seconds = build(derivations, localSlots(column, slots));
  await check();
  return seconds;
}

/** Tells what went wrong; the rest is measured all the same. */
function tell(what: string, error: unknown): void {
  process.exitCode = 1;
  // A program's begins with all its arguments, and ends with what it said.
  const { message } = error as Error;
  console.error(`bench: error: ${what}: ${message.slice(-2000)}`);
}

/** Measures a case in each column in turns; medians, by column. */
async function measure(each: Case): Promise<ByColumn<Measured>> {
  const resident = new Resident();
  const columns = Object.entries(COLUMNS)
    .filter(([, { kind }]) => !(each.isAnswer && kind === "local"));
  const times: ByColumn<number[]> = {};
  for (let run = 0; run < each.runs; run++) {
    for (const [name, column] of columns) {
      const seconds = await take(each, column, resident).catch((error) => {
        tell(`${each.name}, ${name}`, error);
        return NaN;
      });
      (times[name] ??= []).push(seconds);
    }
  }
  return Object.fromEntries(columns.map(([name, column]) => {
    const seconds = median(times[name]!);
    return [name, { seconds, builds: countFor(each, column) }];
  }));
}

/** The last process that was started in w1: they are numbered from 1. */
function lastProcess(): number {
  const { pid } = hostOf("w1");
  const command = ["cat", "/proc/sys/kernel/ns_last_pid"];
  const options = ["--target", pid, "--pid"];
  return Number(execFileSync("nsenter", [...options, ...command]));
}

/** What a trivial build in a column costs beside time. */
async function measureTraffic(
  column: Column,
  resident: Resident,
): Promise<Readonly<Record<string, string>>> {
  const kibibytes = (size: number) => `${Math.round(size / 1024)} KiB`;
  return await withRelay(0, 2, async (count) => {
    const derivations = await begin(column, resident, { slots: 2 });
    const { served } = resident;
    const before = lastProcess();
    await count();
    build(derivations);
    const { connections, up, down } = await count();
    const started = lastProcess() - before - 1; // the one that asks
    if (column.kind === "warm") await resident.waitUntilServed(served + 1);
    return {
      "bytes to the machine": kibibytes(up),
      "bytes from the machine": kibibytes(down),
      "SSH connections": String(connections),
      "processes and threads started there": String(started),
    };
  });
}

/** Prints what a trivial build costs beside time, a row each. */
async function printTraffic(): Promise<void> {
  const resident = new Resident();
  const costs: ByColumn<Readonly<Record<string, string>>> = {};
  for (const [name, column] of Object.entries(COLUMNS)) {
    if (column.kind === "local") continue;
    costs[name] = await measureTraffic(column, resident).catch((error) => {
      tell(`one trivial build, ${name}`, error);
      return {};
    });
  }
  const all = Object.values(costs);
  console.log(`\n${tableHead("one trivial build", ...Object.keys(costs))}`);
  for (const what of new Set(all.flatMap((each) => Object.keys(each)))) {
    const cells = all.map((each) => each[what] ?? "failed");
    console.log(tableLine(what, ...cells));
  }
}

/** Brings new hosts up and sends the builder to the machines. */
function prepare({ slots = SLOTS }: Partial<Case>): void {
  lab("down");
  lab("up", "head", "w1", "w2");
  useMachines(slots);
  lab("daemon", "head");
  for (let i = 0; i < 4; i++) build(makeWork());
}

async function main(args: readonly string[]): Promise<void> {
  const cli = cac("bench");
  cli.option("--quick", "Leave out what takes long");
  cli.option("--case <name>", "Measure only the cases whose names hold this");
  cli.option("--svg <file>", "Draw a chart as well");
  cli.help();
  const { options } = cli.parse(["", "bench", ...args]);
  if (options.help) return;
  const cases = CASES.filter(({ name, slow }) =>
    !(options.quick && slow) && name.includes(options.case ?? "")
  );
  console.log(tableHead("work", ...Object.keys(COLUMNS), "ideal"));
  const rows: [string, ByColumn<Measured>][] = [];
  for (const each of cases) {
    prepare(each);
    const { roundTrip, slots = SLOTS } = each;
    const row = roundTrip === undefined
      ? await measure(each)
      : await withRelay(roundTrip, slots, () => measure(each));
    rows.push([each.name, row]);
    console.log(formatRow(each, row));
  }
  if (options.svg) writeFileSync(options.svg, drawChart(rows));
  if (options.case === undefined) {
    prepare({});
    await printTraffic();
  }
  lab("down");
}

await main(process.argv.slice(2));

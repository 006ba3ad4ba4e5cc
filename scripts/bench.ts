/**
 * Measures Offload beside `guix offload`: the same builds on the same hosts of
 * the lab in the same run, in turns. Compare the ratios; the times depend on
 * the machine and on what else it does.
 *
 * @module
 */

import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { writeFileSync } from "node:fs";
import process from "node:process";
import { createInterface } from "node:readline";
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
  /** Whether so much is moved that it would fill the memory in the end. */
  readonly bulk?: boolean;
  /** Milliseconds there and back, by a relay to the one machine that is used. */
  readonly roundTrip?: number;
  /** Seconds that it would take if builds alone took time. */
  readonly ideal?: number;
}

const MEBIBYTE = 2 ** 20;

const CASES: readonly Case[] = [
  { name: "one trivial build", work: [], runs: 5 },
  {
    name: "20 builds of 2 s, 4 slots",
    work: ["--count=20", "--seconds=2"],
    runs: 1,
    slow: true,
    ideal: 10,
  },
  ...[1, 100, 1000, 5000].map((inputs) => ({
    name: `${inputs.toLocaleString("en")} small input${inputs > 1 ? "s" : ""}`,
    work: [`--inputs=${inputs}`],
    runs: inputs > 1000 ? 1 : 3,
    slow: inputs !== 100,
  })),
  {
    name: "a directory of 2,000 files",
    work: ["--input-files=2000"],
    runs: 2,
    slow: true,
  },
  {
    name: "one input of 400 MiB",
    work: ["--inputs=1", `--input-size=${400 * MEBIBYTE}`],
    runs: 3,
    ...{ slow: true, bulk: true },
  },
  {
    name: "an output of 300 MiB",
    work: [`--output-size=${300 * MEBIBYTE}`],
    runs: 3,
    ...{ slow: true, bulk: true },
  },
  ...[10, 50, 150].map((roundTrip) => ({
    name: `one trivial build, ${roundTrip} ms away`,
    work: [],
    runs: 3,
    slow: roundTrip !== 50,
    roundTrip,
  })),
  {
    name: "40 MiB in and out, 50 ms away",
    work: [
      ...["--inputs=1", "--compressible"],
      ...[`--input-size=${40 * MEBIBYTE}`, `--output-size=${40 * MEBIBYTE}`],
    ],
    ...{ runs: 1, slow: true, roundTrip: 50 },
  },
];

/** The hooks, each with the environment of guix-daemon that selects it. */
const HOOKS: Readonly<Record<string, readonly string[]>> = {
  "guix offload": [],
  "offload, Node": ["GUIX=/offload/scripts/guix", "OFFLOAD_RUNTIME=node"],
  "offload, Deno": ["GUIX=/offload/scripts/guix", "OFFLOAD_RUNTIME=deno"],
};
const REFERENCE = "guix offload";

/** Values by hook. */
type ByHook<T> = Record<string, T>;

const LAB = fileURLToPath(new URL("lab/lab", import.meta.url));
const RELAY = fileURLToPath(new URL("lab/relay", import.meta.url));
const RELAY_PORT = 2222;

function lab(...args: readonly string[]): string {
  return execFileSync(LAB, args, {
    encoding: "utf8",
    // What the disk still does of earlier builds must not slow the next ones.
    env: { OFFLOAD_LAB_MEMORY: "8g", ...process.env },
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

/** Address and pid of a host, from the lab's list. */
function hostOf(name: string): { address: string; pid: string } {
  const line = lab("list").split("\n").find((it) => it.startsWith(`${name} `));
  const [, address, pid] = line!.split(" ");
  return { address: address!, pid: pid! };
}

/** Has head use w1 and w2, or w1 alone, through a relay. */
function useMachines(isRelayed: boolean): void {
  const text = isRelayed
    ? lab("machines", "head", "w1")
      .replace(/\(name "w1"\)/, `$& (port ${RELAY_PORT})`)
    : lab("machines", "head", "w1", "w2");
  const { pid } = hostOf("head");
  writeFileSync(`/proc/${pid}/root/etc/guix/machines.scm`, text);
}

/** What went through a relay. */
interface Traffic {
  readonly connections: number;
  readonly up: number;
  readonly down: number;
}

/** Does some work with a relay to w1, of so many milliseconds there and back. */
async function withRelay<T>(
  roundTrip: number,
  work: (count: () => Promise<Traffic>) => T | Promise<T>,
): Promise<T> {
  const { address } = hostOf("w1");
  const relay = spawn(RELAY, [
    ...[`${address}:${RELAY_PORT}`, `${address}:22`],
    ...["--delay", String(roundTrip / 2)],
  ], { stdio: ["pipe", "pipe", "inherit"] });
  const lines = createInterface(relay.stdout);
  const [ready] = await once(lines, "line");
  if (ready !== "ready") throw new Error(`the relay says '${ready}'`);
  useMachines(true);
  try {
    return await work(async () => {
      relay.stdin.write("\n");
      const [line] = await once(lines, "line");
      return JSON.parse(line);
    });
  } finally {
    useMachines(false);
    relay.kill();
    await once(relay, "close");
  }
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1
    ? sorted[middle]!
    : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** Measures a case with each hook in turns; medians in seconds, by hook. */
function measure({ work, runs, bulk = false }: Case): ByHook<number> {
  const times: ByHook<number[]> = {};
  for (let run = 0; run < runs; run++) {
    for (const [hook, variables] of Object.entries(HOOKS)) {
      lab("daemon", "head", ...variables);
      // What a daemon's database has not yet put in order slows it down, and
      // so does memory that was not in use lately.
      for (const host of ["w1", "w2"]) lab("daemon", host);
      const hosts = bulk ? ["head", "w1", "w2"] : [];
      for (const host of hosts) lab("in", host, "guix", "gc");
      // The first build after a start pays for what is there only then.
      build(makeWork([]));
      (times[hook] ??= []).push(build(makeWork(work)));
    }
  }
  return Object.fromEntries(
    Object.entries(times).map(([hook, values]) => [hook, median(values)]),
  );
}

/** What a trivial build costs beside time, a row each, by hook. */
async function measureTraffic(): Promise<ByHook<ByHook<string>>> {
  const rows: ByHook<ByHook<string>> = {};
  // The last process that was started in w1: they are numbered from 1.
  const processes = () => {
    const { pid } = hostOf("w1");
    const file = "/proc/sys/kernel/ns_last_pid";
    return Number(
      execFileSync("nsenter", ["--target", pid, "--pid", "cat", file]),
    );
  };
  for (const [hook, variables] of Object.entries(HOOKS)) {
    lab("daemon", "head", ...variables);
    await withRelay(0, async (count) => {
      build(makeWork([]));
      const work = makeWork([]);
      const before = processes();
      await count();
      build(work);
      const { connections, up, down } = await count();
      const started = processes() - before - 1; // the one that asks
      const add = (what: string, value: string) =>
        (rows[what] ??= {})[hook] = value;
      const kibibytes = (size: number) => `${Math.round(size / 1024)} KiB`;
      add("bytes to the machine", kibibytes(up));
      add("bytes from the machine", kibibytes(down));
      add("SSH connections", String(connections));
      add("processes and threads started there", String(started));
    });
  }
  return rows;
}

function speedup(medians: ByHook<number>, hook: string): number {
  return medians[REFERENCE]! / medians[hook]!;
}

/** A line of a table in Markdown. */
function tableLine(...cells: readonly string[]): string {
  return `| ${cells.join(" | ")} |`;
}

function formatRow({ name, ideal }: Case, medians: ByHook<number>): string {
  const cells = Object.entries(medians).map(([hook, seconds]) =>
    `${seconds.toFixed(2)} s` +
    (hook === REFERENCE ? "" : ` (${speedup(medians, hook).toFixed(1)}x)`)
  );
  return tableLine(name, ...cells, ideal === undefined ? "" : `${ideal} s`);
}

/** A bar chart, in SVG, of how many times as fast as the reference each is. */
function drawChart(rows: readonly [name: string, ByHook<number>][]): string {
  const hooks = Object.keys(HOOKS).filter((hook) => hook !== REFERENCE);
  const colours = ["#3c873a", "#1f6feb"];
  const [left, scale, bar, gap, top] = [240, 60, 12, 12, 50];
  const rowHeight = hooks.length * bar + gap;
  const longest = Math.max(
    ...rows.flatMap(([, medians]) => hooks.map((it) => speedup(medians, it))),
  );
  const width = Math.ceil(left + longest * scale + 60);
  const height = top + rows.length * rowHeight + 10;
  const text = (x: number, y: number, words: string, more = "") =>
    `<text x="${x}" y="${y}" ${more}>${words}</text>`;
  const rect = (x: number, y: number, length: number, colour: string) =>
    `<rect x="${x}" y="${y}" width="${length.toFixed(1)}" ` +
    `height="${bar - 1}" fill="${colour}"/>`;
  const parts = [
    `<rect width="${width}" height="${height}" fill="#fff"/>`,
    text(10, 18, `Times as fast as ${REFERENCE}`, 'font-weight="bold"'),
    ...hooks.flatMap((hook, i) => [
      rect(left + i * 130, 26, bar, colours[i]!),
      text(left + i * 130 + bar + 4, 36, hook),
    ]),
    `<path d="M${left + scale} ${top - 4}V${height - 10}" stroke="#999"/>`,
  ];
  rows.forEach(([name, medians], row) => {
    const y = top + row * rowHeight;
    parts.push(text(left - 8, y + bar + 4, name, 'text-anchor="end"'));
    hooks.forEach((hook, i) => {
      const ratio = speedup(medians, hook);
      const line = y + i * bar;
      parts.push(rect(left, line, ratio * scale, colours[i]!));
      const end = Math.round(left + ratio * scale + 4);
      parts.push(text(end, line + 10, `${ratio.toFixed(1)}`));
    });
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" ` +
    `height="${height}" font-family="sans-serif" font-size="12">\n` +
    `${parts.join("\n")}\n</svg>\n`;
}

/** Brings new hosts up and sends the builder to the machines. */
function prepare(): void {
  lab("down");
  lab("up", "head", "w1", "w2");
  useMachines(false);
  lab("daemon", "head");
  for (let i = 0; i < 4; i++) build(makeWork([]));
}

function printHead(what: string, ...more: readonly string[]): void {
  const columns = [what, ...Object.keys(HOOKS), ...more];
  console.log(tableLine(...columns));
  console.log(tableLine(...columns.map(() => "---")));
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
  printHead("work", "ideal");
  const rows: [string, ByHook<number>][] = [];
  for (const each of cases) {
    prepare();
    const medians = each.roundTrip === undefined
      ? measure(each)
      : await withRelay(each.roundTrip, () => measure(each));
    rows.push([each.name, medians]);
    console.log(formatRow(each, medians));
  }
  if (options.svg) writeFileSync(options.svg, drawChart(rows));
  if (options.case === undefined) {
    console.log();
    printHead("one trivial build");
    for (const [what, values] of Object.entries(await measureTraffic())) {
      console.log(tableLine(what, ...Object.values(values)));
    }
  }
  lab("down");
}

await main(process.argv.slice(2));

/**
 * Simulates a farm, so that a site can judge a scoring plugin before it uses
 * it: makespan, utilisation and bytes moved, against the reference's policy
 * and a lower bound. _workload.ts and _derivations.ts say what is built,
 * _farm.ts how.
 *
 * @module
 */

import { readFileSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import process from "node:process";
import { gunzipSync } from "node:zlib";
import { cac, isProgram } from "../deps.ts";
import {
  builtinNames,
  loadPlugins,
  OffloadError,
  pluginsWith,
  readSettings,
} from "../mod.ts";
import type { Plugin, Settings } from "../mod.ts";
import { loadPlugin } from "../plugins/_site.ts";
import { knownPackages, ofPackages } from "./_derivations.ts";
import { Farm } from "./_farm.ts";
import type { Experience, Outcome } from "./_simulation.ts";
import { describe, fail, list, synthesizeClients } from "./_workload.ts";

const EXAMPLE = `  {
    "machines": [{"name": "a", "speed": 2, "parallelBuilds": 4}, {"name": "b"}],
    "items": {"gcc": 2e8, "source": 1e6},
    "builds": [
      {"name": "x", "seconds": 30, "inputs": ["gcc", "source"], "output": 3e5},
      {"name": "y", "seconds": 9.5, "inputs": ["gcc", "x"]}
    ]
  }
  The interface Workload in _workload.ts documents every field.`;

/** The options, as cac parses them. */
type Options = Readonly<Record<string, unknown>>;

function parseOptions(args: readonly string[]): Options | undefined {
  const cli = cac("simulate").usage("[options]")
    .option("--plugin <file>", "add the scores of a site's plugin")
    .option("--score <name>", "the built-in score; else that of the settings")
    .option("--workload <file>", "simulate a recorded workload")
    .option("--machines <number>", "else make up so many machines, or 20")
    .option("--builds <number>", "and so many builds, or 2000")
    .option("--packages <names>", "or what is to be built for real packages")
    .option("--clients <number>", "wanted by so many clients, or one")
    .option("--record <file>", "and write what was made up")
    .option("--warm", "have all been built there before, by the reference")
    .option("--seed <number>", "decide all chances; 1 unless told")
    .option("--seeds <from-to>", "simulate for each of these seeds")
    .option("--json", "print one JSON object")
    .option("-h, --help", "print this help");
  cli.globalCommand.helpCallback = (sections) => {
    const packages = `  ${knownPackages().join(", ")}, or all`;
    sections.push({ title: "Packages, separated by commas", body: packages });
    sections.push({ title: "A workload file", body: EXAMPLE });
  };
  const { options } = cli.parse(["", "", ...args], { run: false });
  cli.globalCommand.checkUnknownOptions();
  cli.globalCommand.checkOptionValue();
  cli.globalCommand.checkUnusedArgs();
  if (options.help) cli.outputHelp();
  return options.help ? undefined : options;
}

function readCount(options: Options, name: string, fallback: number): number {
  const value = options[name] ?? fallback;
  if (Number.isSafeInteger(value) && Number(value) > 0) return Number(value);
  fail(`--${name}`, `expected a whole number above 0, got '${value}'`);
}

/** The seeds for which to simulate. */
function readSeeds(options: Options): number[] {
  const { seeds } = options;
  if (seeds === undefined) return [readCount(options, "seed", 1)];
  const [, first, last] = /^(\d{1,9})-(\d{1,9})$/.exec(String(seeds)) ?? [];
  const count = Number(last) - Number(first) + 1;
  if (!(count > 0)) fail("--seeds", `expected FROM-TO, got '${seeds}'`);
  return list(count, (index) => Number(first) + index);
}

/** Reads a workload file, packed or not. */
function readWorkload(file: string): unknown {
  try {
    const bytes = readFileSync(file);
    const text = file.endsWith(".gz") ? gunzipSync(bytes) : bytes;
    return JSON.parse(text.toString());
  } catch (error) {
    fail(file, describe(error));
  }
}

/** The options that go with a workload that is made up. */
const MADE_UP = ["machines", "builds", "packages", "clients", "record"];

/** Reads a workload, or makes one up. */
function findWorkload(options: Options, seed: number): unknown {
  const { workload: file, packages, record } = options;
  if (file !== undefined) {
    const odd = MADE_UP.find((key) => key in options);
    if (odd) fail(`--${odd}`, "it does not go with --workload");
    return readWorkload(String(file));
  }
  const machines = readCount(options, "machines", 20);
  const clients = readCount(options, "clients", 1);
  const builds = readCount(options, "builds", 2000);
  if (packages && "builds" in options) {
    fail("--builds", "it does not go with --packages");
  }
  const names = packages === "all"
    ? knownPackages()
    : String(packages).split(",");
  const workload = packages
    ? ofPackages(names, machines, clients, seed)
    : synthesizeClients(machines, builds, clients, seed);
  if (record !== undefined) {
    writeFileSync(String(record), `${JSON.stringify(workload, null, 1)}\n`);
  }
  return workload;
}

/** Loads a site's plugin as the hook would; one that scores is wanted. */
async function loadScoring(
  file: string,
  taken: readonly string[],
  seconds: number,
): Promise<Plugin> {
  const plugin = await loadPlugin(resolve(file), taken, seconds)
    .catch((error) => {
      if (error instanceof OffloadError) throw error;
      fail(file, describe(error));
    });
  return plugin.score ? plugin : fail(file, "it has no 'score'");
}

function ratio(value: number, other: number): string {
  return other > 0 ? (value / other).toFixed(2) : "-";
}

/** Makes a table of the lower bound and the outcomes, the reference's first. */
function formatTable(bound: number, outcomes: readonly Outcome[]): string {
  const titles = "makespan (s),/ bound,slots used (%),moved (MiB),/ reference";
  const rows = outcomes.map(({ policy, makespan, ...outcome }) => [
    policy,
    makespan?.toFixed(1) ?? "never",
    makespan === null ? "-" : ratio(makespan, bound),
    (outcome.utilisation * 100).toFixed(1),
    (outcome.bytesMoved / 2 ** 20).toFixed(1),
    ratio(outcome.bytesMoved, outcomes[0]!.bytesMoved),
    String(outcome.decisionsPerSecond),
  ]);
  rows[0]![0] += " (reference)";
  const bounds = ["lower bound", bound.toFixed(1), "1.00"];
  const table = [["", ...titles.split(","), "decisions/s"], bounds, ...rows];
  const width = Math.max(...table.map(([name]) => name!.length));
  return table.map(([name, ...cells]) =>
    name!.padEnd(width) + cells.map((cell) => cell.padStart(16)).join("")
  ).join("\n");
}

/** Finds the settings of this machine, with the score that is asked for. */
function findSettings(options: Options): Settings {
  const { OFFLOAD_PLUGINS, GUIX_CONFIGURATION_DIRECTORY = "/etc/guix" } =
    process.env;
  const directory = OFFLOAD_PLUGINS ??
    `${GUIX_CONFIGURATION_DIRECTORY}/offload`;
  const settings = readSettings(directory, process.env);
  return { ...settings, score: String(options.score ?? settings.score) };
}

/** Loads the reference's policy, and the plugins whose scores are summed. */
async function loadPolicies(
  options: Options,
  settings: Settings,
): Promise<[Plugin[], Plugin[]]> {
  // What the settings say of a site's own plugins is of no interest here.
  const names = builtinNames();
  const use = Object.fromEntries(
    Object.entries(settings.use).filter(([name]) => names.includes(name)),
  );
  const builtins = await loadPlugins("", { ...settings, use }, console);
  const reference = builtins.filter(({ name }) => name === "guix");
  const plugins = [...builtins];
  if (options.plugin) {
    const file = String(options.plugin);
    const taken = [...names, ...builtins.map(({ name }) => name)];
    plugins.unshift(await loadScoring(file, taken, settings.hookTimeout));
  }
  return [reference, pluginsWith("score", { plugins, settings })];
}

/** What came of a seed. */
interface Comparison {
  readonly seed: number;
  readonly lowerBound: number;
  readonly reference: Outcome;
  readonly plugin: Outcome;
}

/** Simulates both policies, with a history or without. */
async function compare(
  options: Options,
  settings: Settings,
  [guix, plugins]: readonly [Plugin[], Plugin[]],
  seed: number,
): Promise<Comparison> {
  const file = String(options.workload ?? "synthetic workload");
  const farm = new Farm(findWorkload(options, seed), file);
  const before: Experience = {
    history: new Map(),
    similar: new Map(),
    measured: new Set(),
  };
  if (options.warm) await farm.run(guix, seed, settings, before);
  const run = (policy: readonly Plugin[]) =>
    farm.run(policy, seed, settings, structuredClone(before));
  const reference = await run(guix);
  const isReference = plugins.every((plugin) => guix.includes(plugin));
  const plugin = isReference ? reference : await run(plugins);
  return { seed, lowerBound: farm.lowerBound(), reference, plugin };
}

/** The makespans as multiples of the bound: on average, and at worst. */
function summarize(comparisons: readonly Comparison[]) {
  const ratios = (which: "reference" | "plugin") =>
    comparisons.map(({ lowerBound, [which]: { makespan } }) =>
      (makespan ?? Infinity) / lowerBound
    );
  const average = (values: readonly number[]) =>
    values.reduce((sum, value) => sum + value, 0) / values.length;
  const summary = (values: readonly number[]) => ({
    average: average(values),
    worst: Math.max(...values),
  });
  return {
    reference: summary(ratios("reference")),
    plugin: summary(ratios("plugin")),
  };
}

/** Makes a table of several seeds: makespans, and what of the bound they are. */
function formatSeeds(comparisons: readonly Comparison[]): string {
  const [{ plugin }] = comparisons as [Comparison];
  const titles = ["seed", "lower bound", "guix (s)", "/ bound", plugin.policy];
  const time = (makespan: number | null) => makespan?.toFixed(1) ?? "never";
  const rows = comparisons.map(({ seed, lowerBound, reference, plugin }) => [
    ...[String(seed), lowerBound.toFixed(1), time(reference.makespan)],
    ratio(reference.makespan ?? Infinity, lowerBound),
    time(plugin.makespan),
    ratio(plugin.makespan ?? Infinity, lowerBound),
  ]);
  const summary = summarize(comparisons);
  for (const which of ["average", "worst"] as const) {
    const { reference, plugin } = summary;
    const [one, other] = [reference[which], plugin[which]];
    rows.push([which, "", "", one.toFixed(2), "", other.toFixed(2)]);
  }
  return [[...titles, "/ bound"], ...rows].map((cells) =>
    cells.map((cell) => cell.padStart(16)).join("")
  ).join("\n");
}

function print(comparisons: readonly Comparison[], isJson: boolean): void {
  const [first, ...others] = comparisons as [Comparison];
  if (isJson) {
    const all = { seeds: comparisons, ...summarize(comparisons) };
    console.log(JSON.stringify(others.length > 0 ? all : first, null, 2));
    return;
  }
  const { lowerBound, reference, plugin } = first;
  console.log(
    others.length > 0
      ? formatSeeds(comparisons)
      : formatTable(lowerBound, [reference, plugin]),
  );
}

/** Simulates for each seed, and prints what came of it. */
async function simulate(options: Options): Promise<number> {
  const settings = findSettings(options);
  const policies = await loadPolicies(options, settings);
  const comparisons: Comparison[] = [];
  for (const seed of readSeeds(options)) {
    comparisons.push(await compare(options, settings, policies, seed));
  }
  print(comparisons, Boolean(options.json));
  const problems = comparisons.flatMap(({ plugin }) =>
    Object.entries(plugin.problems)
  );
  for (const [problem, times] of problems) {
    console.error(`simulate: warning: ${problem} (${times} times)`);
  }
  return problems.length > 0 ? 1 : 0;
}

async function main(args: readonly string[]): Promise<number> {
  try {
    const options = parseOptions(args);
    return options === undefined ? 0 : await simulate(options);
  } catch (error) {
    console.error(`simulate: error: ${describe(error)}`);
    const hint = error instanceof OffloadError ? error.hint : undefined;
    if (hint !== undefined) console.error(`hint: ${hint}`);
    return 1;
  }
}

if (isProgram(import.meta)) {
  main(process.argv.slice(2)).then((code) => process.exit(code));
}

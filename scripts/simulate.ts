/**
 * Simulates a farm, so that a site can judge a scoring plugin before it uses
 * it: makespan, utilisation and bytes moved, against the reference's policy
 * and a lower bound. _workload.ts says what is built, _farm.ts how.
 *
 * @module
 */

import { readFileSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import process from "node:process";
import { cac, isProgram } from "../deps.ts";
import {
  builtinNames,
  loadPlugin,
  loadPlugins,
  OffloadError,
  readSettings,
} from "../mod.ts";
import type { Plugin, Settings } from "../mod.ts";
import { Farm } from "./_farm.ts";
import type { Outcome } from "./_simulation.ts";
import { describe, fail, synthesize } from "./_workload.ts";

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
    .option("--record <file>", "and write what was made up")
    .option("--seed <number>", "decide all chances; 1 unless told")
    .option("--json", "print one JSON object")
    .option("-h, --help", "print this help");
  cli.globalCommand.helpCallback = (sections) => {
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

/** Reads a workload, or makes one up. */
function findWorkload(options: Options, seed: number): unknown {
  const { workload: file, record } = options;
  if (file !== undefined) {
    const odd = ["machines", "builds", "record"].find((key) => key in options);
    if (odd) fail(`--${odd}`, "it does not go with --workload");
    try {
      return JSON.parse(readFileSync(String(file), "utf8"));
    } catch (error) {
      fail(String(file), describe(error));
    }
  }
  const machines = readCount(options, "machines", 20);
  const builds = readCount(options, "builds", 2000);
  const workload = synthesize(machines, builds, seed);
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
  const plugins = builtins.filter(({ name, score }) =>
    score !== undefined && (name === settings.score || name in settings.use)
  );
  if (options.plugin) {
    const file = String(options.plugin);
    const taken = [...names, ...builtins.map(({ name }) => name)];
    plugins.unshift(await loadScoring(file, taken, settings.hookTimeout));
  }
  return [reference, plugins];
}

/** Simulates both policies, and prints what came of them. */
async function compare(options: Options): Promise<number> {
  const settings = findSettings(options);
  const [guix, plugins] = await loadPolicies(options, settings);
  const seed = readCount(options, "seed", 1);
  const workload = findWorkload(options, seed);
  const file = String(options.workload ?? "synthetic workload");
  const farm = new Farm(workload, file);
  const lowerBound = farm.lowerBound();
  const reference = await farm.run(guix, seed, settings);
  const plugin = await new Farm(workload, file).run(plugins, seed, settings);
  console.log(
    options.json
      ? JSON.stringify({ seed, lowerBound, reference, plugin }, null, 2)
      : formatTable(lowerBound, [reference, plugin]),
  );
  const problems = Object.entries(plugin.problems);
  for (const [problem, times] of problems) {
    console.error(`simulate: warning: ${problem} (${times} times)`);
  }
  return problems.length > 0 ? 1 : 0;
}

async function main(args: readonly string[]): Promise<number> {
  try {
    const options = parseOptions(args);
    return options === undefined ? 0 : await compare(options);
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

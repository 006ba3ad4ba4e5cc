/**
 * The command `offload metrics`, and the plugin that writes the same to a file:
 * numbers about the farm for Prometheus.
 *
 * @module
 */

import {
  chmodSync,
  renameSync,
  statSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import {
  listMachines,
  lockFile,
  OffloadError,
  orInMemory,
  reason,
  recallMachines,
  takenSlots,
} from "../mod.ts";
import type {
  Context,
  Machine,
  MachineRecord,
  Plugin,
  PluginContext,
  Prospect,
} from "../mod.ts";
import { warnOfGaps } from "./_first_steps.ts";
import { idleReason, withoutNumbers } from "./_idle.ts";
import { journalOf } from "./_journal.ts";
import { formatMetrics } from "./_metrics_format.ts";
import type { Family, Sample } from "./_metrics_format.ts";
import { PHASES } from "./_phases.ts";
import { BOUNDS } from "./_tally.ts";
import type { Count } from "./_tally.ts";

/** A machine, and what is known of it without asking. */
interface Look {
  readonly machine: Machine;
  readonly id: string;
  readonly prospect: Prospect;
  readonly record: MachineRecord | undefined;
  readonly taken: number;
}

/** Looks at all machines; asks none. */
async function lookAround(context: Context): Promise<Look[]> {
  const machines = await listMachines(context);
  const prospects = await recallMachines(machines, "", context);
  const records = context.observations.machines();
  return prospects.map((prospect) => {
    const { id, machine } = prospect;
    const taken = takenSlots(machine, context.stateDirectory).length;
    return { id, machine, prospect, record: records.get(id), taken };
  });
}

/** Whether a machine was reached last; nobody may have tried. */
function isReached(record: MachineRecord | undefined): boolean | undefined {
  if (record === undefined) return undefined;
  return record.failures > 0 ? false : record.facts && true;
}

/** For how many seconds a machine is left alone. */
function leftAlone({ until }: Prospect): number {
  return Math.max(0, until - Date.now()) / 1000;
}

/** A sample of a machine. */
function ofMachine(
  machine: string,
  value: number | boolean | undefined,
  labels: Readonly<Record<string, string>> = {},
): Sample[] {
  if (value === undefined) return [];
  return [{ labels: { machine, ...labels }, value: Number(value) }];
}

/** How machines are. */
function machineFamilies(looks: readonly Look[], context: Context): Family[] {
  const gauge = (name: string, help: string, of: (look: Look) => Sample[]) =>
    ({ name, help, type: "gauge", samples: looks.flatMap(of) }) as const;
  return [
    gauge(
      "offload_slots",
      "Builds that a machine may run at a time.",
      ({ id, machine }) => ofMachine(id, machine.parallelBuilds),
    ),
    gauge(
      "offload_slots_taken",
      "Slots of a machine that are taken now.",
      ({ id, taken }) => ofMachine(id, taken),
    ),
    gauge(
      "offload_machine_reachable",
      "Whether a machine could be reached when that was last tried.",
      ({ id, record }) => ofMachine(id, isReached(record)),
    ),
    gauge(
      "offload_machine_failures",
      "How often a machine failed since a build last succeeded there.",
      ({ id, record }) => ofMachine(id, record?.failures ?? 0),
    ),
    gauge(
      "offload_machine_left_alone_seconds",
      "For how long a machine that failed is left alone from now on.",
      ({ id, prospect }) => ofMachine(id, leftAlone(prospect)),
    ),
    gauge(
      "offload_machine_idle_reason",
      "Why a machine takes no build now; those that would are left out.",
      (look) => {
        const why = idleReason(look.prospect, context);
        if (why === undefined) return [];
        return ofMachine(look.id, 1, { reason: withoutNumbers(why) });
      },
    ),
  ];
}

/** What became of builds. */
function buildFamilies(counts: readonly Count[]): Family[] {
  const counter = (
    name: string,
    help: string,
    counted: Count["name"],
    labels: (count: Count) => Readonly<Record<string, string>> = () => ({}),
  ): Family => ({
    ...{ name, help, type: "counter" },
    samples: counts.filter(({ name }) => name === counted)
      .flatMap((it) => ofMachine(it.machine, it.value, labels(it))),
  });
  return [
    counter(
      "offload_builds",
      "Builds that are over, by the machine that had them last.",
      ...["builds", ({ label: outcome }: Count) => ({ outcome })] as const,
    ),
    counter(
      "offload_attempts_failed",
      "Attempts to build that a machine let down.",
      "attempts",
    ),
    counter(
      "offload_busy_seconds",
      "Time for which slots were taken by builds that are over.",
      "busy",
    ),
    counter("offload_sent_bytes", "Bytes of inputs that were sent.", "sent"),
    counter(
      "offload_retrieved_bytes",
      "Bytes of outputs that were retrieved.",
      "retrieved",
    ),
  ];
}

/** How long builds took. */
function phaseFamily(counts: readonly Count[]): Family {
  return {
    name: "offload_phase_seconds",
    help: "How long the phases of builds took.",
    type: "histogram",
    samples: PHASES.flatMap((phase) => phaseSamples(phase, counts)),
  };
}

/** The histogram of a phase, if a build ever came to it. */
function phaseSamples(phase: string, counts: readonly Count[]): Sample[] {
  const value = (name: Count["name"], label: string) =>
    counts.find((it) => it.name === name && it.label === label)?.value ?? 0;
  let sum = 0;
  const buckets = BOUNDS.map((bound): Sample => {
    sum += value("bound", `${phase} ${bound}`);
    const number = Number.isInteger(bound) ? bound.toFixed(1) : `${bound}`;
    const le = bound === Infinity ? "+Inf" : number;
    return { suffix: "_bucket", labels: { phase, le }, value: sum };
  });
  if (sum === 0) return [];
  const labels = { phase };
  return [
    ...buckets,
    { suffix: "_sum", labels, value: value("phase", phase) },
    { suffix: "_count", labels, value: sum },
  ];
}

/** All that there is to tell, in one of the two formats. */
async function describeFarm(
  context: Context,
  format: "openmetrics" | "text",
): Promise<string> {
  const journal = journalOf(context);
  const waiting: Family = {
    name: "offload_builds_waiting",
    help: "Builds that guix-daemon asks for in vain now.",
    type: "gauge",
    samples: [{ labels: {}, value: journal?.waiting().length ?? 0 }],
  };
  const looks = await lookAround(context);
  const counts = journal?.counts() ?? [];
  const builds = [...buildFamilies(counts), phaseFamily(counts)];
  const machines = machineFamilies(looks, context);
  return formatMetrics([...machines, waiting, ...builds], format);
}

/** How often the file is written at most, in milliseconds. */
const INTERVAL = 15_000;

/** When the file was last written, in milliseconds since 1970. */
function lastWritten(file: string): number {
  try {
    return statSync(file).mtimeMs;
  } catch {
    return 0; // it is not there, or what is wrong is told by writing it
  }
}

/** Writes a file so that who reads it sees all or nothing of that. */
function replace(file: string, text: string): void {
  const place = `${file}.${process.pid}`;
  try {
    writeFileSync(place, text);
    chmodSync(place, 0o644); // another account reads it
    renameSync(place, file);
  } catch (cause) {
    try {
      unlinkSync(place);
    } catch {
      // It was not even made.
    }
    const message = `failed to write '${file}': ${reason(cause)}`;
    const hint = "the account that guix-daemon runs as must be able to " +
      "write to its directory: see the option 'file'";
    throw new OffloadError(message, { cause, hint });
  }
}

/**
 * Writes the file, unless another process is about to: what has happened by now
 * is then in what that writes.
 */
async function update(context: Context): Promise<void> {
  const file = String(context.options.file);
  const directory = `${context.stateDirectory}/offload`;
  const lock = orInMemory(directory, (place) => lockFile(`${place}/metrics`));
  if (lock === undefined) return;
  try {
    const passed = Date.now() - lastWritten(file);
    const wait = passed >= 0 && passed < INTERVAL ? INTERVAL - passed : 0;
    await delay(wait, undefined, { signal: context.signal }).catch(() => {});
  } finally {
    lock.release(); // who comes from now on writes once more
  }
  const quiet = { ...context, report: () => {} }; // the build has told it
  replace(file, await describeFarm(quiet, "text"));
}

const plugin = {
  name: "metrics",
  options: {
    file: {
      default: "/var/lib/prometheus/node-exporter/offload.prom",
      description: "file of numbers for node_exporter's textfile collector",
    },
  },
  // What is built in is given all that there is.
  ended: (_build, context: PluginContext) => update(context as Context),
  command: {
    usage: "",
    summary: "Print numbers about the farm for Prometheus",
    description: [
      "It asks no machine: what is told of them is what builds saw. The format " +
      "is OpenMetrics.",
    ],
    options: [
      ["--text", "Print the older format, as the plugin 'metrics' writes it"],
    ],
    examples: [
      ["offload metrics", "prints them"],
      ["offload metrics --text | promtool check metrics", "checks them"],
    ],
    run: async (_args, options, makeContext) => {
      const context = await makeContext();
      await warnOfGaps(await listMachines(context), context);
      const format = options.text ? "text" : "openmetrics";
      const output = await describeFarm(context, format);
      return { output: output.trimEnd(), exitCode: 0 };
    },
  },
} satisfies Plugin;

export default plugin as Plugin;

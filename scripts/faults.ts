/**
 * Lets builds meet the faults of test/faults with `guix offload` and with
 * Offload, and prints what came of them: the table in
 * plugins/measurements.md.
 *
 * @module
 */

import process from "node:process";
import { cac } from "../deps.ts";
import { FAULTS, titleOf } from "../test/faults/faults.ts";
import type { Fault } from "../test/faults/faults.ts";
import { makeField, SETTINGS, useHook } from "../test/faults/field.ts";
import type { Field, HookKind } from "../test/faults/field.ts";
import { meet, whatRemains } from "../test/faults/meet.ts";

/** Columns of the table. */
const HOOKS: Readonly<Record<string, HookKind>> = {
  "guix offload": "reference",
  "offload": "node",
};

/** Seconds after which a build is not waited for any more. */
const BOUND = 60;

/** Lets a build meet a fault; says in a few words what came of it. */
async function tell(fault: Fault, field: Field): Promise<string> {
  const { ending, seconds } = await meet(fault, field, BOUND);
  const words = {
    "on w1": "built there",
    "on w2": "built elsewhere",
    fails: "fails",
    hangs: "hangs",
  }[ending];
  const time = ending === "hangs" ? `> ${BOUND} s` : `${seconds.toFixed(0)} s`;
  const left = await whatRemains();
  const what = left.map((it) => it.replace(/ \d+ on /, " on "));
  const rest = left.length === 0 ? "" : `; leaves ${what.join(", ")}`;
  return `${words} (${time})${rest}`;
}

async function main(args: readonly string[]): Promise<void> {
  const cli = cac("faults");
  cli.option("--fault <pattern>", "Inject only the faults that match");
  cli.help();
  const { options } = cli.parse(["", "faults", ...args]);
  if (options.help) return;
  const faults = FAULTS.filter((fault) =>
    fault.compared && RegExp(options.fault ?? "").test(titleOf(fault))
  );
  const field = await makeField("reference");
  const columns = new Map<HookKind, string[]>();
  for (const hook of Object.values(HOOKS)) {
    useHook(hook);
    const cells: string[] = [];
    for (const fault of faults) {
      cells.push(await tell(fault, { ...field, hook }));
      console.error(`${titleOf(fault)}: ${hook}: ${cells.at(-1)}`);
    }
    columns.set(hook, cells);
  }
  await field.relay.stop();
  const row = (...cells: string[]) => console.log(`| ${cells.join(" | ")} |`);
  row("fault", ...Object.keys(HOOKS));
  row("---", ...Object.keys(HOOKS).map(() => "---"));
  faults.forEach((fault, index) =>
    row(titleOf(fault), ...[...columns.values()].map((it) => it[index]!))
  );
  console.log(`\nSettings: ${SETTINGS.join(" ")}`);
}

main(process.argv.slice(2));

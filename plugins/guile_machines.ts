/**
 * Machine files that the evaluator in mod.ts leaves alone are evaluated here by
 * the real Guix, once a change: what comes out is kept with the content of all
 * that went in.
 *
 * @module
 */

import { readFileSync } from "node:fs";
import type {
  Machine,
  MachineFile,
  Plugin,
  PluginContext,
  Problem,
} from "../mod.ts";
import type { Outcome } from "./_guile.ts";
import { outcomeOf } from "./_guile_outcomes.ts";

/** Where a variable is used: where evaluation stopped, or its first use. */
function placeOfVariable(
  { file, needsGuile = file }: MachineFile,
  variable: string,
): string {
  const [, place = file, form] = /^(.*:\d+:\d+): (.*)$/.exec(needsGuile) ?? [];
  if (form === variable) return place;
  const name = variable.replace(/\W/g, "\\$&");
  const use = new RegExp(`[\\s()[\\]'\`,]${name}[\\s()[\\]]`);
  const lines = readFileSync(file, "utf8").split("\n");
  for (const [index, line] of lines.entries()) {
    const code = line.replace(
      /"([^"\\]|\\.)*"/g,
      (string) => '"'.repeat(string.length),
    ).replace(/;.*/, "");
    const column = ` ${code} `.search(use);
    if (column >= 0) return `${file}:${index + 1}:${column}`;
  }
  return place;
}

/** Where in a file the real Guix finds an error, or evaluation stopped. */
function placeOfError(
  machineFile: MachineFile,
  { place, variable }: NonNullable<Outcome["error"]>,
): string {
  if (place !== null) return place;
  if (variable !== null) return placeOfVariable(machineFile, variable);
  const { file, needsGuile = file } = machineFile;
  return needsGuile.replace(/^(.*:\d+:\d+): .*$/, "$1");
}

/** Says what is wrong with a file as a whole, if something is. */
function problemOf(
  machineFile: MachineFile,
  { error, machines }: Outcome,
): Problem | undefined {
  if (error) {
    const place = placeOfError(machineFile, error);
    const message = place ? `${place}: ${error.message}` : error.message;
    return { severity: "error", message };
  }
  if (machines) return undefined;
  const message =
    `'${machineFile.file}' did not return a list of build machines; ignoring it`;
  return { severity: "error", message };
}

/** Makes a machine of what Guile says of it, and reports what is wrong. */
function machineFrom(
  context: PluginContext,
  { fields, place }: NonNullable<Outcome["machines"]>[number],
): Machine[] {
  const where = place ?? "";
  const { system, location: _, ...own } = fields;
  const deprecated = (own.systems ?? false) === false &&
    (system ?? false) !== false;
  if (deprecated) {
    const message =
      "The 'system' field is deprecated, please use 'systems' instead.";
    context.report({
      severity: "warning",
      message: where ? `${where}: ${message}` : message,
    });
  }
  const machine = context.machineFromFields(
    deprecated ? { ...own, systems: [system] } : own,
    where,
  );
  if (!("severity" in machine)) return [machine];
  context.report(machine);
  return [];
}

const plugin = {
  name: "guile-machines",
  async machines(context: PluginContext) {
    let machineFile;
    try {
      machineFile = await context.machineFile();
    } catch {
      return []; // the plugin "guix" tells what is wrong
    }
    const { file, needsGuile } = machineFile;
    if (needsGuile === undefined) return [];
    context.log.debug(`${needsGuile}: evaluated by Guile`);
    let outcome: Outcome;
    try {
      outcome = await outcomeOf(context, file);
    } catch (cause) {
      const reason = (cause as Error).message;
      throw new Error(
        `${needsGuile}: only Guile can evaluate this, and '${context.guix} repl' failed: ${reason}`,
        { cause },
      );
    }
    const problem = problemOf(machineFile, outcome);
    if (problem) context.report(problem);
    return (outcome.machines ?? []).flatMap((machine) =>
      machineFrom(context, machine)
    );
  },
} satisfies Plugin;

export default plugin as Plugin;

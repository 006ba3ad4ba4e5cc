/**
 * What plugins share that list machines as JSON.
 *
 * @module
 */

import type { Machine, PluginContext } from "../mod.ts";
import type { Demand } from "./_on_demand.ts";

/** What makes it a machine on demand. */
const DEMAND: Readonly<Record<keyof Demand, string | number>> = {
  start: "",
  stop: "",
  "boot-timeout": 300,
  "idle-time": 600,
};

/** Says what is wrong with what a list says of starting a machine. */
function demandProblem(demand: Record<string, unknown>): string | undefined {
  for (const [name, usual] of Object.entries(DEMAND)) {
    const value = demand[name];
    const good = typeof usual === "number"
      ? Number.isInteger(value) && Number(value) > 0
      : typeof value === "string" && value !== "";
    if (good) continue;
    const expected = typeof usual === "number" ? "whole seconds" : "a command";
    return `field '${name}' must be ${expected}`;
  }
  return undefined;
}

/** Makes machines of a list, and reports what is wrong with those in it. */
function machinesOfList(
  list: readonly (object | null | undefined)[],
  where: string,
  context: PluginContext,
  demands: Map<string, Demand>,
): Machine[] {
  return list.flatMap((entry, index) => {
    const own = Object(entry) as Record<string, unknown>;
    const report = (problem: string) => {
      const name = own.name === undefined ? index + 1 : `'${own.name}'`;
      const message = `${where}: machine ${name}: ${problem}`;
      context.report({ severity: "error", message });
      return [];
    };
    if (entry?.constructor !== Object) return report("expected an object");
    const fields = Object.entries(own).filter(([name]) => !(name in DEMAND));
    const machine = context.machineFromFields(
      ...[Object.fromEntries(fields), where] as const,
    );
    if ("severity" in machine) return context.report(machine), [];
    const id = `${machine.name}:${machine.port}`;
    demands.delete(id);
    if ("start" in own || "stop" in own) {
      const demand = { ...DEMAND, ...own };
      const problem = demandProblem(demand);
      if (problem !== undefined) return report(problem);
      demands.set(id, demand as Demand);
    }
    return [machine];
  });
}

/**
 * Makes machines of JSON: a list, or `{"machines": [...]}`. What is wrong with
 * one of them is reported; it is left out.
 *
 * @throws {Error} where it is no JSON, or no list.
 */
export function parseMachines(
  text: string,
  where: string,
  context: PluginContext,
  demands: Map<string, Demand>,
): Machine[] {
  let value;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new Error(`${where}: ${(cause as Error).message}`, { cause });
  }
  const list = Array.isArray(value) ? value : value?.machines;
  if (Array.isArray(list)) return machinesOfList(list, where, context, demands);
  throw new Error(`${where}: expected a list of machines`);
}

/**
 * Lists the machines of a JSON file, whose JSON Schema is machines.schema.json.
 *
 * @module
 */

import type { Plugin } from "../mod.ts";
import { parseMachines } from "./_machine_list.ts";
import { excludeOff } from "./_on_demand.ts";
import type { Demand } from "./_on_demand.ts";
import { readText } from "./_programs.ts";

const demands = new Map<string, Demand>();

const plugin = {
  name: "json-machines",
  options: {
    file: {
      default: "/etc/guix/machines.json",
      description: "JSON file of machines; machines.schema.json is its schema",
    },
  },
  machines(context) {
    const file = String(context.options.file);
    const text = readText(file);
    return parseMachines(text, file, context, demands);
  },
  exclude: (machine, context) => excludeOff(machine, demands, context),
} satisfies Plugin;

export default plugin as Plugin;

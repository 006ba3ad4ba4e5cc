/**
 * Lists the machines that a command prints as JSON, such as those of a cloud
 * or of a cluster's scheduler.
 *
 * @module
 */

import type { Plugin } from "../mod.ts";
import { parseMachines } from "./_machine_list.ts";
import { excludeOff } from "./_on_demand.ts";
import type { Demand } from "./_on_demand.ts";
import { cachedOutput } from "./_programs.ts";

const demands = new Map<string, Demand>();

const plugin = {
  name: "command",
  options: {
    command: {
      default: "/etc/guix/offload/list-machines",
      description: "shell command that prints machines as JSON; " +
        "machines.schema.json is its schema",
    },
    lifetime: {
      ...{ default: 60, minimum: 1, maximum: 86400 },
      description: "seconds after which it is run again, in the background",
    },
    timeout: {
      ...{ default: 10, minimum: 1, maximum: 50 },
      description: "seconds that it may take",
    },
  },
  async machines(context) {
    const command = String(context.options.command);
    const text = await cachedOutput(command, context);
    return parseMachines(text, `'${command}'`, context, demands);
  },
  exclude: (machine, context) => excludeOff(machine, demands, context),
} satisfies Plugin;

export default plugin as Plugin;

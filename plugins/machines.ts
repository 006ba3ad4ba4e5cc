/**
 * `offload machines`: prints the machines that are listed.
 *
 * @module
 */

import { listMachines, machineId, machineToJson } from "../mod.ts";
import type {
  CommandOptions,
  CommandResult,
  Context,
  Plugin,
  Screen,
} from "../mod.ts";
import { warnOfLack } from "./_first_steps.ts";
import { hasErrors, JSON_OPTION, machinePlugins } from "./_machines.ts";
import { formatJson, formatTable } from "./_screen.ts";

/** `offload machines [FILE]`. */
async function machinesCommand(
  [file]: readonly string[],
  options: CommandOptions,
  context: Context,
  screen: Screen,
): Promise<CommandResult> {
  const plugins = machinePlugins(file, context);
  const machines = await listMachines({ ...context, plugins });
  await warnOfLack(machines, context);
  const rows = machines.map((machine) => [
    machineId(machine),
    machine.systems.join(","),
    machine.user,
    String(machine.parallelBuilds),
    String(machine.speed),
    String(
      machine.overloadThreshold === false ? "-" : machine.overloadThreshold,
    ),
    machine.features.join(",") || "-",
  ]);
  const columns = "machine,systems,user,slots,speed,threshold,features";
  const output = options.json
    ? formatJson(machines.map(machineToJson), 2)
    : formatTable([columns.split(","), ...rows], screen);
  const failed = hasErrors(context);
  return { output, exitCode: failed ? 1 : 0 };
}

const plugin = {
  name: "machines",
  command: {
    order: 5,
    usage: "[FILE]",
    summary: "Print the machines that are listed",
    description: [
      "They are those of FILE, or of /etc/guix/machines.scm and the plugins. " +
      "What is wrong with a file is told with its place. That, or a plugin " +
      "that fails to list machines, makes the exit code 1.",
    ],
    options: [JSON_OPTION],
    examples: [["offload machines ./machines.scm", "checks a new file"]],
    run: async (args, options, makeContext, screen) =>
      machinesCommand(args, options, await makeContext(args[0]), screen),
  },
} satisfies Plugin;

export default plugin as Plugin;

/**
 * The plugins that are built in, in the order in which they are asked.
 *
 * @module
 */

import type { Plugin } from "../mod.ts";
import archiveCommand from "./archive_command.ts";
import command from "./command.ts";
import dnsSd from "./dns_sd.ts";
import drain from "./drain.ts";
import guileMachines from "./guile_machines.ts";
import jsonMachines from "./json_machines.ts";
import leases from "./leases.ts";
import locality from "./locality.ts";
import openssh from "./openssh.ts";
import pressure from "./pressure.ts";
import roundRobin from "./round_robin.ts";

const plugins: readonly Plugin[] = [
  guileMachines,
  jsonMachines,
  command,
  dnsSd,
  drain,
  openssh,
  locality,
  roundRobin,
  pressure,
  leases,
  archiveCommand,
];
export default plugins;

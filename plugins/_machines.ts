/**
 * What commands share that are about some of the machines.
 *
 * @module
 */

import { existsSync } from "node:fs";
import {
  DAY,
  isDefault,
  Late,
  listMachines,
  machineId,
  reason,
} from "../mod.ts";
import type { CommandOptions, Context, Machine, Plugin } from "../mod.ts";
import { usageError } from "./_commands.ts";

/** An option of commands: prints JSON. */
export const JSON_OPTION = ["--json", "Print JSON"] as const;

/** An option of commands: how long each machine has. */
export const TIMEOUT_OPTION = [
  "--timeout SECONDS",
  "Give each machine so long, not the setting 'connectTimeout'",
] as const;

/** Which machines a command is about. */
export const WHICH_MACHINES = "The machines are those of FILE, or of " +
  "/etc/guix/machines.scm and the plugins, whose name matches REGEXP; " +
  "they are asked side by side.";

/** Whether something is wrong with the machine file. */
export function hasErrors({ problems }: Context): boolean {
  return problems.some(({ severity }) => severity === "error");
}

/** The plugins that list machines: where a FILE is named, it alone counts. */
export function machinePlugins(
  file: string | undefined,
  { plugins }: Context,
): readonly Plugin[] {
  if (file === undefined) return plugins;
  if (existsSync(file)) return plugins.filter(isDefault);
  throw usageError(`failed to open machine file '${file}': no such file`);
}

/** How many seconds the options leave each machine. */
export function timeoutOf(
  { timeout }: CommandOptions,
  { settings }: Context,
): number {
  if (timeout === undefined) return settings.connectTimeout;
  if (Number(timeout) > 0 && Number(timeout) <= DAY) return Number(timeout);
  throw usageError(`invalid number of seconds: '${timeout}'`);
}

/** Gives some work so many seconds. */
export async function withTimeout<T>(
  seconds: number,
  { signal, settings }: Context,
  work: (context: Pick<Context, "signal" | "settings">) => Promise<T>,
): Promise<T> {
  const timeout = new AbortController();
  const late = new Late(`no answer within ${seconds} s`);
  const timer = setTimeout(() => timeout.abort(late), seconds * 1000);
  try {
    return await work({
      signal: AbortSignal.any([signal, timeout.signal]),
      // It is our timeout that ends it, not one of what is beneath.
      settings: { ...settings, connectTimeout: 2 * seconds },
    });
  } finally {
    clearTimeout(timer);
  }
}

/** What POSIX calls classes of characters, and JavaScript does not. */
const CHARACTER_CLASSES: Readonly<Record<string, string>> = {
  "[:alnum:]": "A-Za-z0-9",
  "[:alpha:]": "A-Za-z",
  "[:digit:]": "0-9",
  "[:lower:]": "a-z",
  "[:upper:]": "A-Z",
};

/** Reads a regular expression as the reference does, or nearly so. */
function parseRegexp(text: string): RegExp {
  try {
    const name = /\[:\w+:\]/g;
    return new RegExp(text.replace(name, (it) => CHARACTER_CLASSES[it] ?? it));
  } catch (cause) {
    throw usageError(`invalid regular expression '${text}': ${reason(cause)}`);
  }
}

/** The machines that a command is about, each NAME:PORT once. */
export async function selectMachines(
  [file, regexp = ""]: readonly string[],
  context: Context,
): Promise<Machine[]> {
  const pattern = parseRegexp(regexp);
  const plugins = machinePlugins(file, context);
  const machines = new Map<string, Machine>();
  for (const machine of await listMachines({ ...context, plugins })) {
    const id = machineId(machine);
    if (!machines.has(id)) machines.set(id, machine);
  }
  const found = [...machines.values()]
    .filter(({ name }) => pattern.test(name));
  if (found.length > 0 || machines.size === 0) return found;
  throw usageError(`no machine's name matches '${regexp}'`);
}

/** The system type that a machine of an architecture builds for. */
export function systemOf(architecture: string): string {
  const [known] = Object.entries({
    armhf: /^arm/,
    powerpc64le: /^ppc64le/,
    i686: /^i\d86/,
  }).find(([, pattern]) => pattern.test(architecture)) ?? [architecture];
  return `${known}-linux`;
}

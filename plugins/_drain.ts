/**
 * Edits the list of machines that are left alone, for `offload drain` and
 * `offload undrain`.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { existsSync, readFileSync } from "node:fs";
import {
  contextFor,
  listMachines,
  loadBuiltin,
  machineId,
  OffloadError,
  pluginDirectory,
} from "../mod.ts";
import type { CommandResult, Context } from "../mod.ts";
import { replaceFile } from "./_authorization.ts";
import { usageError } from "./_commands.ts";

/** The file of the plugin 'drain', and its lines. */
async function readList(context: Context): Promise<[string, string[]]> {
  const plugin = (await loadBuiltin("drain"))!;
  const file = String(contextFor(plugin, context).options.file);
  const text = existsSync(file) ? readFileSync(file, "utf8") : "";
  return [file, text.split("\n").filter((line) => line !== "")];
}

/** Whether a line is about a machine, by NAME or NAME:PORT. */
function isAbout(line: string, name: string): boolean {
  return /^\s*([^\s#]*)/.exec(line)![1] === name;
}

function write(file: string, lines: readonly string[], context: Context): void {
  const text = lines.map((line) => `${line}\n`).join("");
  replaceFile(file, Buffer.from(text), context);
}

/** `offload drain NAME [REASON]`. */
export async function drain(
  name: string,
  why: string | undefined,
  context: Context,
): Promise<CommandResult> {
  if (!("drain" in context.settings.use)) {
    const file = `${pluginDirectory(context.environment)}/settings.json`;
    const hint = `add '"drain": {}' to 'use' in '${file}'`;
    throw new OffloadError("the plugin 'drain' is not in use", { hint });
  }
  const machines = await listMachines(context);
  const isThere = machines.some((it) =>
    it.name === name || machineId(it) === name
  );
  if (!isThere) {
    const known = machines.map(machineId).join(", ") || "none";
    throw usageError(`there is no machine '${name}', only ${known}`, "drain");
  }
  const [file, lines] = await readList(context);
  const others = lines.filter((line) => !isAbout(line, name));
  const reason = why?.replace(/\s+/g, " ").trim();
  write(file, [...others, reason ? `${name} # ${reason}` : name], context);
  const output = `'${name}' gets no further builds: ` +
    `'offload undrain ${name}' undoes that`;
  return { output, exitCode: 0 };
}

/** `offload undrain NAME`. */
export async function undrain(
  name: string,
  context: Context,
): Promise<CommandResult> {
  const [file, lines] = await readList(context);
  const others = lines.filter((line) => !isAbout(line, name));
  if (others.length === lines.length) {
    throw usageError(`'${name}' is not in '${file}'`, "undrain");
  }
  write(file, others, context);
  return { output: `'${name}' gets builds again`, exitCode: 0 };
}

/**
 * Says what to type next where something is still to be set up: no machine, no
 * key, another account than it takes.
 *
 * @module
 */

import { accessSync, constants, existsSync, readFileSync } from "node:fs";
import process from "node:process";
import { listMachines, maySee, OffloadError, reason } from "../mod.ts";
import type { Command, Context, Log, Machine } from "../mod.ts";

/** What an account is to do that may not what guix-daemon's may. */
export const AS_ACCOUNT =
  "run it as root, or as the account that guix-daemon runs as";

/** Whether this account may not do so much with a file that is there. */
function isForbidden(file: string, mode: number): boolean {
  // Deno goes by a file's mode, which root does not.
  if (process.geteuid!() === 0) return false;
  try {
    accessSync(file, mode);
    return false;
  } catch (error) {
    const { code = "" } = error as NodeJS.ErrnoException;
    return ["EACCES", "EPERM", "EROFS"].includes(code);
  }
}

/** Whether this account may not read a file that is there. */
export function isUnreadable(file: string): boolean {
  return isForbidden(file, constants.R_OK);
}

/** The line to type, as root, for a command that changes what is root's. */
function asRoot(command: string, { configDirectory }: Context): string {
  if (!isForbidden(configDirectory, constants.W_OK)) return `run '${command}'`;
  // An agent may be all that logs in to the machine.
  const agent = process.env.SSH_AUTH_SOCK
    ? "--preserve-env=SSH_AUTH_SOCK "
    : "";
  return `run 'sudo ${agent}${command}'`;
}

/**
 * Refuses to begin what this account can't bring to its end.
 *
 * @throws {OffloadError} where it may not change Guix's configuration.
 */
export function demandRights(command: string, context: Context): void {
  const { configDirectory } = context;
  if (!isForbidden(configDirectory, constants.W_OK)) return;
  const message = `this account may not change '${configDirectory}'`;
  throw new OffloadError(message, { hint: asRoot(command, context) });
}

/** Whether nothing is in the text of a machine file but comments. */
export function isBlank(text: string): boolean {
  return text.replace(/;.*/g, "").trim() === "";
}

/** Whether nothing is in a machine file, or there is none. */
export function isBlankFile(file: string): boolean {
  try {
    return isBlank(readFileSync(file, "utf8"));
  } catch {
    return !existsSync(file);
  }
}

/**
 * What is wrong where no machine is listed, and what to type then; `undefined`
 * where one is, or something else is to be corrected first.
 */
export async function lackOfMachines(
  machines: readonly Machine[],
  context: Context,
): Promise<OffloadError | undefined> {
  if (machines.length > 0) return undefined;
  let file;
  try {
    file = (await context.machineFile()).file;
  } catch {
    return undefined; // it can't be read, which was told
  }
  if (context.problems.length > 0 && !isBlankFile(file)) return undefined;
  const command = `offload trust root@HOST --file ${file}`;
  const hint = `${asRoot(command, context)}: HOST is the machine that is to ` +
    "build, on which guix-daemon runs";
  return new OffloadError("no machine is listed", { hint });
}

/** Tells who has no machine how to get one. */
export async function warnOfLack(
  machines: readonly Machine[],
  context: Context,
): Promise<void> {
  const lack = await lackOfMachines(machines, context);
  if (lack !== undefined) context.log.warn(lack);
}

/** Says to who has typed no command which one comes next. */
export async function nextStep(
  makeContext: Parameters<Command["run"]>[2],
): Promise<string> {
  const ignore = () => {};
  const log: Log = {
    ...{ info: ignore, trace: ignore, debug: ignore },
    ...{ warn: ignore, error: ignore },
  };
  try {
    const context = await makeContext(undefined, log);
    const lack = await lackOfMachines(await listMachines(context), context);
    return lack?.hint ?? "run 'offload test': it tests the machines";
  } catch (error) {
    return `correct the settings: ${reason(error)}`;
  }
}

/** Tells an account that may not see the state what seems to be so. */
export function warnOfState(
  seeming: string,
  { stateDirectory, log }: Context,
): void {
  const directory = `${stateDirectory}/offload`;
  if (maySee(directory)) return;
  const message = `${seeming}, for '${directory}' can't be seen`;
  log.warn(new OffloadError(message, { hint: AS_ACCOUNT }));
}

/** Tells an account that may not see the state, or a key, what it misses. */
function warnOfAccount(
  machines: readonly Machine[],
  context: Context,
): void {
  warnOfState("all slots look free", context);
  const key = machines.find((it) => isUnreadable(it.privateKey))?.privateKey;
  if (key === undefined) return;
  const message = `this account may not use the SSH key '${key}'`;
  context.log.warn(new OffloadError(message, { hint: AS_ACCOUNT }));
}

/** Says what to type next where something keeps a command from its answer. */
export async function warnOfGaps(
  machines: readonly Machine[],
  context: Context,
): Promise<void> {
  warnOfAccount(machines, context);
  await warnOfLack(machines, context);
}

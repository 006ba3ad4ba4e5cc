/**
 * The command `offload serve`: a process that stays, with connections open, so
 * that a build costs next to nothing beside itself.
 *
 * @module
 */

import { appendFileSync, existsSync, readFileSync } from "node:fs";
import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import { asOwner, inodeOf, makeLog, OffloadError, ownerOf } from "../mod.ts";
import type {
  Command,
  CommandOptions,
  CommandResult,
  Context,
  Log,
  Plugin,
} from "../mod.ts";
import { usageError } from "./_commands.ts";
import { isReadOnly } from "./_ground.ts";
import type { End } from "./_resident.ts";
import {
  isThere,
  residentDirectory,
  spawnResident,
} from "./_resident_start.ts";

/** For how long one is waited for that starts or ends, in milliseconds. */
const PATIENCE = 10_000;

/** Waits for something; returns whether it came about. */
async function until(isSo: () => boolean, context: Context): Promise<boolean> {
  const end = performance.now() + PATIENCE;
  while (!isSo()) {
    if (performance.now() > end) return false;
    await delay(20);
    context.signal.throwIfAborted();
  }
  return true;
}

/** Tells the one that reads an inbox to end. */
function tellToEnd(inbox: string): void {
  try {
    asOwner(inbox, () => appendFileSync(inbox, "stop\n", { flag: "r+" }));
  } catch (error) { // it is about to end by itself
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
  }
}

/** Has the one that serves take no more requests. */
async function stop(context: Context, directory: string): Promise<string> {
  if (!isThere(directory)) return "no process serves";
  const inbox = `${directory}/inbox`;
  let told = "";
  const isOver = () => {
    if (!isThere(directory)) return true;
    // One that has just begun has none yet, or that of one that was killed.
    const inode = inodeOf(inbox);
    if (inode !== told) tellToEnd(inbox);
    told = inode;
    return false;
  };
  if (!await until(isOver, context)) {
    throw new OffloadError("the process that serves does not answer", {
      hint: `kill it: its number is in '${directory}/status.json'`,
    });
  }
  return "it takes no more builds, and ends after those that it has";
}

/** Starts one in the background. */
async function startOne(context: Context, directory: string): Promise<string> {
  const { environment, settings, stateDirectory } = context;
  if (isThere(directory)) return "a process serves already";
  spawnResident(settings.residentIdle, stateDirectory, environment);
  const isServing = () =>
    existsSync(`${directory}/inbox`) && isThere(directory);
  if (await until(isServing, context)) return "serving";
  const log = `${stateDirectory}/offload/resident.log`;
  throw new OffloadError("the process that is to serve did not start", {
    hint: existsSync(log) ? readFileSync(log, "utf8") : `see '${log}'`,
  });
}

/** Serves here, until there is a reason to end. */
async function serveHere(
  context: Context,
  directory: string,
  end: End,
): Promise<void> {
  const { Resident } = await import("./_resident.ts");
  const { log } = context;
  process.on("unhandledRejection", (error) => log.warn(error));
  process.on("uncaughtException", (error) => log.warn(error));
  await new Resident(context, directory, selfOf(context), end).run();
}

/** The log of one that serves here: clients are told what is done for them. */
async function makeServingLog(): Promise<Log> {
  const { logOfServed } = await import("./_shim.ts");
  return logOfServed(makeLog(process.env));
}

/** Moves what the one that serves says. */
async function carry(
  makeContext: Parameters<Command["run"]>[2],
): Promise<CommandResult> {
  const { carrierLog, carryHere } = await import("./_carry.ts");
  const log = carrierLog();
  try {
    await carryHere(await makeContext(undefined, log));
    return { output: "", exitCode: 0 };
  } catch (error) {
    log.error(error);
    return { output: "", exitCode: 1 };
  }
}

/** The shim, which alone passes requests on. */
function selfOf({ environment: { OFFLOAD_SELF } }: Context): string {
  if (OFFLOAD_SELF !== undefined) return OFFLOAD_SELF;
  throw new OffloadError("it was not started by the shim", {
    hint: "run it as 'offload serve', which 'scripts/offload' is in a checkout",
  });
}

/** The number that an option has. */
function numberOf(
  options: CommandOptions,
  name: "idle" | "daemon",
): number | undefined {
  const { [name]: value } = options;
  if (value === undefined) return undefined;
  const number = Number(value);
  if (number > 0) return number;
  throw usageError(`--${name}: expected a number, not '${value}'`, "serve");
}

/** Refuses another account than the one whose daemon's state that is. */
function checkAccount(directory: string): void {
  const account = process.geteuid!();
  const owner = asOwner(directory, process.geteuid!);
  const isOurs = account === 0 || ownerOf(directory)?.uid === account;
  if (owner === account && isOurs) return;
  throw new OffloadError(`'${directory}' is another account's`, {
    hint: "run this as the account that guix-daemon runs as",
  });
}

/** Refuses to serve where nothing can be put into the store. */
function checkStore({ storeDirectory }: Context): void {
  if (!isReadOnly(storeDirectory)) return;
  throw new OffloadError(`'${storeDirectory}' is read-only here`, {
    hint:
      "guix-daemon has mounts of its own, as its unit says: let its hooks " +
      "start the process that serves",
  });
}

/** `offload serve`. */
async function serveCommand(
  options: CommandOptions,
  makeContext: Parameters<Command["run"]>[2],
): Promise<CommandResult> {
  if (options.carry) return await carry(makeContext);
  const log = options.foreground ? await makeServingLog() : undefined;
  const context = await makeContext(undefined, log);
  const directory = residentDirectory(context.stateDirectory);
  let output = "";
  if (options.stop) output = await stop(context, directory);
  else {
    checkAccount(directory);
    checkStore(context);
    const idle = numberOf(options, "idle") ?? Infinity;
    const end = { idle, daemon: numberOf(options, "daemon") };
    if (options.foreground) await serveHere(context, directory, end);
    else output = await startOne(context, directory);
  }
  return { output, exitCode: 0 };
}

const plugin = {
  name: "serve",
  command: {
    usage: "",
    summary: "Serve builds from a process that stays",
    description: [
      "It keeps connections to machines open, so that a build costs next to " +
      "nothing beside itself. Hooks start one by themselves, unless the setting " +
      "'resident' is false; they do without where there is none.",
      "It ends once it was idle, when its guix-daemon is gone, and when the " +
      "program, its settings, its plugins or its environment have changed.",
    ],
    options: [
      ["--foreground", "Stay in the foreground, for a service manager"],
      ["--idle SECONDS", "With that, end after so long without a build"],
      ["--daemon PID", "With that, end when this process has"],
      ["--stop", "Have it end, after the builds that it has"],
      ["--carry", "Move store items for it, which says which"],
    ],
    examples: [
      ["offload serve", "starts one in the background"],
      ["offload serve --stop", "ends it"],
    ],
    run: (_args, options, makeContext) => serveCommand(options, makeContext),
  },
} satisfies Plugin;

export default plugin as Plugin;

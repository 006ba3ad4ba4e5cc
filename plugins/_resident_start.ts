/**
 * Starts the process that stays, `offload serve`, for the next builds.
 *
 * @module
 */

import { spawn } from "node:child_process";
import { readFileSync, rmSync, statSync } from "node:fs";
import { dirname } from "node:path";
import { asOwner, isLocked, makeStateDirectory, parentOf } from "../mod.ts";
import type { Context, Variables } from "../mod.ts";
import { withoutRuntime } from "./_ground.ts";

/** Where it meets the shims. */
export function residentDirectory(stateDirectory: string): string {
  return `${stateDirectory}/offload/resident`;
}

/** Whether one is there: it holds a lock, which ends with it. */
export function isThere(directory: string): boolean {
  try {
    return asOwner(directory, () => isLocked(`${directory}/lock`));
  } catch {
    return false; // nothing is there, say
  }
}

/** What one says of itself. */
export interface ResidentStatus {
  /** Its process. */
  readonly pid: number;
  /** When it was started, in milliseconds since 1970. */
  readonly since: number;
  /** How many builds it has under way. */
  readonly builds: number;
  /** How many it has done. */
  readonly served: number;
  /** How many connections to machines it has. */
  readonly connections: number;
}

/** What the one that is there says of itself. */
export function residentStatus(
  stateDirectory: string,
): ResidentStatus | undefined {
  const directory = residentDirectory(stateDirectory);
  if (!isThere(directory)) return undefined;
  try {
    return JSON.parse(readFileSync(`${directory}/status.json`, "utf8"));
  } catch {
    return undefined; // it begins or ends
  }
}

/** Starts one for the hooks after this one, where none is there. */
export function start(
  { environment, settings, stateDirectory }: Context,
): void {
  const { OFFLOAD_SELF: self, OFFLOAD_SHIM: shim } = environment;
  // Nothing but the shim can start it, and passes requests on.
  if (self === undefined) return;
  if (isThere(residentDirectory(stateDirectory))) return;
  const daemon = shim ? daemonOf(parentOf(Number(shim))) : undefined;
  spawnResident(settings.residentIdle, stateDirectory, environment, daemon);
}

/** The guix-daemon of its process for a client, if that can be told. */
export function daemonOf(client: number): number | undefined {
  const parent = parentOf(client);
  return parent > 1 ? parent : undefined; // it is gone, or none
}

/** Starts one in the background, whose messages go to `resident.log`. */
export function spawnResident(
  idle: number,
  stateDirectory: string,
  environment: Variables,
  daemon?: number,
): void {
  const end = [`--idle=${idle}`, ...daemon ? [`--daemon=${daemon}`] : []];
  const log = `${stateDirectory}/offload/resident.log`;
  rmSync(log, { force: true });
  spawnApart(["serve", "--foreground", ...end], log, environment);
}

/** How long a file of messages may become, in bytes. */
const LONGEST_LOG = 2 ** 20;

/** Runs a command of ours in the background; what it says goes to a file. */
export function spawnApart(
  args: readonly string[],
  log: string,
  environment: Variables,
): void {
  const { OFFLOAD_SELF: self = "", OFFLOAD_SHIM: _, ...env } = withoutRuntime(
    environment,
  );
  makeStateDirectory(dirname(log));
  const { size = 0 } = statSync(log, { throwIfNoEntry: false }) ?? {};
  if (size > LONGEST_LOG) rmSync(log);
  const script =
    'umask 077; log=$1; shift; exec "$@" </dev/null >>"$log" 2>&1 4>&-';
  const command = ["-c", script, "sh", log, self, "offload", ...args];
  const child = spawn("/bin/sh", command, {
    cwd: "/",
    detached: true,
    env: env as NodeJS.ProcessEnv,
    stdio: "ignore",
  });
  child.on("error", () => {}); // the next one tries again
  child.unref();
}

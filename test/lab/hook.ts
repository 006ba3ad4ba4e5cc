/**
 * The build hook in the lab, by hand: as guix-daemon talks to it.
 *
 * @module
 */

import { readFileSync, statSync } from "node:fs";
import {
  inHost,
  offloadCommand,
  PATIENT,
  root,
  start,
  STATE,
  SYSTEM,
  until,
  watch,
  within,
} from "./lab.ts";
import type { Running, Runtime } from "./lab.ts";

/** The build hook, started as the daemon starts it. */
export interface Hook extends Running {
  /** Sends a line. */
  say(line: string): void;
  /** Sends a request for a derivation; returns the answer. */
  ask(
    derivation: string,
    system?: string,
    features?: string,
  ): Promise<string>;
  /** Sends what follows an accept: inputs and outputs. */
  work(inputs: readonly string[], outputs: readonly string[]): void;
  /** Closes its standard input. */
  close(): void;
  /** What it wrote to the build log, its file descriptor 4. */
  log(): string;
}

/** How to start a hook. */
export interface HookOptions {
  /** What runs it; the hook is `guix offload` without. */
  readonly runtime?: Runtime;
  /** For how many seconds a build may be silent: 3600 unless told. */
  readonly maxSilentTime?: number;
  /** For how many seconds a build may last: 86400 unless told. */
  readonly buildTimeout?: number;
  /** Whether the daemon has a free slot of its own. */
  readonly wantsLocal?: boolean;
  /** The file that its build log goes to: a new one unless told. */
  readonly log?: string;
  /** Further variables of its environment: `NAME=VALUE`, the last counts. */
  readonly variables?: readonly string[];
}

let hooks = 0;

/** Starts a hook on a master; its build log is a file there. */
export function startHook(
  master: string,
  options: HookOptions = {},
): Hook {
  const { runtime, maxSilentTime = 3600, buildTimeout = 86400 } = options;
  const { wantsLocal = false, variables = [] } = options;
  const { log: file = `/tmp/build-log-${++hooks}` } = options;
  const guix = runtime === undefined ? "guix" : "/offload/scripts/guix";
  const environment = [
    `OFFLOAD_RUNTIME=${runtime ?? ""}`,
    PATIENT,
    ...variables,
  ];
  const command = `${environment.join(" ")} exec ${guix} offload ` +
    `${SYSTEM} ${maxSilentTime} true ${buildTimeout} 4>${file}`;
  const running = watch(start(master, "sh", "-c", command));
  const { stdin } = running.child;
  stdin!.on("error", () => {}); // its end is told by `ended`
  const say = (line: string) => void stdin!.write(`${line}\n`);
  const answers = () => [...running.text().matchAll(/^# (\S+)$/gm)];
  let asked = 0;
  return {
    ...running,
    say,
    async ask(derivation, system = SYSTEM, features = "") {
      say(`${wantsLocal ? 1 : 0} ${system} ${derivation} ${features}`);
      asked++;
      let over = false;
      running.ended.then(() => over = true);
      await until("an answer", () => over || answers().length >= asked);
      return answers()[asked - 1]?.[1] ?? `none: ${running.text()}`;
    },
    work(inputs, outputs) {
      say(inputs.join(" "));
      say(outputs.join(" "));
    },
    close: () => void stdin!.end(),
    log: () => readFileSync(root(master) + file, "utf8"),
  };
}

/** Asks a new hook of head once: its answer, and the milliseconds it took. */
export async function askHook(
  derivation: string,
  options: HookOptions,
): Promise<{ answer: string; took: number; stderr: string }> {
  const hook = startHook("head", options);
  const before = performance.now();
  const answer = await hook.ask(derivation);
  const took = performance.now() - before;
  hook.close();
  const { stderr } = await within("the end of the hook", hook.ended);
  return { answer, took, stderr };
}

/** Where a master's process that stays meets shims. */
export const RESIDENT: string = `${STATE}/resident`;

/** What a master's process that stays says of itself, if one takes requests. */
export function residentStatus(
  master: string,
): { pid: number; served: number; builds: number } | undefined {
  const directory = root(master) + RESIDENT;
  try {
    statSync(`${directory}/inbox`);
    return JSON.parse(readFileSync(`${directory}/status.json`, "utf8"));
  } catch {
    return undefined; // it begins, or ends
  }
}

/**
 * Ends what a master's process that stays has open, if one is there: a
 * connection is to the account, and the server, as they were when it began.
 */
export function endKept(master = "head"): void {
  inHost(master, ...offloadCommand("node", "serve", "--stop"));
}

/** What the daemon would name as inputs: the closure of a derivation. */
export function closure(master: string, derivation: string): string[] {
  return inHost(master, "guix", "gc", "--requisites", derivation)
    .trim().split("\n");
}

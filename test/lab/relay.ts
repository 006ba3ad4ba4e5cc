/**
 * The way to a machine of the lab: relays that count, cut and refuse.
 *
 * @module
 */

import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import * as assert from "uvu/assert";
import { lab, ROOT, within } from "./lab.ts";

/** The port on which a relay to a host's sshd listens, at its address. */
export const RELAY_PORT = 2222;

/** A relay to a host's sshd. */
export interface Relay {
  /** Connections and bytes to the host (up) and from it since last asked. */
  count(): Promise<{ connections: number; up: number; down: number }>;
  /** Has it do that from now on; settles when it does. */
  become(command: "pass" | "drop" | "cut" | "refuse"): Promise<void>;
  /** Its process. */
  readonly child: ChildProcess;
  /** Ends it, and what runs over it; settles when its port is free. */
  stop(): Promise<void>;
}

/** The address of a host. */
export function addressOf(host: string): string {
  const line = lab("list").split("\n").find((it) => it.startsWith(`${host} `));
  return line!.split(" ")[1]!;
}

/** Starts a relay to a host's sshd; the options are relay.ts's. */
export async function startRelay(
  host: string,
  ...options: readonly string[]
): Promise<Relay> {
  const address = addressOf(host);
  const child = spawn(`${ROOT}scripts/lab/relay`, [
    ...[`${address}:${RELAY_PORT}`, `${address}:22`, ...options],
  ], { stdio: ["pipe", "pipe", "inherit"] });
  const ended = once(child, "exit");
  const lines = createInterface(child.stdout)[Symbol.asyncIterator]();
  const next = async (): Promise<string> =>
    (await within("the relay", lines.next())).value ?? "";
  assert.is(await next(), "ready");
  return {
    async count() {
      child.stdin.write("\n");
      return JSON.parse(await next());
    },
    async become(command) {
      child.stdin.write(`${command}\n`);
      await next(); // what it counted
    },
    child,
    async stop() {
      child.kill("SIGKILL");
      await ended;
    },
  };
}

/** Edits a machine file so that machines, all or one, are behind relays. */
export function relayed(text: string, name = "\\w+"): string {
  return text.replaceAll(
    RegExp(`\\(name "${name}"\\)`, "g"),
    `$& (port ${RELAY_PORT})`,
  );
}

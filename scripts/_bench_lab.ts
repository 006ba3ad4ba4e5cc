/**
 * The hosts that the benchmark builds on, and what runs there: guix-daemon, a
 * relay, and the process that stays.
 *
 * @module
 */

import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { machine } from "node:os";
import process from "node:process";
import { createInterface } from "node:readline";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type { ResidentStatus } from "../plugins/_resident_start.ts";
import type { Column } from "./_bench_work.ts";

const LAB = fileURLToPath(new URL("lab/lab", import.meta.url));
const RELAY = fileURLToPath(new URL("lab/relay", import.meta.url));
const RELAY_PORT = 2222;

/** For how long the process that stays is waited for, in milliseconds. */
const PATIENCE = 10_000;

/** Runs a command of the lab; returns what it printed. */
export function lab(...args: readonly string[]): string {
  return execFileSync(LAB, args, {
    encoding: "utf8",
    // What the disk still does of earlier builds must not slow the next ones.
    env: { OFFLOAD_LAB_MEMORY: "8g", ...process.env },
    stdio: ["ignore", "pipe", "pipe"],
    maxBuffer: 1 << 28,
  });
}

/** Address and pid of a host, from the lab's list. */
export function hostOf(name: string): { address: string; pid: string } {
  const line = lab("list").split("\n").find((it) => it.startsWith(`${name} `));
  const [, address, pid] = line!.split(" ");
  return { address: address!, pid: pid! };
}

/** Has head use w1 and w2, or w1 alone, through a relay. */
export function useMachines(slots: number, isRelayed = false): void {
  const names = isRelayed ? ["w1"] : ["w1", "w2"];
  const text = lab("machines", "head", ...names).replace(
    /\(parallel-builds \d+\)/g,
    `(parallel-builds ${slots / names.length})` +
      (isRelayed ? ` (port ${RELAY_PORT})` : ""),
  );
  const { pid } = hostOf("head");
  writeFileSync(`/proc/${pid}/root/etc/guix/machines.scm`, text);
}

/** Makes new derivations on head; returns their file names. */
export function makeWork(options: readonly string[] = []): string[] {
  const script = "/offload/scripts/lab/work.scm";
  return lab("in", "head", "guix", "repl", "--", script, ...options)
    .trim().split("\n");
}

/**
 * Builds on the other machines alone, or on head itself where it has slots;
 * returns the seconds it took.
 */
export function build(derivations: readonly string[], localSlots = 0): number {
  const options = [`--max-jobs=${localSlots}`];
  if (localSlots > 0) options.push("--no-offload");
  const start = performance.now();
  lab("in", "head", "guix", "build", ...options, ...derivations);
  return (performance.now() - start) / 1000;
}

/**
 * Asks a hook to build, as guix-daemon asks it; returns the seconds from its
 * start to its answer. Meanwhile its daemon is there until `then` is done.
 *
 * @throws where it does not accept the build
 */
export async function ask(
  { variables }: Column,
  derivation: string,
  then: () => Promise<void>,
): Promise<number> {
  const script = "/offload/scripts/lab/ask.sh";
  const child = spawn(LAB, [
    ...["in", "head", "env", ...variables, "bash", script],
    ...[`${machine()}-linux`, derivation],
  ], { stdio: ["pipe", "pipe", "inherit"] });
  try {
    let text = "";
    for await (const chunk of child.stdout.setEncoding("utf8")) {
      text += chunk;
      if (text.endsWith("\n")) break;
    }
    const [answer, microseconds] = text.split(" ");
    if (answer !== "accept") {
      throw new Error(`the hook's answer is '${answer}'`);
    }
    await then();
    return Number(microseconds) / 1e6;
  } finally {
    child.stdin.end();
    if (child.exitCode === null) await once(child, "close");
  }
}

// ---------------------------------------------------------------------------
// The process that stays
// ---------------------------------------------------------------------------

/** Waits for something; returns whether it came about. */
async function until(isSo: () => boolean): Promise<boolean> {
  const end = performance.now() + PATIENCE;
  while (!isSo()) {
    if (performance.now() > end) return false;
    await delay(20);
  }
  return true;
}

/** The process on head that stays and serves hooks. */
export class Resident {
  readonly #root: string = `/proc/${hostOf("head").pid}/root`;
  readonly #directory: string = `${this.#root}/var/guix/offload/resident`;
  #last: number | undefined;

  /** What it says of itself, where it is there. */
  status(): ResidentStatus | undefined {
    try {
      const text = readFileSync(`${this.#directory}/status.json`, "utf8");
      const status: ResidentStatus = JSON.parse(text);
      this.#last = status.pid;
      return status;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
      throw error;
    }
  }

  /** How many builds it has served. */
  get served(): number {
    return this.status()?.served ?? 0;
  }

  #error(what: string): Error {
    const log = `${this.#root}/var/guix/offload/resident.log`;
    const text = existsSync(log) ? readFileSync(log, "utf8") : "";
    return new Error(`the process that stays ${what}\n${text.slice(-2000)}`);
  }

  /** Waits until it serves. */
  async waitForStart(): Promise<void> {
    const isThere = () =>
      existsSync(`${this.#directory}/inbox`) && this.status() !== undefined;
    if (!await until(isThere)) throw this.#error("did not start");
  }

  /** Waits until it has ended, as it does by itself when its daemon is gone. */
  async waitForEnd(): Promise<void> {
    const isGone = () =>
      !existsSync(`${this.#directory}/inbox`) &&
      (this.#last === undefined ||
        !existsSync(`${this.#root}/proc/${this.#last}`));
    if (!await until(isGone)) throw this.#error("does not end");
    this.#last = undefined;
  }

  /** Waits until it says that it has served so many builds. */
  async waitUntilServed(count: number): Promise<void> {
    if (await until(() => this.served >= count)) return;
    throw this.#error(`has served ${this.served} builds, not ${count}`);
  }
}

// ---------------------------------------------------------------------------
// The relay
// ---------------------------------------------------------------------------

/** What went through a relay. */
export interface Traffic {
  readonly connections: number;
  readonly up: number;
  readonly down: number;
}

/** Does some work with a relay to w1, of so many milliseconds there and back. */
export async function withRelay<T>(
  roundTrip: number,
  slots: number,
  work: (count: () => Promise<Traffic>) => T | Promise<T>,
): Promise<T> {
  const { address } = hostOf("w1");
  const relay = spawn(RELAY, [
    ...[`${address}:${RELAY_PORT}`, `${address}:22`],
    ...["--delay", String(roundTrip / 2)],
  ], { stdio: ["pipe", "pipe", "inherit"] });
  const lines = createInterface(relay.stdout);
  const [ready] = await once(lines, "line");
  if (ready !== "ready") throw new Error(`the relay says '${ready}'`);
  useMachines(slots, true);
  try {
    return await work(async () => {
      relay.stdin.write("\n");
      const [line] = await once(lines, "line");
      return JSON.parse(line);
    });
  } finally {
    useMachines(slots);
    relay.kill();
    await once(relay, "close");
  }
}

/**
 * Moves what is much for a build of the process that stays, in a process of its
 * own: one alone can't encrypt, hash and write what several machines send and
 * take. That is `offload serve --carry`, which is told by a line what to move,
 * ends when its input does, and writes what there is to log, a line each.
 *
 * @module
 */

import { spawn } from "node:child_process";
import { once } from "node:events";
import process from "node:process";
import { createInterface } from "node:readline";
import {
  chooseTransport,
  cleanUp,
  connectStores,
  machineId,
  openLocalDaemon,
  openSession,
  queryItems,
  reason,
  retrieveOutputs,
  STANDARD_OUTPUT,
  watchSession,
  writeText,
} from "../mod.ts";
import type {
  BuildContext,
  Context,
  Load,
  Log,
  Machine,
  Session,
} from "../mod.ts";
import { withoutRuntime } from "./_ground.ts";

/** From so many bytes on, another process takes less time, its start included. */
const MUCH = 2 ** 26;

/** What one is told. */
interface Errand {
  readonly machine: Machine;
  readonly load: Load;
}

/** What it says: a log's method and the text for that, or bytes that moved. */
type Told = readonly [what: "info" | "warn" | "debug" | "moved", text: string];

/** How often it says how much has moved, in milliseconds. */
const TELLING = 1000;

/**
 * Has a load moved, if it is much, by a process that `self` starts; returns
 * whether it was. Where that fails, for whatever reason, it is to be done here,
 * by which the reason shows.
 */
export async function carry(
  self: string,
  load: Load,
  { course, machine, environment, signal, log, patiently }: BuildContext,
): Promise<boolean> {
  if (load.bytes < MUCH) return false;
  signal.throwIfAborted();
  const child = spawn(self, ["offload", "serve", "--carry"], {
    cwd: "/",
    env: withoutRuntime(environment) as NodeJS.ProcessEnv,
    stdio: ["pipe", "pipe", "ignore"],
  });
  const kill = () => child.kill("SIGKILL");
  signal.addEventListener("abort", kill);
  try {
    child.stdin.on("error", () => {}); // its end is told below
    const errand: Errand = { machine, load };
    child.stdin.write(`${JSON.stringify(errand)}\n`);
    createInterface({ input: child.stdout }).on("line", (line) => {
      const [what, text]: Told = JSON.parse(line);
      if (what === "moved") course.moved = Number(text);
      else log[what](text);
    });
    const [code] = await patiently(() => once(child, "close"));
    if (code !== 0) course.moved = 0;
    return code === 0;
  } catch (error) { // it did not start
    log.debug(reason(error));
    return false;
  } finally {
    signal.removeEventListener("abort", kill);
    signal.throwIfAborted();
  }
}

function tell(...told: Told): void {
  writeText(STANDARD_OUTPUT, `${JSON.stringify(told)}\n`);
}

/** The log of a process that moves something: the other one has the client. */
export function carrierLog(): Log {
  return {
    info: (message, ...more) => {
      const rest = more.map((it) => typeof it === "string" ? it : it.text);
      tell("info", [message, ...rest].join(""));
    },
    trace: () => {},
    warn: (problem) => tell("warn", reason(problem)),
    error: (problem) => tell("debug", reason(problem)),
    debug: (text) => tell("debug", text),
  };
}

/** Reads what to do, and ends this process when there is nobody to do it for. */
function readErrand(): Promise<Errand> {
  const input = createInterface({ input: process.stdin });
  input.on("close", () => process.exit(1));
  return new Promise((resolve) =>
    input.once("line", (line) => resolve(JSON.parse(line)))
  );
}

/** Moves what this process is told. */
export async function carryHere(context: Context): Promise<void> {
  const { machine, load } = await readErrand();
  const { observations, settings, log } = context;
  const session = await openSession(machine, context);
  const id = machineId(machine);
  const { facts } = observations.machines(id).get(id) ?? {};
  session.useSocket(facts?.socket);
  const unwatch = watchSession(session, settings);
  try {
    await Promise.race([move(load, session, context), session.lost]);
  } finally {
    cleanUp(log, unwatch, () => session.close());
  }
}

async function move(
  { derivation, bytes, inputs, outputs }: Load,
  session: Session,
  context: Context,
): Promise<void> {
  const local = openLocalDaemon(context);
  local.catch(() => {}); // it is told below
  const remote = await session.openDaemon();
  const stores = [session, remote, local, derivation] as const;
  const id = machineId(session.machine);
  const course = { machine: id, slot: 0, began: Date.now(), moved: 0 };
  const own = await connectStores(...stores, { ...context, course });
  const transport = await chooseTransport(own);
  const timer = setInterval(() => tell("moved", `${course.moved}`), TELLING);
  try {
    if (inputs) await transport.send(await queryItems(inputs, own.local));
    if (outputs) await retrieveOutputs(outputs, bytes, transport, own);
  } finally {
    clearInterval(timer);
  }
}

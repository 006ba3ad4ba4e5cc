/**
 * Builds that meet a fault, and what must hold after all.
 *
 * @module
 */

import { setTimeout as delay } from "node:timers/promises";
import * as assert from "uvu/assert";
import { FCNTL } from "../helpers.ts";
import {
  buildCommand,
  buildLog,
  inHost,
  makeWork,
  onDatabase,
  outputsOf,
  start,
  STATE,
  storeNames,
  watch,
  within,
} from "../lab/lab.ts";
import type { Result, Running } from "../lab/lab.ts";
import type { Relay } from "../lab/relay.ts";
import type { Ending, Fault, Phase } from "./faults.ts";
import { endKeptConnections, processes, useBoth } from "./field.ts";
import type { Field } from "./field.ts";

/** How a build under a fault went. */
export interface Outcome {
  readonly ending: Ending;
  /** From the fault to its end, or to when it was not waited for any more. */
  readonly seconds: number;
  /** What the client was told. */
  readonly text: string;
}

/** What makes a phase long enough to have a middle. */
const WORK: Readonly<Record<Phase, readonly string[]>> = {
  before: [],
  sending: ["--inputs=1", "--input-size=12000000"],
  building: ["--seconds=3"],
  retrieving: ["--output-size=12000000"],
};

/** After how many bytes a transfer of twelve million is in its middle. */
const MIDDLE_AT = 1_500_000;

/** Waits until a build is in the middle of a phase; false where it ended. */
async function reach(
  phase: Phase,
  client: Running,
  relay: Relay,
): Promise<boolean> {
  const begins = {
    before: /^/,
    sending: /^(guix offload: )?sending \d/m,
    building: /^building work$/m,
    retrieving: /^(guix offload: )?retrieving \d/m,
  }[phase];
  let over = false;
  client.ended.then(() => over = true);
  while (!over && !begins.test(client.text())) await delay(10);
  const direction = phase === "sending" ? "up" : "down";
  let moved = phase === "before" || phase === "building" ? MIDDLE_AT : 0;
  if (moved === 0) await relay.count(); // from here on
  while (!over && moved < MIDDLE_AT) {
    await delay(10);
    moved += (await relay.count())[direction];
  }
  return !over;
}

/** Ends a client that is not waited for any more. */
async function giveUp(client: Running): Promise<void> {
  client.child.kill("SIGTERM");
  await within("the end of the client", client.ended);
}

/** What came of a build: valid outputs alone are believed. */
function endingOf(derivation: string, { status }: Result): Ending {
  const outputs = Object.values(outputsOf("head", derivation));
  const valid = validPaths();
  const isThere = outputs.every((output) => valid.has(output));
  assert.is(isThere, status === 0, `valid: ${isThere}, status: ${status}`);
  if (status !== 0) return "fails";
  return isBuiltOn("w2", derivation) ? "on w2" : "on w1";
}

function isBuiltOn(machine: string, derivation: string): boolean {
  return /^built /m.test(buildLog(machine, derivation) ?? "");
}

/** Lets a build meet a fault, and waits for its end as long as `bound`. */
export async function meet(
  fault: Fault,
  field: Field,
  bound: number,
): Promise<Outcome> {
  useBoth();
  endKeptConnections();
  const work = [...WORK[fault.phase], ...fault.work ?? []];
  const [derivation] = makeWork("head", ...work);
  if (fault.phase === "before") await fault.inject(field);
  let start_ = performance.now();
  const client = watch(start("head", ...buildCommand([derivation!])));
  try {
    if (fault.phase !== "before") {
      const reached = await within(
        `${fault.phase}`,
        reach(fault.phase, client, field.relay),
      );
      assert.ok(reached, `it ended before: ${client.text()}`);
      start_ = performance.now();
      await fault.inject(field, client);
    }
    const late = delay(bound * 1000).then(() => undefined);
    const result = await Promise.race([client.ended, late]);
    const seconds = (performance.now() - start_) / 1000;
    const ending = result === undefined
      ? "hangs"
      : endingOf(derivation!, result);
    return { ending, seconds, text: client.text() };
  } finally {
    await fault.heal?.(field);
    await giveUp(client);
  }
}

/** The items that head's store vouches for. */
export function validPaths(): Set<string> {
  const sql = "SELECT path FROM ValidPaths";
  const rows = onDatabase("/var/guix/db/db.sqlite", sql);
  return new Set(rows.map(({ path }) => path!));
}

/** What is in head's store and not vouched for. */
export function strays(): string[] {
  const valid = validPaths();
  return storeNames("head").filter((name) =>
    !valid.has(`/gnu/store/${name}`) && !name.endsWith(".lock")
  );
}

/** Prints those slot files that can't be locked. */
const TAKEN = `${FCNTL}
for my $name (glob "${STATE}/*/[0-9]*") {
  open my $file, "+<", $name or next;
  print "$name\\n" unless lock_file $file, F_WRLCK;
}`;

/** The slots of head that are taken. */
function takenSlots(): string[] {
  const names = inHost("head", "perl", "-e", TAKEN).split("\n");
  return names.filter((name) => name !== "");
}

/** What should be gone when no build runs: processes, slots. */
function remains(machines: readonly string[]): string[] {
  const left = (["hook", "ssh"] as const).flatMap((program) =>
    processes("head", program).map((pid) => `${program} ${pid} on head`)
  );
  for (const machine of machines) {
    for (const program of ["builder", "archive"] as const) {
      for (const pid of processes(machine, program)) {
        left.push(`${program} ${pid} on ${machine}`);
      }
    }
  }
  return [...left, ...takenSlots()];
}

/** Waits, not for long, until nothing remains; returns what still does. */
export async function whatRemains(
  machines: readonly string[] = ["w1", "w2"],
): Promise<string[]> {
  const end = performance.now() + 20_000;
  let left = remains(machines);
  while (left.length > 0 && performance.now() < end) {
    await delay(200);
    left = remains(machines);
  }
  return left;
}

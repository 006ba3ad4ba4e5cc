/** The garbage collector of head, while outputs come back and after. */

import { existsSync, statSync } from "node:fs";
import { basename } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertOffloaded,
  assertStoreIsSound,
  build,
  buildCommand,
  inHost,
  makeWork,
  outputsOf,
  pathInfo,
  root,
  run,
  start,
  storeNames,
  until,
  up,
  useMachines,
  useOffload,
  watch,
  within,
} from "./lab.ts";
import type { Running } from "./lab.ts";

/** Bytes, so many that they can be stopped on their way. */
const SIZE = 200_000_000;

const test = suite("garbage collector");

/** A build whose output is coming back, and stands still on its way. */
interface Retrieval {
  readonly derivation: string;
  readonly output: string;
  /** Where the output waits, seen from here. */
  readonly temporary: string;
  readonly client: Running;
}

/** Has what w1 sends stand still, or go on. */
function signalSessions(name: "STOP" | "CONT"): void {
  run("w1", "sh", "-c", `kill -${name} $(pgrep -x sshd-session)`);
}

async function startRetrieval(): Promise<Retrieval> {
  const [derivation] = makeWork("head", `--output-size=${SIZE}`);
  const output = outputsOf("head", derivation!).out!;
  const client = watch(start("head", ...buildCommand([derivation!])));
  let names: string[] = [];
  await until("the output's retrieval", () => {
    names = besides(output);
    return existsSync(`${root("head")}/gnu/store/${names[0]}/data`);
  });
  signalSessions("STOP");
  const temporary = `${root("head")}/gnu/store/${names[0]}`;
  const retrieval = { derivation: derivation!, output, temporary, client };
  assert.ok(retrieved(retrieval) < SIZE, "it was stopped too late");
  return retrieval;
}

/** What else stands in head's store under the name of an output. */
function besides(output: string): string[] {
  return storeNames("head").filter((name) =>
    name.startsWith(`${basename(output)}.`) && !name.endsWith(".lock")
  );
}

function retrieved({ temporary }: Retrieval): number {
  const file = `${temporary}/data`;
  return existsSync(file) ? statSync(file).size : SIZE;
}

test.before(() => {
  up("head", "w1");
  useOffload("head", "node", "OFFLOAD_RESIDENT=false");
  useMachines("head", ["w1"]);
});

// Where a test has failed.
test.after.each(() => signalSessions("CONT"));

test.after(() => {
  for (const host of ["head", "w1"]) inHost(host, "guix", "gc");
});

test("an output that comes back is spared", async () => {
  const [garbage] = makeWork("head");
  const retrieval = await startRetrieval();
  // Not by the build's own process: another client's collector.
  inHost("head", "guix", "gc");
  assert.ok(retrieved(retrieval) < SIZE, "the collector came too late");
  assert.not.ok(existsSync(root("head") + garbage!));
  signalSessions("CONT");
  const { derivation, output, client } = retrieval;
  const result = await within("the build", client.ended);
  assertOffloaded(derivation, result, ["w1"]);
  assert.is(pathInfo("head", [output])[output]?.narSize.length, 9);
  assert.equal(pathInfo("head", [output]), pathInfo("w1", [output]));
  assertStoreIsSound("head");
});

test("what a killed hook left is removed", async () => {
  const { derivation, temporary, output, client } = await startRetrieval();
  // The lab kills the daemon and all its children.
  useOffload("head", "node", "OFFLOAD_RESIDENT=false");
  signalSessions("CONT");
  await within("the client's end", client.ended);
  assert.ok(existsSync(temporary), "nothing was left");
  assert.not.ok(existsSync(root("head") + output));
  inHost("head", "guix", "gc");
  assert.not.ok(existsSync(temporary));
  assert.equal(storeNames("head").filter((name) => /work/.test(name)), []);
  assert.not.ok(existsSync(root("head") + derivation));
});

test("what a killed hook left is replaced by the next", async () => {
  const { derivation, temporary, output, client } = await startRetrieval();
  useOffload("head", "node", "OFFLOAD_RESIDENT=false");
  signalSessions("CONT");
  await within("the client's end", client.ended);
  assert.ok(existsSync(temporary), "nothing was left");
  assert.is(build("head", derivation).status, 0);
  assert.not.ok(existsSync(temporary));
  assert.equal(pathInfo("head", [output]), pathInfo("w1", [output]));
});

test("a client that leaves leaves nothing in the way", async () => {
  const { derivation, output, client } = await startRetrieval();
  client.child.kill();
  await within("the client's end", client.ended);
  signalSessions("CONT");
  // The daemon ends the hook, then its lock is free.
  assert.is(build("head", derivation).status, 0);
  assert.equal(pathInfo("head", [output]), pathInfo("w1", [output]));
  assert.equal(besides(output), []);
});

test.run();

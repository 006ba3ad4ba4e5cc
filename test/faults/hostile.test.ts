/**
 * A build machine that lies in each step. What the table says must hold: the
 * hook ends in time and says why, at the output's path is nothing, nothing is
 * left beside it, and what the machine sends does not fill the memory.
 *
 * The rows marked `quick` are run ordinarily; where OFFLOAD_FAULTS is set, those
 * that match that regular expression are.
 */

import { readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { startHook } from "../lab/hook.ts";
import type { Hook } from "../lab/hook.ts";
import {
  forget,
  lab,
  OBSERVATIONS,
  onDatabase,
  root,
  RUNTIMES,
  SYSTEM,
  up,
  within,
} from "../lab/lab.ts";
import type { Runtime } from "../lab/lab.ts";
import { directory, link, program } from "../nars.ts";
import { OUTPUT_ROWS } from "./hostile_outputs.ts";
import { SESSION_ROWS } from "./hostile_sessions.ts";
import { startLiar } from "./liar.ts";
import type { Liar } from "./liar.ts";
import {
  itemName,
  MEMORY,
  PREFIX,
  signed,
  startSigner,
  STORE,
} from "./lies.ts";
import type { Row } from "./lies.ts";

/** In seconds: how long a row may take, on a busy machine. */
const LIMIT = 30;

/** The bounds of the hook's own steps, for the rows to be short. */
const SHORT = [
  "OFFLOAD_CONNECT_TIMEOUT=2",
  "OFFLOAD_DECISION_TIMEOUT=2",
  "OFFLOAD_OUTAGE_TIMEOUT=0",
  "OFFLOAD_STEP_TIMEOUT=3",
];

/** Which rows are run: those that match, or the quick ones. */
const { OFFLOAD_FAULTS: wanted } = process.env;

/** What of this suite is in head's store. */
function left(): string[] {
  return readdirSync(root("head") + STORE)
    .filter((name) => name.includes(`-${PREFIX}-`));
}

/** Deletes it. */
function clear(): void {
  for (const name of left()) {
    rmSync(`${root("head")}${STORE}/${name}`, { recursive: true });
  }
}

/** A process and its descendants. */
function descendants(pid: number): number[] {
  try {
    const file = `/proc/${pid}/task/${pid}/children`;
    const children = readFileSync(file, "latin1").trim().split(" ");
    return [
      pid,
      ...children.filter(Boolean).map(Number).flatMap(descendants),
    ];
  } catch {
    return []; // it has just ended
  }
}

function killProcess(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // It has just ended.
  }
}

/** The most memory that a process took, in bytes. */
function peakMemory(pid: number): number {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "latin1");
    return Number(/^VmHWM:\s*(\d+)/m.exec(status)?.[1] ?? 0) * 1024;
  } catch {
    return 0; // it has just ended
  }
}

/** Watches a hook's memory until it ends; returns the most it took. */
async function watchMemory({ child, ended }: Hook): Promise<number> {
  let most = 0;
  let over = false;
  ended.then(() => over = true);
  while (!over) {
    most = Math.max(most, ...descendants(child.pid!).map(peakMemory));
    await delay(20);
  }
  return most;
}

/** Writes head's machine file: the liar is the only machine. */
function useLiar(address: string, { port, hostKey }: Liar): void {
  const text = `(list (build-machine (name "${address}") (port ${port})
    (systems (list "${SYSTEM}")) (user "root") (host-key "${hostKey}")
    (private-key "/root/.ssh/id_ed25519") (overload-threshold #f)))`;
  writeFileSync(`${root("head")}/etc/guix/machines.scm`, text);
  forget("head");
}

/** What came of a hook. */
interface Outcome {
  readonly answer: string;
  readonly status: number | null;
  readonly text: string;
  readonly memory: number;
}

/**
 * Has the liar asked once, so that the next hook need not, and noted that
 * logging in takes longer than an answer may.
 */
async function seed(runtime: Runtime, derivation: string): Promise<void> {
  const hook = startHook("head", { runtime });
  assert.is(await hook.ask(derivation), "accept");
  hook.close();
  await within("the end", hook.ended);
  onDatabase(
    OBSERVATIONS,
    "UPDATE machine SET facts = json_set(facts, '$.login', 60) RETURNING *",
  );
}

/** Runs a hook against a machine that lies. */
async function offer(
  runtime: Runtime,
  outputs: readonly string[],
  variables: readonly string[],
): Promise<Outcome> {
  const derivation = `${STORE}/${itemName("row")}.drv`;
  const hook = startHook("head", { runtime, variables });
  const memory = watchMemory(hook);
  const answer = await hook.ask(derivation);
  if (answer === "accept") hook.work([], outputs);
  else hook.close();
  const result = await within("the end", hook.ended, LIMIT * 1000)
    .catch((error) => {
      for (const pid of descendants(hook.child.pid!)) killProcess(pid);
      throw new Error(`${error.message}\n${hook.text()}`);
    });
  const { status, stderr } = result;
  return { answer, status, text: stderr, memory: await memory };
}

for (const runtime of RUNTIMES) suiteUnder(runtime);

function suiteUnder(runtime: Runtime): void {
  const test = suite(`a hostile machine under ${runtime}`);
  let liar: Liar;
  let address: string;
  let endSigner: () => void;

  test.before(async () => {
    up("head", "w1");
    const [, head] = /^head (\S+)/m.exec(lab("list")) ?? [];
    address = head!.replace(/\d+$/, "77");
    endSigner = startSigner();
    liar = await startLiar(address);
  });
  test.before.each(() => {
    clear();
    useLiar(address, liar);
  });
  test.after(() => {
    clear();
    liar.close();
    endSigner();
    up("head", "w1");
  });

  test("a machine that does not lie is believed", async () => {
    const outputs = [1, 2].map((number) =>
      `${STORE}/${itemName(`out${number}`)}`
    );
    const node = directory(["x", program("#!/bin/sh")], ["y", link("x")]);
    liar.lies = { item: (path) => signed(node, path) };
    const outcome = await offer(runtime, outputs, SHORT);
    assert.is(outcome.answer, "accept", outcome.text);
    assert.is(outcome.status, 0, outcome.text);
    assert.equal(left().sort(), outputs.map((it) => it.slice(11)).sort());
    const out = `${root("head")}${outputs[0]!}`;
    assert.is(readFileSync(`${out}/y`, "utf8"), "#!/bin/sh");
  });

  for (const row of [...SESSION_ROWS, ...OUTPUT_ROWS]) {
    const isWanted = wanted ? RegExp(wanted).test(row.machine) : row.quick;
    if (!isWanted) continue;
    test(`a machine that ${row.machine}`, () => check(row));
  }

  async function check(row: Row): Promise<void> {
    const outputs = Array.from(
      { length: row.outputs ?? 1 },
      (_, index) => `${STORE}/${itemName(`out${index}`)}`,
    );
    liar.lies = {};
    let variables = [...SHORT, ...row.variables ?? []];
    if (row.late) {
      await seed(runtime, `${STORE}/${itemName("row")}.drv`);
      variables = [...variables, "OFFLOAD_FACTS_LIFETIME=600"];
    }
    liar.lies = row.lies(outputs);
    const outcome = await offer(runtime, outputs, variables);
    const { answer, status, text, memory } = outcome;
    assert.is(answer, row.answer ?? "accept", text);
    assert.is(status, row.answer === undefined ? row.status ?? 1 : 0, text);
    assert.match(text, row.says);
    if (row.says.source !== "^$") assert.match(text, address);
    assert.not.match(text, /\n {4}at /); // a stack
    assert.not.match(text, "\x1b");
    assert.ok(text.length < 3 * 2 ** 20, `${text.length} characters`);
    assert.equal(left(), []);
    assert.ok(memory < MEMORY, `${memory / 2 ** 20} MiB`);
  }

  test.run();
}

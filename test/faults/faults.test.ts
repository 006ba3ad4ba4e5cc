/**
 * Builds that meet a fault: the quick ones, each under one runtime, and some of
 * them with other plugins than the usual `guix`. With OFFLOAD_FAULTS, a regular
 * expression, those whose titles match it: all faults are there under both
 * runtimes and with each plugin that connects or moves archives, such as
 *
 *     sshd killed while sending under deno with openssh
 *
 * So `.` has all of them, `with archive-command` all of one plugin.
 */

import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertStoreIsSound,
  build,
  makeWork,
  PATIENT,
  RUNTIMES,
} from "../lab/lab.ts";
import type { Runtime } from "../lab/lab.ts";
import { FAULTS, titleOf } from "./faults.ts";
import type { Fault } from "./faults.ts";
import { CHOICES, makeField, useHook } from "./field.ts";
import type { Choice, Field } from "./field.ts";
import { meet, strays, whatRemains } from "./meet.ts";

const pattern = process.env.OFFLOAD_FAULTS;

for (const choice of Object.keys(CHOICES) as Choice[]) {
  for (const runtime of RUNTIMES) suiteUnder(runtime, choice);
}

function suiteUnder(runtime: Runtime, choice: Choice): void {
  const place = `under ${runtime} with ${choice}`;
  const faults = FAULTS.filter((fault) =>
    pattern !== undefined
      ? RegExp(pattern).test(`${titleOf(fault)} ${place}`)
      : runtime ===
        (choice === "guix" ? fault.quick : fault.quickWith?.[choice])
  );
  if (faults.length === 0) return;
  const test = suite(`faults ${place}`);
  let field: Field;

  test.before(async () => {
    field = await makeField(runtime, choice);
  });
  test.after(async () => {
    await field.relay.stop();
    for (const host of ["head", "w1", "w2"]) assertStoreIsSound(host);
  });

  for (const fault of faults) {
    test(`${titleOf(fault)}: ${fault.ends}`, () => hold(fault, field));
  }

  test.run();
}

/** Demands what must hold of a fault. */
async function hold(fault: Fault, field: Field): Promise<void> {
  const before = strays();
  // A login by the relay may take longer than an answer on a busy machine.
  const isAwaited = fault.phase === "before" && fault.ends === "on w1";
  const { hook, choice } = field;
  if (isAwaited) useHook(hook, "head", choice, PATIENT);
  const { ending, seconds, text } = await meet(fault, field, fault.seconds);
  if (isAwaited) useHook(hook, "head", choice);
  assert.is(ending, fault.ends, `${seconds} s: ${text}`);
  const says = fault.saysWith?.[field.choice] ?? fault.says;
  if (says !== undefined) assert.ok(says.test(text), text);
  assert.equal(await whatRemains(), [], text);
  // What a hook that was killed left, the next one removes.
  const [next] = makeWork("head");
  const { status, stderr } = build("head", next!);
  assert.is(status, 0, stderr);
  const added = strays().filter((name) => !before.includes(name));
  assert.equal(added, []);
}

/**
 * Builds that meet a fault: the quick ones, each under one runtime, or those
 * whose titles, with `under RUNTIME`, match OFFLOAD_FAULTS: `.` for all.
 */

import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { assertStoreIsSound, build, makeWork, RUNTIMES } from "../lab/lab.ts";
import type { Runtime } from "../lab/lab.ts";
import {
  FAULTS,
  makeField,
  meet,
  strays,
  titleOf,
  whatRemains,
} from "./faults.ts";
import type { Fault, Field } from "./faults.ts";

const pattern = process.env.OFFLOAD_FAULTS;

for (const runtime of RUNTIMES) suiteUnder(runtime);

function suiteUnder(runtime: Runtime): void {
  const faults = FAULTS.filter((fault) =>
    pattern === undefined
      ? fault.quick === runtime
      : RegExp(pattern).test(`${titleOf(fault)} under ${runtime}`)
  );
  if (faults.length === 0) return;
  const test = suite(`faults under ${runtime}`);
  let field: Field;

  test.before(async () => {
    field = await makeField(runtime);
  });
  test.after(() => {
    field.relay.stop();
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
  const { ending, seconds, text } = await meet(fault, field, fault.seconds);
  assert.is(ending, fault.ends, `${seconds} s: ${text}`);
  if (fault.says !== undefined) assert.ok(fault.says.test(text), text);
  assert.equal(await whatRemains(), [], text);
  // What a hook that was killed left, the next one removes.
  const [next] = makeWork("head");
  const { status, stderr } = build("head", next!);
  assert.is(status, 0, stderr);
  const added = strays().filter((name) => !before.includes(name));
  assert.equal(added, []);
}

/** Builds while the directory of the state is damaged. */

import { writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertOffloaded,
  build,
  makeWork,
  root,
  RUNTIMES,
  up,
  useMachines,
  useOffload,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";

const FILE = "/var/guix/offload/observations.sqlite";

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** Builds one derivation, which must be offloaded. */
function offload(): Result {
  const [derivation] = makeWork("head");
  const result = build("head", derivation!);
  assertOffloaded(derivation!, result, ["w1"]);
  return result;
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`damage under ${runtime}`);

  test.before(() => {
    up("head", "w1");
    useMachines("head", ["w1"]);
    useOffload("head", runtime);
    offload();
  });

  test("what is damaged is replaced once, with a word", () => {
    const garbage = "garbage ".repeat(8000);
    writeFileSync(`${root("head")}${FILE}`, garbage);
    const told = /warning: replacing the damaged '.*observations.sqlite': /g;
    assert.is(offload().stderr.match(told)?.length, 1);
    assert.not.match(offload().stderr, told);
  });

  test.run();
}

/** How long one trivial build takes, beside the same through `guix offload`. */

import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertOffloaded,
  build,
  makeWork,
  RUNTIMES,
  up,
  useMachines,
  useOffload,
  useReference,
} from "./lab.ts";

/** Ours may take this share of the reference's time; it takes far less. */
const LIMIT = 1 / 2;

const test = suite("speed");

/** Milliseconds that a trivial build takes, the best of three. */
function trivialBuild(): number {
  const times = makeWork("head", "--count=4").map((derivation) => {
    const start = performance.now();
    const result = build("head", derivation);
    const time = performance.now() - start;
    assertOffloaded(derivation, result, ["w1"]);
    return time;
  });
  // In the first the builder may be sent.
  return Math.round(Math.min(...times.slice(1)));
}

test("a trivial build takes at most half the time of guix offload", () => {
  up("head", "w1");
  useMachines("head", ["w1"]);
  useReference("head");
  const reference = trivialBuild();
  for (const runtime of RUNTIMES) {
    useOffload("head", runtime);
    const ours = trivialBuild();
    console.log(
      `    one trivial build: ${ours} ms under ${runtime}, ` +
        `${reference} ms through guix offload`,
    );
    assert.ok(ours <= reference * LIMIT, `${ours} of ${reference} ms`);
  }
});

test.run();

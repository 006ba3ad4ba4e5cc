/**
 * What suites begin with that are about the same.
 *
 * @module
 */

import { rmSync } from "node:fs";
import type { suite } from "uvu";
import { PLUGINS, root, STATE, up, useMachines, useOffload } from "./lab.ts";
import type { Runtime } from "./lab.ts";

/** Has tests of a suite find head, w1 and w2 up, and no plugins of a site. */
export function withoutSite(
  test: ReturnType<typeof suite>,
  runtime: Runtime,
): void {
  const clear = () =>
    rmSync(root("head") + PLUGINS, { recursive: true, force: true });
  test.before(() => {
    up("head", "w1", "w2");
    useOffload("head", runtime);
  });
  test.before.each(() => {
    clear();
    useMachines("head", ["w1", "w2"]);
  });
  test.after(clear);
}

/** Has tests of a suite find nothing that built-in plugins have kept, and w1. */
export function withoutKept(
  test: ReturnType<typeof suite>,
  runtime: Runtime,
): void {
  test.before(() => {
    up("head", "w1", "w2", "head2:master");
    const kept = ["programs-0", "w1:22", "w1:2222"]
      .map((directory) => `${STATE}/${directory}`);
    for (const directory of [PLUGINS, ...kept]) {
      rmSync(root("head") + directory, { recursive: true, force: true });
    }
  });
  test.before.each(() => {
    useMachines("head", ["w1"]);
    useOffload("head", runtime);
  });
}

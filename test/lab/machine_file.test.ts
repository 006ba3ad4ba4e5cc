/** Machine files: what we make of them, beside what the real Guix does. */

import { writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { conformInLab } from "../lab_machine_file.ts";
import {
  assertOffloaded,
  build,
  LAB,
  lab,
  makeWork,
  root,
  run,
  RUNTIMES,
  startHook,
  up,
  useMachines,
  useOffload,
  within,
} from "./lab.ts";

const COMMANDS = {
  node: [
    "/offload/node_modules/node/bin/node",
    "--disable-warning=ExperimentalWarning",
  ],
  deno: ["sh", "-c", '/offload/node_modules/@deno/*/deno run -A "$@"', "deno"],
};

for (const runtime of RUNTIMES) {
  const test = suite(`machine files under ${runtime}`);

  test.before(() => up("head", "w1", "w2"));

  test("the corpus is read as the real Guix reads it", () => {
    const command = [...COMMANDS[runtime], "/offload/test/lab_machine_file.ts"];
    assert.equal(conformInLab(LAB, command), []);
  });

  test("one that needs Guile is used all the same", () => {
    useOffload("head", runtime);
    useMachines("head", ["w2"], (text) =>
      `(use-modules (ice-9 match))
(match (list ${text}) ((machines) machines))`);
    const [derivation] = makeWork("head");
    assertOffloaded(derivation!, build("head", derivation!), ["w2"]);
    const shim = ["env", `OFFLOAD_RUNTIME=${runtime}`, "/offload/scripts/guix"];
    const machines = run("head", ...shim, "offload", "machines", "--json");
    assert.is(machines.status, 0, machines.stderr);
    assert.equal(
      JSON.parse(machines.stdout).map(({ name }: { name: string }) => name),
      ["w2"],
    );
  });

  test("one that is broken makes the hook decline, and says where", async () => {
    const [derivation] = makeWork("head");
    const broken: Record<string, RegExp> = {
      "(list (build-machine": /machines\.scm:1:\d+: unexpected end of input/,
      "(list (build-machine (nam 1)))": /machines\.scm:1:\d+: .*nam/,
      "(list (frobnicate))": /machines\.scm:1:\d+: .*frobnicate/,
      '"none"': /did not return a list of build machines/,
    };
    for (const [text, message] of Object.entries(broken)) {
      writeFileSync(`${root("head")}/etc/guix/machines.scm`, text);
      const hook = startHook("head", { runtime, wantsLocal: true });
      assert.is(await hook.ask(derivation!), "decline");
      assert.is(await hook.ask(derivation!, "riscv64-none"), "postpone");
      hook.close();
      const { status, stderr } = await within("the end", hook.ended);
      assert.is(status, 0);
      assert.match(stderr, message);
    }
  });

  test.after(() => void lab("up", "head"));
  test.run();
}

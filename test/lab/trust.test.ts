/** Who is trusted: host keys, and the keys that sign outputs. */

import { basename } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { closure, startHook } from "./hook.ts";
import {
  assertOffloaded,
  build,
  buildLog,
  makeWork,
  outputsOf,
  pathInfo,
  RUNTIMES,
  storeNames,
  trustOnly,
  up,
  useMachines,
  useOffload,
  within,
  wrongKey,
} from "./lab.ts";
import type { Runtime } from "./lab.ts";

for (const runtime of RUNTIMES) suiteUnder(runtime);

function suiteUnder(runtime: Runtime): void {
  const test = suite(`trust under ${runtime}`);

  test.before(() => {
    up("head", "w1", "w2");
    useOffload("head", runtime);
  });
  // It gives head the keys of all machines back.
  test.before.each(() => up("head", "w1", "w2"));
  test.after(() => up("head", "w1", "w2"));

  test("nothing is built where no key is trusted at all", () => {
    useMachines("head", ["w1"]);
    trustOnly("head", []);
    const [derivation] = makeWork("head");
    const { status, stderr } = build("head", derivation!);
    assert.is(status, 1);
    assert.match(stderr, "error: '/etc/guix/acl' authorizes no key");
    assert.match(stderr, "guix archive --authorize");
    assert.is(buildLog("w1", derivation!), undefined);
    assertNothing(derivation!);
  });

  test("outputs that nobody trusted has signed are refused", () => {
    useMachines("head", ["w1"]);
    trustOnly("head", ["w2"]);
    const [derivation] = makeWork("head", "--outputs=out,lib");
    const { status, stderr } = build("head", derivation!);
    assert.is(status, 1);
    const outputs = Object.values(outputsOf("head", derivation!));
    assert.match(stderr, refusal(outputs, "w1"));
    assert.match(buildLog("w1", derivation!) ?? "", "built ");
    assertNothing(derivation!);
  });

  test("an output signed by another machine's key is refused", async () => {
    useMachines("head", ["w1"]);
    trustOnly("head", ["w2"]);
    const [derivation] = makeWork("head");
    const outputs = Object.values(outputsOf("head", derivation!));
    const hook = startHook("head", { runtime });
    assert.is(await hook.ask(derivation!), "accept");
    hook.work(closure("head", derivation!), outputs);
    const { status, stderr } = await within("the end", hook.ended);
    assert.is(status, 1, stderr); // not 100: it is not the build's fault
    assert.match(stderr, refusal(outputs, "w1"));
    assertNothing(derivation!);
  });

  test("an output is accepted once its machine's key is", () => {
    useMachines("head", ["w1"]);
    trustOnly("head", ["w2"]);
    const [derivation] = makeWork("head");
    assert.is(build("head", derivation!).status, 1);
    trustOnly("head", ["w1"]);
    assertOffloaded(derivation!, build("head", derivation!), ["w1"]);
  });

  test("a machine with a wrong host key leaves the build to another", () => {
    useMachines(
      "head",
      ["w1", "w2"],
      (text) => wrongKey(text).replace('(name "w1")', "$&\n  (speed 2)"),
    );
    const [derivation] = makeWork("head");
    const result = build("head", derivation!);
    assertOffloaded(derivation!, result, ["w2"]);
    assert.match(result.stderr, "server at 'w1' returned host key");
  });

  test.run();
}

/** The message for one of the outputs. */
function refusal(outputs: readonly string[], machine: string): RegExp {
  return RegExp(
    `error: .*'${machine}'.* '(${outputs.join("|")})': unauthorized public key`,
  );
}

/** Demands that head has none of the outputs, nor anything beside. */
function assertNothing(derivation: string): void {
  const outputs = Object.values(outputsOf("head", derivation));
  assert.equal(pathInfo("head", outputs), {});
  const names = storeNames("head").filter((name) =>
    outputs.some((output) => name.startsWith(basename(output)))
  );
  // The daemon itself keeps the lock of a build that failed.
  assert.equal(names.filter((name) => !name.endsWith(".lock")), []);
}

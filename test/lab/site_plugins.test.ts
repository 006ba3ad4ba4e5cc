/** A site's plugins and settings: what they change, and what they must not. */

import { rmSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { askHook, closure, startHook } from "./hook.ts";
import {
  ACQUAINTED,
  assertOffloaded,
  build,
  forget,
  inHost,
  makeWork,
  meetMachines,
  OBSERVATIONS,
  offloadCommand,
  onDatabase,
  oneSlot,
  PLUGINS,
  root,
  run,
  RUNTIMES,
  until,
  useMachines,
  useOffload,
  within,
  writePlugin,
} from "./lab.ts";
import type { Runtime } from "./lab.ts";
import { withoutSite } from "./suites.ts";

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** Has head believe that logging in takes longer than an answer may. */
function pretendSlow(): void {
  const facts = "json_set(facts, '$.login', 60)";
  const sql = `UPDATE machine SET facts = ${facts} RETURNING 1`;
  assert.ok(onDatabase(OBSERVATIONS, sql).length > 0);
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`a site's plugins under ${runtime}`);

  withoutSite(test, runtime);

  test("a site's plugin changes the choice", async () => {
    useOffload("head", runtime, ACQUAINTED);
    await meetMachines(runtime); // else who answers first has the build
    writePlugin(
      "prefer.ts",
      `import type { Plugin } from "/offload/mod.ts";
const plugin = {
  name: "prefer-w2",
  score: ({ machine }) => machine.name === "w2" ? 100 : undefined,
} satisfies Plugin;
export default plugin as Plugin;
`,
    );
    for (let i = 0; i < 4; i++) {
      const [derivation] = makeWork("head");
      assertOffloaded(derivation!, build("head", derivation!), ["w2"]);
    }
    useOffload("head", runtime);
  });

  test("a site's plugin that fails stops no build, and is named", () => {
    writePlugin("1.ts", 'export default { name: "typo", scor: () => 1 };');
    writePlugin(
      "2.ts",
      'export default { name: "thrower", score() { throw Error("boom"); } };',
    );
    writePlugin("3.ts", 'export default { name: "nan", score: () => NaN };');
    writePlugin(
      "4.ts",
      'export default { name: "sleeper", score: () => new Promise(() => {}) };',
    );
    const [derivation] = makeWork("head");
    const result = build("head", derivation!);
    assertOffloaded(derivation!, result, ["w1", "w2"]);
    assert.match(result.stderr, "1.ts: unknown key 'scor'");
    assert.match(result.stderr, "plugin 'thrower': score: boom");
    assert.match(
      result.stderr,
      "plugin 'nan': score: expected a number, got NaN",
    );
    assert.match(
      result.stderr,
      "plugin 'sleeper': score: no answer within 1 s",
    );
  });

  test("mistakes in the settings and plugins make the hook decline", async () => {
    const [derivation] = makeWork("head");
    const local = { runtime, wantsLocal: true };
    for (const text of ['{"atempts": 3}', "{", '{"score": "localty"}']) {
      writePlugin("settings.json", text);
      const { answer, stderr } = await askHook(derivation!, local);
      assert.is(answer, "decline");
      assert.match(stderr, /^offload: error: .*(atempts|JSON|localty)/m);
    }
    writePlugin("settings.json", "{}");
    writePlugin("stuck.mjs", "await new Promise(() => {});");
    const { answer, stderr } = await askHook(derivation!, local);
    assert.is(answer, "accept");
    assert.match(stderr, "stuck.mjs: not loaded within 1 s");
    rmSync(`${root("head")}${PLUGINS}/stuck.mjs`);
    writePlugin("loose.mjs", "export default {};");
    inHost("head", "chmod", "775", PLUGINS);
    assert.is((await askHook(derivation!, local)).answer, "decline");
    rmSync(`${root("head")}${PLUGINS}/settings.json`);
    const loose = await askHook(derivation!, local);
    assert.is(loose.answer, "accept");
    assert.match(loose.stderr, `${PLUGINS}: others than root`);
  });

  test("what plugins veto everywhere is built here", async () => {
    writePlugin(
      "veto.mjs",
      'export default { name: "veto", score: () => -Infinity };',
    );
    const [derivation] = makeWork("head");
    const local = { runtime, wantsLocal: true };
    assert.is((await askHook(derivation!, local)).answer, "decline");
    assert.is((await askHook(derivation!, { runtime })).answer, "postpone");
  });

  test("what a plugin throws out of turn ends no build", () => {
    writePlugin(
      "rude.mjs",
      'export default { name: "rude", score() { Promise.reject(Error("late"));' +
        ' setTimeout(() => { throw Error("later"); });' +
        ' console.warn("# decline"); return 1; } };',
    );
    const [derivation] = makeWork("head");
    const result = build("head", derivation!);
    assertOffloaded(derivation!, result, ["w1", "w2"]);
    assert.match(result.stderr, "offload: warning: late\n");
    assert.match(result.stderr, "offload: warning: later\n");
    assert.match(result.stderr, "plugin: # decline");
  });

  test("what a plugin connects by is checked, and named", async () => {
    const [derivation] = makeWork("head");
    const cases = [
      ["{ exec() {} }", "'failure' is no function"],
      ["7", "'failure' is no function"],
      [
        "{ failure() {}, close() {}, openSocket() {}, exec: () => ({}) }",
        "'write' is no function",
      ],
    ];
    for (const [answer, problem] of cases) {
      const text =
        `export default { name: "odd", connect: () => (${answer}) };`;
      writePlugin("odd.mjs", text);
      forget("head");
      const hook = await askHook(derivation!, { runtime, wantsLocal: true });
      assert.is(hook.answer, "decline");
      assert.match(hook.stderr, `plugin 'odd': connect: ${problem}`);
      // To 'status', an account that runs no commands is one like another.
      const commands = answer === "{ exec() {} }"
        ? ["test", "status"]
        : ["test"];
      for (const command of commands) {
        const { status, stdout, stderr } = run(
          "head",
          ...offloadCommand(runtime, command),
        );
        assert.is(status, 1, stderr);
        assert.match(stdout + stderr, `plugin 'odd': connect: ${problem}`);
        assert.not.match(stdout + stderr, /TypeError|\n {4}at /);
      }
    }
  });

  test("a slot is free again whatever a plugin does at the end", async () => {
    useMachines("head", ["w1"], oneSlot);
    const [derivation] = makeWork("head");
    assert.is((await askHook(derivation!, { runtime })).answer, "accept");
    // It is later than an answer may be, and all that it does fails.
    writePlugin(
      "odd.mjs",
      `const fail = () => { throw new Error("odd"); };
const odd = { failure: fail, openSocket: fail, exec: fail, close: fail };
const later = (resolve) => setTimeout(resolve, 2000, odd);
export default { name: "odd", connect: () => new Promise(later) };`,
    );
    const variables = [
      ...["OFFLOAD_DECISION_TIMEOUT=0.5", "OFFLOAD_FACTS_LIFETIME=600"],
      ...["OFFLOAD_BACKOFF=600", "OFFLOAD_OUTAGE_TIMEOUT=600"],
    ];
    pretendSlow();
    const hook = startHook("head", { runtime, variables });
    assert.is(await hook.ask(derivation!), "accept", hook.text());
    hook.work(closure("head", derivation!), ["/gnu/store/none"]);
    const waits = /no machine can be reached: waiting/;
    await until("the failure", () => waits.test(hook.text()));
    rmSync(root("head") + PLUGINS, { recursive: true });
    // It knows of no failure, but of slots.
    assert.is((await askHook(derivation!, {})).answer, "accept");
    hook.child.kill();
    const { stderr } = await within("the end of the hook", hook.ended);
    assert.match(stderr, "warning: odd");
    assert.not.match(stderr, /\n {4}at /);
  });

  test.after(() => forget("head"));
  test.run();
}

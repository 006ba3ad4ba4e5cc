import { suite } from "uvu";
import * as assert from "uvu/assert";
import { ownRuntime, ROOT, run } from "./helpers.ts";

const test = suite("run");

/** What of the fixtures must come out as passed and failed. */
const FIXTURES: Readonly<Record<string, readonly [number, number]>> = {
  failing: [1, 1],
  before_hook: [0, 1],
  after_hook: [0, 1],
  non_error: [0, 1],
  forgotten: [0, 1],
  skipped: [1, 1],
  only: [1, 1],
  empty: [0, 1],
  broken: [0, 1],
};

function runSuites(...names: readonly string[]) {
  const [runtime, ...options] = ownRuntime;
  const files = names.map((name) => `${ROOT}/test/fixtures/${name}.ts`);
  return run(runtime, [...options, `${ROOT}/test/run.ts`, ...files]);
}

/** The counts of the last line. */
function counts(output: string): number[] | undefined {
  const last = output.trimEnd().split("\n").at(-1)!;
  return /^(?:node|deno): (\d+) passed, (\d+) failed$/.exec(last)
    ?.slice(1).map(Number);
}

test("run.ts passes what passes", async () => {
  const { code, stdout } = await runSuites("passing");
  assert.is(code, 0);
  assert.equal(counts(stdout.toString()), [2, 0]);
});

test("run.ts fails whatever goes wrong in a suite", async () => {
  await Promise.all(
    Object.entries(FIXTURES).map(async ([name, [passed, failed]]) => {
      const { code, stdout } = await runSuites(name);
      const output = stdout.toString();
      assert.is(code, 1, name);
      const [ran, wrong] = counts(output)!;
      assert.is(ran, passed, `${name}: ${output}`);
      assert.ok(wrong! >= failed, `${name}: ${output}`);
      assert.match(output, name);
    }),
  );
});

test("run.ts adds up what several suites give", async () => {
  const { code, stdout } = await runSuites("failing", "passing", "skipped");
  assert.is(code, 1);
  assert.equal(counts(stdout.toString()), [4, 2]);
});

test("run.ts runs the suites behind one that fails", async () => {
  const names = [...Object.keys(FIXTURES), "passing"];
  const { code, stdout } = await runSuites(...names);
  assert.is(code, 1);
  const output = stdout.toString();
  for (const name of names) assert.match(output, `/${name}.ts`);
  assert.ok(counts(output)![1]! >= names.length - 1);
});

test("run.ts fails without any test", async () => {
  const { code } = await runSuites("missing");
  assert.is(code, 1);
});

for (const name of ["hanging", "exiting"]) {
  test(`run.ts fails where a test is ${name}`, async () => {
    const { code } = await runSuites("passing", name);
    assert.ok(code !== 0);
  });
}

test.run();

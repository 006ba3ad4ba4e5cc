/** Builds that stay here, where that is sooner, on real hosts. */

import { readFileSync, rmSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  build,
  buildLog,
  builds,
  inHost,
  makeWork,
  meetMachines,
  OBSERVATIONS,
  offloadCommand,
  onDatabase,
  PATIENT,
  root,
  run,
  RUNTIMES,
  start,
  STATE,
  until,
  up,
  useMachines,
  useOffload,
  usePlugins,
  watch,
} from "./lab.ts";
import type { Result, Running } from "./lab.ts";

/** Begins to build on head, which may do so many builds itself. */
function begin(jobs: number, ...derivations: readonly string[]): Running {
  const options = ["--keep-going", `--max-jobs=${jobs}`];
  return watch(start("head", "guix", "build", ...options, ...derivations));
}

/** The same to its end. */
function buildBoth(jobs: number, ...derivations: readonly string[]): Result {
  return run("head", "guix", "build", `--max-jobs=${jobs}`, ...derivations);
}

/** How often a log says that a build stays, or goes to a machine. */
function count(log: string): { here: number; there: number } {
  const times = (pattern: RegExp) => (log.match(pattern) ?? []).length;
  return {
    here: times(/^'.*' stays here: /gm),
    there: times(/^offloading build of .* to 'w1'$/gm),
  };
}

/** Whether a derivation was built on w1. */
function wasBuiltThere(derivation: string): boolean {
  return /built/.test(buildLog("w1", derivation) ?? "");
}

for (const runtime of RUNTIMES) {
  const test = suite(`here under ${runtime}`);
  const name = `--name=stay-${runtime}`;

  /** Makes work that takes some seconds, of which there was some before. */
  const makeKnown = (seconds: number, ...more: readonly string[]) =>
    makeWork("head", name, `--seconds=${seconds}`, ...more);

  const use = (localSpeed: number, localBuilds = 1, learn = false) => {
    const options = { localSpeed, localBuilds, learn };
    usePlugins("head", runtime, { expected: options }, PATIENT);
  };

  test.before(async () => {
    up("head", "w1");
    useMachines("head", ["w1"], (text) =>
      text.replace(/\(speed [\d.]+\)/g, "")
        .replace(/\(parallel-builds \d+\)/g, "(parallel-builds 4)")
        .replace("(build-machine", '(build-machine (features (list "big"))'));
    useOffload("head", runtime);
    await meetMachines(runtime);
    assert.is(count(build("head", ...makeKnown(3)).stderr).there, 1);
  });

  test("nothing stays unless that is told", () => {
    useOffload("head", runtime);
    const { stderr: log } = buildBoth(2, ...makeKnown(3, "--count=2"));
    assert.equal(count(log), { here: 0, there: 2 }, log);
  });

  test("a build stays where a machine is slower, and else goes there", () => {
    use(3);
    const [derivation] = makeKnown(2);
    const { status, stderr: log } = buildBoth(1, derivation!);
    assert.is(status, 0, log);
    assert.equal(count(log), { here: 1, there: 0 }, log);
    assert.match(
      log,
      / stays here: it takes about \d.* s here, and \d.* s on 'w1'$/m,
    );
    assert.not.ok(wasBuiltThere(derivation!));
    for (const table of ["journal", "waiting"]) {
      const sql = `SELECT * FROM ${table} WHERE derivation = '${derivation}'`;
      assert.equal(onDatabase(OBSERVATIONS, sql), []);
    }
    use(0.5);
    const [other] = makeKnown(2);
    const there = buildBoth(1, other!).stderr;
    assert.equal(count(there), { here: 0, there: 1 }, there);
    assert.ok(wasBuiltThere(other!));
  });

  test("a build stays where much would have to be sent", () => {
    use(0.8);
    const { stderr: little } = buildBoth(1, ...makeKnown(2));
    assert.equal(count(little), { here: 0, there: 1 }, little);
    const much = ["--inputs=1", `--input-size=${150 * 2 ** 20}`];
    const { stderr: log } = buildBoth(1, ...makeKnown(2, ...much));
    assert.equal(count(log), { here: 1, there: 0 }, log);
  });

  test("what guix-daemon can't do now, or has features, goes out", () => {
    use(9, 9);
    const { stderr: none } = build("head", ...makeKnown(2));
    assert.equal(count(none), { here: 0, there: 1 }, none);
    const { stderr: big } = buildBoth(1, ...makeKnown(2, "--features=big"));
    assert.equal(count(big), { here: 0, there: 1 }, big);
  });

  test("no more builds stay than may, of all clients", async () => {
    use(9);
    const clients = [begin(2, ...makeKnown(20, "--count=2"))];
    await until("a build here", () => builds("head") === 1);
    clients.push(begin(2, ...makeKnown(1, "--count=2")));
    let most = 0;
    let areOver = false;
    const all = Promise.all(clients.map(({ ended }) => ended));
    all.finally(() => areOver = true);
    await until("their end", () => {
      most = Math.max(most, builds("head"));
      return areOver;
    });
    const results = await all;
    const text = results.map(({ stderr }) => stderr).join("\n");
    const counts = results.map(({ stderr }) => count(stderr));
    assert.equal(results.map(({ status }) => status), [0, 0], text);
    const expected = [{ here: 1, there: 1 }, { here: 0, there: 2 }];
    assert.equal(counts, expected, text);
    assert.is(most, 1);
    const { stderr: log } = buildBoth(2, ...makeKnown(1));
    assert.equal(count(log), { here: 1, there: 0 }, log);
  });

  test("one that has failed here leaves its place, though its client stays", async () => {
    use(9);
    const [fails] = makeKnown(1, "--fail", "--log-lines=1");
    const [other] = makeKnown(15, "--features=big");
    const client = begin(1, fails!, other!);
    let isOver = false;
    client.ended.finally(() => isOver = true);
    await until("its failure", () => /build of .* failed/.test(client.text()));
    const { stderr: log } = buildBoth(1, ...makeKnown(1));
    assert.not.ok(isOver, client.text());
    assert.equal(count(log), { here: 1, there: 0 }, log);
    const { stderr } = await client.ended;
    assert.equal(count(stderr), { here: 1, there: 1 }, stderr);
  });

  test("it is learned how quick this machine is", () => {
    const file = `${root("head")}${STATE}/here/builds.json`;
    rmSync(file, { force: true });
    use(9, 1, true);
    for (const seconds of [5, 1]) {
      const { stderr: log } = buildBoth(1, ...makeKnown(seconds));
      assert.equal(count(log), { here: 1, there: 0 }, log);
    }
    // The first of them took 5 s rather than a third of one.
    const { quickness } = JSON.parse(readFileSync(file, "utf8"));
    assert.ok(quickness > 0.3 && quickness < 0.8, `${quickness}`);
  });

  test("offload explain shows this machine beside the others", () => {
    const [derivation] = makeKnown(2);
    const explain = (localSpeed: number, ...options: readonly string[]) => {
      const plugins = { expected: { localSpeed, learn: false } };
      const variable = `OFFLOAD_USE=${JSON.stringify(plugins)}`;
      const args = ["explain", derivation!, ...options];
      return inHost(
        "head",
        "env",
        variable,
        ...offloadCommand(runtime, ...args),
      );
    };
    const chosen = (localSpeed: number) =>
      JSON.parse(explain(localSpeed, "--json"))
        .map((
          it: { machine: string; chosen: boolean },
        ) => [it.machine, it.chosen]);
    assert.equal(chosen(0), [["w1:22", true]]);
    assert.equal(chosen(0.5), [["here", false], ["w1:22", true]]);
    assert.equal(chosen(9), [["here", true], ["w1:22", false]]);
    assert.match(explain(9), /^here\t1 of 1\t.*\ttakes it\t\(build \d+ s\)$/m);
    const text = explain(0.5);
    assert.match(
      text,
      /^here\t.*\tit takes about \d.* s here, and \d.* s on 'w1'/m,
    );
  });

  test.run();
}

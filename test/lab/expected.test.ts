/** Builds that wait for a better machine, and for others, on real hosts. */

import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  build,
  makeWork,
  offloadCommand,
  root,
  run,
  RUNTIMES,
  up,
  useMachines,
  useOffload,
} from "./lab.ts";

/** Tells in the client's log what a plugin is told of a build. */
const SPY = `export default {
  name: "spy",
  async defer(ranking, request, { log }) {
    const names = (list) =>
      list.map((it) => it.name + "(" + names(it.dependents) + ")").join(" ");
    const running = ranking.map(({ candidate }) =>
      candidate.machine.name + ":" + candidate.running().length
    );
    log.info("spy: " + request.name + " before " +
      names(await request.dependents()) + "; " + running.sort().join(" "));
  },
};`;

/** How often a log says that a machine got a build. */
function count(log: string, machine: string): number {
  const pattern = new RegExp(`^offloading build of .* to '${machine}'$`, "gm");
  return log.match(pattern)?.length ?? 0;
}

for (const runtime of RUNTIMES) {
  const test = suite(`expected under ${runtime}`);

  test.before(() => {
    up("head", "w1", "w2");
    useMachines("head", ["w1", "w2"], (text) => {
      const [first, ...others] = text
        .replace(/\(parallel-builds \d+\)/g, "(parallel-builds 1)")
        .replace(/\(speed [\d.]+\)/g, "").split(/(?=\(build-machine)/);
      const machines = others.map((machine, index) =>
        machine.replace(
          "(build-machine",
          (it) => `${it} (speed ${[4, 1][index]})`,
        )
      );
      return [first, ...machines].join("");
    });
  });

  test("a plugin is told what needs a build, and what runs", () => {
    const directory = `${root("head")}/etc/guix/offload`;
    mkdirSync(directory, { recursive: true });
    writeFileSync(`${directory}/spy.mjs`, SPY);
    try {
      useOffload("head", runtime);
      const name = `--name=chain-${runtime}`;
      const chain = makeWork("head", "--count=3", "--chain", name);
      const { stderr: log } = build("head", chain.at(-1)!);
      const work = `chain-${runtime}`;
      assert.match(log, `spy: ${work} before ${work}(${work}()); w1:0 w2:0\n`);
      assert.match(log, `spy: ${work} before ${work}(); w1:0 w2:0\n`);
      assert.match(log, `spy: ${work} before ; w1:0 w2:0\n`);
    } finally {
      rmSync(`${directory}/spy.mjs`);
    }
  });

  test("a build waits for a machine that will be done sooner", () => {
    const work = (number: number) =>
      makeWork(
        "head",
        `--count=${number}`,
        "--seconds=3",
        `--name=long-${runtime}`,
      );
    useOffload("head", runtime);
    assert.is(count(build("head", ...work(1)).stderr, "w1"), 1);
    const { stderr: log } = build("head", ...work(2));
    assert.is(count(log, "w1"), 2, log);
    assert.is(count(log, "w2"), 0, log);
    const command = offloadCommand(runtime, "report", "--json");
    const { machines, foresight } = JSON.parse(run("head", ...command).stdout);
    assert.ok(foresight.builds >= 2, "what was expected is told");
    assert.ok(foresight.ratio > 0.5 && foresight.ratio < 3, foresight.ratio);
    assert.is(machines[0].foresight.builds, foresight.builds);
    // Who goes by speed takes what is free.
    useOffload("head", runtime, "OFFLOAD_SCORE=guix");
    assert.is(count(build("head", ...work(2)).stderr, "w2"), 1);
  });

  test.run();
}

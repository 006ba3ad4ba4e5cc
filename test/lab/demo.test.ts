/** scripts/demo.sh, as somebody runs it who has just got the checkout. */

import { spawn } from "node:child_process";
import { cpSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename } from "node:path";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { ROOT, up, watch, within } from "./lab.ts";

const test = suite("demo");

/** In milliseconds; most of it is the registry's. */
const LIMIT = 600_000;

/** Runs the demo in a copy of the checkout; returns what it printed. */
async function runDemo(directory: string): Promise<string> {
  // Its `npm ci` must not take the libraries from under the tests.
  cpSync(ROOT, directory, {
    recursive: true,
    filter: (file) => ![".git", "node_modules"].includes(basename(file)),
  });
  const child = spawn("sh", [`${directory}/scripts/demo.sh`], {
    stdio: "pipe",
    detached: true, // so that all of it can be ended
  });
  const demo = watch(child);
  try {
    const { status } = await within("the demo's end", demo.ended, LIMIT);
    assert.is(status, 0, demo.text().slice(-3000));
    return demo.text();
  } catch (error) {
    if (child.exitCode === null) process.kill(-child.pid!);
    await demo.ended; // else it writes to what is removed
    throw error;
  }
}

test("the demo shows both builds and their times", async () => {
  up("head", "w1", "w2"); // what is up when it starts, it leaves up
  const directory = mkdtempSync(`${tmpdir()}/offload-demo-`);
  try {
    const text = await runDemo(directory);
    const builds = [...text.matchAll(/offloading build of .* to 'w\d'/g)];
    assert.is(builds.length, 2, text);
    const times = [...text.matchAll(/^ +took (\d+) ms$/gm)];
    assert.is(times.length, 2, text);
    const [ours, reference] = times.map(([, time]) => Number(time));
    assert.match(text, `Offload took ${ours} ms`);
    assert.match(text, `guix offload ${reference} ms`);
    assert.ok(ours! < reference!, text);
    assert.match(text, "checking hashes");
    console.log(`    ${/Offload took .* ms/.exec(text)}`);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
});

test.run();

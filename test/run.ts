/**
 * Runs test suites, strictly: uvu alone passes a suite that never runs, one
 * whose `before` hook throws, and a test that throws what is no Error.
 *
 * Usage: run.ts [FILE…], all suites of this folder without one. The last line
 * is `RUNTIME: N passed, N failed`; the exit code is 1 where any failed.
 *
 * @module
 */

import { readdirSync } from "node:fs";
import process from "node:process";
import { fileURLToPath, pathToFileURL } from "node:url";

/** A suite as uvu queues it: the errors it prints or true, and counts. */
type QueuedSuite = () => Promise<[string | true, number, number, number]>;

/** What uvu shares by way of the global object. */
interface UvuGlobals {
  UVU_DEFER: number;
  UVU_INDEX: number;
  UVU_QUEUE: QueuedSuite[][];
}

const here = fileURLToPath(new URL(".", import.meta.url));
const uvu = globalThis as unknown as UvuGlobals;
let passed = 0;
let failed = 0;
let finished = false;

// A test that never settles, or exits, ends all.
process.on("exit", () => {
  if (!finished) process.exitCode = 1;
});

function fail(message: string): void {
  failed++;
  console.log(`FAIL ${message}`);
}

async function runSuite(suite: QueuedSuite, file: string): Promise<void> {
  const [errors, ran, skipped, total] = await suite();
  passed += ran;
  if (errors !== true) console.log(errors);
  if (skipped > 0) fail(`${file}: ${skipped} tests are skipped`);
  if (total === 0) fail(`${file}: a suite without tests`);
  if (errors === true && ran !== total) fail(`${file}: a hook failed`);
  else failed += total - ran;
}

async function runFile(file: string, index: number): Promise<void> {
  const start = performance.now();
  console.log(file);
  uvu.UVU_INDEX = index;
  uvu.UVU_QUEUE[index] = [];
  try {
    await import(pathToFileURL(file).href);
    const suites = uvu.UVU_QUEUE[index]!;
    if (suites.length === 0) fail(`${file}: no suite was run`);
    for (const suite of suites) await runSuite(suite, file);
  } catch (error) {
    // What a test throws that is no Error ends up here too.
    fail(`${file}: ${error instanceof Error ? error.stack : error}`);
  }
  console.log(` ${((performance.now() - start) / 1000).toFixed(1)} s`);
}

async function main(args: readonly string[]): Promise<number> {
  uvu.UVU_DEFER = 1;
  uvu.UVU_QUEUE = [];
  const names = readdirSync(here).filter((name) => name.endsWith(".test.ts"));
  const files = args.length > 0
    ? args
    : names.sort().map((name) => here + name);
  for (const [index, file] of files.entries()) await runFile(file, index);
  const runtime = "Deno" in globalThis ? "deno" : "node";
  console.log(`${runtime}: ${passed} passed, ${failed} failed`);
  finished = true;
  return failed > 0 || passed === 0 ? 1 : 0;
}

main(process.argv.slice(2)).then((code) => process.exit(code));

/** The oldest runtimes, and releases under all, Debian's too: a build by each. */

import { chmodSync, globSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { endKept, residentStatus } from "./hook.ts";
import {
  assertLikeLocal,
  assertOffloaded,
  assertStoreIsSound,
  build,
  down,
  inHost,
  lab,
  makeWork,
  PATIENT,
  ROOT,
  root,
  run,
  until,
  up,
  useMachines,
} from "./lab.ts";
import { relayed, startRelay } from "./relay.ts";
import { copyRelease, endRelease, serveRelease } from "./release.ts";

const MEBIBYTE = 2 ** 20;

/** A file of a package in this checkout, as hosts see it. */
function inPackages(pattern: string): string {
  const [file] = globSync(`${ROOT}node_modules/${pattern}`);
  return `/offload/${file!.slice(ROOT.length)}`;
}

/** Debian's, on hosts that have it. */
const DEBIANS = "/usr/bin/node";

/** Programs, and whether they are the oldest: the others run this from source in
 * other suites. */
const PROGRAMS = {
  "the oldest Node": [inPackages("node-oldest/bin/node"), true],
  "the oldest Deno": [inPackages("deno-oldest/**/deno"), true],
  "Node": [inPackages("node/bin/node"), false],
  "Deno": [inPackages("@deno/*/deno"), false],
  "Debian's Node": [DEBIANS, false],
} as const;

/** A master, the account that its guix-daemon runs as. */
const MASTERS = { dhead: "root", duhead: "guix-daemon" } as const;

/** What runs it, where its shim is. */
const SHIMS = {
  source: "/offload/scripts/guix",
  release: "/root/release/guix",
} as const;

const test = suite("runtimes");

test.before(async () => {
  up("dhead:master:nodejs", "duhead:master:nodejs:unprivileged", "w1");
  await serveRelease();
  for (const master of Object.keys(MASTERS)) {
    copyRelease(master);
    chmodSync(`${root(master)}/root`, 0o755);
    useMachines(master, ["w1"]);
  }
});
test.after(() => {
  endRelease();
  down(...Object.keys(MASTERS));
  up("head", "w1"); // who is gone leaves the machine files
});

/** Has a master's daemon offload by a program. */
function use(
  master: string,
  shim: string,
  program: string,
  ...variables: readonly string[]
): void {
  endKept(master);
  const runtime = `OFFLOAD_RUNTIME=${program}`;
  lab("daemon", master, `GUIX=${shim}`, runtime, PATIENT, ...variables);
}

/** Builds two, the second one by the process that stays. */
async function buildBoth(master: string): Promise<void> {
  const options = ["--inputs=5", "--text-inputs=2", "--outputs=out,lib"];
  const [first, failing] = [options, ["--fail", "--log-lines=1"]]
    .flatMap((options) => makeWork(master, ...options));
  assertOffloaded(first!, build(master, first!), ["w1"]);
  assertStoreIsSound(master);
  assertLikeLocal(master, first!, "w1");
  await until("the process that stays", () => !!residentStatus(master));
  const { status, stderr } = build(master, failing!);
  assert.is(status, 1, stderr);
  assert.match(stderr, "line 1 of 1\nfailing, as told to\n");
  await until("its count", () => residentStatus(master)?.served === 1);
}

test("Debian's Node is new enough", () => {
  for (const master of Object.keys(MASTERS)) {
    const owner = inHost(master, "dpkg-query", "--search", DEBIANS);
    assert.is(owner, `nodejs: ${DEBIANS}\n`);
    const version = inHost(master, DEBIANS, "--version").trim();
    const [, major, minor] = /^v(\d+)\.(\d+)\./.exec(version)!;
    const isNewEnough = Number(major) * 1000 + Number(minor) >= 22_014;
    assert.ok(isNewEnough, `Debian has ${version}, and 22.14 is the oldest`);
  }
});

for (const [name, [program, isOld]] of Object.entries(PROGRAMS)) {
  for (const [kind, shim] of Object.entries(SHIMS)) {
    if (kind === "source" && !isOld) continue;
    for (const [master, account] of Object.entries(MASTERS)) {
      test(`${name}, from a ${kind}, as ${account}`, async () => {
        use(master, shim, program);
        await buildBoth(master);
      });
    }
  }
  if (!isOld) continue;

  test(`${name} compresses what goes a slow way`, async () => {
    use("dhead", SHIMS.source, program, "OFFLOAD_RESIDENT=false");
    useMachines("dhead", ["w1"], relayed);
    const relay = await startRelay("w1", "--delay", "8");
    try {
      const [derivation] = makeWork(
        ...["dhead", "--compressible", "--inputs=1"],
        ...[`--input-size=${6 * MEBIBYTE}`, `--output-size=${6 * MEBIBYTE}`],
      );
      assertOffloaded(derivation!, build("dhead", derivation!), ["w1"]);
      const { up, down } = await relay.count();
      assert.ok(Math.max(up, down) < 3 * MEBIBYTE, `${up} and ${down} bytes`);
    } finally {
      await relay.stop();
      useMachines("dhead", ["w1"]);
    }
  });

  test(`${name} runs commands`, () => {
    const runtime = `OFFLOAD_RUNTIME=${program}`;
    const { status, stdout, stderr } = run(
      ...["dhead", "env", runtime, SHIMS.source, "offload", "test"] as const,
    );
    assert.is(status, 0, stderr);
    assert.match(stdout, /^w1:22\tok\t8\/8\t/m);
  });
}

test.run();

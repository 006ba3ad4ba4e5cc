/** Builds while the directory of the state is damaged. */

import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { acquireBuildSlot, chooseBuildMachine } from "../../mod.ts";
import { machine, makeContext, request } from "../context.ts";
import { endKept } from "./hook.ts";
import {
  assertOffloaded,
  build,
  buildOneByOne,
  inHost,
  makeWork,
  OBSERVATIONS,
  oneSlot,
  root,
  run,
  RUNTIMES,
  STATE,
  up,
  useMachines,
  useOffload,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";

/** Shell scripts after which nothing can be made there. */
const UNWRITABLE = {
  // It is not that while a process which has been told to end writes there.
  "is read-only": `until mount -o remount,ro ${STATE}; do sleep 0.1; done`,
  "has no inodes": `number=0
    while touch ${STATE}/file$number 2>/dev/null; do
      number=$((number + 1))
    done`,
};

// A directory in which a process writes can be moved, but not removed.
const EMPTY = `cd ${STATE} && mkdir .lost && mv * .lost && rm -rf .lost`;

/** Those after which something else is there. */
const WRONG_KINDS = {
  "has FIFOs for files": `${EMPTY} && mkdir w1:22 &&
    mkfifo w1:22/0 ${OBSERVATIONS}`,
  "has directories for files": `${EMPTY} &&
    mkdir -p w1:22/0 ${OBSERVATIONS}/0`,
  "has files for directories": `${EMPTY} && touch w1:22`,
};

for (const runtime of RUNTIMES) suiteUnder(runtime);
manyDevices();

/** Builds one derivation, which must be offloaded. */
function offload(): Result {
  const [derivation] = makeWork("head");
  const result = build("head", derivation!);
  assertOffloaded(derivation!, result, ["w1"]);
  return result;
}

/** Builds while the state is in a small file system of its own. */
async function withSmallState(work: () => unknown): Promise<void> {
  const options = "size=24m,nr_inodes=200";
  inHost("head", "mount", "-t", "tmpfs", "-o", options, "tmpfs", STATE);
  try {
    await work();
  } finally {
    inHost("head", "umount", "-l", STATE);
  }
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`damage under ${runtime}`);

  test.before(() => {
    up("head", "w1");
    useMachines("head", ["w1"]);
    useOffload("head", runtime);
    offload();
  });

  test("what is damaged is replaced once, with a word", () => {
    const garbage = "garbage ".repeat(8000);
    writeFileSync(`${root("head")}${OBSERVATIONS}`, garbage);
    const told = /warning: replacing the damaged '.*observations.sqlite': /g;
    assert.is(offload().stderr.match(told)?.length, 1);
    assert.not.match(offload().stderr, told);
  });

  test("builds go on where the disk is full, told once", async () => {
    await withSmallState(() => {
      offload(); // makes what it needs
      run("head", "dd", "if=/dev/zero", `of=${STATE}/fill`, "bs=4k");
      inHost("head", "rm", OBSERVATIONS);
      run("head", "dd", "if=/dev/zero", `of=${STATE}/more`, "bs=1k");
      const told = /warning: keeping observations in memory instead of /g;
      assert.is(offload().stderr.match(told)?.length, 1);
      inHost("head", "rm", `${STATE}/fill`, `${STATE}/more`);
      const { stderr } = offload();
      assert.not.match(stderr, told, stderr);
    });
  });

  const testOneByOne = (
    what: string,
    script: string,
    ...preparations: readonly (() => void)[]
  ) =>
    test(`builds go on, one by one, where the state ${what}`, async () => {
      useMachines("head", ["w1"], oneSlot);
      for (const prepare of preparations) {
        await withSmallState(async () => {
          prepare();
          inHost("head", "sh", "-c", script);
          await buildOneByOne(2);
        });
      }
    });

  for (const [what, script] of Object.entries(UNWRITABLE)) {
    // Before anything is there, and with what builds leave.
    testOneByOne(what, script, () => {}, () => {
      offload();
      endKept();
    });
  }
  for (const [what, script] of Object.entries(WRONG_KINDS)) {
    testOneByOne(what, script, offload);
  }

  test.run();
}

/** Does some work in a file system on /dev/loop300 or the like. */
async function onLateDevice(
  work: (directory: string) => Promise<void>,
): Promise<void> {
  const directory = mkdtempSync(`${tmpdir()}/offload-device-`);
  const sh = (script: string) =>
    execFileSync("sh", ["-euc", script], { cwd: directory, timeout: 30_000 });
  sh(`mkdir state; dd if=/dev/zero of=image bs=1M count=4 2>/dev/null
    mkfs.ext4 -q image; mknod device b 7 300; losetup "$PWD/device" image
    mount "$PWD/device" state`);
  try {
    await work(`${directory}/state`);
  } finally {
    sh("umount -l state; losetup -d $PWD/device");
    rmSync(directory, { recursive: true });
  }
}

function manyDevices(): void {
  const test = suite("slots on a device with a minor number above 255");

  test("a slot that is taken is waited for, not tried at once", async () => {
    await onLateDevice(async (stateDirectory) => {
      const { context } = makeContext({ stateDirectory });
      const only = machine();
      const slot = acquireBuildSlot(only, stateDirectory)!;
      const facts = { time: Date.now(), load: 0, cores: 4 };
      context.observations.saveFacts("machine:22", facts);
      let scored = 0;
      const plugin = { name: "counts", score: () => ++scored };
      const choice = await chooseBuildMachine(
        ...[[only], request(), { ...context, plugins: [plugin] }] as const,
        performance.now() + 300,
      );
      assert.is(choice, "busy");
      assert.is(scored, 1);
      slot.release();
    });
  });

  test.run();
}

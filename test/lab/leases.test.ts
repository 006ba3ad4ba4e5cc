/** Leases: masters that know of each other build no more than there are slots. */

import { existsSync } from "node:fs";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertOffloaded,
  build,
  buildCommand,
  builds,
  buildWork,
  forget,
  inHost,
  makeWork,
  oneSlot,
  root,
  RUNTIMES,
  start,
  until,
  useMachines,
  useOffload,
  usePlugins,
  watch,
  within,
} from "./lab.ts";
import type { Running, Runtime } from "./lab.ts";
import { withoutKept } from "./suites.ts";

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** Starts three builds on each of these masters. */
function startBuilds(masters: readonly string[], seconds: number): Running[] {
  return masters.map((master) => {
    const work = makeWork(master, "--count=3", `--seconds=${seconds}`);
    return watch(start(master, ...buildCommand(work)));
  });
}

/** Ends clients and what w1 builds for them. */
async function endBuilds(clients: readonly Running[]): Promise<void> {
  for (const { child } of clients) child.kill();
  for (const { ended } of clients) await within("the client's end", ended);
  await until("w1 is idle", () => builds("w1") === 0);
}

/** Builds on masters at the same time; returns how many ran at most on w1. */
async function mostBuilds(masters: readonly string[]): Promise<number> {
  let most = 0;
  const look = () => most = Math.max(most, builds("w1"));
  // As many as there may be, and another that is refused.
  const long = startBuilds(masters, 100);
  const refused = () => long.some(({ text }) => text().includes(ALL_USED));
  await until("a refusal", () => look() >= 2 && refused());
  look();
  await endBuilds(long);
  const short = startBuilds(masters, 1);
  let over = false;
  const all = Promise.all(short.map(({ ended }) => ended));
  const ended = within("the end of the builds", all);
  ended.finally(() => over = true);
  while (!over) {
    look();
    await delay(20);
  }
  for (const { status, stderr } of await ended) assert.is(status, 0, stderr);
  return most;
}

/** What is said where a lease is refused. */
const ALL_USED = "others use all slots of 'w1'";

function suiteUnder(runtime: Runtime): void {
  const test = suite(`leases under ${runtime}`);

  withoutKept(test, runtime);

  test("machines without leases build more than they have slots", async () => {
    for (const master of ["head", "head2"]) {
      useMachines(master, ["w1"]);
      useOffload(master, runtime);
    }
    const clients = startBuilds(["head", "head2"], 100);
    await until("more builds on w1", () => builds("w1") > 2);
    await endBuilds(clients);
  });

  test("masters that take leases never build more than that", async () => {
    const directory = "/run/guix-offload";
    // As if somebody had made it without a thought of others' locks.
    inHost("w1", "sh", "-c", `mkdir -p ${directory} && chmod 755 ${directory}`);
    for (const master of ["head", "head2"]) {
      usePlugins(master, runtime, { leases: {} });
    }
    const most = await mostBuilds(["head", "head2"]);
    assert.is(most, 2);
    assert.is(inHost("w1", "stat", "-c", "%a", directory), "750\n");
  });

  test("accounts other than root have leases of their own", () => {
    useMachines(
      "head",
      ["w1"],
      (text) => text.replace('(user "root")', '(user "builder")'),
    );
    const home = "/home/builder";
    inHost("w1", "useradd", "--create-home", "--password", "*", "builder");
    try {
      inHost(
        ...["w1", "install", "-D", "-o", "builder", "-m", "600"],
        ...["/root/.ssh/authorized_keys", `${home}/.ssh/authorized_keys`],
      );
      inHost("w1", "chown", "-R", "builder", home);
      usePlugins("head", runtime, { leases: {} }, "OFFLOAD_ATTEMPTS=1");
      const [derivation, result] = buildWork();
      assertOffloaded(derivation, result, ["w1"]);
      const leases = `${home}/.local/state/guix-offload`;
      const shown = inHost("w1", "stat", "-c", "%U %a", leases);
      assert.is(shown, "builder 700\n");
    } finally {
      inHost("w1", "userdel", "--remove", "builder");
    }
  });

  test("nor where the machine has no flock", async () => {
    inHost("w1", "mv", "/usr/bin/flock", "/usr/bin/away");
    try {
      for (const master of ["head", "head2"]) {
        usePlugins(master, runtime, { leases: {} });
      }
      assert.is(await mostBuilds(["head", "head2"]), 2);
    } finally {
      inHost("w1", "mv", "/usr/bin/away", "/usr/bin/flock");
    }
  });

  test("leases are kept where others than the account can't lead it", () => {
    const own = "mkdir -m 777 /tmp/planted; ln -s /etc/nologin /tmp/planted/0";
    const inside = "mkdir -m 755 /tmp/theirs; ln -s /etc/nologin /tmp/theirs/0";
    const plant = `${own}; ${inside}; ln -s /etc /tmp/linked`;
    inHost(
      "w1",
      "setpriv",
      "--reuid=65534",
      "--clear-groups",
      "sh",
      "-c",
      plant,
    );
    useMachines("head", ["w1"]);
    for (const name of ["planted", "theirs", "linked"]) {
      const directory = `/tmp/${name}`;
      usePlugins(
        "head",
        runtime,
        { leases: { directory } },
        "OFFLOAD_ATTEMPTS=1",
      );
      forget("head");
      const [derivation] = makeWork("head");
      const { status, stderr } = build("head", derivation!);
      assert.is(status, 1);
      assert.match(stderr, `'${directory}' is no directory that only user 0`);
    }
    assert.not.ok(existsSync(`${root("w1")}/etc/nologin`));
    assert.not.ok(existsSync(`${root("w1")}/etc/0`));
    inHost("w1", "rm", "-rf", "/tmp/planted", "/tmp/theirs", "/tmp/linked");
    forget("head");
  });

  test("the leases of a master that dies are free again", async () => {
    for (const master of ["head", "head2"]) {
      useMachines(master, ["w1"], oneSlot);
      usePlugins(master, runtime, { leases: {} });
    }
    const [long] = makeWork("head2", "--seconds=30");
    const dying = watch(start("head2", ...buildCommand([long!])));
    await until("it is built", () => builds("w1") === 1);
    const [derivation] = makeWork("head");
    const waiting = watch(start("head", ...buildCommand([derivation!])));
    await until(
      "the lease is found to be taken",
      () => waiting.text().includes(ALL_USED),
    );
    inHost("head2", "sh", "-c", "kill -KILL $(pgrep -f 'mod[.]ts')");
    assertOffloaded(derivation!, await within("it", waiting.ended), ["w1"]);
    dying.child.kill();
    await within("the other", dying.ended);
  });

  test.after(() => {
    useMachines("head", ["w1", "w2"]);
    useOffload("head", runtime);
  });
  test.run();
}

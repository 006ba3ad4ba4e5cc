/**
 * Faults that take hosts of their own, several builds, or a hook by hand: each
 * under one runtime in the ordinary run, where OFFLOAD_FAULTS is set under
 * both.
 */

import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { closure, startHook } from "../lab/hook.ts";
import {
  assertOffloaded,
  build,
  buildCommand,
  down,
  inHost,
  lab,
  makeWork,
  outputsOf,
  root,
  run,
  RUNTIMES,
  start,
  storeNames,
  SYSTEM,
  until,
  up,
  useMachines,
  watch,
  within,
} from "../lab/lab.ts";
import type { Running, Runtime } from "../lab/lab.ts";
import { addressOf } from "../lab/relay.ts";
import { mountSmall, restartSshd, SETTINGS, signal, useHook } from "./field.ts";
import { strays, whatRemains } from "./meet.ts";

const MACHINES = ["w1", "w2"];

for (const runtime of RUNTIMES) suiteUnder(runtime);

function startBuild(...derivations: string[]): Running {
  return watch(start("head", ...buildCommand(derivations)));
}

/**
 * Kills each machine's sshd, that of the one at work last: else the build goes
 * to the other just when it is killed, and its connection may outlive that.
 */
function loseMachines(log: string): void {
  const [, working] = /^offloading '.*' to '(\w+)'/m.exec(log)!;
  const others = MACHINES.filter((machine) => machine !== working);
  for (const machine of [...others, working!]) signal(machine, "KILL", "sshd");
}

/** Whether the builder of a client has begun. */
function isBuilding({ text }: Running): boolean {
  return /^building work$/m.test(text());
}

/** Whether somebody has a connection to a machine's sshd. */
function isConnectedTo(machine: string): boolean {
  const hex = addressOf(machine).split(".").reverse()
    .map((byte) => Number(byte).toString(16).padStart(2, "0")).join("");
  // Local address, remote address, and 01 for established.
  const line = RegExp(`^ *\\d+: \\S+ ${hex}:0016 01 `, "im");
  return line.test(readFileSync("/proc/net/tcp", "latin1"));
}

/** Edits a machine file so that a machine is preferred. */
function prefer(machine: string): (text: string) => string {
  return (text) =>
    text.replace(`(name "${machine}")`, `(name "${machine}") (speed 9.)`);
}

/** Brings up a host whose store has room for so many MiB. */
function upWithSmallStore(host: string, size: number): void {
  up(host);
  const [name] = host.split(":");
  mountSmall(name!, "/gnu/store", size);
  lab("daemon", name!);
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`faults of hosts under ${runtime}`);

  /** Registers a test for all runs, or for those of all faults. */
  const fault = (
    quick: Runtime | undefined,
    title: string,
    act: () => unknown,
  ) => {
    const isChosen = process.env.OFFLOAD_FAULTS !== undefined ||
      quick === runtime;
    if (!isChosen) return;
    test(title, async () => {
      const before = strays();
      await act();
      assert.equal(await whatRemains(), []);
      assert.equal(strays().filter((name) => !before.includes(name)), []);
    });
  };

  test.before(() => {
    up("head", ...MACHINES);
    useHook(runtime);
    makeWork("head"); // else a new host has no database of its store
  });
  test.before.each(() => useMachines("head", MACHINES));

  fault("node", "a remote store that gets full leaves it to another", () => {
    upWithSmallStore("full", 24);
    try {
      useMachines("head", ["full", "w2"], prefer("full"));
      const [derivation] = makeWork(
        "head",
        ...["--inputs=1", "--input-size=32000000"],
      );
      const result = build("head", derivation!);
      assertOffloaded(derivation!, result, ["w2"]);
      assert.match(result.stderr, "No space left on device");
      assert.match(result.stderr, "'full' failed: trying another machine");
    } finally {
      down("full");
    }
  });

  fault("deno", "a full store here ends the build, and leaves nothing", () => {
    upWithSmallStore("tight:master", 24);
    try {
      useHook(runtime, "tight");
      useMachines("tight", ["w1"]);
      const [derivation] = makeWork("tight", "--output-size=32000000");
      const before = storeNames("tight");
      const { status, stderr } = build("tight", derivation!);
      assert.is(status, 1);
      assert.match(
        stderr,
        "failed to write to the store: no space left on device",
      );
      assert.not.match(stderr, "trying another machine");
      const added = storeNames("tight")
        .filter((name) => !before.includes(name) && !name.endsWith(".lock"));
      assert.equal(added, []);
    } finally {
      down("tight");
    }
  });

  fault(
    "deno",
    "a build whose machines are all lost waits for one",
    async () => {
      const [derivation] = makeWork("head", "--seconds=8");
      const client = startBuild(derivation!);
      await until("the build", () => isBuilding(client));
      loseMachines(client.text());
      const waits = /no machine can be reached: waiting/;
      await until("it waits", () => waits.test(client.text()));
      restartSshd("w2");
      const result = await within("the end", client.ended);
      restartSshd("w1");
      assert.is(result.status, 0, result.stderr);
      assert.match(result.stderr, "no machine can be reached: waiting");
    },
  );

  fault("node", "where machines stay lost, all causes are told", async () => {
    const variables = [...SETTINGS, "OFFLOAD_OUTAGE_TIMEOUT=3"];
    const [derivation] = makeWork("head", "--seconds=20");
    const outputs = Object.values(outputsOf("head", derivation!));
    const hook = startHook("head", { runtime, variables });
    assert.is(await hook.ask(derivation!), "accept");
    hook.work(closure("head", derivation!), outputs);
    await until("a machine", () => /^@ build-remote/m.test(hook.text()));
    loseMachines(hook.text());
    const { status, stderr } = await within("the end", hook.ended);
    MACHINES.forEach(restartSshd);
    assert.is(status, 1);
    assert.match(stderr, /^offload: error: lost connection to 'w/m);
    assert.match(stderr, `no other machine can take '${derivation}'`);
  });

  fault(
    "deno",
    "more logins than MaxStartups lets in fail no build",
    async () => {
      lab("sshd", "w1", ...["-o", "MaxStartups=1:100:1"]);
      try {
        useMachines(
          "head",
          ["w1"],
          (text) => text.replace("(parallel-builds 2)", "(parallel-builds 8)"),
        );
        const clients = makeWork("head", "--count=8", "--seconds=1")
          .map((derivation) => startBuild(derivation));
        for (const { ended } of clients) {
          const { status, stderr } = await within("the end", ended);
          assert.is(status, 0, stderr);
        }
      } finally {
        lab("sshd", "w1");
      }
    },
  );

  fault(
    "node",
    "a build that is given up leaves the connection to who shares it",
    async () => {
      useHook(runtime, "head", "openssh");
      try {
        useMachines("head", ["w1"]);
        // Long enough for the connection to be tried, too.
        const clients = makeWork("head", "--count=2", "--seconds=8")
          .map((derivation) => startBuild(derivation));
        await until("both builds", () => clients.every(isBuilding));
        inHost("head", "pkill", "-TERM", "-n", "-f", "[o]ffload/mod.ts");
        const ends = clients.map(({ ended }) => within("the end", ended));
        const results = await Promise.all(ends);
        const [good, ...others] = results.filter(({ status }) => status === 0);
        const stderr = results.map(({ stderr }) => stderr).join("\n");
        assert.ok(good !== undefined && others.length === 0, stderr);
        assert.not.match(good.stderr, "trying another machine");
      } finally {
        useHook(runtime);
      }
    },
  );

  fault("node", "a broken machine file leaves builds to the daemon", () => {
    const file = `${root("head")}/etc/guix/machines.scm`;
    for (const text of ["((", "", '(list "w1")', "\0\0\0"]) {
      writeFileSync(file, text);
      const [derivation] = makeWork("head");
      const { status, stderr } = run(
        "head",
        ...["guix", "build", "--max-jobs=1", derivation!],
      );
      assert.is(status, 0, stderr);
      assert.match(stderr, "offload: error: ");
      assert.not.match(stderr, "offloading build of");
    }
  });

  fault("deno", "garbage on its input ends the hook", async () => {
    const [derivation] = makeWork("head");
    const lines = ["\0\x01\x02\xff", "0 x y z", "x".repeat(1_000_000)];
    for (const line of lines) {
      const hook = startHook("head", { runtime });
      hook.say(line);
      const { status, stdout, stderr } = await within("the end", hook.ended);
      assert.is(status, 1);
      assert.is(stdout, "");
      assert.match(stderr, "error: invalid request line");
    }
    const hook = startHook("head", { runtime });
    assert.is(await hook.ask(derivation!), "accept");
    hook.work(["\0\x01", "../../etc/passwd"], ["/etc/passwd", "x"]);
    const { status } = await within("the end", hook.ended);
    assert.is(status, 1);
    inHost("head", "test", "-s", "/etc/passwd");
  });

  fault("node", "an input that ends early ends the hook", async () => {
    const [derivation] = makeWork("head");
    for (const talk of ["", `${derivation}\n`]) {
      const hook = startHook("head", { runtime });
      assert.is(await hook.ask(derivation!), "accept");
      hook.child.stdin!.end(talk);
      const { status, stderr } = await within("the end", hook.ended);
      assert.is(status, 1);
      assert.match(stderr, `guix-daemon gave up '${derivation}'`);
    }
  });

  fault("node", "a hook that asks machines ends at a signal", async () => {
    const [derivation] = makeWork("head");
    for (const machine of MACHINES) signal(machine, "STOP", "sshd");
    try {
      for (const name of ["TERM", "KILL"] as const) {
        // Nobody answers: it asks for as long as that.
        const variables = ["OFFLOAD_DECISION_TIMEOUT=50"]
          .concat("OFFLOAD_CONNECT_TIMEOUT=50");
        const hook = startHook("head", { runtime, variables });
        hook.say(`0 ${SYSTEM} ${derivation} `);
        await until("it asks", () => MACHINES.every(isConnectedTo));
        signal("head", name, "hook");
        const { status, stdout } = await within("the end", hook.ended);
        assert.is.not(status, 0);
        assert.is(stdout, "");
        useMachines("head", MACHINES);
      }
    } finally {
      for (const machine of MACHINES) signal(machine, "CONT", "sshd");
    }
  });

  for (const limit of ["maxSilentTime", "buildTimeout"] as const) {
    fault(
      undefined,
      `beyond its ${limit} a build is not tried again`,
      async () => {
        const [derivation] = makeWork("head", "--silent", "--seconds=20");
        const outputs = Object.values(outputsOf("head", derivation!));
        const hook = startHook("head", { runtime, [limit]: 1 });
        assert.is(await hook.ask(derivation!), "accept");
        hook.work(closure("head", derivation!), outputs);
        const { status, stderr } = await within("the end", hook.ended);
        assert.is(status, 101, stderr);
        assert.not.match(stderr, "trying another machine");
      },
    );
  }

  test.run();
}

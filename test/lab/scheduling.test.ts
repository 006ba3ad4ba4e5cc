/** Which machine takes a build, and what happens where one fails. */

import { readFileSync, writeFileSync } from "node:fs";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { askHook, startHook } from "./hook.ts";
import {
  assertOffloaded,
  build,
  buildCommand,
  builds,
  down,
  forget,
  holdUploads,
  inHost,
  lab,
  makeWork,
  OBSERVATIONS,
  offloadCommand,
  onDatabase,
  oneSlot,
  root,
  run,
  RUNTIMES,
  start,
  SYSTEM,
  until,
  up,
  useMachines,
  useOffload,
  watch,
  within,
  writePlugin,
} from "./lab.ts";
import type { Result, Running, Runtime } from "./lab.ts";
import { addressOf, relayed, startRelay } from "./relay.ts";
import { withoutSite } from "./suites.ts";

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** Lets an answer take so long that who waits for all of it is found out. */
const FOREVER = ["OFFLOAD_DECISION_TIMEOUT=50"];

/** Demands that an answer came before that, however busy this machine is. */
function assertSoon(milliseconds: number): void {
  assert.ok(milliseconds < 30_000, `${milliseconds} ms`);
}

/** Whether head has facts of a machine. */
function isKnown(id: string): boolean {
  const sql = "SELECT 1 FROM machine WHERE facts IS NOT NULL AND id =";
  return onDatabase(OBSERVATIONS, `${sql} '${id}'`).length === 1;
}

/** The process of a host's sshd that listens. */
function sshd(host: string): number {
  return Number(readFileSync(`${root(host)}/run/sshd.pid`, "utf8"));
}

/** Runs `work` while a host's sshd takes connections and says nothing. */
async function whileSilent(host: string, work: () => Promise<void>) {
  const signal = (name: string) =>
    inHost(host, "kill", `-${name}`, String(sshd(host)));
  signal("STOP");
  try {
    await work();
  } finally {
    signal("CONT");
  }
}

/** Has what is built on a machine stand still, or go on. */
function signalBuilds(machine: string, name: "STOP" | "CONT"): void {
  inHost(machine, "sh", "-c", `kill -${name} $(pgrep -G guixbuild)`);
}

/** Watches, until `ended`, how many builds machines run at most. */
async function mostBuilds(
  machines: readonly string[],
  ended: Promise<unknown>,
): Promise<number> {
  let most = 0;
  let over = false;
  ended.finally(() => over = true);
  while (!over) {
    for (const machine of machines) most = Math.max(most, builds(machine));
    await delay(50);
  }
  return most;
}

function startBuild(...derivations: string[]): Running {
  return watch(start("head", ...buildCommand(derivations)));
}

/** Demands that all went well. */
function assertBuilt({ status, stderr }: Result): void {
  assert.is(status, 0, stderr);
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`scheduling under ${runtime}`);

  withoutSite(test, runtime);

  test("no machine runs more builds than it has slots", async () => {
    const work = makeWork("head", "--count=8", "--seconds=3");
    const running = startBuild(...work);
    const most = await mostBuilds(["w1", "w2"], running.ended);
    assertBuilt(await running.ended);
    assert.is(most, 2);
  });

  test("nor together with guix offload on the same master", async () => {
    const shim = "/offload/scripts/guix";
    // Every other hook is the reference.
    writeFileSync(
      `${root("head")}/tmp/mixed`,
      '#!/bin/sh\n[ "$1" = offload ] && [ $(($$ % 2)) = 0 ] && exec ' +
        `/usr/bin/guix "$@"\nexec ${shim} "$@"\n`,
      { mode: 0o755 },
    );
    lab("daemon", "head", "GUIX=/tmp/mixed", `OFFLOAD_RUNTIME=${runtime}`);
    const work = makeWork("head", "--count=8", "--seconds=2");
    const clients = work.map((derivation) => startBuild(derivation));
    const ended = Promise.all(clients.map(({ ended }) => ended));
    const most = await mostBuilds(["w1", "w2"], ended);
    const texts = (await ended).map((result) => {
      assertBuilt(result);
      return result.stderr;
    });
    assert.ok(most <= 2, `${most} builds on a machine`);
    const byReference = texts.filter((text) =>
      /acquired build slot/.test(text)
    );
    assert.ok(byReference.length > 0, "the reference took part");
    assert.ok(byReference.length < texts.length, "and so did Offload");
    useOffload("head", runtime);
  });

  test("dead and silent machines delay no second answer", async () => {
    up("dead", "silent");
    useMachines("head", ["w1", "dead", "silent"]);
    down("dead");
    const [derivation] = makeWork("head");
    try {
      await whileSilent("silent", async () => {
        const first = await askHook(derivation!, {
          runtime,
          variables: FOREVER,
        });
        assert.is(first.answer, "accept");
        assert.match(first.stderr, "failed to connect to 'dead': connection");
        const second = await askHook(derivation!, {
          runtime,
          variables: FOREVER,
        });
        assert.is(second.answer, "accept");
        assert.not.match(second.stderr, "failed to connect");
        for (const { took } of [first, second]) assertSoon(took);
      });
    } finally {
      down("silent");
    }
  });

  test("a machine that is back is used again while others are there", () => {
    up("back");
    useMachines(
      "head",
      ["w1", "back"],
      (text) => text.replace('(name "back")', '(name "back") (speed 9.)'),
    );
    useOffload("head", runtime, "OFFLOAD_BACKOFF=1");
    const [first, ...others] = makeWork("head", "--count=9", "--seconds=1");
    inHost("back", "kill", String(sshd("back")));
    assertOffloaded(first!, build("head", first!), ["w1"]);
    lab("sshd", "back");
    // It has little time to answer, but it is asked at each build.
    const isUsed = others.some((derivation) => {
      const result = build("head", derivation);
      return assertOffloaded(derivation, result, ["w1", "back"]) === "back";
    });
    assert.ok(isUsed);
    useOffload("head", runtime);
    down("back");
  });

  test("a silent machine alone is given up within the bound", async () => {
    useMachines("head", ["w1"]);
    const [derivation] = makeWork("head");
    await whileSilent("w1", async () => {
      // That of the connection is none of it.
      const variables = ["OFFLOAD_DECISION_TIMEOUT=1"]
        .concat("OFFLOAD_CONNECT_TIMEOUT=60");
      const { answer, took } = await askHook(derivation!, {
        runtime,
        variables,
      });
      assert.is(answer, "postpone");
      assert.ok(took < 20_000, `${took} ms`); // with the hook's start
    });
  });

  test("what no machine can be reached for is built here", async () => {
    up("dead");
    useMachines("head", ["dead"]);
    down("dead");
    const [derivation] = makeWork("head");
    const local = { runtime, wantsLocal: true };
    assert.is((await askHook(derivation!, local)).answer, "decline");
    assert.is((await askHook(derivation!, { runtime })).answer, "postpone");
    const variables = ["OFFLOAD_BUILD_LOCALLY=false"];
    assert.is(
      (await askHook(derivation!, { ...local, variables })).answer,
      "postpone",
    );
  });

  test("busy machines mean postpone, also where head could build", async () => {
    useMachines("head", ["w1"], oneSlot);
    const [long, other] = makeWork("head", "--count=2", "--seconds=60");
    const running = startBuild(long!);
    await until("a build on w1", () => builds("w1") > 0);
    const options = { runtime, wantsLocal: true };
    assert.is((await askHook(other!, options)).answer, "postpone");
    running.child.kill();
    await within("the end", running.ended);
    await until("w1 is idle", () => builds("w1") === 0);
  });

  test("a build whose machine dies goes on elsewhere", async () => {
    up("mortal");
    useMachines(
      "head",
      ["mortal", "w1"],
      (text) => text.replace('(name "mortal")', '(name "mortal") (speed 9.)'),
    );
    const [derivation] = makeWork("head", "--seconds=4");
    const running = startBuild(derivation!);
    await until("a build on mortal", () => builds("mortal") > 0);
    signalBuilds("mortal", "STOP"); // it is not to end before
    down("mortal");
    const result = await within("the end", running.ended);
    assertBuilt(result);
    assert.match(result.stderr, "lost connection to 'mortal'");
    assert.match(result.stderr, "'mortal' failed: trying another machine");
    assert.match(result.stderr, `offloading '${derivation}' to 'w1'`);
  });

  test("a failed build is not tried elsewhere", () => {
    const [derivation] = makeWork("head", "--fail");
    const { status, stderr } = build("head", derivation!);
    assert.is(status, 1);
    assert.not.match(stderr, "trying another machine");
    assert.is(stderr.match(/^offloading '/gm)?.length, 1);
  });

  test("more messages than a pipe holds keep no answer back", () => {
    writePlugin(
      "loud.mjs",
      'for (let i = 0; i < 3000; i++) console.log("x".repeat(70));' +
        ' export default { name: "loud", score: () => 1 };',
    );
    const [derivation] = makeWork("head");
    const result = build("head", derivation!);
    assertOffloaded(derivation!, result, ["w1", "w2"]);
    assert.is(result.stderr.match(/^plugin: x{70}$/gm)?.length, 3000);
  });

  test("a build waits for a busy machine when its own dies", async () => {
    up("mortal");
    useMachines(
      "head",
      ["mortal", "w1"],
      (text) =>
        oneSlot(text).replace('(name "mortal")', '(name "mortal") (speed 9.)'),
    );
    const [first, second] = makeWork("head", "--count=2", "--seconds=5");
    const dying = startBuild(first!);
    await until("a build on mortal", () => builds("mortal") > 0);
    signalBuilds("mortal", "STOP");
    const other = startBuild(second!);
    await until("a build on w1", () => builds("w1") > 0);
    signalBuilds("w1", "STOP");
    down("mortal");
    const tries = "'mortal' failed: trying another machine";
    await until("another try", () => dying.text().includes(tries));
    signalBuilds("w1", "CONT");
    assertBuilt(await within("the end", other.ended));
    assertBuilt(await within("the end", dying.ended));
  });

  test("a machine whose daemon is frozen is left for another", async () => {
    useOffload("head", runtime, "OFFLOAD_CONNECT_TIMEOUT=2");
    useMachines(
      "head",
      ["w1", "w2"],
      (text) => text.replace('(name "w1")', '(name "w1") (speed 9.)'),
    );
    const pid = readFileSync(`${root("w1")}/run/guix-daemon.pid`, "utf8")
      .trim();
    inHost("w1", "kill", "-STOP", pid);
    try {
      const [derivation] = makeWork("head");
      const { ended } = startBuild(derivation!);
      const result = await within("the end", ended);
      assertOffloaded(derivation!, result, ["w2"]);
      assert.match(result.stderr, "guix-daemon on 'w1' has not answered yet");
    } finally {
      inHost("w1", "kill", "-CONT", pid);
      useOffload("head", runtime);
    }
  });

  test("an idle hook ends at a signal", async () => {
    const [derivation] = makeWork("head");
    const hook = startHook("head", { runtime });
    assert.is(await hook.ask(derivation!, "riscv64-none"), "decline");
    const script = "kill -TERM $(pgrep -f '[o]ffload/mod.ts')";
    inHost("head", "sh", "-c", script);
    const { status, stderr } = await within("the end", hook.ended);
    assert.is(status, 1);
    assert.is(stderr, "offload: error: interrupted by SIGTERM\n");
  });

  test("offload explain says who would build, and builds nothing", () => {
    up("dead");
    useMachines(
      "head",
      ["w1", "w2", "dead"],
      (text) =>
        text.replace('(name "w2")', '(name "w2") (features (list "kvm"))'),
    );
    down("dead");
    const [derivation] = makeWork("head", "--features=kvm");
    const explain = (...options: string[]) =>
      run(
        "head",
        ...offloadCommand(runtime, "explain", derivation!, ...options),
      );
    const { status, stdout } = explain();
    assert.is(status, 0, stdout);
    assert.match(stdout, /^w1:22\t.*\tlacks the features kvm\t$/m);
    assert.match(stdout, /^w2:22\t.*\ttakes it\t$/m);
    const json = JSON.parse(explain("--json").stdout);
    assert.equal(
      json.map((
        each: { machine: string; chosen: boolean },
      ) => [each.machine, each.chosen]),
      [["w1:22", false], ["w2:22", true], ["dead:22", false]],
    );
    assert.is(builds("w2"), 0);
  });

  test("nothing is accepted for a machine whose daemon is down", async () => {
    useMachines("head", ["w1"]);
    const pid = readFileSync(`${root("w1")}/run/guix-daemon.pid`, "utf8");
    const [derivation] = makeWork("head");
    // What is known of the machine is of before: so is the answer fresh.
    assert.is((await askHook(derivation!, { runtime })).answer, "accept");
    inHost("w1", "kill", pid.trim());
    try {
      const variables = ["OFFLOAD_FACTS_LIFETIME=600"];
      const here = { runtime, variables, wantsLocal: true };
      const { answer, stderr } = await askHook(derivation!, here);
      assert.is(answer, "decline");
      assert.match(stderr, "failed to connect to guix-daemon on 'w1'");
      forget("head");
      assert.is((await askHook(derivation!, here)).answer, "decline");
      assert.is((await askHook(derivation!, { runtime })).answer, "postpone");
      const local = ["guix", "build", "--max-jobs=1", derivation!];
      assertBuilt(run("head", ...local));
    } finally {
      lab("daemon", "w1");
    }
  });

  test("the fast machines being down holds nothing up", async () => {
    const down = (text: string) =>
      text.replace(/^\(list\n([^]*)\)\n$/, (_, machines: string) => {
        const [first = ""] = machines.split("(build-machine").slice(1);
        const others = Array.from({ length: 100 }, (_, number) => {
          const port = `(port ${3000 + number}) (speed 9.)`;
          return ` (build-machine${first.replace("(systems", `${port} $&`)}`;
        });
        return `(list\n${machines}${others.join("\n")})\n`;
      });
    useMachines("head", ["w1", "w2"], down);
    const [derivation] = makeWork("head");
    for (const wantsLocal of [false, true]) {
      forget("head");
      const asked = { runtime, wantsLocal, variables: FOREVER };
      const { answer, stderr, took } = await askHook(derivation!, asked);
      assert.is(answer, "accept", stderr);
      assertSoon(took);
      assert.match(stderr, "connection refused");
    }
  });

  test("silent machines do not keep others from being asked", async () => {
    up("silent");
    const many = (text: string) =>
      text.replace(/^\(list\n/, (start) => {
        const [, machine = ""] = text.split("(build-machine");
        const others = Array.from({ length: 40 }, (_, number) =>
          ` (build-machine${
            machine.replace('"silent"', `"silent${number}"`)
              .replace("(systems", "(speed 9.) $&")
          }`);
        return `${start}${others.join("\n")}\n`;
      });
    useMachines("head", ["silent", "w1"], many);
    const address = addressOf("silent");
    const names = Array.from({ length: 40 }, (_, number) => `silent${number}`);
    const hosts = `${root("head")}/etc/hosts`;
    const before = readFileSync(hosts, "utf8");
    writeFileSync(hosts, `${before}${address} ${names.join(" ")}\n`);
    const [derivation] = makeWork("head");
    try {
      await whileSilent("silent", async () => {
        const asked = { runtime, wantsLocal: true };
        const { answer, stderr } = await askHook(derivation!, asked);
        assert.is(answer, "accept", stderr);
        assert.match(stderr, "'silent0' has not answered yet");
      });
    } finally {
      writeFileSync(hosts, before);
      down("silent");
    }
  });

  test("a login may take longer than an answer", async () => {
    const relay = await startRelay("w1", "--delay=200");
    useMachines("head", ["w1"], (text) => relayed(text, "w1"));
    useOffload("head", runtime, "OFFLOAD_DECISION_TIMEOUT=1");
    const variables = ["OFFLOAD_DECISION_TIMEOUT=1"];
    try {
      const work = makeWork("head", "--count=3");
      // Never seen, and no other place: it is waited for.
      const first = build("head", work[0]!);
      assertOffloaded(work[0]!, first, ["w1"]);
      assert.not.match(first.stderr, "offload: ");
      // Known: it is not waited for, whatever there is else.
      const here = { runtime, variables, wantsLocal: true };
      await relay.become("drop");
      assert.is((await askHook(work[1]!, here)).answer, "accept");
      await relay.become("pass");
      assertOffloaded(work[1]!, build("head", work[1]!), ["w1"]);
      // Never seen, and it could be built here: the client is told.
      forget("head");
      const hook = startHook("head", here);
      assert.is(await hook.ask(work[2]!), "decline");
      assert.match(hook.text(), /'w1' has not answered yet/);
      assert.match(hook.text(), /^hint: .*decisionTimeout/m);
      // Once it has answered after all, it is used.
      await until("the login", () => isKnown("w1:2222"));
      assert.is(await hook.ask(work[2]!), "accept");
      hook.close();
      await within("the end of the hook", hook.ended);
    } finally {
      relay.stop();
      useOffload("head", runtime);
    }
  });

  test("who waits says so again and again", async () => {
    useMachines("head", ["w1"]);
    const [derivation] = makeWork(
      "head",
      ...["--inputs=1", "--input-size=5000000"],
    );
    const letGo = await holdUploads("head", "w1");
    const building = startBuild(derivation!);
    const again = /^still waiting for another upload to 'w1' after 10 s/m;
    await until("the reminder", () => again.test(building.text()));
    await letGo();
    assertBuilt(await within("the end", building.ended));
  });

  test("offload explain knows what guix-daemon never asks for", () => {
    const also = SYSTEM === "x86_64-linux" ? "i686-linux" : "armhf-linux";
    const systems = `(systems (list "${SYSTEM}" "${also}" "riscv64-linux"))`;
    useMachines(
      "head",
      ["w1"],
      (text) => text.replace(`(systems (list "${SYSTEM}"))`, systems),
    );
    const explain = (derivation: string) =>
      run(
        "head",
        ...offloadCommand(runtime, "explain", derivation),
      );
    const itself = "guix-daemon builds it itself, for its preferLocalBuild";
    for (const system of [SYSTEM, also]) {
      const [derivation] = makeWork("head", "--local", `--system=${system}`);
      const { status, stdout } = explain(derivation!);
      assert.is(status, 1, stdout);
      assert.match(stdout, RegExp(`^w1:22\t.*\t${itself} is set\t$`, "m"));
    }
    const [other] = makeWork("head", "--local", "--system=riscv64-linux");
    const { status, stdout, stderr } = explain(other!);
    assert.is(status, 0, stderr);
    assert.match(stdout, /^w1:22\t.*\ttakes it\t$/m);
    const [derivation] = makeWork("head", "--local");
    const built = build("head", derivation!); // without a local slot
    assert.is(built.status, 0, built.stderr);
    assert.not.match(built.stderr, "offload");
  });

  test("50 hooks at once on 3 machines finish without a failure", async () => {
    up("w3");
    useMachines("head", ["w1", "w2", "w3"]);
    const work = makeWork("head", "--count=50");
    const clients = work.map((derivation) => startBuild(derivation));
    const results = await Promise.all(clients.map(({ ended }) => ended));
    results.forEach(assertBuilt);
    const text = results.map(({ stderr }) => stderr).join("");
    assert.not.match(text, "offload: error");
    down("w3");
  });

  test.after(() => forget("head"));
  test.run();
}

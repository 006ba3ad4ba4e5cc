/** Slow, odd and broken ways to the machines, and what becomes of archives. */

import { readdirSync, readFileSync } from "node:fs";
import { createConnection, createServer } from "node:net";
import { basename } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { closure, endKept, startHook } from "./hook.ts";
import {
  assertLikeLocal,
  assertOffloaded,
  assertStoreIsSound,
  build,
  buildCommand,
  holdUploads,
  inHost,
  lab,
  makeWork,
  offloadCommand,
  oneSlot,
  outputsOf,
  root,
  run,
  RUNTIMES,
  start,
  storeNames,
  until,
  up,
  useMachines,
  useOffload,
  watch,
  within,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";
import { relayed, startRelay } from "./relay.ts";

const MEBIBYTE = 2 ** 20;

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** Makes work, builds it through w1, and gives the log. */
function buildWork(...options: string[]): [derivation: string, Result] {
  const [derivation] = makeWork("head", ...options);
  return [derivation!, build("head", derivation!)];
}

/** The same, while this process goes on. */
async function buildMeanwhile(): Promise<[derivation: string, Result]> {
  const [derivation] = makeWork("head", "--inputs=1");
  const building = watch(start("head", ...buildCommand([derivation!])));
  return [derivation!, await within("the build", building.ended)];
}

/** Builds with 6 MiB in and out; returns how many MiB went over the wire. */
async function wireSizes(
  ...options: string[]
): Promise<{ up: number; down: number }> {
  const size = 6 * MEBIBYTE;
  const relay = await startRelay("w1", "--delay", "8");
  try {
    const [derivation, result] = buildWork(
      ...["--inputs=1", `--input-size=${size}`, `--output-size=${size}`],
      ...options,
    );
    assertOffloaded(derivation, result, ["w1"]);
    const { up, down } = await relay.count();
    return { up: up / MEBIBYTE, down: down / MEBIBYTE };
  } finally {
    await relay.stop();
  }
}

/** The most memory that the hook on head had until `ended`, in bytes. */
async function peakMemory(ended: Promise<unknown>): Promise<number> {
  let over = false;
  ended.then(() => over = true, () => over = true);
  let peak = 0;
  while (!over) {
    await delay(50);
    const proc = `${root("head")}/proc`;
    for (const pid of readdirSync(proc).filter((name) => /^\d+$/.test(name))) {
      try {
        const command = readFileSync(`${proc}/${pid}/cmdline`, "latin1");
        if (!command.includes("mod.ts")) continue;
        const status = readFileSync(`${proc}/${pid}/status`, "latin1");
        const [, size] = /^VmHWM:\s*(\d+) kB$/m.exec(status) ?? [];
        peak = Math.max(peak, Number(size ?? 0) * 1024);
      } catch {
        // It has just ended.
      }
    }
  }
  return peak;
}

/** What is left on head where the outputs of `derivation` were to be. */
function leftovers(derivation: string): string[] {
  const outputs = Object.values(outputsOf("head", derivation));
  return storeNames("head").filter((name) =>
    outputs.some((output) => name.startsWith(basename(output))) &&
    !name.endsWith(".lock") // guix-daemon's
  );
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`ways under ${runtime}`);

  test.before(() => {
    up("head", "w1");
    useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1");
  });
  test.before.each(() => useMachines("head", ["w1"]));

  test("what goes a slow way is compressed, unless that is off", async () => {
    assertOffloaded(...buildWork(), ["w1"]); // it has what all builds need
    useMachines("head", ["w1"], relayed);
    const packed = await wireSizes("--compressible");
    assert.ok(packed.up < 3, `${packed.up} MiB`);
    assert.ok(packed.down < 3, `${packed.down} MiB`);
    useMachines(
      "head",
      ["w1"],
      (text) => relayed(text).replace('(name "w1")', '$& (compression "none")'),
    );
    const plain = await wireSizes("--compressible");
    assert.ok(plain.up > 6, `${plain.up} MiB`);
    assert.ok(plain.down > 6, `${plain.down} MiB`);
  });

  test("gzip will do where there is no zstd", async () => {
    useMachines("head", ["w1"], relayed);
    inHost("w1", "mv", "/usr/bin/zstd", "/usr/bin/zstd.away");
    try {
      const { up, down } = await wireSizes("--compressible");
      assert.ok(up < 3, `${up} MiB`);
      assert.ok(down < 3, `${down} MiB`);
    } finally {
      inHost("w1", "mv", "/usr/bin/zstd.away", "/usr/bin/zstd");
    }
  });

  test("where no command may run, bulk goes through the daemon", () => {
    lab("sshd", "w1", "-o", "ForceCommand=echo no shell for you");
    try {
      const [derivation, result] = buildWork(
        ...["--inputs=1", `--input-size=${40 * MEBIBYTE}`],
      );
      assertOffloaded(derivation, result, ["w1"]);
    } finally {
      lab("sshd", "w1");
    }
  });

  test("a forced command that reads holds up no answer", async () => {
    lab("sshd", "w1", "-o", "ForceCommand=cat");
    try {
      useMachines("head", ["w1"]); // what it said before is forgotten
      const [derivation] = makeWork("head");
      const hook = startHook("head", { runtime });
      assert.is(await hook.ask(derivation!), "accept");
      hook.child.stdin!.end();
      await within("the end", hook.ended);
    } finally {
      lab("sshd", "w1");
      useMachines("head", ["w1"]);
    }
  });

  // What they are given is the same, whichever runtime it comes from.
  const shells = runtime === "node"
    ? ["bash", "dash", "fish", "tcsh"]
    : ["bsd-csh", "zsh"];
  test(`an account's own shell may be ${shells.join(", ")}`, () => {
    try {
      for (const shell of shells) {
        inHost("w1", "usermod", "--shell", `/usr/bin/${shell}`, "root");
        useMachines("head", ["w1"]);
        const tested = run("head", ...offloadCommand(runtime, "test"));
        assert.is(tested.status, 0, shell + tested.stdout);
        assert.match(tested.stdout, /^w1:22\tok\t8\/8\t/m);
        const size = `--input-size=${6 * MEBIBYTE}`; // `guix archive` runs there
        const [derivation, result] = buildWork("--inputs=1", size);
        assertOffloaded(derivation, result, ["w1"]);
      }
    } finally {
      inHost("w1", "usermod", "--shell", "/bin/bash", "root");
    }
  });

  for (const options of [[], ["-j"]]) {
    const how = options.length > 0 ? "by a relay" : "as it forwards to sockets";
    test(`a real dropbear is reached ${how}`, () => buildByDropbear(options));
  }

  async function buildByDropbear(options: readonly string[]): Promise<void> {
    inHost("w1", "usermod", "--shell", "/usr/bin/tcsh", "root");
    inHost(
      "w1",
      "sh",
      "-c",
      `
      test -e /root/dropbear.key || {
        dropbearkey -t ed25519 -f /root/dropbear.key >/dev/null
        dropbearkey -y -f /root/dropbear.key | grep ^ssh- >/root/dropbear.pub
      }`,
    );
    const address = lab("list").match(/^w1 (\S+)/m)![1]!;
    const dropbear = watch(start("w1", "dropbear", ...[
      ...["-F", "-E", "-r", "/root/dropbear.key", "-p", `${address}:2223`],
      ...options,
    ]));
    try {
      await until("dropbear", () => /Not backgrounding/.test(dropbear.text()));
      const key = inHost("w1", "cat", "/root/dropbear.pub").trim();
      useMachines(
        "head",
        ["w1"],
        (text) =>
          text.replace('(name "w1")', "$& (port 2223)")
            .replace(/ssh-ed25519 [^"]+/, key),
      );
      const [derivation, result] = buildWork(
        ...["--inputs=60", "--input-size=3000", "--tree", "--outputs=out,lib"],
      );
      assertOffloaded(derivation, result, ["w1"]);
      assertLikeLocal("head", derivation, "w1");
    } finally {
      inHost("w1", "usermod", "--shell", "/bin/bash", "root");
      endKept(); // or it would serve that on
      dropbear.child.kill();
      await dropbear.ended;
    }
  }

  test("a stream that is cut leaves nothing half-made", async () => {
    useMachines("head", ["w1"], relayed);
    const size = 2 * MEBIBYTE;
    for (const cut of ["--cut-up", "--cut-down"]) {
      for (let i = 0; i < 2; i++) {
        const offset = Math.floor(3000 + Math.random() * size);
        const relay = await startRelay("w1", cut, String(offset));
        useMachines("head", ["w1"], relayed); // forgets the failure
        const [derivation, result] = buildWork(
          ...["--inputs=1", `--input-size=${size}`, "--outputs=out,lib"],
          `--output-size=${size / 2}`,
        );
        await relay.stop();
        assert.is.not(result.status, 0, `${cut} ${offset}`);
        assert.match(result.stderr, "'w1'", `${cut} ${offset}`);
        assert.equal(leftovers(derivation), [], `${cut} ${offset}`);
      }
    }
    assertStoreIsSound("w1");
    assertStoreIsSound("head");
  });

  test("what was collected before the build is sent again", async () => {
    const [first] = makeWork("head");
    assertOffloaded(first!, build("head", first!), ["w1"]);
    endKept(); // which keeps from the collector what was sent over it
    const [second] = makeWork(
      ...["head", "--inputs=1", `--input-size=${6 * MEBIBYTE}`],
    );
    const input = closure("head", second!)
      .find((path) => path.endsWith("-work-builder"));
    const release = await holdUploads("head", "w1");
    const building = watch(start("head", ...buildCommand([second!])));
    try {
      await until(
        "waiting",
        () => building.text().includes("waiting for another upload"),
      );
      inHost("w1", "guix", "gc", "--delete", input!);
    } finally {
      await release();
    }
    const result = await within("the build", building.ended);
    assertOffloaded(second!, result, ["w1"]);
    assert.match(result.stderr, /'w1' has lost 1 store item/);
  });

  test("a build may take longer than connecting", async () => {
    useMachines("head", ["w1"]);
    useOffload("head", runtime, "OFFLOAD_CONNECT_TIMEOUT=5");
    try {
      const [derivation] = makeWork("head", "--seconds=7");
      const building = watch(start("head", ...buildCommand([derivation!])));
      const result = await within("the build", building.ended);
      assertOffloaded(derivation!, result, ["w1"]);
      const told = result.stderr.match(/^offloading '/gm);
      assert.is(told?.length, 1, result.stderr);
    } finally {
      useOffload("head", runtime);
    }
  });

  test("a relay before a daemon may break messages into pieces", async () => {
    const directory = `${root("w1")}/var/guix/daemon-socket`;
    let connections = 0;
    const server = createServer(async (client) => {
      connections++;
      const daemon = createConnection(`${directory}/socket`);
      daemon.on("error", () => client.destroy());
      daemon.pipe(client).on("error", () => daemon.destroy());
      try {
        for await (const chunk of client) {
          for (let at = 0; at < chunk.length; at += 512) {
            daemon.write(chunk.subarray(at, at + 512));
            await delay(2);
          }
        }
      } catch {
        // The hook went.
      }
      daemon.end();
    });
    server.listen(`${directory}/pieces`);
    try {
      // Who asks anew has leave already, if for the only slot. A daemon need not
      // say that it lost count.
      useOffload(
        "head",
        runtime,
        "OFFLOAD_ATTEMPTS=1",
        "OFFLOAD_CONNECT_TIMEOUT=5",
        'OFFLOAD_USE={"leases": {}}',
      );
      useMachines("head", ["w1"], (text) => {
        const file = '"/var/guix/daemon-socket/pieces"';
        return oneSlot(text)
          .replace('(name "w1")', `$& (daemon-socket ${file})`);
      });
      const [derivation] = makeWork("head", "--inputs=30");
      const building = watch(start("head", ...buildCommand([derivation!])));
      const result = await within("the build", building.ended);
      assertOffloaded(derivation!, result, ["w1"]);
      assert.not.match(result.stderr, /EOF/);
      assert.ok(connections >= 2, `${connections} connections`);
    } finally {
      useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1");
      await new Promise((resolve) => server.close(resolve));
    }
  });

  test("a machine may fetch inputs by itself, and gets the rest", async () => {
    const address = lab("list").match(/^head (\S+)/m)![1]!;
    const url = `http://${address}:8181`;
    lab("daemon", "w1", "--", `--substitute-urls=${url}`);
    useOffload("head", runtime, "OFFLOAD_SUBSTITUTES=true");
    const publish = watch( // it keeps a connection to head's daemon
      start("head", "guix", "publish", "--port=8181", `--listen=${address}`),
    );
    try {
      await until("guix publish", () => /publishing/.test(publish.text()));
      const options = ["--inputs=1", `--input-size=${6 * MEBIBYTE}`];
      const [derivation, result] = buildWork(...options);
      assertOffloaded(derivation, result, ["w1"]);
      assert.match(result.stderr, "'w1' fetches 1 store item itself");
      assert.match(result.stderr, /^sending \d store items? \(0.0 MiB\)/m);
      publish.child.kill();
      await publish.ended;
      const [other, pushed] = buildWork(...options);
      assertOffloaded(other, pushed, ["w1"]);
      assert.match(pushed.stderr, /^sending \d store items \(6.0 MiB\)/m);
    } finally {
      publish.child.kill();
      useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1");
      lab("daemon", "w1");
    }
  });

  test("without the setting, nothing is looked up at servers there", async () => {
    const address = lab("list").match(/^w1 (\S+)/m)![1]!;
    let [connections, answers] = [0, false];
    const server = createServer((client) => {
      connections++;
      client.on("error", () => {});
      if (answers) client.destroy();
    });
    await new Promise<void>((resolve) => {
      server.listen(8182, address, resolve);
    });
    lab("daemon", "w1", "--", `--substitute-urls=http://${address}:8182`);
    try {
      const [derivation, result] = await buildMeanwhile();
      assertOffloaded(derivation, result, ["w1"]);
      assert.is(connections, 0);
      answers = true;
      useOffload("head", runtime, "OFFLOAD_SUBSTITUTES=true");
      const [other, asked] = await buildMeanwhile();
      assertOffloaded(other, asked, ["w1"]);
      assert.ok(connections > 0);
    } finally {
      lab("daemon", "w1"); // ends what still asks
      server.close();
      useOffload("head", runtime, "OFFLOAD_ATTEMPTS=1");
    }
  });

  test("memory is bounded, whatever moves", async () => {
    const size = 300 * MEBIBYTE;
    const [derivation] = makeWork(
      ...["head", "--inputs=1", `--input-size=${size}`],
      `--output-size=${size}`,
    );
    const building = watch(start("head", ...buildCommand([derivation!])));
    const peak = await peakMemory(building.ended);
    assertOffloaded(derivation!, await building.ended, ["w1"]);
    assert.ok(peak > 0 && peak < 200 * MEBIBYTE, `${peak / MEBIBYTE} MiB`);
  });

  test.run();
}

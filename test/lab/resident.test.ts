/** The process that stays, which serves the hooks of head's daemon. */

import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { RESIDENT } from "./hook.ts";
import {
  ACQUAINTED,
  assertLikeLocal,
  assertOffloaded,
  assertStoreIsSound,
  build,
  buildCommand,
  builds,
  buildWork,
  inHost,
  makeWork,
  offloadCommand,
  outputsOf,
  PATIENT,
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
  withSlots,
  writePlugin,
  wrongKey,
} from "./lab.ts";
import type { Result, Running, Runtime } from "./lab.ts";

const MACHINES = ["w1", "w2"];

/** Starts 200 hooks, each of which is asked for what no machine builds. */
const MANY_HOOKS = `
cd $(mktemp -d)
for number in $(seq 200); do
  {
    echo "1 none-linux /gnu/store/none.drv " |
      /offload/scripts/guix offload none-linux 3600 true 86400 4>/dev/null
  } >$number 2>&1 &
done
wait
cat *
rm -r "$PWD"
`;

/** What the process says of itself, if one is there. */
function status(): { pid: number; served: number; builds: number } | undefined {
  const file = `${root("head")}${RESIDENT}/status.json`;
  return existsSync(file) ? JSON.parse(readFileSync(file, "utf8")) : undefined;
}

/** Whether the process takes requests. */
function isServing(): boolean {
  return existsSync(`${root("head")}${RESIDENT}/inbox`) && !!status();
}

/** Whether a process of head has not ended. */
function isRunning(pid: number): boolean {
  return run("head", "kill", "-0", `${pid}`).status === 0;
}

/** The processes of head that move something for the one that stays. */
function carriers(): number[] {
  const { stdout } = run("head", "pgrep", "-f", "serve --carry");
  return stdout.split("\n").filter((line) => line !== "").map(Number);
}

/** How many slots of head's are locked. */
function takenSlots(): number {
  const text = inHost("head", ...offloadCommand("node", "status", "--json"));
  const machines: { builds: unknown[] }[] = JSON.parse(text);
  return machines.reduce((sum, { builds }) => sum + builds.length, 0);
}

/** Sends a signal to the process. */
function signal(name: string, pid: number = status()!.pid): void {
  inHost("head", "kill", `-${name}`, `${pid}`);
}

/** Starts the process anew; returns its number. */
async function serveAnew(runtime: Runtime): Promise<number> {
  await stop(runtime);
  const [derivation] = makeWork("head");
  assertOffloaded(derivation!, build("head", derivation!), MACHINES);
  await until("the process that stays", isServing);
  return status()!.pid;
}

/** Has the process end, where one is there. */
async function stop(runtime: Runtime): Promise<void> {
  const { pid } = status() ?? {};
  inHost("head", ...offloadCommand(runtime, "serve", "--stop"));
  if (pid) await until("its end", () => !isRunning(pid));
}

/** Starts builds, each of which is new. */
function startWork(...options: readonly string[]): {
  readonly derivations: readonly string[];
  readonly client: Running;
} {
  const derivations = makeWork("head", ...options);
  const client = watch(start("head", ...buildCommand(derivations)));
  return { derivations, client };
}

/** What a client was told, without what differs between two builds. */
function told({ status, stdout, stderr }: Result) {
  const plain = (text: string) =>
    text.replace(/\/gnu\/store\/\w{32}-/g, "").replace(/\d+\.\d MiB/g, "MiB")
      .replace(/'w[12]'/g, "MACHINE").replace(/ w[12]\b/g, " MACHINE")
      .replace(/^.*MiB\/s\n/gm, "").replace(/@ \w+[^\n]*/g, "").replace(
        /sending \d+ store items?/,
        "sending",
      )
      .replace(/[^ ]*\/drvs\/[^ ]*/, "LOG");
  // They come by two pipes, of which guix-daemon reads either first.
  const isBuilder = (line: string) =>
    /^(building work|line \d|failing|built)/.test(line);
  const lines = plain(stderr).split("\n");
  return {
    status,
    stdout: plain(stdout),
    log: lines.filter(isBuilder),
    messages: lines.filter((line) => !isBuilder(line)),
  };
}

for (const runtime of RUNTIMES) suiteUnder(runtime);

function suiteUnder(runtime: Runtime): void {
  const test = suite(`the process that stays, under ${runtime}`);
  const useResident = (...variables: readonly string[]) => {
    const usual = ["OFFLOAD_RESIDENT=true", PATIENT, ACQUAINTED];
    useOffload("head", runtime, ...usual, ...variables);
  };

  test.before(() => {
    up("head", ...MACHINES);
    useResident();
  });

  test.before.each(() => useMachines("head", MACHINES));

  test.after(() => stop(runtime));

  test("it serves the next builds, which equal local ones", async () => {
    await serveAnew(runtime);
    const [derivation, result] = buildWork("--name=stays", "--log-lines=2");
    const machine = assertOffloaded(derivation, result, MACHINES);
    assert.match(result.stderr, "building stays\nline 1 of 2\nline 2 of 2\n");
    assertStoreIsSound("head");
    assertLikeLocal("head", derivation, machine);
    await until("its count", () => status()!.served === 1);
    const { stderr } = run("head", ...offloadCommand(runtime, "status"));
    assert.match(
      stderr,
      /^process \d+ serves builds since .*: 0 under way, 1/m,
    );
  });

  test("clients are told the same with it and without", async () => {
    await serveAnew(runtime);
    const kinds = [
      ["--log-lines=3"],
      ["--fail", "--log-lines=1"],
      ["--outputs=out,lib"],
      ["--inputs=3"],
    ];
    const results = kinds.map((options) => told(buildWork(...options)[1]));
    useResident("OFFLOAD_RESIDENT=false");
    const others = kinds.map((options) => told(buildWork(...options)[1]));
    useResident();
    assert.equal(results, others);
    assert.equal(others.map(({ status }) => status), [0, 1, 0, 0]);
  });

  test("many builds at once, on the slots that there are", async () => {
    await serveAnew(runtime);
    const derivations = makeWork("head", "--count=20");
    const result = build("head", ...derivations);
    assert.is(result.status, 0, result.stderr);
    await until("its count", () => status()!.served === 20);
    assert.is(takenSlots(), 0);
    assertStoreIsSound("head");
  });

  const MUCH = 66 * 2 ** 20;
  const BULKY = { sent: "--input-size", retrieved: "--output-size" } as const;
  /**
   * Starts a build with much to move, and runs a command of the shell as soon
   * as `$carrier` moves it, there: soon it is moved.
   */
  const startBulky = (option: string, command: string) => {
    const inputs = option === BULKY.sent ? ["--inputs=1"] : [];
    const build = startWork(...inputs, `${option}=${MUCH}`);
    const find =
      "until carrier=$(pgrep -f '[s]erve --carry'); do sleep 0.05; done";
    inHost("head", "sh", "-c", `${find}; ${command}`);
    return build;
  };

  for (const [what, option] of Object.entries(BULKY)) {
    test(`what is much is ${what} by another process`, async () => {
      useMachines("head", ["w1"]);
      const pid = await serveAnew(runtime);
      const { derivations, client } = startBulky(option, ":");
      const result = await within("its end", client.ended, 60_000);
      assertOffloaded(derivations[0]!, result, ["w1"]);
      assert.equal(carriers(), []);
      await until("its count", () => status()!.served === 1);
      assert.is(status()!.pid, pid);
    });

    test(`where that process is killed, it is ${what} without`, async () => {
      useMachines("head", ["w1"]);
      await serveAnew(runtime);
      const { derivations, client } = startBulky(option, "kill -KILL $carrier");
      const result = await within("its end", client.ended, 60_000);
      assertOffloaded(derivations[0]!, result, ["w1"]);
      assert.not.match(result.stderr, /warning|fail/);
    });

    test(`while it is ${what}, the end of all is that of it`, async () => {
      useMachines("head", ["w1"]);
      for (const end of ["client", "resident"]) {
        const pid = await serveAnew(runtime);
        const before = storeNames("head");
        const { derivations, client } = startBulky(
          option,
          end === "client"
            ? "kill -INT $(pgrep -f '[g]uix build')"
            : `kill -KILL ${pid}`,
        );
        const { status: code } = await within("its end", client.ended, 60_000);
        assert.is.not(code, 0);
        await until("that of the carrier", () => carriers().length === 0);
        // What is left is taken by the next build.
        const result = build("head", derivations[0]!);
        assertOffloaded(derivations[0]!, result, ["w1"]);
        const made = storeNames("head").filter((it) => !before.includes(it));
        assert.not.match(made.join("\n"), /\.chroot|\.lock$/);
      }
      assertStoreIsSound("head");
      useMachines("head", MACHINES);
    });
  }

  test("a client that is interrupted ends its build there", async () => {
    await serveAnew(runtime);
    const { client } = startWork("--seconds=600");
    await until("the build", () => builds("w1") + builds("w2") === 1);
    client.child.stdin!.end();
    run("head", "sh", "-c", "kill -INT $(pgrep -f 'guix build')");
    await within("the client's end", client.ended);
    await until("the build's end", () => builds("w1") + builds("w2") === 0);
    await until("a free slot", () => takenSlots() === 0);
    const [derivation, result] = buildWork();
    assertOffloaded(derivation, result, MACHINES);
  });

  for (const name of ["KILL", "TERM"]) {
    test(`SIG${name} fails the builds that it has, and no other`, async () => {
      useMachines("head", MACHINES, withSlots(4));
      const pid = await serveAnew(runtime);
      const before = storeNames("head");
      const { client, derivations } = startWork("--seconds=600", "--count=8");
      await until("the builds", () => builds("w1") + builds("w2") === 8);
      signal(name);
      const { status: code } = await within("the client's end", client.ended);
      assert.is(code, 1);
      await until("its end", () => !isRunning(pid));
      await until("free slots", () => takenSlots() === 0);
      await until("their end", () => builds("w1") + builds("w2") === 0);
      const [derivation, result] = buildWork();
      assertOffloaded(derivation, result, MACHINES);
      const left = storeNames("head").filter((it) => !before.includes(it));
      const outputs = derivations.map((it) => outputsOf("head", it).out);
      assert.not(left.some((it) => outputs.includes(`/gnu/store/${it}`)));
      assert.not(left.some((it) => it.endsWith(".chroot")), left.join());
    });
  }

  test("200 hooks at once get an answer each", async () => {
    const pid = await serveAnew(runtime);
    writeFileSync(`${root("head")}/tmp/many`, MANY_HOOKS);
    // In guix-daemon's environment, as hooks are.
    const script = `xargs -0 sh -c 'env -i "$@" sh /tmp/many' sh ` +
      `</proc/${pid}/environ`;
    // None goes on by itself: that would be an error.
    const library = "/offload/scripts/runtime.sh";
    inHost("head", "mount", "--bind", "/dev/null", library);
    const { stdout, stderr } = run("head", "sh", "-c", script);
    inHost("head", "umount", library);
    assert.is(stdout, "# decline\n".repeat(200), stderr);
    // The script was their daemon.
    await until("its end", () => !isRunning(pid));
    const left = readdirSync(`${root("head")}${RESIDENT}`);
    assert.equal(left, ["lock"]);
  });

  test("one that is killed before it answers loses nothing", async () => {
    const pid = await serveAnew(runtime);
    signal("STOP");
    const { client, derivations } = startWork();
    await until("a claim", () =>
      readdirSync(`${root("head")}${RESIDENT}`)
        .some((name) => name.startsWith("claim-")));
    signal("KILL", pid);
    const result = await within("the client's end", client.ended);
    assertOffloaded(derivations[0]!, result, MACHINES);
    await until("another one", () => isServing() && status()!.pid !== pid);
  });

  // It takes half a minute, and is the work of a shell's program.
  const testOnce = runtime === "node" ? test : () => {};

  testOnce("one that is frozen is killed, and loses nothing", async () => {
    const pid = await serveAnew(runtime);
    signal("STOP");
    const { client, derivations } = startWork();
    const result = await within("the client's end", client.ended, 90_000);
    assertOffloaded(derivations[0]!, result, MACHINES);
    assert.not(isRunning(pid));
  });

  test("new settings are another process's", async () => {
    const pid = await serveAnew(runtime);
    writePlugin("settings.json", '{"attempts": 2}');
    const [derivation, result] = buildWork();
    assertOffloaded(derivation, result, MACHINES);
    await until("its end", () => !isRunning(pid));
    inHost("head", "rm", `/etc/guix/offload/settings.json`);
  });

  test("a daemon with another environment has another process", async () => {
    const pid = await serveAnew(runtime);
    useResident("OFFLOAD_ATTEMPTS=2");
    const [derivation, result] = buildWork();
    assertOffloaded(derivation, result, MACHINES);
    await until("its end", () => !isRunning(pid));
    useResident();
  });

  test("no connection is used for another entry of a machine", async () => {
    useMachines("head", ["w1"]);
    await serveAnew(runtime);
    buildWork();
    await until("its count", () => status()!.served === 1);
    const file = `${root("head")}/etc/guix/machines.scm`;
    writeFileSync(file, wrongKey(readFileSync(file, "utf8")));
    const { client } = startWork();
    await until("a warning", () => /host key/.test(client.text()));
    assert.is(status()!.served, 1);
    useMachines("head", MACHINES);
    const result = await within("the build", client.ended, 60_000);
    assert.is(result.status, 0, result.stderr);
  });

  test("what was sent can be collected there soon", async () => {
    useMachines("head", ["w1"]);
    useResident("OFFLOAD_KEEP_CONNECTIONS=2");
    await serveAnew(runtime);
    const [derivation, result] = buildWork("--inputs=1");
    assertOffloaded(derivation, result, ["w1"]);
    const { out } = outputsOf("head", derivation);
    const isThere = () => existsSync(root("w1") + out);
    assert.ok(isThere());
    await until("its collection", () => {
      run("w1", "guix", "gc", "--delete", out!);
      return !isThere();
    });
    useResident();
  });

  test("a directory that is lost or another's is done without", async () => {
    // A directory in which a process writes can be moved, but not removed.
    const lost = `${RESIDENT}-lost`;
    const remove = `mv -T ${RESIDENT} ${lost} && rm -r ${lost}`;
    const scripts = ["chown -R guixbuilder01", "chmod 777"]
      .map((command) => `${command} ${RESIDENT}`);
    for (const script of [remove, ...scripts]) {
      const pid = await serveAnew(runtime);
      inHost("head", "sh", "-c", script);
      const [derivation, result] = buildWork();
      assertOffloaded(derivation, result, MACHINES);
      await until("its end", () => !isRunning(pid));
      inHost("head", "sh", "-c", `[ ! -e ${RESIDENT} ] || { ${remove}; }`);
    }
  });

  test("it ends with its daemon, and leaves nothing", async () => {
    const pid = await serveAnew(runtime);
    useResident();
    await until("its end", () => !isRunning(pid));
    const names = readdirSync(`${root("head")}${RESIDENT}`);
    assert.equal(names, ["lock"]);
  });

  test("another account has no way in", async () => {
    await serveAnew(runtime);
    const script = `ls ${RESIDENT} || cat ${RESIDENT}/status.json || ` +
      `echo >${RESIDENT}/inbox || mv ${RESIDENT} /tmp/mine`;
    const tried = run("head", "su", "-s", "/bin/sh", "-c", script, "nobody");
    assert.is.not(tried.status, 0);
    assert.is(tried.stdout, "");
    const [derivation, result] = buildWork();
    assertOffloaded(derivation, result, MACHINES);
  });

  test.run();
}

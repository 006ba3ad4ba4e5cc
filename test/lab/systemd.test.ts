/**
 * guix-daemon as a unit of systemd, with what its unit grants it: the release
 * is installed, serves, is brought up to date, and goes again.
 */

import { readFileSync, readlinkSync, rmSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { residentStatus } from "./hook.ts";
import {
  assertLikeLocal,
  assertOffloaded,
  build,
  buildCommand,
  builds,
  down,
  inHost,
  makeWork,
  onTerminal,
  root,
  run,
  start,
  until,
  up,
  useMachines,
  watch,
  within,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";
import {
  assertRefused,
  changes,
  copyRelease,
  endRelease,
  install,
  LIBRARY,
  listing,
  makeFresh,
  nextVersion,
  serveRelease,
  SHIM,
} from "./release.ts";

const DROP_INS = "systemd/system/guix-daemon.service.d";
const CGROUP = "/sys/fs/cgroup/system.slice/guix-daemon.service";

/** CAP_CHOWN, in a mask of capabilities. */
const CHOWN = 1n;

/** Longer than anything takes to end that is told to, in milliseconds. */
const PATIENCE = 20_000;

suiteOn("sroot", "root", "node");
suiteOn("suser", "guix-daemon", "deno");

function suiteOn(host: string, account: string, runtime: Runtime): void {
  const test = suite(`systemd, with ${account}'s guix-daemon`);
  const isRoot = account === "root";
  // What knows nothing of the unit's own.
  const testOnce = isRoot ? test : () => {};
  let before: Record<string, string>;
  let state: string;
  let brief: string[], endless: string[], long: string[];

  test.before(async () => {
    up(`${host}:master:systemd${isRoot ? "" : ":unprivileged"}`, "w1");
    brief = makeWork(host, "--count=20");
    endless = makeWork(host, "--count=2", "--seconds=600");
    long = makeWork(host, "--seconds=6");
    useMachines(host, ["w1"]);
    makeFresh(host, runtime);
    await serveRelease();
    copyRelease(host);
    before = listing(host);
    state = stateOf(host);
  });

  test.after(() => {
    endRelease();
    down(host);
  });

  /** Builds something new, which w1 must do. */
  const offload = () => {
    const derivation = brief.pop()!;
    assertOffloaded(derivation, build(host, derivation), ["w1"]);
    return derivation;
  };
  /** Starts a build on w1. */
  const startWork = async (derivations: string[]) => {
    const client = watch(start(host, ...buildCommand([derivations.pop()!])));
    await until("the build", () => builds("w1") === 1);
    return client;
  };
  /** Has the process that stays serve the next builds. */
  const serveAnew = async () => {
    if (!residentStatus(host)) offload();
    await until("the process that stays", () => !!residentStatus(host));
    return residentStatus(host)!.pid;
  };
  /** Waits until the unit has these processes; one may not be a program yet. */
  const becomes = (names: string) =>
    until(`'${names}' alone`, () => processes(host).join() === names);
  /** Installs by hand, and answers the question; returns what was printed. */
  const answer = async (word: string) => {
    const terminal = onTerminal(host, ["sh", "/root/release/install.sh"]);
    await until("the question", () => /\[y\/N\] /.test(terminal.text()));
    terminal.child.stdin!.write(`${word}\r`);
    const { status, stdout } = await within("the end", terminal.ended);
    assert.is(status, 0, stdout);
    return stdout;
  };
  const uninstall = (...options: readonly string[]) =>
    run(host, "sh", `${LIBRARY}/install.sh`, "--uninstall", ...options);

  test("a daemon that does not start with it is started without", async () => {
    const fails = `ExecStartPre=/bin/sh -c '[ -z "$GUIX" ]'`;
    await withDropIn(host, "fails", fails, () => {
      const failed = install(host, "--yes");
      assertRefused(host, before, failed, /guix-daemon does not start again/);
      assert.is(show(host, "ActiveState"), "active");
    });
    assert.is(stateOf(host), state);
  });

  testOnce(
    "another drop-in that sets GUIX is in the way, unless before it",
    async () => {
      await withDropIn(host, "zz", "Environment=GUIX=/other", () => {
        const failed = install(host, "--yes");
        assertRefused(
          host,
          before,
          failed,
          /a drop-in after .* sets GUIX, too/,
        );
      });
      const harmless = "Environment=GUIX=/other OFFLOAD_GUIX=/usr/bin/guix";
      await withDropIn(host, "aa", harmless, () => {
        const { status, stderr } = install(host);
        assert.is(status, 0, stderr);
        const { status: code } = uninstall();
        assert.is(code, 0);
      });
      assert.is(stateOf(host), state);
      assert.equal(changes(before, listing(host)), []);
    },
  );

  testOnce("what is stopped is not started, and nobody is asked", () => {
    inHost(host, "systemctl", "stop", "guix-daemon");
    const { status, stdout, stderr } = install(host, "--yes");
    assert.is(status, 0, stderr);
    assert.match(stdout, "next start on: systemctl restart guix-daemon\n");
    assert.is(show(host, "ActiveState"), "inactive");
    assert.is(uninstall().status, 0);
    assert.is(show(host, "ActiveState"), "inactive");
    inHost(host, "systemctl", "start", "guix-daemon");
    assert.is(stateOf(host), state);
  });

  testOnce("nothing is restarted where nobody allows it", async () => {
    const pid = show(host, "MainPID");
    const next = "next start on: systemctl restart guix-daemon\n";
    const asked = install(host); // nobody can be asked
    assert.match(asked.stdout, next, asked.stderr);
    assert.match(await answer("n"), next.trim());
    assert.is(show(host, "MainPID"), pid);
    assert.is(uninstall().status, 0);
    assert.is(show(host, "MainPID"), pid);
  });

  test("a drop-in switches it, once that is allowed", async () => {
    const pid = show(host, "MainPID");
    assert.match(await answer("y"), /^w1:22.*ok/m);
    assert.is.not(show(host, "MainPID"), pid);
    const dropIn = `${root(host)}/etc/${DROP_INS}/offload.conf`;
    const text = readFileSync(dropIn, "utf8");
    assert.is(text, `[Service]\nEnvironment=GUIX=${SHIM}\n`);
    const again = install(host, "--yes");
    assert.match(again.stdout, "\nguix-daemon uses Offload already\n");
    const during = listing(host);
    assertRefused(host, during, uninstall(), /still uses Offload/);
  });

  test("builds go through the hook, with what the unit grants", async () => {
    const refused = run(host, "touch", "/gnu/store/x");
    assert.match(refused.stderr, "Read-only file system");
    assertLikeLocal(host, offload(), "w1");
    const pid = await serveAnew();
    offload();
    await until("its count", () => residentStatus(host)!.served === 1);
    const daemon = Number(show(host, "MainPID"));
    assert.equal(unitOf(host, pid), unitOf(host, daemon));
    assert.is.not(mounts(host, pid), mounts(host, 1));
    assert.is(inHost(host, "stat", "-c", "%U", `/proc/${pid}`).trim(), account);
    assert.is(capabilities(host, daemon), isRoot ? 0n : CHOWN);
    const program = readlinkSync(`${root(host)}/proc/${pid}/exe`);
    assert.match(program, runtime);
  });

  test("the process that stays ends with the unit, at once", async () => {
    for (const command of ["restart", "stop"]) {
      const pid = await serveAnew();
      inHost(host, "systemctl", command, "guix-daemon");
      assert.not(isRunning(host, pid));
      if (command === "stop") assert.equal(processes(host), []);
      else await becomes("guix-daemon");
    }
    inHost(host, "systemctl", "start", "guix-daemon");
    offload();
  });

  test("so do builds, its own and a hook's alone", async () => {
    for (const isAlone of [true, false]) {
      if (isAlone) inHost(host, "systemctl", "restart", "guix-daemon");
      else await serveAnew();
      const client = await startWork(endless);
      const began = performance.now();
      inHost(host, "systemctl", "restart", "guix-daemon");
      assert.ok(performance.now() - began < PATIENCE);
      assert.is((await within("the client's end", client.ended)).status, 1);
      await until("the build's end", () => builds("w1") === 0);
      await becomes("guix-daemon");
    }
    assert.is(show(host, "Result"), "success");
    offload();
  });

  test("systemd starts anew what was killed, without what was left", async () => {
    const pid = await serveAnew();
    const daemon = show(host, "MainPID");
    inHost(host, "kill", "-KILL", daemon);
    await until(
      "another daemon",
      () => ![daemon, "0"].includes(show(host, "MainPID")),
    );
    await until("its end", () => !isRunning(host, pid));
    await until("it answers", () => run(host, "guix", "gc", "-R").status === 0);
    offload();
  });

  test("it ends by itself where the unit leaves what it started", async () => {
    await withDropIn(host, "leaves", "KillMode=process", async () => {
      const pid = await serveAnew();
      inHost(host, "systemctl", "stop", "guix-daemon");
      await until("its end", () => !isRunning(host, pid));
      await becomes("");
    });
    inHost(host, "systemctl", "start", "guix-daemon");
  });

  test("it serves nowhere that the store is read-only", async () => {
    inHost(host, "systemctl", "restart", "guix-daemon");
    const daemon = show(host, "MainPID");
    const command = `setpriv --reuid=${account} --clear-groups env -i "$@" ` +
      `${LIBRARY}/offload serve`;
    const script = `xargs -0 sh -c '${command}' sh </proc/${daemon}/environ`;
    const serve = () => run(host, "sh", "-c", script);
    const refused = serve();
    assert.is.not(refused.status, 0);
    assert.match(refused.stderr, "'/gnu/store' is read-only here\nhint: guix-");
    inHost(host, "systemctl", "stop", "gnu-store.mount");
    const { stdout, stderr } = serve();
    assert.match(stdout, "serving", stderr);
    const { pid } = residentStatus(host)!;
    inHost(host, "systemctl", "start", "gnu-store.mount");
    offload();
    await until("its end", () => !isRunning(host, pid));
    await serveAnew();
  });

  test("an upgrade lets builds end, and needs no restart", async () => {
    const pid = await serveAnew();
    const daemon = show(host, "MainPID");
    const client = await startWork(long);
    nextVersion(`${root(host)}/root/release`);
    const upgraded = install(host, "--yes");
    assert.is(upgraded.status, 0, upgraded.stderr);
    assert.match(upgraded.stdout, `installed ${LIBRARY}/offload.mjs\n`);
    assert.match(upgraded.stdout, "\nguix-daemon uses Offload already\n");
    assert.is(show(host, "MainPID"), daemon);
    offload();
    const result: Result = await within("the build", client.ended);
    assert.is(result.status, 0, result.stderr);
    await until("its end", () => !isRunning(host, pid));
    assert.is.not(await serveAnew(), pid);
  });

  test("what was before is back, and builds", async () => {
    const pid = await serveAnew();
    const removed = uninstall("--yes");
    assert.is(removed.status, 0, removed.stderr);
    assert.match(removed.stdout, "\nrestarted guix-daemon\n");
    assert.not(isRunning(host, pid));
    assert.equal(changes(before, listing(host)), []);
    assert.is(stateOf(host), state);
    await becomes("guix-daemon");
    offload();
    await becomes("guix-daemon");
  });

  test.run();
}

/** A property of guix-daemon's unit. */
function show(host: string, property: string): string {
  const option = `--property=${property}`;
  const command = ["systemctl", "show", "--value", option, "guix-daemon"];
  return inHost(host, ...command).trim();
}

/** What systemd knows of the unit that is not of one run of it. */
function stateOf(host: string): string {
  return ["ActiveState", "DropInPaths", "Environment", "FragmentPath"]
    .concat("NeedDaemonReload", "Result", "SubState", "UnitFileState")
    .map((property) => `${property}=${show(host, property)}`).join("\n");
}

/** Does work while the unit has another drop-in, with a line. */
async function withDropIn(
  host: string,
  name: string,
  line: string,
  work: () => void | Promise<void>,
): Promise<void> {
  const file = `${root(host)}/run/${DROP_INS}/${name}.conf`;
  writeFileSync(file, `[Service]\n${line}\n`);
  inHost(host, "systemctl", "daemon-reload");
  try {
    await work();
  } finally {
    rmSync(file);
    inHost(host, "systemctl", "daemon-reload");
  }
}

/** The names of the processes that the unit has. */
function processes(host: string): string[] {
  const script = `cat ${CGROUP}/cgroup.procs 2>/dev/null |
    while read pid; do cat /proc/$pid/comm 2>/dev/null; done; true`;
  return inHost(host, "sh", "-c", script).split("\n").filter((it) => it !== "");
}

/** Whether a process of a host has not ended. */
function isRunning(host: string, pid: number): boolean {
  return run(host, "kill", "-0", `${pid}`).status === 0;
}

/** The cgroup of a process, as its host sees it. */
function unitOf(host: string, pid: number): string {
  return inHost(host, "ps", "-o", "cgroup=", `${pid}`).trim();
}

/** The mounts that a process sees. */
function mounts(host: string, pid: number): string {
  return readlinkSync(`${root(host)}/proc/${pid}/ns/mnt`);
}

/** The capabilities that a process passes on to what it starts. */
function capabilities(host: string, pid: number): bigint {
  const text = readFileSync(`${root(host)}/proc/${pid}/status`, "utf8");
  return BigInt(`0x${/^CapAmb:\s*(\w+)$/m.exec(text)![1]}`);
}

/**
 * Faults in real hosts, and what must hold of a build that meets one. Each is
 * a row of {@linkcode FAULTS}; {@linkcode meet} injects it.
 *
 * Of two machines, 'w1' is the one to prefer; a relay stands before it, which
 * can be told to lose what passes, and lets little through at a time, so that
 * there is a middle of a transfer. 'w2' is what is left.
 *
 * @module
 */

import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { createConnection } from "node:net";
import type { Socket } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import * as assert from "uvu/assert";
import { FCNTL } from "../helpers.ts";
import {
  build,
  buildCommand,
  buildLog,
  inHost,
  lab,
  makeWork,
  OBSERVATIONS,
  onDatabase,
  outputsOf,
  root,
  run,
  start,
  STATE,
  storeNames,
  until,
  up,
  useMachines,
  useOffload,
  useReference,
  watch,
  within,
} from "../lab/lab.ts";
import type { Result, Running, Runtime } from "../lab/lab.ts";
import { addressOf, RELAY_PORT, relayed, startRelay } from "../lab/relay.ts";
import type { Relay } from "../lab/relay.ts";

/** What runs the hook: Offload under a runtime, or `guix offload`. */
export type HookKind = Runtime | "reference";

/**
 * The built-in plugins that connect or move archives, and by which variables
 * the hook is told to use them. What must hold of a fault holds with each.
 */
export const CHOICES = {
  "guix": [],
  "openssh": ["OFFLOAD_CONNECT=openssh"],
  "archive-command": ["OFFLOAD_TRANSPORT=archive-command"],
} as const satisfies Record<string, readonly string[]>;

export type Choice = keyof typeof CHOICES;

/** How far a build is when a fault is injected. */
export type Phase = "before" | "sending" | "building" | "retrieving";

/** What comes of a build: on which machine it is built, or that it fails. */
export type Ending = "on w1" | "on w2" | "fails" | "hangs";

/** A fault, and what must hold. */
export interface Fault {
  /** What goes wrong. */
  readonly name: string;
  /** When it does: before the build is asked for, or in the middle of that. */
  readonly phase: Phase;
  /** Further options of work.scm. */
  readonly work?: readonly string[];
  /** Makes it go wrong, for a client that waits for the build. */
  inject(field: Field, client?: Running): unknown;
  /** Makes it good again. */
  heal?(field: Field): unknown;
  /** What must come of the build. */
  readonly ends: Ending;
  /** What must be said of it. */
  readonly says?: RegExp;
  /** The same, where a plugin has words of its own. */
  readonly saysWith?: Partial<Record<Choice, RegExp>>;
  /** In how many seconds, from the fault on, it must end. */
  readonly seconds: number;
  /** The runtime under which the ordinary tests try it. */
  readonly quick?: Runtime;
  /** The same, with other plugins. */
  readonly quickWith?: Partial<Record<Choice, Runtime>>;
  /** Whether scripts/faults tries it with `guix offload`, too. */
  readonly compared?: true;
}

/** Names a fault and when it happens. */
export function titleOf({ name, phase }: Fault): string {
  return phase === "before" ? name : `${name} while ${phase}`;
}

/** How a build under a fault went. */
export interface Outcome {
  readonly ending: Ending;
  /** From the fault to its end, or to when it was not waited for any more. */
  readonly seconds: number;
  /** What the client was told. */
  readonly text: string;
}

// ---------------------------------------------------------------------------
// The field: hosts, and what can be done to them
// ---------------------------------------------------------------------------

/** Bytes a second: a transfer of some seconds needs no large items. */
const SLOW = 3_000_000;

/** The hosts, and what is between them. */
export interface Field {
  /** What offloads on head. */
  readonly hook: HookKind;
  /** By which of the plugins. */
  readonly choice: Choice;
  /** Before w1. */
  readonly relay: Relay;
}

/** Timers of the suite, in seconds, so that no row takes minutes. */
export const SETTINGS: readonly string[] = [
  "OFFLOAD_CONNECT_TIMEOUT=5",
  "OFFLOAD_KEEPALIVE_TIMEOUT=4",
  "OFFLOAD_STEP_TIMEOUT=15",
  "OFFLOAD_BACKOFF=2",
  "OFFLOAD_OUTAGE_TIMEOUT=20",
  "OFFLOAD_MINIMUM_FREE_SPACE=0",
];

/** Restarts the daemon of a master so that it offloads with a hook. */
export function useHook(
  hook: HookKind,
  master = "head",
  choice: Choice = "guix",
): void {
  if (hook === "reference") useReference(master);
  else useOffload(master, hook, ...SETTINGS, ...CHOICES[choice]);
}

/** Brings the hosts up and a relay before w1. */
export async function makeField(
  hook: HookKind,
  choice: Choice = "guix",
): Promise<Field> {
  up("head", "w1", "w2");
  // Few may wait for one that is stopped.
  const relay = await startRelay("w1", `--rate=${SLOW}`, "--backlog=1");
  useHook(hook, "head", choice);
  makeWork("head"); // else a new host has no database of its store
  return { hook, choice, relay };
}

/**
 * Edits a machine file so that w1 is preferred, and reached by the relay. What
 * compresses an archive there may have all of it while little has arrived.
 */
function preferRelayed(text: string): string {
  const fields = '(speed 9.) (compression "none") (port';
  return relayed(text, "w1").replace("(port", fields);
}

/** Has head use both machines. */
function useBoth(): void {
  useMachines("head", ["w1", "w2"], preferRelayed);
}

/** Regular expressions of the names of processes, for pgrep. */
const PROGRAM = {
  daemon: "-x guix-daemon",
  sshd: "-x 'sshd|sshd-session|sshd-auth'",
  sessions: "-x 'sshd-session|sshd-auth'",
  builder: "-u guixbuilder01,guixbuilder02,guixbuilder03,guixbuilder04",
  archive: "-f '[g]uix archive'",
  hook: "-f '[o]ffload/mod.ts|[g]uix offload'",
  // The first keep a connection, the others are a hook's.
  kept: "-f '^ssh: .*[[]mux]'",
  ssh: "-f '^ssh -'",
} as const;

/** The processes of a program in a host. */
function processes(host: string, program: keyof typeof PROGRAM): string[] {
  const { stdout } = run(host, "sh", "-c", `pgrep ${PROGRAM[program]}`);
  return stdout.trim().split("\n").filter((pid) => pid !== "");
}

/** Sends a signal to the processes of a program in a host. */
export function signal(
  host: string,
  name: "KILL" | "TERM" | "STOP" | "CONT",
  program: keyof typeof PROGRAM,
): void {
  const pids = processes(host, program);
  run(host, "kill", `-${name}`, ...pids);
}

/** Ends what the plugin 'openssh' keeps: no fault meets another's connection. */
function endKeptConnections(): void {
  if (processes("head", "kept").length > 0) signal("head", "TERM", "kept");
}

/** Starts the SSH server of a host whose processes were killed. */
export function restartSshd(host: string): void {
  rmSync(`${root(host)}/run/sshd.pid`, { force: true });
  lab("sshd", host);
}

/** Replaces the SSH host key of a machine by another, or by the former. */
function rotateHostKey(host: string, back = false): void {
  const key = "/etc/ssh/ssh_host_ed25519_key";
  const script = back
    ? `mv /root/key ${key}; mv /root/key.pub ${key}.pub`
    : `mv ${key} /root/key; mv ${key}.pub /root/key.pub;
       ssh-keygen -q -N '' -t ed25519 -f ${key}`;
  inHost(host, "sh", "-c", script);
  lab("sshd", host);
}

const ACL = "/etc/guix/acl";

function emptyAcl(host: string): void {
  writeFileSync(root(host) + ACL, "(acl)\n");
}

/** Lets all hosts trust each other again. */
function restoreAcls(): void {
  up("head", "w1", "w2");
}

/** Mounts a new file system of a size, in MiB, on a directory of a host. */
export function mountSmall(host: string, directory: string, size: number) {
  const options = `size=${size}m,mode=1777`;
  inHost(host, "mount", "-t", "tmpfs", "-o", options, "tmpfs", directory);
}

/** Takes it away again. */
export function unmount(host: string, directory: string): void {
  inHost(host, "umount", "-l", directory);
}

const PLUGINS = "/etc/guix/offload";

/** Gives head a plugin. */
export function writePlugin(text: string): void {
  mkdirSync(root("head") + PLUGINS, { recursive: true });
  writeFileSync(`${root("head")}${PLUGINS}/fault.mjs`, text);
}

/** Takes it away. */
export function removePlugin(): void {
  rmSync(root("head") + PLUGINS, { recursive: true, force: true });
}

/** Where the reference keeps no more than it needs, an hour is no matter. */
const FAST_CLOCK = `#!/bin/sh
exec /usr/bin/date -d '1 hour' "$@"
`;

// ---------------------------------------------------------------------------
// Faults
// ---------------------------------------------------------------------------

/** What all faults of the network between head and w1 have in common. */
const network = (command: "drop" | "cut" | "refuse") => ({
  inject: ({ relay }: Field) => relay.become(command),
  heal: ({ relay }: Field) => relay.become("pass"),
});

/** A relay that is stopped, and before which as many wait as may. */
function overfilled() {
  let waiting: Socket[] = [];
  return {
    async inject({ relay }: Field) {
      relay.child.kill("SIGSTOP");
      const options = { host: addressOf("w1"), port: RELAY_PORT };
      waiting = Array.from({ length: 4 }, () => createConnection(options));
      waiting.forEach((socket) => socket.on("error", () => {}));
      // The system takes one more than may wait.
      const taken = () => waiting.filter(({ pending }) => !pending).length;
      await until("those that may wait do", () => taken() >= 2);
    },
    heal({ relay }: Field) {
      waiting.forEach((socket) => socket.destroy());
      relay.child.kill("SIGCONT");
    },
  };
}

/** A program on w1 that is frozen, for as long as it takes. */
const frozen = (program: "sshd" | "sessions" | "daemon") => ({
  inject: () => signal("w1", "STOP", program),
  heal: () => signal("w1", "CONT", program),
});

const killedSshd = {
  inject: () => signal("w1", "KILL", "sshd"),
  heal: () => restartSshd("w1"),
};

const killedDaemon = {
  inject: () => signal("w1", "KILL", "daemon"),
  heal: () => lab("daemon", "w1"),
};

const restartedSshd = {
  inject: () => lab("sshd", "w1"),
};

const restartedDaemon = {
  inject: () => {
    signal("w1", "TERM", "daemon");
    lab("daemon", "w1");
  },
};

const LOST = /lost connection to 'w1': /;
const SILENT = {
  says: /lost connection to 'w1': Keepalive timeout/,
  saysWith: { openssh: LOST }, // its ssh notices, and ends
};
const MIDDLE = ["sending", "building", "retrieving"] as const;

/** Faults of the ways to w1, before a build comes there. */
const UNREACHABLE: readonly Fault[] = [
  {
    name: "connection refused",
    phase: "before",
    ...network("refuse"),
    ends: "on w2",
    says: /failed to connect to 'w1': connection refused/,
    seconds: 15,
    quick: "node",
    compared: true,
  },
  {
    name: "packets dropped from the start",
    phase: "before",
    ...overfilled(),
    ends: "on w2",
    seconds: 20,
    quick: "deno",
    compared: true,
  },
  {
    name: "connections taken and never answered",
    phase: "before",
    ...network("drop"),
    ends: "on w2",
    seconds: 20,
  },
  {
    name: "packets dropped since the last build",
    phase: "before",
    ...network("drop"),
    inject: async (field) => {
      const [derivation] = makeWork("head");
      assert.is(build("head", derivation!).status, 0);
      await network("drop").inject(field);
    },
    ends: "on w2",
    seconds: 20,
    quickWith: { openssh: "node" },
  },
  {
    name: "sshd killed",
    phase: "before",
    ...killedSshd,
    ends: "on w2",
    seconds: 20,
  },
  {
    name: "sshd frozen",
    phase: "before",
    ...frozen("sshd"),
    ends: "on w2",
    seconds: 20,
    compared: true,
  },
  {
    name: "host key rotated",
    phase: "before",
    inject: () => rotateHostKey("w1"),
    heal: () => rotateHostKey("w1", true),
    ends: "on w2",
    says: /server at 'w1' returned host key/,
    saysWith: { openssh: /failed to connect to 'w1': it has another host key/ },
    seconds: 15,
    compared: true,
  },
  {
    name: "remote daemon killed",
    phase: "before",
    ...killedDaemon,
    ends: "on w2",
    says: /failed to connect to guix-daemon on 'w1'/,
    seconds: 20,
    compared: true,
  },
  {
    name: "remote daemon frozen",
    phase: "before",
    ...frozen("daemon"),
    ends: "on w2",
    says: /guix-daemon on 'w1' has not answered/,
    seconds: 25,
    compared: true,
  },
];

/** Faults of the network and of programs on w1 in the middle of a build. */
const INTERRUPTED: readonly Fault[] = MIDDLE.flatMap((phase): Fault[] => [
  {
    name: "packets dropped",
    phase,
    ...network("drop"),
    ends: "on w2",
    ...SILENT,
    seconds: 25,
    ...(phase === "sending" &&
      { quick: "node", quickWith: { "archive-command": "deno" } }),
    compared: true,
  },
  {
    name: "connection cut",
    phase,
    ...network("cut"),
    ends: "on w2",
    says: LOST,
    seconds: 20,
    ...(phase === "building" &&
      { quick: "deno", quickWith: { openssh: "node" } }),
    compared: true,
  },
  {
    name: "sshd killed",
    phase,
    ...killedSshd,
    ends: "on w2",
    says: LOST,
    // There, a channel's end may be seen before its ssh has ended.
    saysWith: { openssh: new RegExp(`${LOST.source}|unexpected end of data`) },
    seconds: 20,
  },
  {
    name: "sshd frozen",
    phase,
    ...frozen("sshd"),
    ends: "on w2",
    ...SILENT,
    seconds: 25,
  },
  {
    name: "sshd restarted",
    phase,
    ...restartedSshd,
    ends: "on w1",
    seconds: 20,
  },
  {
    name: "remote daemon killed",
    phase,
    ...killedDaemon,
    ends: "on w2",
    seconds: 25,
    ...(phase === "retrieving" &&
      { quick: "node", quickWith: { "archive-command": "deno" } }),
    compared: true,
  },
  {
    name: "remote daemon frozen",
    phase,
    ...frozen("daemon"),
    ends: "on w2",
    says:
      /lost connection to 'w1': failed to connect to guix-daemon.*no answer/,
    seconds: 30,
    ...(phase === "building" && { quick: "deno" }),
    compared: true,
  },
  {
    name: "remote daemon restarted",
    phase,
    ...restartedDaemon,
    ends: "on w2",
    seconds: 25,
  },
]);

/** Faults that are none of the network's. */
const REFUSED: readonly Fault[] = [
  {
    name: "builder killed",
    phase: "building",
    inject: () => signal("w1", "KILL", "builder"),
    ends: "on w2",
    says: /'w1' failed: trying another machine/,
    seconds: 20,
    compared: true,
  },
  {
    name: "remote build directory full",
    phase: "before",
    work: ["--scratch-size=8000000"],
    inject: () => mountSmall("w1", "/tmp", 4),
    heal: () => unmount("w1", "/tmp"),
    ends: "on w2",
    says: /'w1' failed: trying another machine/,
    seconds: 20,
    compared: true,
  },
  {
    name: "the machine's ACL emptied",
    phase: "before",
    work: ["--inputs=1", "--input-size=2000000"],
    inject: () => emptyAcl("w1"),
    heal: restoreAcls,
    ends: "on w2",
    says: /'w1' failed: trying another machine/,
    seconds: 20,
    compared: true,
  },
  {
    name: "the ACL here emptied",
    phase: "before",
    inject: () => emptyAcl("head"),
    heal: restoreAcls,
    ends: "fails",
    says: /error: '\/etc\/guix\/acl' authorizes no key/,
    seconds: 15,
    quick: "deno",
    compared: true,
  },
  {
    name: "the ACL here emptied",
    phase: "building",
    inject: () => emptyAcl("head"),
    heal: restoreAcls,
    ends: "fails",
    says: /error: '\/etc\/guix\/acl' authorizes no key/,
    seconds: 15,
    compared: true,
  },
  {
    name: "the machine's clock an hour ahead",
    phase: "before",
    inject: () =>
      writeFileSync(`${root("w1")}/usr/local/bin/date`, FAST_CLOCK, {
        mode: 0o755,
      }),
    heal: () => rmSync(`${root("w1")}/usr/local/bin/date`),
    ends: "on w1",
    seconds: 15,
  },
  {
    name: "the clock here set back by an hour",
    phase: "before",
    inject: setClockBack,
    ends: "on w1",
    seconds: 15,
    quick: "node",
  },
  {
    name: "machine file broken",
    phase: "building",
    inject: () => writeFileSync(`${root("head")}/etc/guix/machines.scm`, "(("),
    heal: useBoth,
    ends: "on w1",
    seconds: 15,
    quick: "deno",
    compared: true,
  },
  {
    name: "a plugin's score throws",
    phase: "before",
    inject: () =>
      writePlugin('export default { name: "bad", score() { throw "up"; } };'),
    heal: removePlugin,
    ends: "on w1",
    says: /plugin 'bad': score: up/,
    seconds: 15,
  },
  {
    name: "a plugin's score hangs",
    phase: "before",
    inject: () =>
      writePlugin(
        'export default { name: "bad", score: () => new Promise(() => {}) };',
      ),
    heal: removePlugin,
    ends: "on w1",
    says: /plugin 'bad': score: no answer within 1 s/,
    seconds: 15,
    quick: "node",
  },
  {
    name: "a plugin's transport throws",
    phase: "before",
    inject: () => writePlugin(badTransport('throw Error("up");')),
    heal: removePlugin,
    ends: "on w2",
    says: /warning: up\n/,
    seconds: 15,
  },
  {
    name: "a plugin's transport hangs",
    phase: "before",
    inject: () => writePlugin(badTransport("return new Promise(() => {});")),
    heal: removePlugin,
    ends: "on w2",
    says: /lost connection to 'w1': nothing moved for 15 s/,
    seconds: 35,
  },
];

/** A plugin whose transport to w1 does `what` instead of sending. */
function badTransport(what: string): string {
  return `export default {
  name: "bad",
  transport: ({ name }) => name === "w1" ? {
    missing: (paths) => paths, send() { ${what} }, retrieve() {},
  } : undefined,
};
`;
}

/**
 * What setting the clock back leaves: what was noted, of one machine that
 * failed and of one that did not, is of the future.  (No clock but the whole
 * machine's could be set back for real.)
 */
async function setClockBack({ relay }: Field): Promise<void> {
  await relay.become("refuse");
  const [derivation] = makeWork("head");
  assert.is(build("head", derivation!).status, 0);
  await relay.become("pass");
  onDatabase(
    OBSERVATIONS,
    `UPDATE machine SET until = until + iif(until = 0, 0, 3600000),
     facts = json_set(facts, '$.time', facts ->> '$.time' + 3600000),
     asked = asked + 3600000 RETURNING *`,
  );
}

/** What hooks share here can't be written any more. */
const UNWRITABLE: readonly Fault[] = (["before", ...MIDDLE] as const)
  .flatMap((phase): Fault[] => [
    {
      name: "the disk of the state full",
      phase,
      inject: () =>
        onState(`mount -t tmpfs -o size=64k,nr_inodes=9 tmpfs ${STATE}
          ! cat /dev/zero >${STATE}/fill 2>/dev/null`),
      heal: () => onState(`umount -l ${STATE}`),
      ends: "on w1",
      seconds: 15,
      ...(phase === "before" && { quick: "deno" }),
    },
    {
      name: "the disk of the state read-only",
      phase,
      inject: () =>
        onState(`mount --bind ${STATE} ${STATE}
          mount -o remount,bind,ro ${STATE}`),
      heal: () => onState(`umount -l ${STATE}`),
      ends: "on w1",
      seconds: 15,
      ...(phase === "sending" && { quick: "node" }),
    },
  ]);

function onState(script: string): void {
  inHost("head", "sh", "-euc", `mkdir -p ${STATE}\n${script}`);
}

/** The end of the hook, or of who waits for it. */
const ABANDONED: readonly Fault[] = MIDDLE.flatMap((phase): Fault[] => [
  ...(["KILL", "TERM"] as const).map((name): Fault => ({
    name: `hook ended by SIG${name}`,
    phase,
    inject: () => signal("head", name, "hook"),
    ends: "fails",
    seconds: 10,
    ...(name === "KILL" && phase === "building" && { quick: "node" }),
    ...(name === "TERM" && phase === "sending" && { quick: "deno" }),
    ...(name === "KILL" && phase === "building" && { compared: true }),
  })),
  {
    name: "client interrupted",
    phase,
    inject: (_, client) => client!.child.kill("SIGINT"),
    ends: "fails",
    seconds: 10,
    ...(phase === "retrieving" && { quick: "node", compared: true }),
  },
  {
    name: "local daemon killed",
    phase,
    inject: () => signal("head", "KILL", "daemon"),
    heal: ({ hook, choice }) => useHook(hook, "head", choice),
    ends: "fails",
    seconds: 10,
    ...(phase === "retrieving" && { quick: "deno" }),
    ...(phase === "building" && { compared: true }),
  },
]);

/** All faults that one build meets. */
export const FAULTS: readonly Fault[] = [
  ...UNREACHABLE,
  ...INTERRUPTED,
  ...REFUSED,
  ...UNWRITABLE,
  ...ABANDONED,
];

// ---------------------------------------------------------------------------
// Builds that meet a fault
// ---------------------------------------------------------------------------

/** What makes a phase long enough to have a middle. */
const WORK: Readonly<Record<Phase, readonly string[]>> = {
  before: [],
  sending: ["--inputs=1", "--input-size=12000000"],
  building: ["--seconds=3"],
  retrieving: ["--output-size=12000000"],
};

/** After how many bytes a transfer of twelve million is in its middle. */
const MIDDLE_AT = 1_500_000;

/** Waits until a build is in the middle of a phase; false where it ended. */
async function reach(
  phase: Phase,
  client: Running,
  relay: Relay,
): Promise<boolean> {
  const begins = {
    before: /^/,
    sending: /^(guix offload: )?sending \d/m,
    building: /^building work$/m,
    retrieving: /^(guix offload: )?retrieving \d/m,
  }[phase];
  let over = false;
  client.ended.then(() => over = true);
  while (!over && !begins.test(client.text())) await delay(10);
  const direction = phase === "sending" ? "up" : "down";
  let moved = phase === "before" || phase === "building" ? MIDDLE_AT : 0;
  if (moved === 0) await relay.count(); // from here on
  while (!over && moved < MIDDLE_AT) {
    await delay(10);
    moved += (await relay.count())[direction];
  }
  return !over;
}

/** Ends a client that is not waited for any more. */
async function giveUp(client: Running): Promise<void> {
  client.child.kill("SIGTERM");
  await within("the end of the client", client.ended);
}

/** What came of a build: valid outputs alone are believed. */
function endingOf(derivation: string, { status }: Result): Ending {
  const outputs = Object.values(outputsOf("head", derivation));
  const valid = validPaths();
  const isThere = outputs.every((output) => valid.has(output));
  assert.is(isThere, status === 0, `valid: ${isThere}, status: ${status}`);
  if (status !== 0) return "fails";
  return isBuiltOn("w2", derivation) ? "on w2" : "on w1";
}

function isBuiltOn(machine: string, derivation: string): boolean {
  return /^built /m.test(buildLog(machine, derivation) ?? "");
}

/** Lets a build meet a fault, and waits for its end as long as `bound`. */
export async function meet(
  fault: Fault,
  field: Field,
  bound: number,
): Promise<Outcome> {
  useBoth();
  endKeptConnections();
  const work = [...WORK[fault.phase], ...fault.work ?? []];
  const [derivation] = makeWork("head", ...work);
  if (fault.phase === "before") await fault.inject(field);
  let start_ = performance.now();
  const client = watch(start("head", ...buildCommand([derivation!])));
  try {
    if (fault.phase !== "before") {
      const reached = await within(
        `${fault.phase}`,
        reach(fault.phase, client, field.relay),
      );
      assert.ok(reached, `it ended before: ${client.text()}`);
      start_ = performance.now();
      await fault.inject(field, client);
    }
    const late = delay(bound * 1000).then(() => undefined);
    const result = await Promise.race([client.ended, late]);
    const seconds = (performance.now() - start_) / 1000;
    const ending = result === undefined
      ? "hangs"
      : endingOf(derivation!, result);
    return { ending, seconds, text: client.text() };
  } finally {
    await fault.heal?.(field);
    await giveUp(client);
  }
}

// ---------------------------------------------------------------------------
// What must hold after all
// ---------------------------------------------------------------------------

/** The items that head's store vouches for. */
export function validPaths(): Set<string> {
  const sql = "SELECT path FROM ValidPaths";
  const rows = onDatabase("/var/guix/db/db.sqlite", sql);
  return new Set(rows.map(({ path }) => path!));
}

/** What is in head's store and not vouched for. */
export function strays(): string[] {
  const valid = validPaths();
  return storeNames("head").filter((name) =>
    !valid.has(`/gnu/store/${name}`) && !name.endsWith(".lock")
  );
}

/** Prints those slot files that can't be locked. */
const TAKEN = `${FCNTL}
for my $name (glob "${STATE}/*/[0-9]*") {
  open my $file, "+<", $name or next;
  print "$name\\n" unless lock_file $file, F_WRLCK;
}`;

/** The slots of head that are taken. */
function takenSlots(): string[] {
  const names = inHost("head", "perl", "-e", TAKEN).split("\n");
  return names.filter((name) => name !== "");
}

/** What should be gone when no build runs: processes, slots. */
function remains(machines: readonly string[]): string[] {
  const left = (["hook", "ssh"] as const).flatMap((program) =>
    processes("head", program).map((pid) => `${program} ${pid} on head`)
  );
  for (const machine of machines) {
    for (const program of ["builder", "archive"] as const) {
      for (const pid of processes(machine, program)) {
        left.push(`${program} ${pid} on ${machine}`);
      }
    }
  }
  return [...left, ...takenSlots()];
}

/** Waits, not for long, until nothing remains; returns what still does. */
export async function whatRemains(
  machines: readonly string[] = ["w1", "w2"],
): Promise<string[]> {
  const end = performance.now() + 20_000;
  let left = remains(machines);
  while (left.length > 0 && performance.now() < end) {
    await delay(200);
    left = remains(machines);
  }
  return left;
}

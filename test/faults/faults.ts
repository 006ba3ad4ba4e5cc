/**
 * Faults in real hosts, and what must hold of a build that meets one: each is
 * a row of {@linkcode FAULTS}.
 *
 * @module
 */

import { rmSync, writeFileSync } from "node:fs";
import { createConnection } from "node:net";
import type { Socket } from "node:net";
import * as assert from "uvu/assert";
import {
  build,
  inHost,
  lab,
  makeWork,
  OBSERVATIONS,
  onDatabase,
  PLUGINS,
  root,
  STATE,
  until,
  writePlugin,
} from "../lab/lab.ts";
import type { Running, Runtime } from "../lab/lab.ts";
import { addressOf, RELAY_PORT } from "../lab/relay.ts";
import {
  emptyAcl,
  mountSmall,
  restartSshd,
  restoreAcls,
  rotateHostKey,
  signal,
  unmount,
  useBoth,
  useHook,
} from "./field.ts";
import type { Choice, Field } from "./field.ts";

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

/** Gives head a plugin. */
function givePlugin(text: string): void {
  writePlugin("fault.mjs", text);
}

/** Takes it away. */
function removePlugin(): void {
  rmSync(root("head") + PLUGINS, { recursive: true, force: true });
}

/** Where the reference keeps no more than it needs, an hour is no matter. */
const FAST_CLOCK = `#!/bin/sh
exec /usr/bin/date -d '1 hour' "$@"
`;

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
      givePlugin('export default { name: "bad", score() { throw "up"; } };'),
    heal: removePlugin,
    ends: "on w1",
    says: /plugin 'bad': score: up/,
    seconds: 15,
  },
  {
    name: "a plugin's score hangs",
    phase: "before",
    inject: () =>
      givePlugin(
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
    inject: () => givePlugin(badTransport('throw Error("up");')),
    heal: removePlugin,
    ends: "on w2",
    says: /warning: up\n/,
    seconds: 15,
  },
  {
    name: "a plugin's transport hangs",
    phase: "before",
    inject: () => givePlugin(badTransport("return new Promise(() => {});")),
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

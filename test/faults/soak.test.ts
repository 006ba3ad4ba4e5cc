/**
 * Many builds, while machines fail at random, what hooks share is damaged or the
 * process that stays is killed: OFFLOAD_SOAK builds, at most 500 unless told.
 * OFFLOAD_SEED repeats a run's choice of faults, as far as times allow.
 */

import { readdirSync, writeFileSync } from "node:fs";
import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { FCNTL } from "../helpers.ts";
import { endKept, RESIDENT, residentStatus } from "../lab/hook.ts";
import {
  assertOffloaded,
  assertStoreIsSound,
  build,
  inHost,
  lab,
  makeWork,
  OBSERVATIONS,
  outputsOf,
  root,
  run,
  RUNTIMES,
  start,
  STATE,
  until,
  up,
  useMachines,
  useOffload,
  watch,
  withSlots,
} from "../lab/lab.ts";
import type { Result, Runtime } from "../lab/lab.ts";
import { relayed, startRelay } from "../lab/relay.ts";
import type { Relay } from "../lab/relay.ts";
import { restartSshd, SETTINGS, signal } from "./field.ts";
import { strays, validPaths, whatRemains } from "./meet.ts";

const MACHINES = ["w1", "w2", "w3"] as const;
const BUILDS = Number(process.env.OFFLOAD_SOAK ?? 500);
const DAMAGED = Math.min(300, BUILDS);
/** How many builds are done at a time while the process that stays is killed. */
const SLOTS = 8;
const SEED = Number(process.env.OFFLOAD_SEED ?? Date.now() % 1e9);

/** Milliseconds from fault to fault. */
const INTERVAL = 2000;

/** Milliseconds for which the process that stays lives. */
const LIFETIME = 10_000;

/** A build may meet more faults than a site would let it. */
const PATIENT = [
  ...SETTINGS,
  "OFFLOAD_ATTEMPTS=50",
  "OFFLOAD_OUTAGE_TIMEOUT=120",
];

/** A machine that is reached by a relay. */
interface Reached {
  readonly machine: string;
  readonly relay: Relay;
}

/** What goes wrong, with a machine unless told, and how that gets well. */
interface Trouble<T = Reached> {
  readonly name: string;
  begin(target: T): Promise<void> | void;
  end(target: T): Promise<void> | void;
}

const nothing = () => {};

const TROUBLES: readonly Trouble[] = [
  ...(["drop", "cut", "refuse"] as const).map((command): Trouble => ({
    name: `network: ${command}`,
    begin: ({ relay }) => relay.become(command),
    end: ({ relay }) => relay.become("pass"),
  })),
  ...(["sshd", "sessions", "daemon"] as const).map((program): Trouble => ({
    name: `${program} frozen`,
    begin: ({ machine }) => signal(machine, "STOP", program),
    end: ({ machine }) => signal(machine, "CONT", program),
  })),
  {
    name: "sshd killed",
    begin: ({ machine }) => signal(machine, "KILL", "sshd"),
    end: ({ machine }) => restartSshd(machine),
  },
  {
    name: "SSH sessions killed",
    begin: ({ machine }) => signal(machine, "KILL", "sessions"),
    end: nothing,
  },
  {
    name: "daemon killed",
    begin: ({ machine }) => signal(machine, "KILL", "daemon"),
    end: ({ machine }) => lab("daemon", machine),
  },
  {
    name: "daemon ended",
    begin: ({ machine }) => signal(machine, "TERM", "daemon"),
    end: ({ machine }) => lab("daemon", machine),
  },
  {
    name: "builders killed",
    begin: ({ machine }) => signal(machine, "KILL", "builder"),
    end: nothing,
  },
];

/** Where this is on head. */
const LOCK_FILE = "/tmp/lock.pl";

/** Locks for a while, for writing where it may, those files that it may open. */
const LOCK = `${FCNTL}
my @files;
for my $name (@ARGV) {
  open my $file, "+<", $name or open $file, "<", $name or next;
  lock_file $file, F_WRLCK or lock_file $file, F_RDLCK;
  push @files, $file;
}
sleep 4`;

/** Shell scripts for what befalls the state, in a small file system of its
 * own, and for its end if need be. */
const DAMAGES: Readonly<Record<string, readonly [string, string?]>> = {
  "pages of the database": [
    `size=$(stat -c %s ${OBSERVATIONS})
    for page in $(seq 1 3 $((size / 4096))); do
      printf garbage | dd of=${OBSERVATIONS} bs=1 conv=notrunc seek=$((page * 4096))
    done`,
  ],
  "garbage for a database": [`head -c 9000 /dev/urandom >${OBSERVATIONS}`],
  "a cut database": [`truncate -s 5000 ${OBSERVATIONS}`],
  "values of the database": [
    `sed -i 's/"cores"/"cor/g' ${OBSERVATIONS}`,
  ],
  "another program's database": [
    `rm -f ${OBSERVATIONS}; cp /var/guix/db/db.sqlite ${OBSERVATIONS}`,
  ],
  "garbage in slots": [`for slot in ${STATE}/w*/[0-9]*; do
    head -c 9000 /dev/urandom >$slot
  done`],
  "all removed": [`rm -rf ${STATE}/*`],
  "slots removed": [`rm -rf ${STATE}/w*`],
  "database removed": [`rm -f ${OBSERVATIONS}`],
  "a directory for a database": [
    `rm -f ${OBSERVATIONS}; mkdir ${OBSERVATIONS}`,
    `rmdir ${OBSERVATIONS}`,
  ],
  "a FIFO for a database": [
    `rm -f ${OBSERVATIONS}; mkfifo ${OBSERVATIONS}`,
    `rm -f ${OBSERVATIONS}`,
  ],
  "a link for a database": [
    `rm -f ${OBSERVATIONS}; ln -s /etc/nowhere/file ${OBSERVATIONS}`,
    `rm -f ${OBSERVATIONS}`,
  ],
  "open to all": [`chmod -R a+rwX ${STATE}`],
  "another owner": [
    `chown -R nobody: ${STATE}`,
    `chown -R root: ${STATE}`,
  ],
  "a full disk": [`cat /dev/zero >${STATE}/fill`, `rm -f ${STATE}/fill`],
  "no inodes": [
    `mkdir -p ${STATE}/fills
    for number in $(seq 9999); do touch ${STATE}/fills/$number || break; done`,
    `rm -rf ${STATE}/fills`,
  ],
  "read-only": [
    `mount --bind ${STATE} ${STATE}; mount -o remount,bind,ro ${STATE}`,
    `umount -l ${STATE}`,
  ],
  "another file system": [
    `mount -t tmpfs tmpfs ${STATE}`,
    `umount -l ${STATE}`,
  ],
  "locked by root": [
    `setsid perl ${LOCK_FILE} ${OBSERVATIONS} ${STATE}/w*/* &`,
  ],
  "locked by another user": [
    `setsid su -s /bin/sh -c "perl ${LOCK_FILE} ${OBSERVATIONS} \
      ${STATE}/w1:22/0 ${STATE}/w2:22/0" nobody &`,
  ],
};

const QUIETLY = "exec >/dev/null 2>&1\n";

/** Makes trouble of damages; one may not be possible, or wait, after another. */
const STATE_TROUBLES = Object.entries(DAMAGES).map(
  ([name, [begin, end]]): Trouble<number> => {
    const does = (script = "") => () =>
      void run("head", "timeout", "9", "sh", "-c", `${QUIETLY}${script}`);
    return { name, begin: does(begin), end: end ? does(end) : nothing };
  },
);

/** Random numbers below 1 that a seed repeats (mulberry32). */
function makeRandom(seed: number): () => number {
  let state = seed;
  return () => {
    state = state + 0x6d2b79f5 | 0;
    let mixed = Math.imul(state ^ state >>> 15, 1 | state);
    mixed = mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) / 2 ** 32;
  };
}

/**
 * Troubles one after another of `targets` until `ended`; returns how often.
 * None is troubled twice at the same time.
 */
async function trouble<T>(
  targets: readonly T[],
  troubles: readonly Trouble<T>[],
  ended: Promise<unknown>,
): Promise<Record<string, number>> {
  const counts: Record<string, number> = {};
  const healing = new Map<T, Promise<void>>();
  const random = makeRandom(SEED);
  const pick = <U>(from: readonly U[]) =>
    from[Math.floor(random() * from.length)];
  let over = false;
  ended.finally(() => over = true);
  while (!over) {
    await delay(INTERVAL);
    const target = pick(targets.filter((it) => !healing.has(it)));
    if (target === undefined || over) continue;
    const { name, begin, end } = pick(troubles)!;
    counts[name] = (counts[name] ?? 0) + 1;
    await begin(target);
    const heals = delay(500 + random() * 5500).then(async () => {
      await end(target);
      healing.delete(target);
    });
    healing.set(target, heals);
  }
  await Promise.all(healing.values());
  return counts;
}

/**
 * How many builds a client asks for: guix-daemon keeps five descriptors open
 * for each that was offloaded, until the client goes, and dies of 1024.
 */
const CLIENT_BUILDS = 100;

/** Builds all, one client after another; returns what these were told. */
async function buildAll(
  derivations: readonly string[],
): Promise<Pick<Result, "status" | "stderr">> {
  const options = ["--max-jobs=0", "--keep-going"];
  let [worst, text] = [0 as number | null, ""];
  for (let at = 0; at < derivations.length; at += CLIENT_BUILDS) {
    const some = derivations.slice(at, at + CLIENT_BUILDS);
    const client = watch(start("head", "guix", "build", ...options, ...some));
    const { status, stderr } = await client.ended;
    worst ||= status;
    text += stderr;
  }
  return { status: worst, stderr: text };
}

/** Demands that all builds succeeded but for those made to fail. */
function assertAllDone(
  good: readonly string[],
  bad: readonly string[],
  text: string,
): void {
  const valid = validPaths();
  const isBuilt = (derivation: string) =>
    Object.values(outputsOf("head", derivation)).every((it) => valid.has(it));
  const lost = good.filter((derivation) => !isBuilt(derivation));
  assert.equal(lost, [], text.slice(-20_000));
  assert.equal(bad.filter(isBuilt), []);
  for (const derivation of bad) {
    assert.match(text, RegExp(`'${derivation}' offloaded to 'w\\d' failed`));
  }
}

/** Demands that nothing is left, and all stores are what they should be. */
async function assertClean(machines: readonly string[]): Promise<void> {
  assert.equal(await whatRemains(machines), []);
  for (const host of ["head", ...machines]) assertStoreIsSound(host);
  assert.equal(strays(), []);
}

for (const runtime of RUNTIMES) suiteUnder(runtime);

function suiteUnder(runtime: Runtime): void {
  const test = suite(`soak under ${runtime}`);
  const relays = new Map<string, Relay>();

  test.before(async () => {
    up("head", ...MACHINES);
    for (const machine of MACHINES) {
      relays.set(machine, await startRelay(machine));
    }
    useOffload("head", runtime, ...PATIENT);
    inHost("head", "guix", "gc");
  });
  test.after(async () => {
    for (const relay of relays.values()) await relay.stop();
  });

  test("200 builds on 4 slots while machines come and go", async () => {
    const machines = ["w1", "w2"];
    useMachines("head", machines, relayed);
    const count = Math.min(200, BUILDS);
    const work = makeWork("head", `--count=${count}`, "--seconds=0.2");
    const ended = buildAll(work);
    let over = false;
    ended.finally(() => over = true);
    // How long each is away, and all are there, is the fault itself.
    for (let turn = 0; !over; turn++) {
      const machine = machines[turn % 2]!;
      const relay = relays.get(machine)!;
      await relay.become("refuse");
      await Promise.race([ended, delay(4000)]);
      await relay.become("pass");
      await Promise.race([ended, delay(2000)]);
    }
    const { status, stderr } = await ended;
    assert.is(status, 0, stderr.slice(-20_000));
    assertAllDone(work, [], stderr);
    await assertClean(machines);
  });

  test(`${BUILDS} builds while machines fail, seed ${SEED}`, async () => {
    useMachines("head", MACHINES, relayed);
    const few = Math.ceil(BUILDS / 20);
    const options = ["--inputs=1", "--input-size=100000", "--log-lines=2"];
    const some = makeWork("head", `--count=${few}`, "--fail", ...options);
    const most = makeWork(
      "head",
      ...[`--count=${BUILDS - few}`, "--seconds=1", "--output-size=300000"],
      ...options,
    );
    const ended = buildAll([...most, ...some]);
    const began = performance.now();
    const reached = [...relays]
      .map(([machine, relay]): Reached => ({ machine, relay }));
    const counts = await trouble(reached, TROUBLES, ended);
    const { stderr } = await ended;
    const seconds = Math.round((performance.now() - began) / 1000);
    const tries = stderr.match(/: trying another machine/g)?.length ?? 0;
    console.log(`  ${seconds} s, ${tries} tried again`, counts);
    assertAllDone(most, some, stderr);
    await assertClean(MACHINES);
  });

  test(`${BUILDS} builds while the process that stays is killed`, async () => {
    const machines = ["w1", "w2"];
    useMachines("head", machines, withSlots(SLOTS / 2));
    useOffload("head", runtime, ...PATIENT, "OFFLOAD_RESIDENT=true");
    const work = makeWork("head", `--count=${BUILDS}`, "--seconds=0.2");
    const ended = buildAll(work);
    let over = false;
    ended.finally(() => over = true);
    let kills = 0;
    while (!over) {
      await Promise.race([ended, delay(LIFETIME)]);
      const { pid } = residentStatus("head") ?? {};
      if (!over && pid) {
        kills += run("head", "kill", "-9", `${pid}`).status! ^ 1;
      }
    }
    await ended;
    const valid = validPaths();
    const lost = work.filter((derivation) =>
      !valid.has(outputsOf("head", derivation).out!)
    );
    console.log(`  ${kills} kills, ${lost.length} builds ended with it`);
    assert.ok(kills > 0);
    assert.ok(lost.length <= SLOTS * kills, `${lost.length} lost`);
    // What has failed so is built as if nothing had been.
    const { status, stderr } = await buildAll(lost);
    assert.is(status, 0, stderr.slice(-20_000));
    assertAllDone(work, [], stderr);
    endKept();
    await assertClean(machines);
    await until(
      "the end of all that it has",
      () => readdirSync(root("head") + RESIDENT).join() === "lock",
    );
    useOffload("head", runtime, ...PATIENT);
  });

  test(`${DAMAGED} builds while the state is damaged, seed ${SEED}`, async () => {
    const machines = ["w1", "w2"];
    useMachines("head", machines);
    inHost("head", "mkdir", "-p", STATE);
    writeFileSync(`${root("head")}${LOCK_FILE}`, LOCK);
    const options = "size=24m,nr_inodes=400";
    inHost("head", "mount", "-t", "tmpfs", "-o", options, "tmpfs", STATE);
    try {
      const work = makeWork("head", `--count=${DAMAGED}`, "--seconds=1");
      const ended = buildAll(work);
      // Two damages may meet.
      const counts = await trouble([1, 2], STATE_TROUBLES, ended);
      const { status, stderr } = await ended;
      console.log(" ", counts);
      assert.is(status, 0, stderr.slice(-20_000));
      assertAllDone(work, [], stderr);
      await assertClean(machines);
      // Nobody has to see to it: what is damaged still is replaced, once.
      const [first, second] = makeWork("head", "--count=2");
      build("head", first!);
      const last = build("head", second!);
      assertOffloaded(second!, last, machines);
      assert.not.match(last.stderr, "warning");
    } finally {
      run("head", "umount", "-l", STATE);
    }
  });

  test.run();
}

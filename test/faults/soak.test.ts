/**
 * Many builds, while machines fail at random: OFFLOAD_SOAK builds, 500 unless
 * told. OFFLOAD_SEED repeats a run's choice of faults, as far as times allow.
 */

import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertStoreIsSound,
  inHost,
  lab,
  makeWork,
  outputsOf,
  relayed,
  RUNTIMES,
  start,
  startRelay,
  up,
  useMachines,
  useOffload,
  watch,
} from "../lab/lab.ts";
import type { Relay, Running, Runtime } from "../lab/lab.ts";
import {
  restartSshd,
  SETTINGS,
  signal,
  strays,
  validPaths,
  whatRemains,
} from "./faults.ts";

const MACHINES = ["w1", "w2", "w3"] as const;
const BUILDS = Number(process.env.OFFLOAD_SOAK ?? 500);
const SEED = Number(process.env.OFFLOAD_SEED ?? Date.now() % 1e9);

/** Milliseconds from fault to fault. */
const INTERVAL = 2000;

/** A build may meet more faults than a site would let it. */
const PATIENT = [
  ...SETTINGS,
  "OFFLOAD_ATTEMPTS=50",
  "OFFLOAD_OUTAGE_TIMEOUT=120",
];

/** What goes wrong with a machine, and how it gets well. */
interface Trouble {
  readonly name: string;
  begin(machine: string, relay: Relay): Promise<void> | void;
  end(machine: string, relay: Relay): Promise<void> | void;
}

const nothing = () => {};

const TROUBLES: readonly Trouble[] = [
  ...(["drop", "cut", "refuse"] as const).map((command): Trouble => ({
    name: `network: ${command}`,
    begin: (_, relay) => relay.become(command),
    end: (_, relay) => relay.become("pass"),
  })),
  ...(["sshd", "sessions", "daemon"] as const).map((program): Trouble => ({
    name: `${program} frozen`,
    begin: (machine) => signal(machine, "STOP", program),
    end: (machine) => signal(machine, "CONT", program),
  })),
  {
    name: "sshd killed",
    begin: (machine) => signal(machine, "KILL", "sshd"),
    end: restartSshd,
  },
  {
    name: "SSH sessions killed",
    begin: (machine) => signal(machine, "KILL", "sessions"),
    end: nothing,
  },
  {
    name: "daemon killed",
    begin: (machine) => signal(machine, "KILL", "daemon"),
    end: (machine) => lab("daemon", machine),
  },
  {
    name: "daemon ended",
    begin: (machine) => signal(machine, "TERM", "daemon"),
    end: (machine) => lab("daemon", machine),
  },
  {
    name: "builders killed",
    begin: (machine) => signal(machine, "KILL", "builder"),
    end: nothing,
  },
];

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

/** Troubles one machine after another until `ended`; returns how often. */
async function trouble(
  relays: ReadonlyMap<string, Relay>,
  random: () => number,
  ended: Promise<unknown>,
): Promise<Record<string, number>> {
  const counts: Record<string, number> = {};
  const healing = new Map<string, Promise<void>>();
  let over = false;
  ended.finally(() => over = true);
  while (!over) {
    await delay(INTERVAL);
    const well = [...relays.keys()].filter((name) => !healing.has(name));
    const machine = well[Math.floor(random() * well.length)];
    if (machine === undefined || over) continue;
    const relay = relays.get(machine)!;
    const { name, begin, end } = TROUBLES[
      Math.floor(random() * TROUBLES.length)
    ]!;
    counts[name] = (counts[name] ?? 0) + 1;
    await begin(machine, relay);
    const heals = delay(500 + random() * 5500).then(async () => {
      await end(machine, relay);
      healing.delete(machine);
    });
    healing.set(machine, heals);
  }
  await Promise.all(healing.values());
  return counts;
}

function startBuilds(derivations: readonly string[]): Running {
  const options = ["--max-jobs=0", "--keep-going"];
  return watch(start("head", "guix", "build", ...options, ...derivations));
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
    const client = startBuilds(work);
    let over = false;
    client.ended.finally(() => over = true);
    // How long each is away, and all are there, is the fault itself.
    for (let turn = 0; !over; turn++) {
      const machine = machines[turn % 2]!;
      const relay = relays.get(machine)!;
      await relay.become("refuse");
      await Promise.race([client.ended, delay(4000)]);
      await relay.become("pass");
      await Promise.race([client.ended, delay(2000)]);
    }
    const { status, stderr } = await client.ended;
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
    const client = startBuilds([...most, ...some]);
    const began = performance.now();
    const counts = await trouble(relays, makeRandom(SEED), client.ended);
    const { stderr } = await client.ended;
    const seconds = Math.round((performance.now() - began) / 1000);
    const tries = stderr.match(/: trying another machine/g)?.length ?? 0;
    console.log(`  ${seconds} s, ${tries} tried again`, counts);
    assertAllDone(most, some, stderr);
    await assertClean(MACHINES);
  });

  test.run();
}

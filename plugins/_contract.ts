/**
 * Contract tests: what each hook must do, whatever else a plugin is about. They
 * are for the tests of plugins, in any test runner: each throws an error that
 * says what was expected.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { mkdtempSync, rmSync } from "node:fs";
import { createConnection } from "node:net";
import { tmpdir } from "node:os";
import process from "node:process";
import { buffer, text } from "node:stream/consumers";
import { isDeepStrictEqual } from "node:util";
import {
  asOwner,
  ByteReader,
  contextFor,
  exportBundle,
  loadPlugins,
  machineFromFields,
  machineToJson,
  openSession,
  openStore,
  queryPathInfos,
  readSettings,
  restoreNar,
  within,
  writableDirectory,
} from "../mod.ts";
import type {
  Awaitable,
  Candidate,
  Connection,
  Facts,
  Hooks,
  JournalEntry,
  Machine,
  Options,
  Plugin,
  PluginContext,
  ScoredRequest,
  StoreConnection,
  TransportContext,
} from "../mod.ts";
import { pluginProblem } from "./_site.ts";

function demand(condition: unknown, message: string): asserts condition {
  if (!condition) throw new Error(message);
}

/** Settles as `answer` does, within seconds. */
function answerWithin<T>(
  seconds: number,
  what: string,
  answer: () => Awaitable<T>,
): Promise<T> {
  const message = `${what}: no answer within ${seconds} s`;
  return within(seconds, (async () => await answer())(), message);
}

/** Makes the context of a plugin that has these options. */
export function makePluginContext(
  plugin: Plugin,
  options: Partial<Options> = {},
): PluginContext {
  const environment = process.env;
  const file = "/etc/guix/machines.scm";
  const { error } = console;
  const settings = readSettings("/nonexistent", {});
  const context: Omit<PluginContext, "options"> = {
    log: { info: error, trace: error, warn: error, error, debug: () => {} },
    signal: new AbortController().signal,
    settings: { ...settings, use: { [plugin.name]: options } },
    environment,
    configDirectory: environment.GUIX_CONFIGURATION_DIRECTORY ?? "/etc/guix",
    stateDirectory: environment.GUIX_STATE_DIRECTORY ?? "/var/guix",
    guix: environment.OFFLOAD_GUIX ?? "guix",
    asOwner,
    writable: writableDirectory,
    machineFile: () => ({ file, machines: [], problems: [] }),
    machineFromFields,
    report: ({ severity, message }) => {
      if (severity === "error") throw new Error(message);
    },
  };
  return contextFor(plugin, context);
}

/** Checks what every plugin must have: a name, hooks, and nothing unknown. */
export function checkPlugin(plugin: unknown): asserts plugin is Plugin {
  const problem = pluginProblem(plugin);
  demand(problem === undefined, problem ?? "");
}

/** Checks `machines`: a list of well-formed machines, each there once. */
export async function checkMachines(
  plugin: Plugin,
  context: PluginContext = makePluginContext(plugin),
): Promise<readonly Machine[]> {
  const { hookTimeout } = context.settings;
  demand(plugin.machines, "there is no hook 'machines'");
  const machines = await answerWithin(
    hookTimeout,
    "machines",
    () => plugin.machines!(context),
  );
  demand(Array.isArray(machines), "machines: expected a list");
  const ids = new Set<string>();
  for (const machine of machines as readonly Machine[]) {
    const id = `${machine.name}:${machine.port}`;
    const made = machineFromFields(machineToJson(machine), "machines");
    if ("severity" in made) throw new Error(made.message);
    demand(!ids.has(id), `machines: ${id} is listed twice`);
    ids.add(id);
  }
  return machines;
}

/** A machine like those that `exclude` and `score` are asked about. */
export const MACHINE: Machine = {
  name: "example",
  port: 22,
  systems: ["x86_64-linux"],
  user: "offload",
  privateKey: "/nonexistent",
  hostKey: "ssh-ed25519 " +
    "AAAAC3NzaC1lZDI1NTE5AAAAIHy+IsFpXiJH78ydyzMC/Wy+sp/fPwGXHhEiljoqqSf5",
  compression: "none",
  compressionLevel: 3,
  daemonSocket: "/var/guix/daemon-socket/socket",
  overloadThreshold: false,
  parallelBuilds: 2,
  speed: 1,
  features: [],
};

/** Checks `exclude`: a reason, or `undefined`; nothing is started by asking. */
export async function checkExclude(
  plugin: Plugin,
  context: PluginContext = makePluginContext(plugin),
  machine: Machine = MACHINE,
): Promise<void> {
  const { hookTimeout } = context.settings;
  demand(plugin.exclude, "there is no hook 'exclude'");
  const answer = await answerWithin(
    hookTimeout,
    "exclude",
    () => plugin.exclude!(Object.freeze({ ...machine }), context),
  );
  if (answer === undefined) return;
  demand(typeof answer.why === "string" && answer.why, "exclude: why?");
  demand(typeof answer.isBusy === "boolean", "exclude: isBusy: true or false");
  const { start, isStarting = false } = answer;
  demand(typeof isStarting === "boolean", "exclude: isStarting: true or false");
  demand(!start || typeof start === "function", "exclude: start: no function");
}

/** What machines may say of themselves: much, or nothing. */
const FACTS: readonly (Facts | undefined)[] = [
  undefined,
  { time: Date.now() },
  {
    time: Date.now(),
    load: 0.5,
    cores: 4,
    memory: 2 ** 33,
    roundTrip: 1,
    clock: -0.1,
    uname: "Linux example 6.12 x86_64",
    pressure: { cpu: 0, io: 0, memory: 0 },
    store: { bytes: 2 ** 36, inodes: 2 ** 20 },
    build: { bytes: 2 ** 36, inodes: Infinity },
  },
  { time: Date.now() - 5000, load: 99, cores: 1, memory: 0 },
];

/** Candidates of all kinds, which nobody may change. */
function makeCandidates(): Candidate[] {
  return FACTS.flatMap((facts) =>
    [0, 2].map((free): Candidate =>
      Object.freeze({
        machine: Object.freeze({ ...MACHINE }),
        id: `${MACHINE.name}:${MACHINE.port}`,
        facts,
        freeSlots: () => free,
        running: () =>
          free > 0 ? [] : [{ name: "hello-2.11", since: Date.now() - 5000 }],
        quickness: free === 0 ? undefined : 1.5,
        holds: (paths: readonly string[]) => paths.slice(0, free),
        bandwidth: free === 0 ? undefined : 1e7,
        lastUsed: free === 0 ? undefined : Date.now() - 60_000,
      })
    )
  );
}

/** What a request has where nothing is known, and nothing waits. */
export const NOTHING_KNOWN: Pick<
  ScoredRequest,
  | "history"
  | "similar"
  | "inputs"
  | "dependents"
  | "waited"
  | "pace"
  | "waiting"
> = {
  history: () => [],
  similar: () => [],
  inputs: () => Promise.resolve([]),
  dependents: () => Promise.resolve([]),
  waited: () => 0,
  pace: () => 0,
  waiting: () => [],
};

/** Requests for a build that is new, and for one that was done before. */
function makeRequests(): ScoredRequest[] {
  const common = {
    wantsLocal: false,
    system: "x86_64-linux",
    features: ["kvm"],
    name: "hello-2.12",
    derivation: "/gnu/store/0-hello-2.12.drv",
    isAccepted: false,
  };
  const now = Date.now();
  const other = { derivation: "/gnu/store/1-gcc-15.drv", why: "busy", rank: 9 };
  const path = "/gnu/store/0-input";
  const past = [{ machine: "example:22", seconds: 60 }];
  return [
    { ...common, ...NOTHING_KNOWN, time: now },
    {
      ...common,
      time: now + 1,
      history: () => past,
      similar: () => past,
      inputs: () => Promise.resolve([{ path, size: 2 ** 30 }]),
      dependents: () => Promise.resolve([{ name: "a-1", dependents: [] }]),
      waited: () => 3600,
      pace: () => 0.1,
      waiting: () => [{ ...other, since: now - 9000, seen: now }],
    },
  ].map((request) => Object.freeze(request));
}

/** Checks `score`: a number, -Infinity or `undefined`, whatever is known. */
export async function checkScore(
  plugin: Plugin,
  context: PluginContext = makePluginContext(plugin),
): Promise<void> {
  const { hookTimeout } = context.settings;
  demand(plugin.score, "there is no hook 'score'");
  for (const request of makeRequests()) {
    for (const candidate of makeCandidates()) {
      const score = await answerWithin(
        hookTimeout,
        "score",
        () => plugin.score!(candidate, request, context),
      );
      if (score === undefined || score === -Infinity) continue;
      const about = JSON.stringify(candidate.facts) ?? "no facts";
      demand(Number.isFinite(score), `score: ${score} of ${about}`);
    }
  }
}

/** The same machine with another host key, of the same type. */
function impostor(machine: Machine): Machine {
  const [type, key = ""] = machine.hostKey.trim().split(/\s+/);
  const other = Buffer.from(key, "base64");
  other[other.length - 1]! ^= 1;
  return { ...machine, hostKey: `${type} ${other.toString("base64")}` };
}

/**
 * Checks `connect` against a real machine: commands, their ends and outputs,
 * the daemon's socket, and that no other host key is believed.
 */
export async function checkConnect(
  plugin: Plugin,
  machine: Machine,
  context: PluginContext = makePluginContext(plugin),
): Promise<void> {
  const { connectTimeout } = context.settings;
  demand(plugin.connect, "there is no hook 'connect'");
  const refused = await answerWithin(
    connectTimeout,
    "connect, with another host key",
    () => plugin.connect!(impostor(machine), context),
  ).then(() => false, () => true);
  demand(refused, "connect: believed a host key that is not the machine's");
  const connection = await answerWithin(
    connectTimeout,
    "connect",
    () => plugin.connect!(machine, context),
  );
  demand(connection, "connect: no connection");
  await checkExec(connection);
  await checkOpenSocket(connection, machine, connectTimeout);
  const waiting = await connection.exec("cat");
  waiting.channel.on("error", () => {}).resume();
  connection.close();
  await answerWithin(
    connectTimeout,
    "the end, after close",
    () => waiting.ended,
  );
}

/** Demands that commands get their input, and give their output back. */
async function checkExec(connection: Connection): Promise<void> {
  const said = await connection.exec("echo said; echo wrong >&2; exit 3");
  demand(await text(said.channel) === "said\n", "exec: standard output");
  const { code, errors } = await said.ended;
  demand(code === 3, `exec: exit code ${code} instead of 3`);
  demand(errors === "wrong\n", "exec: standard error");
  const echo = await connection.exec("cat");
  const sent = Buffer.alloc(2 ** 20, "0123456789");
  const back = buffer(echo.channel);
  echo.channel.end(sent);
  demand(sent.equals(await back), "exec: standard input");
}

/** Demands that there is a way to the daemon's socket, and none to nothing. */
async function checkOpenSocket(
  connection: Connection,
  machine: Machine,
  connectTimeout: number,
): Promise<void> {
  const stream = await connection.openSocket(machine.daemonSocket);
  await answerWithin(
    connectTimeout,
    "openSocket",
    () => openStore(stream, "openSocket"),
  );
  const none = await answerWithin(
    connectTimeout,
    "openSocket of none",
    async () => openStore(await connection.openSocket("/nonexistent"), "none"),
  ).then(() => false, () => true);
  demand(none, "openSocket: connected to a socket that is not there");
}

/** Connects to the daemon here. */
async function openLocal(context: PluginContext): Promise<StoreConnection> {
  const path = `${context.stateDirectory}/daemon-socket/socket`;
  const stream = createConnection({ path });
  return await openStore(stream, "guix-daemon");
}

/** Gives `work` the connections that transports and `admit` are given. */
async function withConnections<T>(
  plugin: Plugin,
  machine: Machine,
  context: PluginContext,
  work: (context: TransportContext) => Promise<T>,
): Promise<T> {
  const local = await openLocal(context);
  const settings = { ...context.settings, use: {} };
  const builtins = await loadPlugins("/nonexistent", settings, context.log);
  const plugins = [plugin, ...builtins];
  const session = await openSession(machine, { ...context, plugins });
  try {
    const remote = await session.openDaemon();
    return await work({
      ...context,
      machine,
      local,
      remote,
      roundTrip: 1,
      openDaemon: session.openDaemon,
      leaveDaemon: session.leaveDaemon,
      exec: session.exec,
      patiently: session.patiently,
      exportBundle: (paths) => exportBundle(local, paths),
    });
  } finally {
    session.close();
    local.stream.destroy();
  }
}

/** Reads a bundle; returns the hash of each item's nar, by its path. */
async function readBundle(
  bundle: AsyncIterable<Uint8Array>,
): Promise<Map<string, string>> {
  const directory = mkdtempSync(`${tmpdir()}/offload-contract-`);
  const reader = new ByteReader(bundle, "retrieve");
  const hashes = new Map<string, string>();
  try {
    while (await reader.number(1) === 1) {
      reader.startHash();
      await restoreNar(reader, `${directory}/${hashes.size}`);
      const hash = reader.finishHash().toString("hex");
      demand(await reader.number() === 0x4558494e, "retrieve: no bundle");
      hashes.set(await reader.string(4096), hash);
      await reader.strings(); // references
      await reader.string(4096); // deriver
      const signed = await reader.number(1) === 1;
      demand(signed, "retrieve: an item without a signature");
      await reader.bytes(16384);
    }
    demand(!await reader.more(), "retrieve: more than a bundle");
    return hashes;
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/**
 * Checks `transport` against a real machine: sends store items that are valid
 * here, each after those that it refers to, and retrieves them.
 */
export async function checkTransport(
  plugin: Plugin,
  machine: Machine,
  paths: readonly string[],
  context: PluginContext = makePluginContext(plugin),
): Promise<void> {
  demand(plugin.transport, "there is no hook 'transport'");
  await withConnections(plugin, machine, context, async (connections) => {
    const transport = await plugin.transport!(machine, connections);
    demand(transport, "transport: none for this machine");
    const missing = await transport.missing(paths);
    const odd = missing.find((path) => !paths.includes(path));
    demand(odd === undefined, `missing: '${odd}' was not asked about`);
    const items = await queryPathInfos(connections.local, paths);
    const reserved = await transport.reserve?.(1);
    const isRight = !reserved || typeof reserved.release === "function";
    demand(isRight, "reserve: 'release' is no function");
    reserved?.release();
    await transport.send(
      new Map([...items].filter(([path]) => missing.includes(path))),
    );
    const left = await transport.missing(paths);
    demand(left.length === 0, `send: '${left[0]}' did not arrive`);
    const hashes = await readBundle(transport.retrieve(paths));
    const expected = [...items].map(([path, { narHash }]) => [path, narHash]);
    demand(
      isDeepStrictEqual([...hashes].sort(), expected.sort()),
      "retrieve: expected the items that were asked for, as they are here",
    );
  });
}

/** Checks `defer`: a reason with a rank, or `undefined`. */
export async function checkDefer(
  plugin: Plugin,
  context: PluginContext = makePluginContext(plugin),
): Promise<void> {
  const { hookTimeout } = context.settings;
  demand(plugin.defer, "there is no hook 'defer'");
  const candidates = makeCandidates();
  const ranking = candidates
    .map((candidate, index) => ({ candidate, score: -index }));
  for (const request of makeRequests()) {
    const answer = await answerWithin(
      hookTimeout,
      "defer",
      () => plugin.defer!(ranking, request, context),
    );
    if (answer === undefined) continue;
    const { why, rank, isHeld, candidate } = answer;
    demand(typeof why === "string", `defer: why: ${why}, expected a reason`);
    demand(Number.isFinite(rank), `defer: rank: ${rank}, expected a number`);
    demand(
      typeof isHeld === "boolean",
      `defer: isHeld: ${isHeld}, expected true or false`,
    );
    demand(
      candidate === undefined || candidates.includes(candidate),
      "defer: 'candidate' is none of the ranking",
    );
  }
}

/** Checks `admit` against a real machine: `true`, `false` or `undefined`. */
export async function checkAdmit(
  plugin: Plugin,
  machine: Machine,
  context: PluginContext = makePluginContext(plugin),
): Promise<boolean | undefined> {
  const { connectTimeout } = context.settings;
  demand(plugin.admit, "there is no hook 'admit'");
  return await withConnections(plugin, machine, context, async (own) => {
    const answer = await answerWithin(
      connectTimeout,
      "admit",
      () => plugin.admit!(machine, own),
    );
    demand(
      answer === undefined || typeof answer === "boolean",
      `admit: ${answer}, expected true, false or undefined`,
    );
    return answer;
  });
}

/** Builds that are over, in all ways, which nobody may change. */
function makeEnded(): JournalEntry[] {
  const now = Date.now();
  const common = {
    derivation: "/gnu/store/0-hello-2.12.drv",
    name: "hello-2.12",
    machine: "example:22",
    slot: 0,
    earlier: [],
    asked: now - 9000,
    accepted: now - 8900,
    ended: now,
  };
  const ways = ["failed", "timed-out", "lost", "interrupted"] as const;
  const begun = { ...common, began: now - 8900, connected: now - 8000 };
  const sent = { ...begun, sent: now - 7000 };
  const sizes = { items: 3, bytesSent: 2 ** 20, bytesRetrieved: 2 ** 10 };
  const { machine, slot } = common;
  const problem = "lost connection to 'example': \u2028<b>\"";
  const attempt = { machine, slot, began: 1, ended: 2, problem };
  return [
    ...ways.map((outcome) => ({ ...begun, outcome, problem })),
    {
      ...{ ...sent, ...sizes, built: now - 2000, retrieved: now - 1000 },
      ...{ earlier: [Object.freeze(attempt)], outcome: "built" as const },
    },
  ].map((build) => Object.freeze(build));
}

/** Checks `ended`: it comes to an end, whatever became of a build. */
export async function checkEnded(
  plugin: Plugin,
  context: PluginContext = makePluginContext(plugin),
): Promise<void> {
  const { connectTimeout } = context.settings;
  demand(plugin.ended, "there is no hook 'ended'");
  for (const build of makeEnded()) {
    await answerWithin(
      connectTimeout,
      "ended",
      () => plugin.ended!(build, context),
    );
  }
}

/** The check of each hook, in the order in which a build meets them. */
export const CHECKS: Readonly<
  Record<keyof Hooks, (plugin: Plugin, ...more: never[]) => Promise<unknown>>
> = {
  machines: checkMachines,
  exclude: checkExclude,
  connect: checkConnect,
  score: checkScore,
  defer: checkDefer,
  admit: checkAdmit,
  transport: checkTransport,
  ended: checkEnded,
};

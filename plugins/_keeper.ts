/**
 * Keeps connections for the next builds: to machines, to the daemons there and
 * to the one here, with the programs that these have started to sign. One on
 * which anything went wrong is not kept.
 *
 * @module
 */

import { statSync } from "node:fs";
import type { Duplex } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import {
  connectByPlugin,
  definitionOf,
  machineId,
  makeSession,
  newKept,
  queryValidPaths,
  within,
} from "../mod.ts";
import type {
  Connection,
  Context,
  HookContext,
  Kept,
  Log,
  Machine,
  Reached,
  RemoteProcess,
  StoreConnection,
} from "../mod.ts";
import { doFor, forward } from "./_shim.ts";

/**
 * How much longer than without use what is kept is kept at all: a connection to
 * a daemon keeps what was sent over it from the garbage collector.
 */
const MOST = 4;

/** How long what a build has opened may take to end after it, in milliseconds. */
const ENDING = 2000;

/**
 * How long nothing may have passed, in milliseconds, for a connection to be
 * taken for alive, and how long an answer may take, in seconds: a new one would
 * be there soon.
 */
const ALIVE = { silence: 5000, answer: 1 } as const;

/** How old facts become before they are asked for anew, of `factsLifetime`. */
const FACTS_AGE = 0.5;

/** A connection to a machine that is kept. */
interface Entry {
  readonly machine: Machine;
  readonly connection: Connection;
  readonly kept: Kept;
  readonly opened: number;
  /** When a build last had it, by `performance.now()`. */
  used: number;
  /** When it was last asked for facts, by the same. */
  asked: number;
  /**
   * Tells the build that has it of its end: the connection's own promise, which
   * lives as long, would keep what each that waited for it has left.
   */
  tellEnd: () => void;
}

/** What is to be the same for a connection to be used again. */
function keyOf(machine: Machine): string {
  const file = statSync(machine.privateKey, { throwIfNoEntry: false });
  const key = file && [file.dev, file.ino, file.size, file.mtimeMs];
  return JSON.stringify([definitionOf(machine), key]);
}

/** Whether nothing more comes over a connection to a daemon. */
function isOver({ stream }: StoreConnection): boolean {
  return stream.destroyed || stream.readableEnded || !stream.writable;
}

function close({ stream }: StoreConnection): void {
  stream.destroy();
}

/** What a build opens over a connection. */
class Channels {
  readonly #connection: Connection;
  readonly #streams = new Set<Duplex>();
  readonly #processes = new Set<Duplex>();

  constructor(connection: Connection) {
    this.#connection = connection;
  }

  async openSocket(file: string): Promise<Duplex> {
    const stream = await this.#connection.openSocket(file);
    this.#streams.add(stream);
    const end = () => this.#streams.delete(stream);
    stream.once("close", end);
    // What nobody reads any more would keep it from closing.
    const destroy = stream.destroy.bind(stream);
    stream.destroy = (error) => {
      end();
      return destroy(error).resume();
    };
    return stream;
  }

  async exec(command: string): Promise<RemoteProcess> {
    const started = await this.#connection.exec(command);
    const { channel, ended } = started;
    this.#processes.add(channel);
    const end = () => this.#processes.delete(channel);
    ended.then(end, end);
    return started;
  }

  /** Ends what runs there still, as the end of the connection would. */
  endProcesses(): void {
    this.#processes.forEach((channel) => channel.end().resume());
  }

  /** Whether all of it is closed, or kept. */
  areOver({ daemons }: Kept): boolean {
    const isKept = (it: Duplex) => daemons.some(({ stream }) => stream === it);
    return this.#processes.size === 0 && [...this.#streams].every(isKept);
  }
}

/** Keeps connections for builds of one process. */
export class Keeper {
  readonly #signal: AbortSignal;
  readonly #log: Log;
  /** For how long what nobody uses is kept, in milliseconds. */
  readonly #lifetime: number;
  readonly #idle = new Map<string, Entry[]>();
  readonly #all = new Set<Entry>();
  readonly #opened = new WeakMap<StoreConnection, number>();
  #localUsed = 0;
  /** Connections to the daemon here. */
  readonly localDaemons: StoreConnection[] = [];

  /** Keeps them for a while, until the signal at the most. */
  constructor({ log, signal, settings }: Context) {
    this.#log = log;
    this.#signal = signal;
    this.#lifetime = 1000 * settings.keepConnections;
  }

  /** How many connections to machines there are. */
  get size(): number {
    return this.#all.size;
  }

  /** Connects to a machine, by what is kept if there is such a thing. */
  readonly connect: typeof connectByPlugin = async (
    machine,
    context,
    reached,
  ) => {
    const key = keyOf(machine);
    for (let left; (left = this.#idle.get(key)?.pop()) !== undefined;) {
      if (await this.#isAlive(left)) {
        reached?.("host key");
        return this.#lend(left, key);
      }
      this.#end(left, new Error("it does not answer"));
    }
    return await this.#open(machine, key, context, reached);
  };

  /** Whether something has passed over a connection lately, or does now. */
  async #isAlive({ connection, kept }: Entry): Promise<boolean> {
    if (connection.failure() !== undefined) return false;
    const [daemon] = kept.daemons;
    if (daemon === undefined) return false;
    if (performance.now() - kept.used < ALIVE.silence) return true;
    const answer = queryValidPaths(daemon, []);
    return await within(ALIVE.answer, answer, "no answer")
      .then(() => true, () => false);
  }

  /** Makes a connection; one that comes too late for its build is kept. */
  async #open(
    machine: Machine,
    key: string,
    context: HookContext,
    reached?: (what: Reached) => void,
  ): Promise<Connection> {
    const { signal } = context;
    let { log } = context;
    const own = { ...context, signal: this.#signal, log: forward(() => log) };
    const opening = doFor(
      undefined,
      () => connectByPlugin(machine, own, reached),
    )
      .finally(() => log = this.#log)
      .then((connection) => this.#lend(this.#add(machine, connection), key));
    const interrupted = Promise.withResolvers<never>();
    const abort = () => {
      interrupted.reject(signal.reason);
      opening.then((late) => late.close(), () => {});
    };
    signal.addEventListener("abort", abort);
    if (signal.aborted) abort();
    try {
      return await Promise.race([opening, interrupted.promise]);
    } finally {
      signal.removeEventListener("abort", abort);
    }
  }

  #add(machine: Machine, connection: Connection): Entry {
    const now = performance.now();
    const kept = connection.kept ?? newKept();
    const entry = {
      ...{ machine, connection, kept, opened: now, used: now, asked: 0 },
      tellEnd: () => {},
    };
    this.#all.add(entry);
    const drop = () => {
      this.#all.delete(entry);
      entry.tellEnd();
    };
    connection.ended?.then(drop, drop);
    return entry;
  }

  /** A connection for one build, which may come back at its end. */
  #lend(entry: Entry, key: string): Connection {
    const { connection, kept } = entry;
    const { failure, pieceSize } = connection;
    const channels = new Channels(connection);
    const ended = Promise.withResolvers<void>();
    let isBack = false;
    entry.used = performance.now();
    entry.tellEnd = ended.resolve;
    if (!this.#all.has(entry)) ended.resolve();
    return {
      failure,
      ...(connection.ended && { ended: ended.promise }),
      ...(pieceSize && { pieceSize }),
      kept,
      openSocket: (file) => channels.openSocket(file),
      exec: (command) => channels.exec(command),
      close: (error) => {
        if (isBack) return;
        isBack = true;
        entry.used = performance.now();
        entry.tellEnd = () => {};
        ended.resolve();
        if (error !== undefined) return this.#end(entry, error);
        channels.endProcesses();
        this.#takeBack(entry, key, channels);
      },
    };
  }

  /** Keeps a connection once nothing of its build goes on over it, or ends it. */
  async #takeBack(
    entry: Entry,
    key: string,
    channels: Channels,
  ): Promise<void> {
    const { connection, kept } = entry;
    const end = performance.now() + ENDING;
    while (!channels.areOver(kept) && performance.now() < end) await delay(10);
    const isKept = connection.failure() === undefined &&
      this.#all.has(entry) && channels.areOver(kept) &&
      !this.#isOld(entry) && this.#isWanted(entry, key);
    if (!isKept) return this.#end(entry);
    this.#idle.set(key, [...this.#idle.get(key) ?? [], entry]);
  }

  #isOld({ opened }: Entry): boolean {
    return performance.now() - opened >= MOST * this.#lifetime;
  }

  /** Whether there are not as many already as builds at a time. */
  #isWanted({ machine }: Entry, key: string): boolean {
    return (this.#idle.get(key)?.length ?? 0) < machine.parallelBuilds;
  }

  #end(entry: Entry, error?: Error): void {
    this.#all.delete(entry);
    entry.connection.close(error);
  }

  /** Ends what was not used for a while, or is there for long. */
  prune(): void {
    const now = performance.now();
    const isIdle = (used: number) => now - used >= this.#lifetime;
    for (const [key, entries] of this.#idle) {
      const left = entries.filter((entry) => {
        if (!this.#all.has(entry)) return false;
        if (!isIdle(entry.used) && !this.#isOld(entry)) return true;
        this.#end(entry);
        return false;
      });
      if (left.length > 0) this.#idle.set(key, left);
      else this.#idle.delete(key);
    }
    // A long build needs none of those that others have left there.
    for (const { kept, used } of this.#all) {
      if (isIdle(used)) kept.daemons.splice(0).forEach(close);
    }
    this.#pruneLocal(isIdle(this.#localUsed));
  }

  #pruneLocal(isIdle: boolean): void {
    const now = performance.now();
    for (const store of this.localDaemons.splice(0)) {
      const opened = this.#opened.get(store) ?? now;
      this.#opened.set(store, opened);
      const isYoung = now - opened < MOST * this.#lifetime;
      const isKept = !isIdle && isYoung && !isOver(store);
      if (isKept) this.localDaemons.push(store);
      else close(store);
    }
  }

  /** Notes that a build is served. */
  noteUse(): void {
    this.#localUsed = performance.now();
  }

  /**
   * Asks machines for their facts before these are too old, over a connection
   * that no build has: a machine may allow but one session in each.
   */
  async refresh(context: Context): Promise<void> {
    if (this.#idle.size === 0) return;
    const age = context.settings.factsLifetime * 1000 * FACTS_AGE;
    const records = context.observations.machines();
    const asking = [...this.#idle].map(async ([key, entries]) => {
      const id = entries.length > 0 ? machineId(entries[0]!.machine) : "";
      const { facts } = records.get(id) ?? {};
      if (!facts || Date.now() - facts.time < age) return;
      const entry = entries.at(-1)!;
      if (performance.now() - entry.asked < age) return;
      entry.asked = performance.now();
      entries.pop();
      await this.#ask(entry, key, facts.login, context);
    });
    await Promise.all(asking);
  }

  /** Asks a machine over a connection, which is kept if it answers. */
  async #ask(
    entry: Entry,
    key: string,
    login: number | undefined,
    context: Context,
  ): Promise<void> {
    const { connection, machine } = entry;
    const { observations, settings: { connectTimeout } } = context;
    const channels = new Channels(connection);
    const session = makeSession(machine, {
      failure: connection.failure,
      openSocket: (file) => channels.openSocket(file),
      exec: (command) => channels.exec(command),
      close: () => channels.endProcesses(),
    }, context);
    try {
      const { default: remote } = await import("./_remote.ts");
      const probing = remote.probe(session, context);
      const facts = await within(connectTimeout, probing, "no answer");
      // It says nothing where the daemon has the only session.
      if (facts.uname !== undefined) {
        observations.saveFacts(machineId(machine), { ...facts, login });
      }
      session.close();
      await this.#takeBack(entry, key, channels);
    } catch (error) { // a build will see what is wrong
      session.close();
      this.#end(entry, error as Error);
    }
  }

  /** Ends all that no build has. */
  end(): void {
    for (const entries of this.#idle.values()) {
      entries.forEach((entry) => this.#end(entry));
    }
    this.#idle.clear();
    this.localDaemons.splice(0).forEach(close);
  }
}

/**
 * What several suites need.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { spawn } from "node:child_process";
import type { SpawnOptions } from "node:child_process";
import { createHash } from "node:crypto";
import { globSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import process from "node:process";
import { Duplex } from "node:stream";
import { buffer } from "node:stream/consumers";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import * as assert from "uvu/assert";
import { encode, OffloadError, openStore } from "../mod.ts";
import type { Machine } from "../mod.ts";
import { machine } from "./context.ts";
import { exportPath } from "../plugins/_quick_operations.ts";

/** The checkout. */
export const ROOT = fileURLToPath(new URL("..", import.meta.url));

/** What a client sent, and what came back: hexadecimal, turn by turn. */
export type Turns = readonly (readonly [sent: string, received: string])[];

/** Conversations with a real daemon; see data/README.md. */
export interface GoldenDaemon {
  /** Its public key. */
  readonly key: string;
  /** An access-control list with that key. */
  readonly acl: string;
  /** A derivation that it builds. */
  readonly drv: string;
  /** What is made of it. */
  readonly output: string;
  /** A derivation that it fails to build. */
  readonly failing: string;
  /** By name. */
  readonly conversations: Readonly<Record<string, Turns>>;
}

/** Reads a file of golden data. */
export function golden<T>(name: string): T {
  return JSON.parse(readFileSync(`${ROOT}/test/data/${name}`, "utf8"));
}

/** A daemon's conversations, by the version of Guix. */
export const daemons: Readonly<Record<string, GoldenDaemon>> = {
  "1.5": golden("daemon-1.5.json"),
  "1.2": golden("daemon-1.2.json"),
};

/** A key, and what was signed with it. */
export interface Signed {
  /** The public key. */
  readonly key: string;
  /** A signature of {@linkcode hash}. */
  readonly signature: string;
}

/** Keys of all kinds, made by Guix, with their signatures. */
export const keys: Readonly<
  Record<"ecdsa" | "other" | "rsa" | "nist" | "eddsa", Signed>
> = golden("signatures.json");

/** What was signed. */
export const hash: Buffer = createHash("sha256").update("offload").digest();

/** An access-control list of keys. */
export function aclOf(...keys: readonly string[]): string {
  const entries = keys.map((key) => `(entry ${key} (tag (guix import)))`);
  return `(acl ${entries.join("\n")})`;
}

/** The value of `(name #…#)` in a signature. */
export function field({ signature }: Signed, name: string): string {
  return new RegExp(`\\(${name} #(\\w+)#\\)`).exec(signature)![1]!;
}

/** A peer that gives each recorded answer once it got the recorded request. */
export class Peer extends Duplex {
  readonly #turns: [sent: Buffer, received: Buffer][];
  readonly #chunk: number;
  #written: Buffer = Buffer.alloc(0);

  /** Answers in pieces of `chunk` bytes and then ends the stream. */
  constructor(
    turns: readonly Turn[],
    chunk = Infinity,
  ) {
    super();
    this.#turns = turns.map(([a, b]) => [Buffer.from(a), Buffer.from(b)]);
    this.#chunk = chunk;
  }

  /** Whether all that was expected was sent. */
  get done(): boolean {
    return this.#turns.length === 0 && this.#written.length === 0;
  }

  override _write(bytes: Buffer, _: unknown, done: () => void): void {
    this.#written = Buffer.concat([this.#written, bytes]);
    this.#answer();
    done();
  }

  #answer(): void {
    const [sent, received] = this.#turns[0] ?? [Buffer.alloc(0)];
    const part = this.#written.subarray(0, sent.length);
    if (!part.equals(sent.subarray(0, part.length)) || !received) {
      const hex = this.#written.toString("hex");
      this.destroy(new Error(`expected ${sent.toString("hex")}, got ${hex}`));
    } else if (part.length === sent.length) {
      this.#written = this.#written.subarray(sent.length);
      this.#turns.shift();
      for (let at = 0; at < received.length; at += this.#chunk) {
        this.push(received.subarray(at, at + this.#chunk));
      }
      if (this.#turns.length === 0) this.push(null);
      else if (this.#written.length > 0) this.#answer();
    }
  }

  override _read(): void {}
}

/** Bytes as a source of chunks. */
export async function* chunks(
  ...parts: readonly Uint8Array[]
): AsyncGenerator<Uint8Array> {
  yield* parts;
}

/** In milliseconds: what takes longer hangs, however busy the machine is. */
const PATIENCE = 60_000;

/** Fails where `promise` takes much longer than anything here should. */
export async function settled<T>(promise: Promise<T>): Promise<T> {
  let timer;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error("it hangs")), PATIENCE);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Waits until `condition` holds, asking again every few milliseconds. */
export async function until(
  what: string,
  condition: () => boolean,
): Promise<void> {
  const end = performance.now() + PATIENCE;
  while (!condition()) {
    if (performance.now() > end) throw new Error(`waited in vain: ${what}`);
    await delay(5);
  }
}

/**
 * The milliseconds that processors were at work for this process. Unlike the
 * time on a clock, it is no matter what else they are at.
 */
export function processorTime(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}

function checkError(error: unknown, pattern: RegExp): OffloadError {
  if (!(error instanceof OffloadError)) throw error;
  assert.match(error.message, pattern);
  return error;
}

/** Checks that `promise` fails with an `OffloadError`, which it returns. */
export async function rejects(
  promise: Promise<unknown>,
  pattern: RegExp,
): Promise<OffloadError> {
  const nothing = Symbol();
  const error = await settled(promise).then(() => nothing, (error) => error);
  if (error === nothing) throw new Error(`no error like ${pattern}`);
  return checkError(error, pattern);
}

/** Checks that `work` throws an `OffloadError`, which it returns. */
export function throws(work: () => unknown, pattern: RegExp): OffloadError {
  let result;
  try {
    result = work();
  } catch (error) {
    return checkError(error, pattern);
  }
  throw new Error(`'${result}' instead of an error like ${pattern}`);
}

/** Calls `work` with a new directory, which is removed afterwards. */
export async function withDirectory<T>(
  work: (directory: string) => T,
): Promise<Awaited<T>> {
  const directory = mkdtempSync(`${tmpdir()}/offload-`);
  try {
    return await work(directory);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/** Makes numbers from 0 to 1, always the same ones. */
export function makeRandom(seed: number): Random {
  return () => {
    seed = (seed * 1664525 + 1013904223) % 2 ** 32;
    return seed / 2 ** 32;
  };
}

/** Makes numbers from 0 to 1. */
export type Random = () => number;

/**
 * Calls `work` in rounds, each with random numbers of its own: so many, always
 * the same ones, or where OFFLOAD_FUZZ is set, others for so many seconds.
 */
export async function fuzz(
  rounds: number,
  work: (random: Random) => unknown,
): Promise<void> {
  const seconds = Number(process.env.OFFLOAD_FUZZ ?? 0);
  const end = performance.now() + 1000 * seconds;
  const first = seconds > 0 ? Math.floor(Math.random() * 2 ** 31) : 1;
  for (let round = 0; round < rounds || performance.now() < end; round++) {
    const seed = (first + round) * 2654435761 % 2 ** 32;
    try {
      const start = performance.now();
      await work(makeRandom(seed));
      const took = performance.now() - start;
      if (took > 10_000) throw new Error(`it took ${took} ms`);
    } catch (cause) {
      throw new Error(`with makeRandom(${seed}): ${cause}`, { cause });
    }
  }
}

/** What became of a child process. */
export interface Finished {
  /** Its exit code, -1 where a signal ended it. */
  readonly code: number;
  /** What it wrote to standard output. */
  readonly stdout: Buffer;
  /** What it wrote to standard error. */
  readonly stderr: string;
}

/** Runs a program to its end; a missing one fails the test, by name. */
export async function run(
  program: string,
  args: readonly string[],
  options: SpawnOptions & { readonly input?: string } = {},
): Promise<Finished> {
  const child = spawn(program, args, { ...options, stdio: "pipe" });
  const code = new Promise<number>((resolve, reject) => {
    child.on("close", (code) => resolve(code ?? -1));
    child.on("error", (cause) => {
      reject(new Error(`failed to run '${program}': is it there?`, { cause }));
    });
  });
  child.stdin!.on("error", () => {}).end(options.input);
  const output = Promise.all([buffer(child.stdout!), buffer(child.stderr!)]);
  const [[stdout, stderr], exitCode] = await Promise.all([output, code]);
  return { code: exitCode, stdout, stderr: stderr.toString() };
}

/** A program and its first arguments, which run a script. */
export type Runtime = readonly [program: string, ...args: string[]];

const node = `${ROOT}/node_modules/node/bin/node`;
const [deno = "deno"] = globSync(`${ROOT}/node_modules/@deno/*/deno`);

/** Both runtimes. */
export const runtimes: Readonly<Record<"node" | "deno", Runtime>> = {
  node: [
    ...[node, "--disable-warning=ExperimentalWarning"] as const,
    "--experimental-strip-types", // for the oldest
  ],
  deno: [deno, "run", "--allow-all"],
};

/** The runtime that the tests run on. */
export const ownRuntime: Runtime = [
  process.execPath,
  ...runtimes["Deno" in globalThis ? "deno" : "node"].slice(1),
];

/** A build machine as the reference would have it by default. */
export function makeMachine(fields: Partial<Machine> = {}): Machine {
  return machine({
    name: "w1",
    user: "root",
    privateKey: "/root/.ssh/id_ed25519",
    hostKey: "ssh-ed25519 AAAA",
    compression: "zlib@openssh.com,zlib",
    ...fields,
  });
}

/** A request of a conversation, and the answer to it. */
export type Turn = readonly [sent: Uint8Array, received: Uint8Array];

/** A recorded conversation, but with the one write of our handshake. */
export function goldenTurns(daemon: GoldenDaemon, name: string): Turn[] {
  const hello = encode(0x6e697863, 0x164, 0, 0);
  const [greeting, end, ...rest] = daemon.conversations[name]!;
  const answer = Buffer.from(greeting![1] + end![1], "hex");
  const turns = rest.map((turn): Turn => {
    const [sent, received] = turn.map((hex) => Buffer.from(hex, "hex"));
    return [sent!, received!];
  });
  return [[hello, answer], ...turns];
}

/** A daemon that greets, does not have a derivation, and hears nothing more. */
export function greeter(derivation: string): Peer {
  const [greeting] = goldenTurns(daemons["1.5"]!, "export-path");
  const queryValidPaths = encode(31, [derivation]);
  const none = encode(0x616c7473, []);
  return new Peer([
    greeting!,
    [queryValidPaths, none],
    [Buffer.from("nothing else"), Buffer.alloc(0)],
  ]);
}

/** What a real daemon exported: nar, metadata, signature. */
export async function goldenExport(daemon: GoldenDaemon): Promise<Buffer> {
  const peer = new Peer(goldenTurns(daemon, "export-path"));
  const store = await openStore(peer, "guix-daemon");
  return buffer(exportPath(store, daemon.output));
}

/** Perl that locks an open file for F_RDLCK or F_WRLCK, by fcntl, if it can. */
export const FCNTL = `
use Fcntl qw(:DEFAULT :seek);
sub lock_file {
  my ($file, $type) = @_;
  # struct flock: type and whence; start and length; pid
  my $lock = pack "s! s! x![q] q q i x![q]", $type, SEEK_SET, 0, 0, 0;
  return fcntl $file, F_SETLK, $lock;
}`;

/** Makes what is installed, by scripts/bundle; returns what that printed. */
export async function bundle(directory: string): Promise<string> {
  const env = { ...process.env, OFFLOAD_RUNTIME: process.execPath };
  const result = await run(`${ROOT}/scripts/bundle`, [directory], { env });
  if (result.code === 0) return result.stdout.toString();
  throw new Error(`failed to run scripts/bundle: ${result.stderr}`);
}

/**
 * What machines that lie send, and what of it is signed.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import type { Duplex } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { encode } from "../../mod.ts";
import { start } from "../lab/lab.ts";
import { directory, file, nar } from "../nars.ts";
import type { Node } from "../nars.ts";
import {
  exportHash,
  pour,
  STDERR,
  unsignedExport,
  withSignature,
} from "./liar.ts";
import type { Lies } from "./liar.ts";

/** A machine, and what must hold. */
export interface Row {
  /** What it does. */
  readonly machine: string;
  /** How it lies to a hook that wants these outputs. */
  readonly lies: (outputs: readonly string[]) => Lies;
  /** What the hook says. */
  readonly says: RegExp;
  /** What the hook answers: "accept" unless told. */
  readonly answer?: "postpone";
  /** Whether it lies only once the build is accepted. */
  readonly late?: boolean;
  /** How many outputs are asked for: one unless told. */
  readonly outputs?: number;
  /** What the hook exits with after an accept: 1 unless told. */
  readonly status?: number;
  /** Further variables of the hook's environment. */
  readonly variables?: readonly string[];
  /** Whether it is run ordinarily. */
  readonly quick?: boolean;
}

/** In bytes: how much memory the hook may take. */
export const MEMORY = 250 * 2 ** 20;

/** The store. */
export const STORE = "/gnu/store";

export const PREFIX = "hostile";

/** The name of a store item of this suite. */
export function itemName(stem: string): string {
  return `${"0".repeat(32)}-${PREFIX}-${stem}`;
}

export const MEBIBYTE = Buffer.alloc(2 ** 20, "x");

/** So many mebibytes, after a beginning. */
export function* mebibytes(
  count: number,
  ...first: readonly Uint8Array[]
): Generator<Uint8Array> {
  yield* first;
  for (; count > 0; count--) yield MEBIBYTE;
}

/** The same again and again. */
export function* endless(
  ...pieces: readonly Uint8Array[]
): Generator<Uint8Array> {
  for (;;) yield* pieces;
}

export const DONE = encode(STDERR.last, 1);

/** The same, after some seconds, for which it can flood. */
export async function* slowly(bytes: Uint8Array): AsyncGenerator<Uint8Array> {
  await delay(5000);
  yield bytes;
}

/** A message of a log, as long as one may be. */
export const LOG = encode(STDERR.next, MEBIBYTE);

export function daemonSays(
  ...pieces: readonly Uint8Array[]
): (channel: Duplex) => void {
  return (channel) => void pour(channel, pieces);
}

/**
 * Floods what a socket has beside its data and nobody reads, whatever the
 * window, in pieces with which that is never exactly used up.
 */
export function flood(channel: Duplex): void {
  const { stderr, outgoing, _client: { _sock: socket } } = channel as
    & Duplex
    & {
      stderr: Duplex;
      outgoing: { window: number };
      _client: { _sock: Duplex };
    };
  const piece = Buffer.alloc(30_001);
  let left = 2 * MEMORY;
  const go = () => {
    while (left > 0 && !socket.destroyed) {
      outgoing.window = 2 ** 31;
      stderr.write(piece);
      left -= piece.length;
      if (socket.writableNeedDrain) return void socket.once("drain", go);
    }
  };
  channel.resume();
  go();
}

/** Sends all, whoever reads it. */
export function send(
  bytes: () => Iterable<Uint8Array>,
): (socket: Duplex) => void {
  return (socket) => {
    socket.resume();
    pour(socket, bytes()).catch(() => {});
  };
}

// ---------------------------------------------------------------------------
// What is signed
// ---------------------------------------------------------------------------

/** Signs as the daemon of w1 does, by the very program. */
class Signer {
  readonly #child = start("w1", "guix", "authenticate");
  #text = "";
  #last: Promise<string> = Promise.resolve("");

  constructor() {
    this.#child.stdout!.setEncoding("latin1")
      .on("data", (chunk: string) => this.#text += chunk);
  }

  /** One at a time: the answers come without their questions. */
  sign(hash: string): Promise<string> {
    return this.#last = this.#last.then(() => this.#ask(hash));
  }

  async #ask(hash: string): Promise<string> {
    const key = "/etc/guix/signing-key.sec";
    const words = [key, hash].map((word) => `${word.length}:${word}`);
    this.#child.stdin!.write(`sign ${words.join(" ")}\n`);
    for (let waited = 0; waited < 20_000; waited += 5) {
      const [head, size] = /^0 (\d+):/.exec(this.#text) ?? [];
      const end = Number(size) + (head?.length ?? 0);
      if (head !== undefined && this.#text.length >= end) {
        const signature = this.#text.slice(head.length, end);
        this.#text = this.#text.slice(end);
        return signature;
      }
      await delay(5);
    }
    throw new Error(`guix authenticate: ${this.#text}`);
  }

  close(): void {
    this.#child.kill();
  }
}

let signer: Signer;

/** Has w1 sign what is sent; returns how to end that. */
export function startSigner(): () => void {
  signer = new Signer();
  return () => signer.close();
}

/** An export that is signed by a key we trust, whatever is in it. */
export async function signed(
  node: Node | Uint8Array,
  path: string,
): Promise<Buffer> {
  const archive = node instanceof Uint8Array ? node : nar(node);
  const unsigned = unsignedExport(archive, { path });
  const signature = await signer.sign(exportHash(unsigned));
  return withSignature(unsigned, signature);
}

/** A machine that sends this item, signed. */
export function sends(node: Node | Uint8Array): Row["lies"] {
  return () => ({ item: (path) => signed(node, path) });
}

/** A machine that changes what it has signed. */
export function changes(
  change: (item: Buffer, path: string) => Uint8Array | Promise<Uint8Array>,
): Row["lies"] {
  const item = async (path: string) => {
    return await change(await signed(file("a good output"), path), path);
  };
  return () => ({ item });
}

/** A machine that closes the connection behind half a message. */
export function closesInArchive(): Lies {
  let close = () => {};
  async function* half(): AsyncGenerator<Uint8Array> {
    yield encode(STDERR.write, "x".repeat(100)).subarray(0, 50);
    close();
  }
  return {
    answers: { exportPath: half },
    session: (connection) => close = () => connection.end(),
  };
}

/** A copy with one bit flipped. */
export function flip(bytes: Buffer, at: number): Buffer {
  const copy = Buffer.from(bytes);
  copy[at < 0 ? copy.length + at : at]! ^= 1;
  return copy;
}

/** An entry of a directory whose name has an absurd length. */
export function absurdName(length: bigint): Buffer {
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(length);
  const head = encode("nix-archive-1", "(", "type", "directory", "entry");
  return Buffer.concat([head, encode("(", "name"), size, MEBIBYTE]);
}

/** A file that says it is so long. */
export function absurdFile(length: bigint, contents: Uint8Array): Buffer {
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(length);
  const head = encode("nix-archive-1", "(", "type", "regular", "contents");
  return Buffer.concat([head, size, contents]);
}

/** Directories in directories, so deep. */
export function deep(depth: number): Buffer {
  const open = encode(
    ...["(", "type", "directory", "entry", "(", "name", "d", "node"],
  );
  const parts = [encode("nix-archive-1")];
  for (let left = depth; left > 0; left--) parts.push(open);
  parts.push(encode(...directory()));
  for (let left = depth; left > 0; left--) parts.push(encode(")", ")"));
  return Buffer.concat(parts);
}

/** A directory of so many empty files. */
export function* manyFiles(count: number): Generator<Uint8Array> {
  yield encode("nix-archive-1", "(", "type", "directory");
  for (let i = 0; i < count; i++) {
    const name = String(i).padStart(8, "0");
    yield encode("entry", "(", "name", name, "node", ...file(), ")");
  }
}

/** Bytes that are always the same and mean nothing. */
export function noise(size: number): Uint8Array {
  const bytes = new Uint8Array(size);
  let seed = 4711;
  for (let at = 0; at < size; at++) {
    seed = (seed * 1664525 + 1013904223) % 2 ** 32;
    bytes[at] = seed >>> 24;
  }
  return bytes;
}

/** A path in which a name that is no UTF-8 is at the very end. */
export function longName(): Node {
  const last = Buffer.alloc(255, 0xff);
  let node = directory([last, file()]);
  // The output's own path has less than 100 bytes.
  for (let length = 100; length < 3900; length += 200) {
    node = directory(["d".repeat(199), node]);
  }
  return node;
}

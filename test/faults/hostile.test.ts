/**
 * A build machine that lies in each step. What the table says must hold: the
 * hook ends in time and says why, at the output's path is nothing, nothing is
 * left beside it, and what the machine sends does not fill the memory.
 *
 * The rows marked `quick` are run ordinarily; where OFFLOAD_FAULTS is set, those
 * that match that regular expression are.
 */

import { Buffer } from "node:buffer";
import { readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import process from "node:process";
import type { Duplex } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { encode } from "../../mod.ts";
import { startHook } from "../lab/hook.ts";
import type { Hook } from "../lab/hook.ts";
import {
  forget,
  lab,
  OBSERVATIONS,
  onDatabase,
  root,
  RUNTIMES,
  start,
  SYSTEM,
  up,
  within,
} from "../lab/lab.ts";
import type { Runtime } from "../lab/lab.ts";
import { directory, file, link, nar, program } from "../nars.ts";
import type { Node } from "../nars.ts";
import {
  exportHash,
  pour,
  startLiar,
  STDERR,
  unsignedExport,
  withSignature,
} from "./liar.ts";
import type { Liar, Lies } from "./liar.ts";

/** A machine, and what must hold. */
interface Row {
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

/** In seconds: how long a row may take, on a busy machine. */
const LIMIT = 30;

/** In bytes: how much memory the hook may take. */
const MEMORY = 250 * 2 ** 20;

/** The bounds of the hook's own steps, for the rows to be short. */
const SHORT = [
  "OFFLOAD_CONNECT_TIMEOUT=2",
  "OFFLOAD_DECISION_TIMEOUT=2",
  "OFFLOAD_OUTAGE_TIMEOUT=0",
  "OFFLOAD_STEP_TIMEOUT=3",
];

const STORE = "/gnu/store";
/** Which rows are run: those that match, or the quick ones. */
const { OFFLOAD_FAULTS: wanted } = process.env;

// ---------------------------------------------------------------------------
// What machines send
// ---------------------------------------------------------------------------

const MEBIBYTE = Buffer.alloc(2 ** 20, "x");

/** So many mebibytes, after a beginning. */
function* mebibytes(
  count: number,
  ...first: readonly Uint8Array[]
): Generator<Uint8Array> {
  yield* first;
  for (; count > 0; count--) yield MEBIBYTE;
}

/** The same again and again. */
function* endless(...pieces: readonly Uint8Array[]): Generator<Uint8Array> {
  for (;;) yield* pieces;
}

const DONE = encode(STDERR.last, 1);

/** The same, after some seconds, for which it can flood. */
async function* slowly(bytes: Uint8Array): AsyncGenerator<Uint8Array> {
  await delay(5000);
  yield bytes;
}

/** A message of a log, as long as one may be. */
const LOG = encode(STDERR.next, MEBIBYTE);

function daemonSays(
  ...pieces: readonly Uint8Array[]
): (channel: Duplex) => void {
  return (channel) => void pour(channel, pieces);
}

/**
 * Floods what a socket has beside its data and nobody reads, whatever the
 * window, in pieces with which that is never exactly used up.
 */
function flood(channel: Duplex): void {
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
function send(
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

/** An export that is signed by a key we trust, whatever is in it. */
async function signed(
  node: Node | Uint8Array,
  path: string,
): Promise<Buffer> {
  const archive = node instanceof Uint8Array ? node : nar(node);
  const unsigned = unsignedExport(archive, { path });
  const signature = await signer.sign(exportHash(unsigned));
  return withSignature(unsigned, signature);
}

/** A machine that sends this item, signed. */
function sends(node: Node | Uint8Array): Row["lies"] {
  return () => ({ item: (path) => signed(node, path) });
}

/** A machine that changes what it has signed. */
function changes(
  change: (item: Buffer, path: string) => Uint8Array | Promise<Uint8Array>,
): Row["lies"] {
  const item = async (path: string) => {
    return await change(await signed(file("a good output"), path), path);
  };
  return () => ({ item });
}

/** A machine that closes the connection behind half a message. */
function closesInArchive(): Lies {
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
function flip(bytes: Buffer, at: number): Buffer {
  const copy = Buffer.from(bytes);
  copy[at < 0 ? copy.length + at : at]! ^= 1;
  return copy;
}

/** An entry of a directory whose name has an absurd length. */
function absurdName(length: bigint): Buffer {
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(length);
  const head = encode("nix-archive-1", "(", "type", "directory", "entry");
  return Buffer.concat([head, encode("(", "name"), size, MEBIBYTE]);
}

/** A file that says it is so long. */
function absurdFile(length: bigint, contents: Uint8Array): Buffer {
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(length);
  const head = encode("nix-archive-1", "(", "type", "regular", "contents");
  return Buffer.concat([head, size, contents]);
}

/** Directories in directories, so deep. */
function deep(depth: number): Buffer {
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
function* manyFiles(count: number): Generator<Uint8Array> {
  yield encode("nix-archive-1", "(", "type", "directory");
  for (let i = 0; i < count; i++) {
    const name = String(i).padStart(8, "0");
    yield encode("entry", "(", "name", name, "node", ...file(), ")");
  }
}

// ---------------------------------------------------------------------------
// The table
// ---------------------------------------------------------------------------

const rows: readonly Row[] = [
  // No SSH, or not much of it.
  {
    machine: "sends a banner of megabytes",
    lies: () => ({ connection: send(() => mebibytes(64)) }),
    answer: "postpone",
    says: /failed to connect to .*[Hh]eader/,
    quick: true,
  },
  {
    machine: "sends banners line by line without end",
    lies: () => ({
      connection: send(() => endless(Buffer.from("welcome\r\n"))),
    }),
    answer: "postpone",
    says: /failed to connect to .*greeting lines/,
  },
  {
    machine: "talks HTTP and waits",
    lies: () => ({
      connection: send(() => [Buffer.from("HTTP/1.1 400 Bad Request\r\n\r\n")]),
    }),
    answer: "postpone",
    says: /failed to connect to |has not answered/,
  },
  {
    machine: "says nothing",
    lies: () => ({ connection: () => {} }),
    answer: "postpone",
    says: /failed to connect to .*[Tt]imed out|has not answered/,
    quick: true,
  },
  {
    machine: "sends random bytes",
    lies: () => ({
      connection: send(() => [Buffer.from(noise(2 ** 20))]),
    }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "closes at once",
    lies: () => ({ connection: (socket) => socket.destroy() }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "stalls after its identification",
    lies: () => ({
      connection: send(() => [Buffer.from("SSH-2.0-liar\r\n")]),
    }),
    answer: "postpone",
    says: /failed to connect to .*[Tt]imed out|has not answered/,
  },
  {
    machine: "sends noise after its identification",
    lies: () => ({
      connection: send(() => [
        Buffer.from("SSH-2.0-liar\r\n"),
        Buffer.from(noise(2 ** 16)),
      ]),
    }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "shows another host key",
    lies: () => ({ otherHostKey: true }),
    answer: "postpone",
    says: /server at '.*' returned host key '/,
    quick: true,
  },
  {
    machine: "shows another host key and keeps the line, after the answer",
    lies: () => ({ otherHostKey: true }),
    late: true,
    says: /server at '.*' returned host key '/,
  },
  {
    machine: "talks HTTP and waits, after the answer",
    lies: () => ({
      connection: send(() => [Buffer.from("HTTP/1.1 400 Bad Request\r\n\r\n")]),
    }),
    late: true,
    says: /failed to connect to /,
    quick: true,
  },
  {
    machine: "says nothing, after the answer",
    lies: () => ({ connection: () => {} }),
    late: true,
    says: /failed to connect to .*[Tt]imed out/,
  },
  {
    machine: "closes after the key exchange",
    lies: () => ({ stops: { "key exchange": "closes" } }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "closes at the authentication",
    lies: () => ({ stops: { authentication: "closes" } }),
    answer: "postpone",
    says: /failed to connect to /,
  },
  {
    machine: "does not answer the authentication",
    lies: () => ({ stops: { authentication: "is silent" } }),
    late: true,
    says: /failed to connect to .*[Tt]imed out/,
  },
  {
    machine: "refuses the key",
    lies: () => ({ stops: { authentication: "refuses" } }),
    answer: "postpone",
    says: /public key authentication failed for '/,
  },

  // What it says of itself. It may lie; it may not do harm.
  {
    machine: "closes at the probe and whenever it is asked again",
    lies: () => ({ stops: { probe: "closes", daemon: "closes" } }),
    answer: "postpone",
    says: /failed to connect to '/,
  },
  {
    machine: "does not answer the probe",
    lies: () => ({ stops: { probe: "is silent" } }),
    says: /archive from '.*unexpected end of data/,
  },
  {
    machine: "prints megabytes for the probe",
    lies: () => ({
      facts: () => mebibytes(400),
      stops: { daemon: "closes" },
    }),
    answer: "postpone",
    says: /failed to connect to '/,
    quick: true,
  },
  {
    machine: "prints to the probe's standard error without end",
    lies: () => ({ complaints: () => endless(MEBIBYTE) }),
    says: /archive from '.*unexpected end of data/,
  },
  {
    machine: "prints absurd numbers for the probe",
    lies: () => ({
      facts: () =>
        Buffer.from(
          "cores 0\nload -1 x\nmemory NaN 1e999 kB\nstore-bytes a b c 1e400\n" +
            "store-inodes - - - -1\nclock -1e300\nuname \0\x1b[2J\n__proto__ 1\n",
        ),
      stops: { daemon: "closes" },
    }),
    answer: "postpone",
    says: /failed to connect to '/,
  },

  // The way to its daemon.
  {
    machine: "refuses all channels",
    lies: () => ({
      stops: { probe: "refuses", daemon: "refuses", command: "refuses" },
    }),
    answer: "postpone",
    says: /failed to connect to guix-daemon on '/,
    quick: true,
  },
  {
    machine: "closes when the daemon is asked for",
    lies: () => ({ stops: { daemon: "closes" } }),
    answer: "postpone",
    says: /failed to connect to '/,
  },
  {
    machine: "does not open a channel to the daemon",
    lies: () => ({ stops: { daemon: "is silent", command: "is silent" } }),
    answer: "postpone",
    says: /guix-daemon on '.*no answer/,
  },

  // A daemon that is none.
  {
    machine: "has a daemon that never answers",
    lies: () => ({ daemon: () => {} }),
    answer: "postpone",
    says: /failed to connect to guix-daemon on '.*no answer/,
    quick: true,
  },
  {
    machine: "has a daemon that greets wrongly",
    lies: () => ({ daemon: daemonSays(encode(1, 2, 3)) }),
    answer: "postpone",
    says: /guix-daemon on '.*unexpected greeting/,
  },
  {
    machine: "has a daemon of another protocol",
    lies: () => ({ daemon: daemonSays(encode(0x6478696f, 0x364, 1)) }),
    answer: "postpone",
    says: /guix-daemon on '.*unsupported protocol/,
  },
  {
    machine: "has a daemon that says random bytes",
    lies: () => ({ daemon: daemonSays(Buffer.from(noise(2 ** 20))) }),
    answer: "postpone",
    says: /guix-daemon on '/,
  },
  {
    machine: "has a daemon that complains without end",
    lies: () => ({ daemon: flood }),
    answer: "postpone",
    says: /guix-daemon on '.*no answer/,
    quick: true,
  },
  {
    machine: "greets with a log without end",
    lies: () => ({
      answers: {
        greeting: () => endless(encode(0x6478696f, 0x164), LOG, LOG),
      },
    }),
    answer: "postpone",
    says: /guix-daemon on '/,
  },
  {
    machine: "answers an operation with a log without end",
    lies: () => ({ answers: { setOptions: () => endless(LOG) } }),
    says: /guix-daemon on '.*too many messages/,
    quick: true,
  },
  {
    machine: "answers with empty messages without end",
    lies: () => ({
      answers: {
        setOptions: () =>
          endless(Buffer.concat(Array(4096).fill(encode(STDERR.next, "")))),
      },
    }),
    says: /guix-daemon on '.*too many messages/,
  },
  {
    machine: "answers with a message of an absurd length",
    lies: () => ({
      answers: {
        setOptions: () => mebibytes(64, encode(STDERR.next, 2 ** 40)),
      },
    }),
    says: /guix-daemon on '.*unexpected number/,
  },
  {
    machine: "answers with gigabytes of store items",
    lies: () => ({
      answers: {
        queryValidPaths: () =>
          endless(
            encode(STDERR.last, 2 ** 20),
            Buffer.concat(Array(200).fill(encode("x".repeat(4096)))),
          ),
      },
    }),
    answer: "postpone",
    says: /guix-daemon on '.*(too long|unexpected)/,
    quick: true,
  },
  {
    machine: "fails with an error that looks like an answer to the daemon",
    lies: () => ({
      answers: {
        setOptions: () => encode(STDERR.error, "\x1b[2J\n# decline\n", 1),
      },
    }),
    says: /error: .*\n {2}# decline/,
    quick: true,
  },
  {
    machine: "fails with an error as long as one may be",
    lies: () => ({
      answers: { setOptions: () => encode(STDERR.error, MEBIBYTE, 1) },
    }),
    says: /error: .*xxx/,
  },
  {
    machine: "fails with an error without a status",
    lies: () => ({
      answers: { setOptions: () => encode(STDERR.error, "disk full") },
    }),
    says: /lost connection to '/,
  },
  {
    machine: "answers a build with a code that there is not",
    lies: () => ({ answers: { buildThings: () => encode(4711) } }),
    says: /guix-daemon on '.*unexpected message/,
  },
  {
    machine: "asks for data when there is none",
    lies: () => ({ answers: { buildThings: () => encode(STDERR.read, 8) } }),
    says: /guix-daemon on '.*unexpected message/,
  },
  {
    machine: "says the build failed for good",
    lies: () => ({
      answers: { buildThings: () => encode(STDERR.error, "it failed", 100) },
    }),
    status: 100,
    says: /offloaded to '.*' failed: it failed/,
  },
  {
    machine: "says the build failed with an absurd status",
    lies: () => ({
      answers: {
        buildThings: () => encode(STDERR.error, "it failed", 2 ** 40),
      },
    }),
    says: /offloaded to '.*' failed: it failed/,
  },

  // Outputs.
  {
    machine: "builds in no time and has no output",
    lies: () => ({
      answers: { exportPath: () => encode(STDERR.error, "no such item", 1) },
    }),
    says: /error: .*no such item/,
  },
  {
    machine: "sends nothing for an output",
    lies: () => ({ item: () => Buffer.alloc(0) }),
    says: /archive from '.*unexpected end of data/,
    quick: true,
  },
  {
    machine: "says that it failed to export",
    lies: () => ({
      answers: { exportPath: () => encode(STDERR.last, 0) },
    }),
    says: /guix-daemon on '.*failed to export/,
  },
  {
    machine: "signs nothing",
    lies: () => ({
      item: (path) =>
        withSignature(unsignedExport(nar(file("x")), { path }), undefined),
    }),
    says: /archive from '.*it lacks a signature/,
    quick: true,
  },
  {
    machine: "sends the signature of another item",
    lies: changes(async (item, path) => {
      const other = await signed(file("another output"), path);
      return Buffer.concat([
        item.subarray(0, item.indexOf("(signature") - 16),
        other.subarray(other.indexOf("(signature") - 16),
      ]);
    }),
    says: /archive from '.*invalid hash/,
    quick: true,
  },
  {
    machine: "flips a bit of the contents",
    lies: changes((item) => flip(item, item.indexOf("a good output"))),
    says: /archive from '.*invalid hash/,
  },
  {
    machine: "flips a bit of the signature's s",
    lies: changes((item) => {
      const at = item.indexOf("(s #") + 10;
      const copy = Buffer.from(item);
      copy[at] = copy[at] === 0x30 ? 0x31 : 0x30; // a hexadecimal digit
      return copy;
    }),
    says: /archive from '.*invalid signature/,
    quick: true,
  },
  {
    machine: "signs with a key of its own",
    lies: changes((item) => {
      const at = item.indexOf("(q #") + 10;
      const copy = Buffer.from(item);
      copy[at] = copy[at] === 0x30 ? 0x31 : 0x30;
      return copy;
    }),
    says: /archive from '.*unauthorized public key/,
  },
  {
    machine: "sends nonsense for a signature",
    lies: () => ({
      item: (path) =>
        withSignature(
          unsignedExport(nar(file("x")), { path }),
          "(".repeat(16384),
        ),
    }),
    says: /: invalid s-expression/,
  },
  {
    machine: "sends an item that was not asked for",
    lies: () => ({
      item: () => signed(file("evil"), `${STORE}/${name("evil")}`),
    }),
    says: /archive from '.*unexpected store item/,
    quick: true,
  },
  {
    machine: "sends an item that is in no store",
    lies: () => ({ item: () => signed(file("evil"), "/etc/passwd") }),
    says: /archive from '.*unexpected store item '\/etc\/passwd'/,
  },
  {
    machine: "sends the same output twice",
    lies: (outputs) => ({
      item: () => signed(file("the first"), outputs[0]!),
    }),
    outputs: 2,
    says: /archive from '.*twice/,
  },
  {
    machine: "sends an item too many",
    lies: changes(async (item) =>
      Buffer.concat([
        item,
        encode(1),
        await signed(file("evil"), `${STORE}/${name("evil")}`),
      ])
    ),
    says: /archive from '.*more store items than were asked for/,
    quick: true,
  },
  {
    machine: "ends the archive early and goes on",
    lies: changes((item) => Buffer.concat([item, encode(0), MEBIBYTE])),
    says: /archive from '.*unexpected data at the end/,
  },
  {
    machine: "cuts the archive in the middle",
    lies: changes((item) => item.subarray(0, item.length / 2)),
    says: /archive from '/,
    quick: true,
  },
  {
    machine: "closes in the middle of an archive",
    lies: closesInArchive,
    says: /lost connection to '/,
  },
  {
    machine: "sends an archive with a file ../x",
    lies: sends(directory(["../x", file("evil")])),
    says: /archive from '.*invalid nar: file name/,
    quick: true,
  },
  ...["a/b", ".", "..", "", "a\0b", "/etc/passwd"].map((name): Row => ({
    machine: `sends an archive with a file ${JSON.stringify(name)}`,
    lies: sends(directory([name, file("evil")])),
    says: /archive from '.*invalid nar: file name/,
  })),
  {
    machine: "sends an archive with the same name twice",
    lies: sends(directory(["a", file()], ["a", file("evil")])),
    says: /archive from '.*out of order/,
  },
  {
    machine: "sends an archive that is not sorted",
    lies: sends(directory(["b", file()], ["a", file()])),
    says: /archive from '.*out of order/,
  },
  {
    machine: "sends a symlink and then a file through it",
    lies: sends(
      directory(["a", link("/tmp")], ["a", directory(["x", file("evil")])]),
    ),
    says: /archive from '.*out of order/,
    quick: true,
  },
  {
    machine: "sends a setuid file",
    lies: sends(["(", "type", "regular", "setuid", "", "contents", "", ")"]),
    says: /archive from '.*invalid nar/,
  },
  {
    machine: "sends a device",
    lies: sends(["(", "type", "block", ")"]),
    says: /archive from '.*unsupported file type 'block'/,
  },
  ...[2n ** 63n, 2n ** 64n - 1n, 2n ** 31n].map((length): Row => ({
    machine: `sends a file name of ${length} bytes`,
    lies: () => ({ item: () => absurdName(length) }),
    says: /archive from '.*unexpected number/,
  })),
  {
    machine: "sends a file of 2^63 bytes",
    lies: () => ({ item: () => absurdFile(2n ** 63n, MEBIBYTE) }),
    says: /archive from '.*unexpected number/,
    quick: true,
  },
  {
    machine: "sends a file that is shorter than it says",
    lies: () => ({ item: () => absurdFile(2n ** 52n, MEBIBYTE) }),
    says: /archive from '.*unexpected end of data/,
  },
  {
    machine: "sends directories that nest without end",
    lies: sends(deep(100_000)),
    says: /archive from '.*file name is too long/,
    quick: true,
  },
  {
    machine: "sends a name that is no UTF-8 where paths are longest",
    lies: sends(longName()),
    says: /archive from '.*file name is too long/,
  },
  {
    machine: "sends a file without end",
    lies: () => ({
      item: () => endless(absurdFile(2n ** 52n, MEBIBYTE)),
    }),
    variables: [`OFFLOAD_MAXIMUM_ARCHIVE_SIZE=${300 * 2 ** 20}`],
    says: /more than 300\.0 MiB came back/,
    quick: true,
  },
  {
    machine: "sends files without end",
    lies: () => ({ item: () => manyFiles(1e9) }),
    variables: [`OFFLOAD_MAXIMUM_ARCHIVE_SIZE=${2 ** 20}`],
    says: /more than 1\.0 MiB came back/,
  },
  {
    machine: "sends references without end",
    lies: (outputs) => ({
      item: () =>
        endless(
          Buffer.concat([nar(file()), encode(0x4558494e, outputs[0]!)]),
          encode(2 ** 20),
          Buffer.concat(Array(200).fill(encode("x".repeat(4096)))),
        ),
    }),
    says: /archive from '.*(too long|unexpected)/,
  },
  {
    machine: "sends gigabytes that nobody reads, whatever the window",
    lies: () => ({
      floods: true,
      answers: {
        // ssh2 drops what comes where nothing may, not where less may.
        exportPath: () => endless(DONE, MEBIBYTE, Buffer.of(0)),
        buildThings: () => slowly(DONE),
      },
    }),
    says: /lost connection to '.*more than was asked for/,
    quick: true,
  },

  // The same by `guix archive`.
  {
    machine: "sends an archive of noise",
    lies: () => ({
      command: () => Buffer.from(noise(2 ** 20)),
    }),
    variables: ["OFFLOAD_TRANSPORT=archive-command"],
    says: /'/,
  },
  {
    machine: "lacks store items without end",
    lies: () => ({ command: () => endless(MEBIBYTE) }),
    variables: ["OFFLOAD_TRANSPORT=archive-command"],
    says: /lacks more than it was asked about/,
  },
  {
    machine: "lacks another's store item",
    lies: () => ({
      command: (command) =>
        command.includes("--missing")
          ? Buffer.from(`${STORE}/${name("secret")}\n`)
          : encode(0),
    }),
    variables: ["OFFLOAD_TRANSPORT=archive-command"],
    says: /archive from '.*is missing/,
  },
];

/** Bytes that are always the same and mean nothing. */
function noise(size: number): Uint8Array {
  const bytes = new Uint8Array(size);
  let seed = 4711;
  for (let at = 0; at < size; at++) {
    seed = (seed * 1664525 + 1013904223) % 2 ** 32;
    bytes[at] = seed >>> 24;
  }
  return bytes;
}

/** A path in which a name that is no UTF-8 is at the very end. */
function longName(): Node {
  const last = Buffer.alloc(255, 0xff);
  let node = directory([last, file()]);
  // The output's own path has less than 100 bytes.
  for (let length = 100; length < 3900; length += 200) {
    node = directory(["d".repeat(199), node]);
  }
  return node;
}

// ---------------------------------------------------------------------------
// Running it
// ---------------------------------------------------------------------------

const PREFIX = "hostile";

/** The name of a store item of this suite. */
function name(stem: string): string {
  return `${"0".repeat(32)}-${PREFIX}-${stem}`;
}

/** What of this suite is in head's store. */
function left(): string[] {
  return readdirSync(root("head") + STORE)
    .filter((name) => name.includes(`-${PREFIX}-`));
}

/** Deletes it. */
function clear(): void {
  for (const name of left()) {
    rmSync(`${root("head")}${STORE}/${name}`, { recursive: true });
  }
}

/** A process and its descendants. */
function descendants(pid: number): number[] {
  try {
    const file = `/proc/${pid}/task/${pid}/children`;
    const children = readFileSync(file, "latin1").trim().split(" ");
    return [
      pid,
      ...children.filter(Boolean).map(Number).flatMap(descendants),
    ];
  } catch {
    return []; // it has just ended
  }
}

function killProcess(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // It has just ended.
  }
}

/** The most memory that a process took, in bytes. */
function peakMemory(pid: number): number {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "latin1");
    return Number(/^VmHWM:\s*(\d+)/m.exec(status)?.[1] ?? 0) * 1024;
  } catch {
    return 0; // it has just ended
  }
}

/** Watches a hook's memory until it ends; returns the most it took. */
async function watchMemory({ child, ended }: Hook): Promise<number> {
  let most = 0;
  let over = false;
  ended.then(() => over = true);
  while (!over) {
    most = Math.max(most, ...descendants(child.pid!).map(peakMemory));
    await delay(20);
  }
  return most;
}

/** Writes head's machine file: the liar is the only machine. */
function useLiar(address: string, { port, hostKey }: Liar): void {
  const text = `(list (build-machine (name "${address}") (port ${port})
    (systems (list "${SYSTEM}")) (user "root") (host-key "${hostKey}")
    (private-key "/root/.ssh/id_ed25519") (overload-threshold #f)))`;
  writeFileSync(`${root("head")}/etc/guix/machines.scm`, text);
  forget("head");
}

/** What came of a hook. */
interface Outcome {
  readonly answer: string;
  readonly status: number | null;
  readonly text: string;
  readonly memory: number;
}

/**
 * Has the liar asked once, so that the next hook need not, and noted that
 * logging in takes longer than an answer may.
 */
async function seed(runtime: Runtime, derivation: string): Promise<void> {
  const hook = startHook("head", { runtime });
  assert.is(await hook.ask(derivation), "accept");
  hook.close();
  await within("the end", hook.ended);
  onDatabase(
    OBSERVATIONS,
    "UPDATE machine SET facts = json_set(facts, '$.login', 60) RETURNING *",
  );
}

/** Runs a hook against a machine that lies. */
async function offer(
  runtime: Runtime,
  outputs: readonly string[],
  variables: readonly string[],
): Promise<Outcome> {
  const derivation = `${STORE}/${name("row")}.drv`;
  const hook = startHook("head", { runtime, variables });
  const memory = watchMemory(hook);
  const answer = await hook.ask(derivation);
  if (answer === "accept") hook.work([], outputs);
  else hook.close();
  const result = await within("the end", hook.ended, LIMIT * 1000)
    .catch((error) => {
      for (const pid of descendants(hook.child.pid!)) killProcess(pid);
      throw new Error(`${error.message}\n${hook.text()}`);
    });
  const { status, stderr } = result;
  return { answer, status, text: stderr, memory: await memory };
}

for (const runtime of RUNTIMES) suiteUnder(runtime);

function suiteUnder(runtime: Runtime): void {
  const test = suite(`a hostile machine under ${runtime}`);
  let liar: Liar;
  let address: string;

  test.before(async () => {
    up("head", "w1");
    const [, head] = /^head (\S+)/m.exec(lab("list")) ?? [];
    address = head!.replace(/\d+$/, "77");
    signer = new Signer();
    liar = await startLiar(address);
  });
  test.before.each(() => {
    clear();
    useLiar(address, liar);
  });
  test.after(() => {
    clear();
    liar.close();
    signer.close();
    up("head", "w1");
  });

  test("a machine that does not lie is believed", async () => {
    const outputs = [1, 2].map((number) => `${STORE}/${name(`out${number}`)}`);
    const node = directory(["x", program("#!/bin/sh")], ["y", link("x")]);
    liar.lies = { item: (path) => signed(node, path) };
    const outcome = await offer(runtime, outputs, SHORT);
    assert.is(outcome.answer, "accept", outcome.text);
    assert.is(outcome.status, 0, outcome.text);
    assert.equal(left().sort(), outputs.map((it) => it.slice(11)).sort());
    const out = `${root("head")}${outputs[0]!}`;
    assert.is(readFileSync(`${out}/y`, "utf8"), "#!/bin/sh");
  });

  for (const row of rows) {
    const isWanted = wanted ? RegExp(wanted).test(row.machine) : row.quick;
    if (!isWanted) continue;
    test(`a machine that ${row.machine}`, () => check(row));
  }

  async function check(row: Row): Promise<void> {
    const outputs = Array.from(
      { length: row.outputs ?? 1 },
      (_, index) => `${STORE}/${name(`out${index}`)}`,
    );
    liar.lies = {};
    let variables = [...SHORT, ...row.variables ?? []];
    if (row.late) {
      await seed(runtime, `${STORE}/${name("row")}.drv`);
      variables = [...variables, "OFFLOAD_FACTS_LIFETIME=600"];
    }
    liar.lies = row.lies(outputs);
    const outcome = await offer(runtime, outputs, variables);
    const { answer, status, text, memory } = outcome;
    assert.is(answer, row.answer ?? "accept", text);
    assert.is(status, row.answer === undefined ? row.status ?? 1 : 0, text);
    assert.match(text, row.says);
    if (row.says.source !== "^$") assert.match(text, address);
    assert.not.match(text, /\n {4}at /); // a stack
    assert.not.match(text, "\x1b");
    assert.ok(text.length < 3 * 2 ** 20, `${text.length} characters`);
    assert.equal(left(), []);
    assert.ok(memory < MEMORY, `${memory / 2 ** 20} MiB`);
  }

  test.run();
}

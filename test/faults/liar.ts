/**
 * A build machine that lies: an SSH server and a guix-daemon of the tests' own,
 * for what a real one never does.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { createServer } from "node:net";
import type { AddressInfo, Server, Socket } from "node:net";
import type { Duplex, Writable } from "node:stream";
import { setImmediate } from "node:timers/promises";
// @ts-types="npm:@types/ssh2@^1.15"
import ssh2 from "ssh2";
// @ts-types="npm:@types/ssh2@^1.15"
import type { Connection, ServerChannel } from "ssh2";
import { ByteReader, encode } from "../../mod.ts";

/** Where a connection gets to, in this order. */
export type Step =
  | "key exchange"
  | "authentication"
  | "probe"
  | "daemon"
  | "command";

/** What it does at a step instead of going on. */
export type Stop = "closes" | "is silent" | "refuses";

/** Bytes, at once or in pieces. */
export type Bytes =
  | Uint8Array
  | Iterable<Uint8Array>
  | AsyncIterable<Uint8Array>;

/** The daemon's operations, by what the hook calls them. */
export type Operation = keyof typeof OPERATIONS;

/** How a machine lies; what is left out it does as a good one does. */
export interface Lies {
  /** Takes over the connection, without SSH. */
  readonly connection?: (socket: Socket) => void;
  /** Whether it shows another host key than its own. */
  readonly otherHostKey?: boolean;
  /** Called with a session that just began. */
  readonly session?: (connection: Connection) => void;
  /** Where it stops, and how. */
  readonly stops?: Partial<Record<Step, Stop>>;
  /** What the probe prints. */
  readonly facts?: () => Bytes;
  /** What the probe prints to standard error. */
  readonly complaints?: () => Bytes;
  /** What another command prints. */
  readonly command?: (command: string) => Bytes;
  /** Takes over a channel to the daemon. */
  readonly daemon?: (channel: Duplex) => void;
  /** What the daemon answers to operations. */
  readonly answers?: Partial<Record<Operation, () => Bytes>>;
  /** The export of an item. */
  readonly item?: (path: string) => Bytes | Promise<Bytes>;
  /** Whether it sends no matter how much was taken. */
  readonly floods?: boolean;
}

/** How the daemon's messages begin (guix/store.scm). */
export const STDERR = {
  next: 0x6f6c6d67,
  read: 0x64617461,
  write: 0x64617416,
  last: 0x616c7473,
  error: 0x63787470,
} as const;

const GREETING = encode(0x6478696f, 0x164, STDERR.last);

const DONE = encode(STDERR.last, 1);

const OPERATIONS = {
  greeting: 0x6e697863,
  buildThings: 9,
  exportPath: 16,
  setOptions: 19,
  queryPathInfo: 26,
  importPaths: 27,
  queryValidPaths: 31,
} as const;

/** What a good machine says of itself. */
const FACTS = Buffer.from(
  "uname Linux liar 6.1.0 x86_64\ncores 4\nload 0.00 0.00 0.00 1/100 4711\n" +
    "memory MemAvailable: 8000000 kB\n" +
    "store-bytes overlay 100000000 1 99999999 1% /gnu/store\n",
);

/** A machine that lies, while it is up. */
export interface Liar {
  /** Its port. */
  readonly port: number;
  /** Its host key. */
  readonly hostKey: string;
  /** How it lies: what is set holds for what it does from then on. */
  lies: Lies;
  /** Ends it and all its connections. */
  close(): void;
}

/** Settles when a stream takes more, or is closed. */
function drained(stream: Writable): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      stream.off("drain", done).off("close", done);
      resolve();
    };
    stream.on("drain", done).on("close", done);
  });
}

/** Writes all, at the pace at which it is taken, until the channel closes. */
export async function pour(channel: Writable, bytes: Bytes): Promise<void> {
  const pieces = bytes instanceof Uint8Array ? [bytes] : bytes;
  for await (const piece of pieces) {
    if (channel.destroyed || channel.writableEnded) return;
    if (!channel.write(piece)) await drained(channel);
  }
}

/** What ssh2 has inside. */
type Inside = Writable & {
  readonly outgoing: { window: number };
  readonly _client: { readonly _sock: Socket };
};

/** Writes all, at the pace of the network, whoever takes it at the end. */
async function flood(channel: Writable, bytes: Bytes): Promise<void> {
  const { outgoing, _client: { _sock: socket } } = channel as Inside;
  const pieces = bytes instanceof Uint8Array ? [bytes] : bytes;
  for await (const piece of pieces) {
    if (channel.destroyed || socket.destroyed) return;
    outgoing.window = 2 ** 31;
    channel.write(piece);
    await setImmediate();
    if (socket.writableNeedDrain) await drained(socket);
  }
}

/** Reads numbers that don't matter. */
async function skip(reader: ByteReader, count: number): Promise<string[]> {
  for (; count > 0; count--) await reader.number();
  return [];
}

/** Reads an operation's arguments; returns the paths among them. */
async function readArguments(
  reader: ByteReader,
  operation: Operation,
): Promise<string[]> {
  if (operation === "greeting") return skip(reader, 3);
  if (operation === "importPaths") return [];
  if (operation === "setOptions") {
    await skip(reader, 9);
    for (let left = 2 * await reader.number(); left > 0; left--) {
      await reader.string(4096);
    }
    return [];
  }
  const isOne = ["exportPath", "queryPathInfo"]
    .includes(operation);
  const paths = isOne ? [await reader.string(4096)] : await reader.strings();
  const hasMode = ["buildThings", "exportPath"].includes(operation);
  await skip(reader, hasMode ? 1 : 0);
  return paths;
}

/** What the daemon answers. */
async function* answer(
  operation: Operation,
  paths: readonly string[],
  { answers, item }: Lies,
): AsyncGenerator<Uint8Array> {
  const lie = answers?.[operation]?.();
  if (lie !== undefined) yield* lie instanceof Uint8Array ? [lie] : lie;
  else if (operation === "greeting") yield GREETING;
  else if (operation === "setOptions") yield encode(STDERR.last);
  else if (operation === "queryValidPaths") yield encode(STDERR.last, paths);
  else if (operation === "queryPathInfo") {
    yield encode(STDERR.last, "", "", [], 0, 120);
  } else if (operation !== "exportPath") yield DONE;
  else {
    const bytes = await item?.(paths[0]!) ?? Buffer.alloc(0);
    const pieces = bytes instanceof Uint8Array ? [bytes] : bytes;
    for await (const piece of pieces) {
      for (let at = 0; at < piece.length; at += 1 << 20) {
        yield encode(STDERR.write, piece.subarray(at, at + (1 << 20)));
      }
    }
    yield DONE;
  }
}

/** Serves a channel to the daemon. */
async function serveDaemon(channel: Duplex, liar: Liar): Promise<void> {
  const reader = new ByteReader(channel, "hook");
  while (await reader.more()) {
    const code = await reader.number();
    const names = Object.keys(OPERATIONS) as Operation[];
    const operation = names.find((name) => OPERATIONS[name] === code);
    if (operation === undefined) throw new Error(`unexpected ${code}`);
    const paths = await readArguments(reader, operation);
    const bytes = answer(operation, paths, liar.lies);
    await (liar.lies.floods ? flood : pour)(channel, bytes);
  }
}

/** Runs a command: the probe's facts, or what else is printed. */
async function serveCommand(
  channel: ServerChannel,
  command: string,
  { facts, complaints, command: other }: Lies,
): Promise<void> {
  const isProbe = command.includes("uname");
  const output = isProbe ? facts?.() ?? FACTS : other?.(command);
  // What tells the output from what a shell prints when it starts.
  const [, ...parts] = /([\da-f-]{36}) ([\da-f-]{36})/.exec(command) ?? [];
  if (output !== undefined) channel.write(`${parts.join(":")}\n`);
  await Promise.all([
    pour(channel, output ?? Buffer.alloc(0)),
    isProbe && complaints && pour(channel.stderr, complaints()),
  ]);
  channel.exit(output === undefined ? 127 : 0);
  channel.end();
}

/** Serves a connection by SSH. */
function serve(connection: Connection, socket: Socket, liar: Liar): void {
  const stopped = (step: Step, refuse?: () => void) => {
    const stop = liar.lies.stops?.[step];
    if (stop === "closes") socket.destroy();
    if (stop === "refuses") refuse?.();
    return stop !== undefined;
  };
  connection.on("error", () => {}); // the hook ended it
  connection.on("handshake", () => void stopped("key exchange"));
  connection.on("authentication", (context) => {
    if (!stopped("authentication", () => context.reject())) context.accept();
  });
  connection.on("ready", () => liar.lies.session?.(connection));
  connection.on("session", (accept) => {
    accept().on("exec", (accept, reject, { command }) => {
      const step = command.includes("uname") ? "probe" : "command";
      if (stopped(step, reject)) return;
      const channel = accept();
      channel.on("error", () => {});
      serveCommand(channel, command, liar.lies).catch(() => {});
    });
  });
  const streamLocal = (accept: () => ServerChannel, reject: () => void) => {
    if (stopped("daemon", reject)) return;
    const channel = accept();
    channel.on("error", () => {});
    if (liar.lies.daemon !== undefined) return liar.lies.daemon(channel);
    serveDaemon(channel, liar).catch(() => channel.destroy());
  };
  connection.on("openssh.streamlocal" as "session", streamLocal as never);
}

/** Brings a machine up that lies, at an address of the loopback. */
export async function startLiar(address: string): Promise<Liar> {
  const [own, other] = [1, 2].map(() =>
    ssh2.utils.generateKeyPairSync("ed25519")
  );
  const sockets = new Set<Socket>();
  const makeServer = (key: string) =>
    new ssh2.Server({ hostKeys: [key] }, (connection) => {
      const socket = (connection as Connection & { _sock: Socket })._sock;
      serve(connection, socket, liar);
    });
  const good = makeServer(own!.private);
  const bad = makeServer(other!.private);
  const server: Server = createServer((socket) => {
    sockets.add(socket);
    socket.on("error", () => {}).on("close", () => sockets.delete(socket));
    socket.setNoDelay(true);
    if (liar.lies.connection !== undefined) liar.lies.connection(socket);
    else (liar.lies.otherHostKey ? bad : good).injectSocket(socket);
  });
  await new Promise<void>((resolve) => server.listen(0, address, resolve));
  const liar: Liar = {
    port: (server.address() as AddressInfo).port,
    hostKey: own!.public.trim(),
    lies: {},
    close() {
      server.close();
      for (const socket of sockets) socket.destroy();
    },
  };
  return liar;
}

/** What an export says of its item, behind the nar. */
export interface Metadata {
  /** The item. */
  readonly path: string;
  /** What it refers to. */
  readonly references?: readonly string[];
  /** The derivation that made it. */
  readonly deriver?: string;
}

/** The part of an export that is signed. */
export function unsignedExport(
  nar: Uint8Array,
  { path, references = [], deriver = "" }: Metadata,
): Buffer {
  const metadata = encode(0x4558494e, path, references, deriver);
  return Buffer.concat([nar, metadata]);
}

/** An export with its signature, or without one. */
export function withSignature(
  unsigned: Uint8Array,
  signature: string | undefined,
): Buffer {
  const end = signature === undefined ? encode(0) : encode(1, signature);
  return Buffer.concat([unsigned, end]);
}

/** What a signature is of: the hash of an unsigned export. */
export function exportHash(unsigned: Uint8Array): string {
  return createHash("sha256").update(unsigned).digest("hex");
}

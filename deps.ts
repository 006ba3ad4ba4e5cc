/**
 * The border to what others have made: the packages, named in this file alone
 * (their versions stand in package.json), where the runtimes differ, and what
 * mends either, each with why and since when.
 *
 * @module
 */

import { isUtf8 } from "node:buffer";
import {
  constants,
  createPrivateKey,
  createPublicKey,
  createSecretKey,
  getCiphers,
  publicDecrypt,
} from "node:crypto";
import {
  constants as fsConstants,
  existsSync,
  mkdirSync,
  openSync,
  realpathSync,
  renameSync,
  symlinkSync,
} from "node:fs";
import type { Stats } from "node:fs";
import { dirname } from "node:path";
import process from "node:process";
import { finished } from "node:stream";
import type { Duplex } from "node:stream";
import { fileURLToPath } from "node:url";
import type {
  CipherAlgorithm,
  Client,
  ParsedKey,
  ServerHostKeyAlgorithm,
} from "ssh2";
import nacl from "tweetnacl";

// --- Packages

export { default as cac } from "cac";
// @ts-types="npm:@types/ssh2@^1.15"
export { default as ssh2 } from "ssh2";
// @ts-types="npm:@types/ssh2@^1.15"
export type * from "ssh2";
export { default as glob } from "tiny-glob";

// --- Deno and Node

/** What is used of Deno's own calls. */
interface DenoNamespace {
  readonly version: { readonly deno: string };
  statSync(file: string): unknown;
  dlopen(file: string, symbols: unknown): {
    readonly symbols: Record<
      "rename" | "symlink" | "setgroups",
      (...values: (Buffer | number | null)[]) => number
    >;
  };
}

/** Deno's own calls; `undefined` on Node. */
export const deno = (globalThis as { Deno?: unknown }).Deno as
  | DenoNamespace
  | undefined;

/** The C library, for file names that are no UTF-8: Deno 2 takes none. */
let libc: ReturnType<DenoNamespace["dlopen"]> | undefined;

function callWithBytes(name: "rename" | "symlink", paths: Buffer[]): void {
  const signature = { parameters: ["buffer", "buffer"], result: "i32" };
  const symbols = { rename: signature, symlink: signature };
  libc ??= deno!.dlopen("libc.so.6", symbols);
  const strings = paths.map((path) => Buffer.concat([path, Buffer.alloc(1)]));
  if (libc.symbols[name](...strings) !== 0) {
    throw new Error(`failed to ${name} '${paths.join("' to '")}'`);
  }
}

/** Renames a file to a name that may be no UTF-8, as a nar's entries may. */
export function renameToBytes(from: string, to: Buffer): void {
  if (deno === undefined) renameSync(from, to);
  else callWithBytes("rename", [Buffer.from(from), to]);
}

/** Makes a link whose target may be no UTF-8. */
export function symlinkBytes(target: Buffer, file: string): void {
  if (deno === undefined) symlinkSync(target, file);
  else if (isUtf8(target)) symlinkSync(target.toString(), file);
  else callWithBytes("symlink", [target, Buffer.from(file)]);
}

/** Leaves all groups but the process's own, which root needs for nothing. */
function leaveGroups(): void {
  if (process.getgroups!().length === 0) return;
  if (process.setgroups) return process.setgroups([]);
  const setgroups = { parameters: ["usize", "pointer"], result: "i32" };
  deno!.dlopen("libc.so.6", { setgroups }).symbols.setgroups(0, null);
}

/** The group of accounts that have no other: in Guix, as in most systems. */
const NOGROUP = 65534;

/**
 * Takes on the rights of an account, until what is returned is called; those of
 * root's group, which a file of its may have, are none of them.
 */
export function become({ uid, gid }: Pick<Stats, "uid" | "gid">): () => void {
  const goBack = () => {
    process.seteuid!(0);
    process.setegid!(0);
  };
  leaveGroups();
  try {
    process.setegid!(gid || NOGROUP);
    process.seteuid!(uid);
    return goBack;
  } catch (error) {
    goBack();
    throw error;
  }
}

/** Makes directories one by one: Node says "not found" of a read-only system. */
export function makeDirectories(directory: string): void {
  if (existsSync(directory)) return;
  makeDirectories(dirname(directory));
  try {
    mkdirSync(directory);
  } catch (error) {
    // Another process may have been quicker.
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  }
}

/**
 * Opens a descriptor anew (by number, Deno can't use all): to write to a pipe
 * won't wait then, as it goes on to do for others who share the descriptor.
 */
export function reopen(
  descriptor: number,
  process: number | "self" = "self",
): number {
  const { O_APPEND, O_NONBLOCK, O_WRONLY } = fsConstants;
  const flags = O_APPEND | O_NONBLOCK | O_WRONLY;
  return openSync(`/proc/${process}/fd/${descriptor}`, flags);
}

/** Does nothing for so long, nor anything else. */
export function sleep(milliseconds: number): void {
  const never = new Int32Array(new SharedArrayBuffer(4));
  Atomics.wait(never, 0, 0, milliseconds);
}

/** The chunks of a stream as they came; its own iterator would join them. */
export async function* chunksOf(
  stream: Duplex,
): AsyncGenerator<Uint8Array, void> {
  const chunks: Uint8Array[] = [];
  let wake = () => {};
  let ended = false;
  let failure: Error | undefined;
  const end = (error?: Error | null) => {
    failure ??= error ?? undefined;
    ended = true;
    wake();
  };
  stream.on("data", (chunk) => {
    chunks.push(chunk);
    stream.pause();
    wake();
  });
  finished(stream, { writable: false }, end);
  for (;;) {
    for (let chunk; (chunk = chunks.shift()) !== undefined;) yield chunk;
    if (failure !== undefined) throw failure;
    if (ended) return;
    const woken = new Promise<void>((resolve) => wake = resolve);
    stream.resume();
    await woken;
  }
}

/** Says so where a runtime is too old, on which things fail in odd ways. */
export function runtimeProblem(): string | undefined {
  const [name, version, oldest] = deno === undefined
    ? ["Node", process.versions.node, [22, 14, 0]] as const
    : ["Deno", deno.version.deno, [2, 7, 14]] as const;
  const numbers = version.split(".").map(Number);
  const index = oldest.findIndex((part, index) => numbers[index] !== part);
  return index >= 0 && numbers[index]! < oldest[index]!
    ? `${name} ${version} is too old: ${oldest.join(".")} or newer is needed`
    : undefined;
}

/** Whether a module is the program; Node before 22.18 does not say so itself. */
export function isProgram({ main, url }: ImportMeta): boolean {
  if (main !== undefined) return main;
  const [, script = ""] = process.argv;
  return existsSync(script) && realpathSync(script) === fileURLToPath(url);
}

// --- ssh2 (1.17)

/**
 * The ciphers of SSH, the best here first. Node is quickest with AES in GCM;
 * Deno needs half as long again for it as for AES in CTR with an HMAC
 * (measured). ChaCha20 is last: ssh2 makes three ciphers a packet for it and
 * finishes none, and Deno frees only finished ones, so it takes about 1 KiB
 * more memory with each packet.
 */
export function ciphers(): CipherAlgorithm[] {
  const gcm = ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com"] as const;
  const ctr = ["aes128-ctr", "aes192-ctr", "aes256-ctr"] as const;
  const chacha = getCiphers().includes("chacha20")
    ? ["chacha20-poly1305@openssh.com"] as const
    : [];
  return deno === undefined
    ? [...gcm, ...ctr, ...chacha]
    : [...ctr, ...gcm, ...chacha];
}

/** The signature algorithms by which a server shows a key of each type. */
export const HOST_KEY_ALGORITHMS: Readonly<
  Record<string, readonly ServerHostKeyAlgorithm[]>
> = {
  "ssh-ed25519": ["ssh-ed25519"],
  "ssh-rsa": ["rsa-sha2-512", "rsa-sha2-256", "ssh-rsa"],
  "ecdsa-sha2-nistp256": ["ecdsa-sha2-nistp256"],
  "ecdsa-sha2-nistp384": ["ecdsa-sha2-nistp384"],
  "ecdsa-sha2-nistp521": ["ecdsa-sha2-nistp521"],
};

/** Writes strings as SSH does, each behind its length (RFC 4251, section 5). */
function sshStrings(...parts: readonly (Buffer | string)[]): Buffer {
  return Buffer.concat(parts.flatMap((part) => {
    const length = Buffer.alloc(4);
    length.writeUInt32BE(Buffer.byteLength(part));
    return [length, Buffer.from(part)];
  }));
}

/** Writes a key, of the public one and what that lacks, as OpenSSH does. */
function opensshKey(publicKey: Buffer, secretPart: Buffer): string {
  const secret = Buffer.concat([
    Buffer.alloc(8), // twice the same number
    publicKey,
    sshStrings(secretPart, ""),
  ]);
  const paddingBytes = [1, 2, 3, 4, 5, 6, 7].slice(0, -secret.length & 7);
  const blob = Buffer.concat([
    Buffer.from("openssh-key-v1\0"),
    sshStrings("none", "none", ""),
    Buffer.from([0, 0, 0, 1]),
    sshStrings(publicKey, Buffer.concat([secret, Buffer.from(paddingBytes)])),
  ]).toString("base64");
  return "-----BEGIN OPENSSH PRIVATE KEY-----\n" +
    blob.replace(/.{1,70}/g, "$&\n") + "-----END OPENSSH PRIVATE KEY-----\n";
}

/**
 * Turns PEM forms into OpenSSH's: PKCS #8 ssh2 doesn't read, and of SEC 1 not
 * all curves under Deno.
 */
export function convertPrivateKey(pem: string): string {
  if (!/-----BEGIN (EC )?PRIVATE KEY-----/.test(pem)) return pem;
  const key = createPrivateKey(pem);
  if (key.asymmetricKeyType === "rsa") {
    return key.export({ type: "pkcs1", format: "pem" }) as string;
  }
  const jwk = key.export({ format: "jwk" });
  const [d, x, y] = [jwk.d, jwk.x, jwk.y].map((part = "") =>
    Buffer.from(part, "base64url")
  );
  if (jwk.crv === "Ed25519") {
    return opensshKey(sshStrings("ssh-ed25519", x!), Buffer.concat([d!, x!]));
  }
  const curve = jwk.crv?.replace(/^P-/, "nistp") ?? "";
  const type = `ecdsa-sha2-${curve}`;
  const isKnown = type in HOST_KEY_ALGORITHMS;
  if (!isKnown) throw new Error("unsupported type of key");
  const point = Buffer.concat([Buffer.of(4), x!, y!]);
  return opensshKey(sshStrings(type, curve, point), d!);
}

/**
 * Drops the zero that OpenSSH puts before a number whose first bit is set:
 * ssh2 hands it on, and Deno refuses it.
 */
export function withoutSign(key: string, parsed: ParsedKey): string {
  if (!parsed.type.startsWith("ecdsa-")) return key;
  const pem = parsed.getPrivatePEM().replace(/-----.*-----/g, "");
  const der = Buffer.from(pem, "base64");
  const start = der.indexOf(Buffer.of(2, 1, 1, 4)) + 5; // behind the version
  const number = der.subarray(start, start + der[start - 1]!);
  if (number[0] !== 0 || number[1]! < 0x80) return key;
  return opensshKey(parsed.getPublicSSH(), number.subarray(1));
}

/** What makes packets and reads them, with the names of their keys. */
const PACKETS = { _cipher: "_encKey", _decipher: "_decipherKey" } as const;

/**
 * Has a client wait for nothing more to send, and its keys at hand: in GCM, ssh2
 * makes a cipher for each packet, which takes Node 24 four times as long of
 * bytes (measured).
 */
export function quicken(client: Client): Client {
  client.on("connect", () => client.setNoDelay(true));
  if (deno !== undefined) return client;
  type Parts = Record<string, Record<string, unknown> | undefined>;
  // After each exchange of keys; ssh2 has no other way to have them.
  client.on("handshake", () => {
    const { _protocol: parts } = client as { _protocol?: Parts };
    for (const [name, keyName] of Object.entries(PACKETS)) {
      const key = parts?.[name]?.[keyName];
      if (Buffer.isBuffer(key)) parts![name]![keyName] = createSecretKey(key);
    }
  });
  return client;
}

/** What may come over a channel before it is read, in bytes: ssh2's window. */
const WINDOW = 2 ** 21;

/** Ends a connection over which more comes than may: ssh2 lets it pass. */
export function limitUnread(channel: Duplex, client: Client): void {
  const push = channel.push;
  channel.push = (chunk) => {
    const isMuch = chunk !== null && channel.readableLength > 2 * WINDOW;
    if (!isMuch) return push.call(channel, chunk);
    client.emit("error", new Error("it sends more than was asked for"));
    return false;
  };
}

/** Connects to a Unix-domain socket on the other side. */
export function openSocket(client: Client, file: string): Promise<Duplex> {
  return new Promise((resolve, reject) => {
    client.openssh_forwardOutStreamLocal(file, (cause, stream) => {
      if (cause !== undefined) return reject(cause);
      limitUnread(stream, client);
      stream.stderr.resume(); // nobody sends any; unread, it would pile up
      resolve(stream);
    });
  });
}

/** Tells how far a client has come. */
export function tellReached(
  client: Client,
  reached: (what: "connect" | "greeting" | "host key") => void,
): void {
  client.once("connect", () => {
    reached("connect");
    // ssh2 has no event of its own for it.
    const { _sock: socket } = client as { _sock?: Duplex };
    socket?.once("data", () => reached("greeting"));
  });
  // Its first message after the host key was found to be right.
  client.once("handshake", () => reached("host key"));
}

/**
 * What a server takes in a packet, in bytes, and writes to a socket at once, if
 * it is OpenSSH's; of others, such as Dropbear, that is not known.
 */
export function pieceSizeOf(client: Client): number {
  // ssh2 has no other way to tell; were it gone, no harm would be done.
  const { _remoteVer: version } = client as { _remoteVer?: unknown };
  return /^OpenSSH_/.test(String(version)) ? 32768 : 0;
}

// --- Signatures (node:crypto and tweetnacl 1.0)

// node:crypto has ECDSA over no such curve as Guix's keys are on, tweetnacl the
// curve but no ECDSA; neither takes the hash of a message for the message.

/** How PKCS #1 marks a SHA-256 hash (RFC 8017, section 9.2). */
const SHA256_PREFIX = "3031300d060960864801650304020105000420";

/**
 * Verifies a signature of a SHA-256 hash by RSA, as PKCS #1 has it: a number,
 * as are the modulus and the exponent of the key, big end first.
 *
 * @returns whether it is one; not so where the key is none.
 */
export function verifyRsa(
  n: Buffer,
  e: Buffer,
  hash: Buffer,
  s: Buffer,
): boolean {
  const number = (bytes: Buffer) => {
    const start = bytes.findIndex((byte) => byte !== 0);
    return bytes.subarray(start < 0 ? bytes.length : start);
  };
  const [modulus, exponent, signature] = [n, e, s].map(number);
  const jwk = {
    kty: "RSA",
    n: modulus!.toString("base64url"),
    e: exponent!.toString("base64url"),
  };
  const padded = Buffer.alloc(modulus!.length);
  if (signature!.length > padded.length) return false;
  padded.set(signature!, padded.length - signature!.length);
  try {
    const key = createPublicKey({ key: jwk, format: "jwk" });
    const signed = publicDecrypt(
      { key, padding: constants.RSA_PKCS1_PADDING },
      padded,
    );
    return signed.toString("hex") === SHA256_PREFIX + hash.toString("hex");
  } catch {
    return false; // the padding is wrong, or the key none
  }
}

// The curve Ed25519 (RFC 8032, section 5.1): its field, the order of its base
// point and its constant d.
const FIELD = 2n ** 255n - 19n;
const ORDER = 2n ** 252n + 27742317777372353535851937790883648493n;
const CURVE_D = modulo(-121665n * inverse(121666n, FIELD), FIELD);

function modulo(value: bigint, modulus: bigint): bigint {
  return (value % modulus + modulus) % modulus;
}

function power(base: bigint, exponent: bigint, modulus: bigint): bigint {
  let result = 1n;
  for (let rest = exponent; rest > 0n; rest >>= 1n) {
    if (rest & 1n) result = result * base % modulus;
    base = base * base % modulus;
  }
  return result;
}

/** What gives 1 when multiplied with a number, by Euclid's algorithm. */
function inverse(value: bigint, modulus: bigint): bigint {
  let [rest, next] = [modulus, modulo(value, modulus)];
  let [result, other] = [0n, 1n];
  while (next !== 0n) {
    const quotient = rest / next;
    [rest, next] = [next, rest - quotient * next];
    [result, other] = [other, result - quotient * other];
  }
  return modulo(result, modulus);
}

function bigEndian(bytes: Uint8Array): bigint {
  return BigInt(`0x0${Buffer.from(bytes).toString("hex")}`);
}

function littleEndian(bytes: Uint8Array): bigint {
  return bigEndian(Uint8Array.from(bytes).reverse());
}

function toLittleEndian(value: bigint): Uint8Array {
  const hex = value.toString(16).padStart(64, "0");
  return Uint8Array.from(Buffer.from(hex, "hex")).reverse();
}

/** An element of the field, and a point in extended coordinates. */
type Element = Float64Array;
type Point = readonly [x: Element, y: Element, z: Element, t: Element];

/** What tweetnacl has but does not declare. */
interface CurveOperations {
  gf(): Element;
  unpack25519(element: Element, bytes: Uint8Array): void;
  pack25519(bytes: Uint8Array, element: Element): void;
  A(sum: Element, element: Element, other: Element): void;
  Z(difference: Element, from: Element, what: Element): void;
  M(product: Element, element: Element, other: Element): void;
}

const { lowlevel } = nacl as unknown as { lowlevel: CurveOperations };

function makeElement(value: bigint): Element {
  const element = lowlevel.gf();
  lowlevel.unpack25519(element, toLittleEndian(value));
  return element;
}

function makePoint(x: bigint, y: bigint): Point {
  return [x, y, 1n, x * y % FIELD].map(makeElement) as unknown as Point;
}

const TWICE_D = makeElement(2n * CURVE_D % FIELD);

const { gf, A: plus, Z: minus, M: times } = lowlevel;

/** What an addition needs: to make it takes longer than to add. */
const scratch = [gf(), gf(), gf(), gf(), gf(), gf(), gf(), gf()] as const;

/** Adds a point to another one, or to itself (RFC 8032, section 5.1.4). */
function addPoint([x1, y1, z1, t1]: Point, [x2, y2, z2, t2]: Point): void {
  const [a, b, c, d, e, f, g, h] = scratch;
  minus(a, y1, x1);
  minus(e, y2, x2);
  times(a, a, e);
  plus(b, y1, x1);
  plus(e, y2, x2);
  times(b, b, e);
  times(c, t1, t2);
  times(c, c, TWICE_D);
  times(d, z1, z2);
  plus(d, d, d);
  minus(e, b, a);
  minus(f, d, c);
  plus(g, d, c);
  plus(h, b, a);
  times(x1, e, f);
  times(y1, g, h);
  times(t1, e, h);
  times(z1, f, g);
}

function fieldValue(element: Float64Array): bigint {
  const bytes = new Uint8Array(32);
  lowlevel.pack25519(bytes, element);
  return littleEndian(bytes);
}

/** Decodes a point (RFC 8032, section 5.1.3), `undefined` if it is none. */
function decodePoint(bytes: Buffer): Point | undefined {
  if (bytes.length !== 32) return undefined;
  const number = littleEndian(bytes);
  const y = number & (2n ** 255n - 1n);
  const sign = number >> 255n;
  if (y >= FIELD) return undefined;
  const u = modulo(y * y - 1n, FIELD);
  const v = modulo(CURVE_D * y * y + 1n, FIELD);
  const root = power(u * v ** 7n % FIELD, (FIELD - 5n) / 8n, FIELD);
  let x = u * v ** 3n * root % FIELD;
  if (v * x * x % FIELD !== u) {
    x = x * power(2n, (FIELD - 1n) / 4n, FIELD) % FIELD;
  }
  if (v * x * x % FIELD !== u || (x === 0n && sign === 1n)) return undefined;
  return makePoint((x & 1n) === sign ? x : FIELD - x, y);
}

/** Keys that were decoded, the latest ones: most signatures are by few. */
const keys = new Map<string, Point | undefined>();

/** The point that a key is, `undefined` if it is none. */
function pointOf(key: Buffer): Point | undefined {
  const name = key.toString("hex");
  if (!keys.has(name)) {
    if (keys.size === 16) keys.clear();
    keys.set(name, decodePoint(key));
  }
  return keys.get(name);
}

let base: Point | undefined;

/**
 * Adds a multiple of the base point to one of `point`, bit by bit of both, in a
 * time that depends on them: nothing here is secret.
 */
function sumOfMultiples(ofBase: bigint, point: Point, ofPoint: bigint): Point {
  base ??= decodePoint(Buffer.from("58".padEnd(64, "6"), "hex"))!;
  const both = makePoint(0n, 1n);
  for (const one of [base, point]) addPoint(both, one);
  const sum = makePoint(0n, 1n);
  for (let bit = 253n; bit-- > 0n;) {
    addPoint(sum, sum);
    const [isBase, isPoint] = [ofBase, ofPoint].map((it) => it >> bit & 1n);
    const term = isBase ? (isPoint ? both : base) : isPoint ? point : undefined;
    if (term !== undefined) addPoint(sum, term);
  }
  return sum;
}

/**
 * Verifies an ECDSA signature over the curve Ed25519, as libgcrypt makes it
 * for Guix: the 256-bit hash loses 3 bits, for the order has 253. The key `q`
 * is a point as EdDSA encodes it, 32 bytes; the numbers have their big end
 * first.
 *
 * @returns whether it is one; not so where the key is none.
 */
export function verifyEcdsa(
  q: Buffer,
  hash: Buffer,
  rBytes: Buffer,
  sBytes: Buffer,
): boolean {
  const [r, s] = [bigEndian(rBytes), bigEndian(sBytes)];
  if (r <= 0n || r >= ORDER || s <= 0n || s >= ORDER) return false;
  const key = pointOf(q);
  if (key === undefined) return false;
  const w = inverse(s, ORDER);
  const ofBase = (bigEndian(hash) >> 3n) * w % ORDER;
  const [x, , z] = sumOfMultiples(ofBase, key, r * w % ORDER).map(fieldValue);
  return x! * inverse(z!, FIELD) % FIELD % ORDER === r;
}

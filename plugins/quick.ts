/**
 * The transport that is used unless told: items whose names follow from their
 * contents go without signatures, small archives over the connections to the
 * daemons, and bulk by `guix archive`, compressed where the way is slow.
 *
 * @module
 */

import { createHash, randomBytes } from "node:crypto";
import { lstatSync, readFileSync } from "node:fs";
import { dirname } from "node:path";
import type { Duplex, Transform } from "node:stream";
import { pipeline } from "node:stream/promises";
import {
  constants as zlibConstants,
  createGunzip,
  createGzip,
  createZstdCompress,
  createZstdDecompress,
} from "node:zlib";
import {
  addCall,
  addTextRequest,
  bounded,
  BULK,
  ByteReader,
  count,
  encode,
  exportBundle,
  exportPath,
  HASH_PART_LENGTH,
  importPaths,
  isOutOfStep,
  itemName,
  LIMITS,
  makeProgress,
  OffloadError,
  operateAll,
  OPERATION,
  queryValidPaths,
  READ_SIZE,
  remind,
  withProgress,
} from "../mod.ts";
import type {
  PathInfo,
  Plugin,
  StoreConnection,
  Transport,
  TransportContext,
} from "../mod.ts";

const NIX_BASE32 = "0123456789abcdfghijklmnpqrsvwxyz";

/** Folds a hash to 160 bits and writes it as the names in the store do. */
function storeHash(fingerprint: string): string {
  const folded = new Uint8Array(20);
  createHash("sha256").update(fingerprint).digest()
    .forEach((byte, i) => folded[i % 20]! ^= byte);
  // The last five bits come first.
  let text = "";
  for (let bit = 5 * (HASH_PART_LENGTH - 1); bit >= 0; bit -= 5) {
    const [low, high = 0] = folded.subarray(bit >> 3);
    text += NIX_BASE32[(low! | high << 8) >> (bit & 7) & 31];
  }
  return text;
}

/** What an item's name follows from: no signature is needed to believe it. */
export type ContentAddress = "text" | "flat" | "recursive";

/** A larger item is not read just to see what its name follows from. */
const LARGEST_ADDRESSED = 2 ** 20;

/** Reads a file; what is no file, or executable, is none of the plain kind. */
function readPlainFile(path: string): Buffer | undefined {
  const stat = lstatSync(path);
  const plain = stat.isFile() && (stat.mode & 0o111) === 0;
  return plain ? readFileSync(path) : undefined;
}

/** Finds out what the name of an item follows from (guix/store.scm). */
export function contentAddress(
  path: string,
  { references, narHash, narSize }: PathInfo,
  read: (path: string) => Buffer | undefined = readPlainFile,
): ContentAddress | undefined {
  const store = dirname(path);
  const is = (type: string, hash: string) =>
    path === `${store}/` +
        storeHash(`${type}:sha256:${hash}:${store}:${itemName(path)}`) +
        `-${itemName(path)}`;
  const alone = references.length === 0;
  if (narSize > LARGEST_ADDRESSED) return undefined;
  if (alone && is("source", narHash)) return "recursive";
  const contents = read(path);
  if (contents === undefined) return undefined;
  const hash = sha256(contents);
  if (is(["text", ...references.toSorted()].join(":"), hash)) return "text";
  const fixed = sha256(`fixed:out:sha256:${hash}:`);
  return alone && is("output:out", fixed) ? "flat" : undefined;
}

function sha256(data: string | Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}

/** Items to send by one means: by their contents, or as signed archives. */
export interface Batch {
  /** Whether the items' names follow from their contents. */
  readonly addressed: boolean;
  /** The store items, references first. */
  readonly paths: readonly string[];
}

/**
 * Orders items so that each comes after those it refers to, in few batches:
 * each costs a round trip or more.
 */
export function makeBatches(
  references: ReadonlyMap<string, readonly string[]>,
  isAddressed: (path: string) => boolean,
): Batch[] {
  const waiting = new Map<string, number>();
  const referrers = new Map<string, string[]>();
  for (const path of references.keys()) referrers.set(path, []);
  for (const [path, all] of references) {
    const targets = all.filter((target) =>
      target !== path && references.has(target)
    );
    waiting.set(path, targets.length);
    for (const target of targets) referrers.get(target)!.push(path);
  }
  return drain(waiting, referrers, isAddressed);
}

/** Takes what waits for nothing, means by means, until all is taken. */
function drain(
  waiting: Map<string, number>,
  referrers: ReadonlyMap<string, readonly string[]>,
  isAddressed: (path: string) => boolean,
): Batch[] {
  const batches: Batch[] = [];
  let ready = [...waiting.keys()].filter((path) => waiting.get(path) === 0);
  for (let addressed = true; ready.length > 0; addressed = !addressed) {
    const paths: string[] = [];
    const later: string[] = [];
    // `ready` grows while it is walked.
    for (const path of ready) {
      if (isAddressed(path) !== addressed) {
        later.push(path);
        continue;
      }
      paths.push(path);
      for (const referrer of referrers.get(path)!) {
        const left = waiting.get(referrer)! - 1;
        waiting.set(referrer, left);
        if (left === 0) ready.push(referrer);
      }
    }
    if (paths.length > 0) batches.push({ addressed, paths });
    ready = later;
  }
  return batches;
}

/**
 * What means of sending cost, in milliseconds, as measured: an item by its
 * contents and as a signed archive, starting `guix authenticate` on one side
 * and on both, a message of an archive, which is of `READ_SIZE`, and starting
 * `guix archive` there, which needs no round trip for each message.
 */
const COST = {
  addressed: 0.3,
  signed: 2.5,
  sign: 125,
  authenticate: 250,
  message: 0.5,
  archive: 350,
} as const;

/** Whether to send items by their contents rather than signed. */
function worthAddressing(
  addressed: readonly PathInfo[],
  others: number,
  roundTrip: number,
  { ahead }: StoreConnection,
): boolean {
  const { length } = addressed;
  const size = addressed.reduce((sum, { narSize }) => sum + narSize, 0);
  const messages = size / READ_SIZE;
  const waits = ahead === 0 ? length : Math.min(length, messages + 1);
  const archive = Math.min(messages * (roundTrip + COST.message), COST.archive);
  return COST.addressed * length + waits * roundTrip <
    COST.signed * length + archive + (others === 0 ? COST.authenticate : 0);
}

/** The nar of a file that is not executable. */
function fileNar(contents: Uint8Array): Buffer {
  const head = ["nix-archive-1", "(", "type", "regular", "contents"];
  return Buffer.concat([encode(...head), encode(contents, ")")]);
}

/** The request that adds an item to a store by what its name follows from. */
async function addressedRequest(
  path: string,
  address: ContentAddress,
  { references, narSize }: PathInfo,
  local: StoreConnection,
): Promise<Buffer> {
  const name = itemName(path);
  if (address === "text") {
    return addTextRequest(name, readFileSync(path), references);
  }
  const contents = readPlainFile(path);
  const nar = contents === undefined
    ? await readNar(local, path, narSize)
    : fileNar(contents);
  return addNarRequest(name, address === "recursive", nar);
}

/** Reads the nar of an item, with which its export begins. */
async function readNar(
  store: StoreConnection,
  path: string,
  size: number,
): Promise<Buffer> {
  const chunks = [];
  for await (const chunk of exportPath(store, path, false)) chunks.push(chunk);
  return Buffer.concat(chunks).subarray(0, size);
}

/** Sends items by their contents, each after those it refers to. */
async function sendAddressed(
  paths: readonly string[],
  items: ReadonlyMap<string, PathInfo>,
  addresses: ReadonlyMap<string, ContentAddress>,
  { local, log, machine, remote }: TransportContext,
): Promise<void> {
  const what = `sending ${count(paths.length)} to '${machine.name}'`;
  const progress = makeProgress(what, log);
  const problems: string[] = []; // told when all is answered
  const calls = async function* () {
    for (const path of paths) {
      const item = items.get(path)!;
      const address = addresses.get(path)!;
      const request = await addressedRequest(path, address, item, local);
      yield addCall(request, (added) => {
        if (added === path) return;
        problems.push(`'${machine.name}' made '${added}' of '${path}'`);
      });
      progress(item.narSize);
    }
  };
  await operateAll(remote, calls());
  if (problems.length > 0) throw new OffloadError(problems[0]!);
}

/** What packs a stream there and unpacks it here, or the other way round. */
interface Compressor {
  compress(level: number): Transform;
  decompress(): Transform;
}

/** The programs to look for on a machine, the best first: four letters each. */
const COMPRESSORS: Readonly<Record<string, Compressor>> = {
  zstd: {
    compress: (level) =>
      createZstdCompress({
        params: { [zlibConstants.ZSTD_c_compressionLevel]: level },
      }),
    // No level in use needs more than 8 MiB of memory.
    decompress: () =>
      createZstdDecompress({
        params: { [zlibConstants.ZSTD_d_windowLogMax]: 23 },
      }),
  },
  gzip: {
    compress: (level) => createGzip({ level }),
    decompress: () => createGunzip(),
  },
};

/**
 * When compressing pays: a round trip, in milliseconds, from which on the way
 * is taken for slow, and else the size of an archive from which on it is
 * measured, the size of what is sent for that, both in bytes, and the bytes a
 * second below which the stores, rather than the way, would be waited for.
 */
const SLOW_WAY = {
  roundTrip: 10,
  measured: 2 ** 25,
  sample: 2 ** 19,
  rate: 2 ** 25,
} as const;

/** How fast the way to a machine is, in bytes a second. */
async function measureWay({ exec }: TransportContext): Promise<number> {
  const { channel, ended } = await exec("echo; cat >/dev/null; echo");
  const reader = new ByteReader(channel, "sample");
  await reader.read(1);
  const start = performance.now();
  channel.end(randomBytes(SLOW_WAY.sample));
  await reader.read(1);
  const rate = SLOW_WAY.sample / (performance.now() - start) * 1000;
  await discard(reader.rest());
  await ended; // the server may let one command run at a time
  return rate;
}

/** The level with which an archive of so many bytes gets there the soonest. */
async function compressionLevel(
  size: number,
  context: TransportContext,
): Promise<number | undefined> {
  const { machine, roundTrip } = context;
  if (machine.compression === "none" || size < BULK) return undefined;
  if (roundTrip > SLOW_WAY.roundTrip) return machine.compressionLevel;
  if (size < SLOW_WAY.measured) return undefined;
  const rate = await measureWay(context).catch(() => Infinity);
  return rate < SLOW_WAY.rate ? machine.compressionLevel : undefined;
}

/** `guix archive` at work on a build machine. */
interface RemoteArchive {
  readonly channel: Duplex;
  /** What it prints, still compressed. */
  readonly output: AsyncIterable<Uint8Array>;
  readonly compressor: Compressor | undefined;
  /**
   * Waits for its end.
   *
   * @throws {OffloadError} that says what went wrong there.
   */
  finish(): Promise<void>;
}

/** The command: it prints the compressor's name, the rest is compressed. */
function archiveCommand(
  way: "in" | "out",
  options: readonly string[],
  level: number | undefined,
): string {
  const archive = `guix archive ${options.join(" ")}`;
  const compressors = level === undefined ? [] : Object.keys(COMPRESSORS);
  return `
command -v guix >/dev/null || exit 127
for zip in ${compressors.join(" ")} none; do
  ! command -v $zip >/dev/null || break
done
echo $zip
[ $zip != none ] || exec ${archive}
` + (way === "in"
    ? `$zip -dc | ${archive}`
    // A pipe's status is its last command's.
    : `exec 4>&1
exit $({ { ${archive} 3>&-; echo $? >&3; } | $zip -${level}c 3>&- >&4; } 3>&1)`);
}

/** Starts `guix archive` there, or returns `undefined` where that can't be. */
async function startArchive(
  way: "in" | "out",
  options: readonly string[],
  level: number | undefined,
  context: TransportContext,
): Promise<RemoteArchive | undefined> {
  // What runs commands there is not loaded before it is needed.
  const { Noise, quoteWord } = await import("./_remote.ts");
  try {
    const command = archiveCommand(way, options.map(quoteWord), level);
    const { channel, ended } = await context.exec(command);
    const { name } = context.machine;
    const reader = new ByteReader(channel, `'guix archive' on '${name}'`);
    const compressor = (await reader.read(5)).toString().trimEnd();
    if (compressor !== "none" && !Object.hasOwn(COMPRESSORS, compressor)) {
      return undefined; // it is not our command that runs
    }
    return {
      channel,
      output: reader.rest(),
      compressor: COMPRESSORS[compressor],
      finish: async () => {
        const { code, errors } = await ended;
        if (code === 0) return;
        const why = errors.trim() || `exit ${code}`;
        throw new OffloadError(`'guix archive' failed on '${name}': ${why}`);
      },
    };
  } catch (error) {
    if (error instanceof Noise) context.log.warn(error);
    return undefined;
  }
}

/** Protects items from the collector there, as many as it can until stopped. */
function protect(
  paths: readonly string[],
  remote: StoreConnection,
): { stop(): Promise<void> } {
  let stopped = false;
  const left = function* () {
    for (const path of paths) if (!stopped) yield path;
  };
  const done = addTempRoots(remote, left());
  done.catch(() => {}); // it is told by whoever uses the connection next
  return {
    stop: () => {
      stopped = true;
      return done.catch((error) => {
        if (isOutOfStep(error)) throw error;
      });
    },
  };
}

/** Sends signed archives: small ones over the connection to the daemon. */
async function sendSigned(
  paths: readonly string[],
  size: number,
  context: TransportContext,
): Promise<void> {
  const { machine, remote, roundTrip } = context;
  const messages = size / READ_SIZE;
  const what = `sending ${count(paths.length)} to '${machine.name}'`;
  const makeBundle = () =>
    withProgress(context.exportBundle(paths), what, context.log);
  const isBulk = messages * (roundTrip + COST.message) >= COST.archive;
  const level = isBulk ? await compressionLevel(size, context) : undefined;
  const archive = isBulk
    ? await startArchive("in", ["--import"], level, context)
    : undefined;
  if (archive === undefined) {
    await importPaths(remote, makeBundle());
    return;
  }
  const { channel, compressor, output } = archive;
  discard(output).catch(() => {}); // the names of what it imported
  const protection = protect(paths, remote);
  try {
    const bundle = makeBundle();
    await (compressor === undefined || level === undefined
      ? pipeline(bundle, channel)
      : pipeline(bundle, compressor.compress(level), channel));
  } catch (cause) {
    // What it says is the cause, where its end is what broke the stream.
    if (cause instanceof OffloadError) throw cause;
    await archive.finish();
    throw cause;
  } finally {
    await protection.stop();
  }
  const unpacking = `waiting for '${machine.name}' to unpack them`;
  await remind(unpacking, context.log, () => archive.finish());
}

/** The bundle that `guix archive` makes there. */
async function* readArchive(
  { compressor, output, finish }: RemoteArchive,
): AsyncGenerator<Uint8Array, void> {
  if (compressor === undefined) yield* output;
  else {
    const bundle = compressor.decompress();
    // What fails there, fails the reading as well.
    pipeline(output, bundle).catch(() => {});
    yield* bundle;
  }
  await finish();
}

/** Round trips until a further connection to a daemon has signed something. */
const EXPORTER_TRIPS = 3;

/** Sends items: by their contents where that is worth it, else signed. */
async function send(
  items: ReadonlyMap<string, PathInfo>,
  context: TransportContext,
): Promise<void> {
  const { remote, roundTrip } = context;
  const addresses = new Map<string, ContentAddress>();
  for (const [path, item] of items) {
    const address = contentAddress(path, item);
    if (address !== undefined) addresses.set(path, address);
  }
  const addressed = [...addresses.keys()].map((path) => items.get(path)!);
  const others = items.size - addressed.length;
  if (!worthAddressing(addressed, others, roundTrip, remote)) addresses.clear();
  const references = new Map(
    [...items].map(([path, item]) => [path, item.references]),
  );
  const batches = makeBatches(references, (path) => addresses.has(path));
  for (const { addressed, paths } of batches) {
    const size = paths.reduce((n, path) => n + items.get(path)!.narSize, 0);
    if (!addressed) await sendSigned(paths, size, context);
    else await sendAddressed(paths, items, addresses, context);
  }
}

/** Over connections to the daemon, but for bulk. */
function daemonTransport(context: TransportContext): Transport {
  const { remote, roundTrip, openDaemon, signal } = context;
  let exporter: Promise<StoreConnection> | undefined;
  let ready: StoreConnection | undefined;
  return {
    missing: async (paths) => {
      const valid = new Set(await queryValidPaths(remote, paths));
      return paths.filter((path) => !valid.has(path));
    },
    send: (items) => send(items, context),
    prepare: (derivation) => {
      // Signing takes a while to start, and the build takes a while anyway.
      exporter = openDaemon().then(async (store) => {
        const chunks = exportPath(store, derivation);
        await discard(bounded(chunks, LIMITS.chunk, signal));
        return ready = store;
      });
      exporter.catch(() => {});
    },
    retrieve: async function* (paths, size = 0) {
      // From afar, it may take longer than to start the signing over there.
      const isQuick = EXPORTER_TRIPS * roundTrip < COST.sign;
      if (isQuick) await exporter?.catch(() => {});
      const store = ready ?? remote;
      const level = await compressionLevel(size, context);
      const archive = level === undefined
        ? undefined
        : await startArchive("out", ["--export", ...paths], level, context);
      yield* archive === undefined
        ? exportBundle(store, paths)
        : readArchive(archive);
    },
  };
}

async function discard(chunks: AsyncIterable<unknown>): Promise<void> {
  for await (const _ of chunks);
}

/** Protects items from garbage collection while the connection is open. */
export async function addTempRoots(
  store: StoreConnection,
  paths: Iterable<string>,
): Promise<void> {
  const calls = function* () {
    for (const path of paths) {
      const request = encode(OPERATION.addTempRoot, path);
      yield { request, result: (reader: ByteReader) => reader.number() };
    }
  };
  await operateAll(store, calls());
}

/** The request that adds a nar, or the file that it is, to the store. */
export function addNarRequest(
  name: string,
  recursive: boolean,
  nar: Buffer,
): Buffer {
  const request = [OPERATION.addToStore, name, true, recursive, "sha256"];
  return Buffer.concat([encode(...request), nar]);
}

const plugin = {
  name: "quick",
  transport: (_machine, context) => daemonTransport(context),
} satisfies Plugin;

export default plugin as Plugin;

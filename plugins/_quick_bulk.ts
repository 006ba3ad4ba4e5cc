/**
 * Bulk: one process at a time sends it to a machine, by `guix archive`, and
 * compressed where the way is slow.
 *
 * @module
 */

import { randomBytes } from "node:crypto";
import type { Duplex, Transform } from "node:stream";
import { pipeline } from "node:stream/promises";
import { setTimeout as delay } from "node:timers/promises";
import * as zlib from "node:zlib";
import {
  ByteReader,
  lockFile,
  OffloadError,
  orInMemory,
  remind,
  slotDirectory,
} from "../mod.ts";
import type { Slot, TransportContext } from "../mod.ts";

/** From this many bytes on, one process at a time sends to a machine. */
export const BULK = 2 ** 22;

/** Waits for the right to send a lot, so that nothing is sent twice. */
export async function lockUploads(
  { machine, stateDirectory, log, signal }: TransportContext,
): Promise<Slot> {
  const directory = slotDirectory(machine, stateDirectory);
  const take = () =>
    orInMemory(directory, (place) => lockFile(`${place}/upload`));
  let lock = take();
  if (lock !== undefined) return lock;
  const what = `waiting for another upload to '${machine.name}'`;
  log.info(`${what}...`);
  return await remind(what, log, async () => {
    while ((lock = take()) === undefined) {
      await delay(100);
      signal.throwIfAborted();
    }
    return lock;
  });
}

/** What packs a stream and unpacks it. */
interface Compressor {
  /** Packs, by a level as the format has them. */
  compress(level: number): Transform;
  /** Unpacks. */
  decompress(): Transform;
}

/** Zstandard, where the runtime has it: Node has since 22.15. */
const zstd: Compressor | undefined = "createZstdCompress" in zlib
  ? {
    compress: (level) =>
      zlib.createZstdCompress({
        params: { [zlib.constants.ZSTD_c_compressionLevel]: level },
      }),
    // No level in use needs more than 8 MiB of memory.
    decompress: () =>
      zlib.createZstdDecompress({
        params: { [zlib.constants.ZSTD_d_windowLogMax]: 23 },
      }),
  }
  : undefined;

/** The programs to look for on a machine, the best first: four letters each. */
const COMPRESSORS: Readonly<Record<string, Compressor>> = {
  ...(zstd && { zstd }),
  gzip: {
    compress: (level) => zlib.createGzip({ level }),
    decompress: () => zlib.createGunzip(),
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
export async function compressionLevel(
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
export async function startArchive(
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

/** The bundle that `guix archive` makes there. */
export async function* readArchive(
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

export async function discard(chunks: AsyncIterable<unknown>): Promise<void> {
  for await (const _ of chunks);
}

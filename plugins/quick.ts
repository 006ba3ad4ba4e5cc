/**
 * The transport that is used unless told: items whose names follow from their
 * contents go without signatures, small archives over the connections to the
 * daemons, and bulk by `guix archive`, compressed where the way is slow.
 *
 * @module
 */

import { pipeline } from "node:stream/promises";
import {
  count,
  DaemonError,
  exportBundle,
  importPaths,
  isOutOfStep,
  LIMITS,
  makeProgress,
  OffloadError,
  passOn,
  plainTransport,
  READ_SIZE,
  reason,
  remind,
  takeUpTo,
} from "../mod.ts";
import type {
  PathInfo,
  Plugin,
  StoreConnection,
  Transport,
  TransportContext,
} from "../mod.ts";
import {
  BULK,
  compressionLevel,
  discard,
  lockUploads,
  readArchive,
  startArchive,
} from "./_quick_bulk.ts";
import {
  contentAddress,
  makeBatches,
  makeReader,
  sendAddressed,
} from "./_quick_contents.ts";
import type { ContentAddress } from "./_quick_contents.ts";
import {
  addTempRoots,
  buildThings,
  exportPath,
  querySubstitutablePaths,
} from "./_quick_operations.ts";

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
    passOn(context.exportBundle(paths), makeProgress(what, context.log));
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

/** Round trips until a further connection to a daemon has signed something. */
const EXPORTER_TRIPS = 3;

/** Sends items: by their contents where that is worth it, else signed. */
async function send(
  items: ReadonlyMap<string, PathInfo>,
  context: TransportContext,
): Promise<void> {
  const { remote, roundTrip } = context;
  const addresses = new Map<string, ContentAddress>();
  const read = makeReader();
  for (const [path, item] of items) {
    const address = contentAddress(path, item, read);
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
    else await sendAddressed(paths, items, addresses, read, context);
  }
}

/** Has the machine fetch what its own substitute servers have of `paths`. */
async function substitute(
  paths: readonly string[],
  { machine, remote, log, patiently }: TransportContext,
): Promise<void> {
  // It would build a derivation.
  const items = paths.filter((path) => !path.endsWith(".drv"));
  const found = new Set(await querySubstitutablePaths(remote, items));
  const available = items.filter((path) => found.has(path));
  if (available.length === 0) return;
  log.info(`'${machine.name}' fetches ${count(available.length)} itself...`);
  const fetch = () => patiently(() => buildThings(remote, available, () => {}));
  try {
    await remind(`waiting for '${machine.name}' to fetch them`, log, fetch);
  } catch (error) {
    if (!(error instanceof DaemonError)) throw error;
    log.info(`'${machine.name}' could not: ${reason(error)}`);
  }
}

/**
 * Another connection to the daemon there, which has signed something: that takes
 * a while to start, and the build takes a while anyway.
 */
async function openExporter(
  derivation: string,
  { openDaemon, signal }: TransportContext,
): Promise<StoreConnection> {
  const store = await openDaemon();
  try {
    const chunks = exportPath(store, derivation);
    const check = () => signal.throwIfAborted();
    await discard(passOn(chunks, check, takeUpTo(LIMITS.chunk)));
  } catch (error) { // the build may be over
    store.stream.destroy();
    throw error;
  }
  store.hasSigned = true;
  return store;
}

/** Over connections to the daemon, but for bulk. */
function quickTransport(context: TransportContext): Transport {
  const { remote, roundTrip, patiently } = context;
  const plain = plainTransport(context);
  let mayFetch = context.settings.substitutes;
  let exporter: Promise<StoreConnection> | undefined;
  let ready: StoreConnection | undefined;
  return {
    missing: async (paths) => {
      const missing = await plain.missing(paths);
      const fetches = mayFetch && missing.length > 0;
      mayFetch = false;
      if (!fetches) return missing;
      await substitute(missing, context);
      return plain.missing(missing);
    },
    reserve: async (size) =>
      size < BULK ? undefined : await patiently(() => lockUploads(context)),
    send: (items) => send(items, context),
    prepare: (derivation) => {
      if (remote.hasSigned) return;
      exporter = openExporter(derivation, context);
      exporter.then((store) => exporter && (ready = store), () => {});
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
      exporter?.then(context.leaveDaemon, () => {});
      exporter = ready = undefined; // another build's, from now on
    },
  };
}

const plugin = {
  name: "quick",
  transport: (_machine, context) => quickTransport(context),
} satisfies Plugin;

export default plugin as Plugin;

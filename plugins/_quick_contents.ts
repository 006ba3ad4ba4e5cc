/**
 * Items whose names follow from their contents: they need no signature to be
 * believed, and are sent one by one over the connection to the daemon.
 *
 * @module
 */

import { hash } from "node:crypto";
import { lstatSync, readFileSync } from "node:fs";
import { dirname } from "node:path";
import {
  addCall,
  addTextRequest,
  count,
  encode,
  HASH_PART_LENGTH,
  itemName,
  makeProgress,
  OffloadError,
  operateAll,
} from "../mod.ts";
import type { PathInfo, StoreConnection, TransportContext } from "../mod.ts";
import { addNarRequest, exportPath } from "./_quick_operations.ts";

const NIX_BASE32 = "0123456789abcdfghijklmnpqrsvwxyz";

/** Folds a hash to 160 bits and writes it as the names in the store do. */
function storeHash(fingerprint: string): string {
  const bytes = hash("sha256", fingerprint, "buffer");
  for (let i = 20; i < bytes.length; i++) bytes[i - 20]! ^= bytes[i]!;
  bytes[20] = 0;
  // The last five bits come first.
  let text = "";
  for (let bit = 5 * (HASH_PART_LENGTH - 1); bit >= 0; bit -= 5) {
    const pair = bytes.readUInt16LE(bit >> 3);
    text += NIX_BASE32[pair >> (bit & 7) & 31];
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

/** Of what is read, so many bytes are kept until it is sent. */
const KEPT = 2 ** 22;

/** What a small file takes in memory beside its contents, in bytes. */
const OVERHEAD = 256;

/** Reads plain files, and keeps the first ones for who reads them once more. */
export function makeReader(): (path: string) => Buffer | undefined {
  const kept = new Map<string, Buffer>();
  let room = KEPT;
  return (path) => {
    const contents = kept.get(path) ?? readPlainFile(path);
    if (kept.delete(path) || contents === undefined) return contents;
    room -= contents.length + OVERHEAD;
    if (room > 0) kept.set(path, contents);
    return contents;
  };
}

/** Finds out what the name of an item follows from (guix/store.scm). */
export function contentAddress(
  path: string,
  { references, narHash, narSize }: PathInfo,
  read: (path: string) => Buffer | undefined = readPlainFile,
): ContentAddress | undefined {
  const store = dirname(path);
  const name = itemName(path);
  const is = (type: string, digest: string) =>
    path === `${store}/` +
        storeHash(`${type}:sha256:${digest}:${store}:${name}`) + `-${name}`;
  const alone = references.length === 0;
  if (narSize > LARGEST_ADDRESSED) return undefined;
  if (alone && is("source", narHash)) return "recursive";
  const contents = read(path);
  if (contents === undefined) return undefined;
  const digest = sha256(contents);
  if (is(["text", ...references.toSorted()].join(":"), digest)) return "text";
  const fixed = sha256(`fixed:out:sha256:${digest}:`);
  return alone && is("output:out", fixed) ? "flat" : undefined;
}

function sha256(data: string | Uint8Array): string {
  return hash("sha256", data, "hex");
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

/** With what the nar of a file that is not executable begins. */
const FILE_NAR = encode("nix-archive-1", "(", "type", "regular", "contents");

/** The nar of a file that is not executable. */
function fileNar(contents: Uint8Array): Buffer {
  return Buffer.concat([FILE_NAR, encode(contents, ")")]);
}

/** An item to send by what its name follows from. */
interface Addressed extends PathInfo {
  readonly path: string;
  readonly address: ContentAddress;
  /** What is in it, where it is a plain file. */
  readonly contents: Buffer | undefined;
}

/** The request that adds an item to a store. */
async function addressedRequest(
  { path, address, references, narSize, contents }: Addressed,
  local: StoreConnection,
): Promise<Buffer> {
  const name = itemName(path);
  if (address === "text" && contents !== undefined) {
    return addTextRequest(name, contents, references);
  }
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
export async function sendAddressed(
  paths: readonly string[],
  items: ReadonlyMap<string, PathInfo>,
  addresses: ReadonlyMap<string, ContentAddress>,
  read: (path: string) => Buffer | undefined,
  { local, log, machine, remote }: TransportContext,
): Promise<void> {
  const what = `sending ${count(paths.length)} to '${machine.name}'`;
  const progress = makeProgress(what, log);
  const problems: string[] = []; // told when all is answered
  const calls = async function* () {
    for (const path of paths) {
      const item = items.get(path)!;
      const address = addresses.get(path)!;
      const addressed = { ...item, path, address, contents: read(path) };
      const request = await addressedRequest(addressed, local);
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

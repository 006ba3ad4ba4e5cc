import { Buffer } from "node:buffer";
import { buffer } from "node:stream/consumers";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  ByteReader,
  DaemonError,
  importPaths,
  openStore,
  operateAll,
  optionsCall,
  queryPathInfos,
  queryValidPaths,
} from "../mod.ts";
import type { PathInfo, StoreConnection } from "../mod.ts";
import { addTextToStore } from "../plugins/_own_machine.ts";
import {
  chunks,
  daemons,
  goldenTurns,
  Peer,
  rejects,
  settled,
} from "./helpers.ts";
import type { GoldenDaemon, Turn } from "./helpers.ts";
import {
  addTempRoots,
  buildThings,
  exportPath,
} from "../plugins/_quick_operations.ts";

const test = suite("daemon");

const MISSING = `/gnu/store/${"0".repeat(32)}-missing`;

/** Ends a conversation after `size` bytes of its answers. */
function cut(turns: readonly Turn[], size: number): Turn[] {
  const kept: Turn[] = [];
  for (const [sent, received] of turns) {
    kept.push([sent, received.subarray(0, size)]);
    size -= received.length;
    if (size < 0) break;
  }
  return kept;
}

/** What is done in each conversation, and what comes of it. */
const OPERATIONS: Readonly<
  Record<
    string,
    (store: StoreConnection, daemon: GoldenDaemon) => Promise<unknown>
  >
> = {
  "add-text-to-store": (store, { drv }) =>
    addTextToStore(store, "golden.txt", Buffer.from("some text\n"), [drv]),
  "add-temp-root": (store, { drv }) => addTempRoots(store, [drv]),
  "query-valid-paths": (store, { drv }) =>
    queryValidPaths(store, [MISSING, drv]),
  "query-path-info": (store, { drv }) => queryPathInfos(store, [drv]),
  "error": (store) => queryPathInfos(store, [MISSING]),
  "build-things": (store, { drv }) => buildThings(store, [drv], () => {}),
  "build-failure": (store, { failing }) =>
    buildThings(store, [failing], () => {}),
  "export-path": (store, { output }) => buffer(exportPath(store, output)),
  "import-paths": (store, { conversations }) => {
    const data = Buffer.from(conversations["import-paths"]!.at(-1)![0], "hex");
    const size = Number(data.readBigUInt64LE());
    return importPaths(store, chunks(data.subarray(8, 8 + size)));
  },
};

async function replay(
  daemon: GoldenDaemon,
  name: string,
  chunk?: number,
): Promise<unknown> {
  const peer = new Peer(goldenTurns(daemon, name), chunk);
  const store = await openStore(peer, "guix-daemon");
  const result = await OPERATIONS[name]!(store, daemon)
    .catch((error) => error);
  if (!peer.done) throw result;
  return result;
}

/** Reads the arguments of set-options. */
async function readOptions(bytes: Uint8Array) {
  const reader = new ByteReader(chunks(bytes), "options");
  const numbers = [];
  while (numbers.length < 10) numbers.push(await reader.number());
  const pairs = new Map<string, string>();
  for (let left = await reader.number(); left > 0; left--) {
    pairs.set(await reader.string(99), await reader.string(99));
  }
  assert.not.ok(await reader.more());
  return { numbers, pairs };
}

for (const [version, daemon] of Object.entries(daemons)) {
  const { drv, output } = daemon;

  test(`openStore() shakes hands with Guix ${version}`, async () => {
    const peer = new Peer(goldenTurns(daemon, "handshake"));
    const store = await settled(openStore(peer, "guix-daemon"));
    assert.is(store.minor, version === "1.5" ? 0x64 : 0x63);
    assert.is(store.name, "guix-daemon");
    assert.ok(peer.done);
  });

  test(`operations do as Guix ${version} does, whatever the chunks`, async () => {
    for (const chunk of [Infinity, 1, 7, 8, 13]) {
      const call = (name: string) => settled(replay(daemon, name, chunk));
      assert.match(
        await call("add-text-to-store") as string,
        /^\/gnu\/store\/[0-9a-z]{32}-golden\.txt$/,
      );
      assert.is(await call("add-temp-root"), undefined);
      assert.equal(await call("query-valid-paths"), [drv]);
      const infos = await call("query-path-info") as Map<string, PathInfo>;
      const { references } = infos.get(drv)!;
      assert.is(references.length, 3);
      assert.match(references.join(), /-busybox,.*-work-builder$/);
      assert.is(await call("build-things"), undefined);
      const bytes = await call("export-path") as Buffer;
      assert.ok(bytes.subarray(8).toString().startsWith("nix-archive-1"));
      assert.ok(bytes.includes(output));
      const [imported] = await call("import-paths") as string[];
      assert.match(imported!, /-imported$/);
    }
  });

  test(`operations report the errors of Guix ${version}`, async () => {
    const error = await replay(daemon, "error") as DaemonError;
    assert.instance(error, DaemonError);
    assert.is(error.status, 1);
    assert.is(error.message, `path \`${MISSING}' is not valid`);
    const failure = await replay(daemon, "build-failure") as DaemonError;
    assert.instance(failure, DaemonError);
    assert.is(failure.status, 100);
    assert.is(failure.message, `build of \`${daemon.failing}' failed`);
  });

  test(`buildThings() hands out the log of Guix ${version}`, async () => {
    const peer = new Peer(goldenTurns(daemon, "build-things"), 5);
    const store = await openStore(peer, "guix-daemon");
    let log = "";
    await buildThings(store, [drv], (text) => log += text);
    const lines = ["building golden", "built golden", ""].join("\n");
    assert.is(log, `building path(s) \`${output}'\n${lines}`);
  });

  test(`optionsCall() makes what Guix ${version} reads`, async () => {
    const turns = goldenTurns(daemon, "set-options");
    const written: Uint8Array[] = [];
    const store = await openStore(new Peer(turns.slice(0, 1)), "daemon");
    store.stream.write = (bytes: Uint8Array) => !!written.push(bytes);
    await rejects(
      operateAll(store, [
        optionsCall({ maxSilentTime: 3600, buildTimeout: 86400 }),
      ]),
      /unexpected end/,
    );
    const ours = await readOptions(Buffer.concat(written));
    const theirs = await readOptions(turns[1]![0]);
    assert.equal(ours.numbers.slice(0, 4), [19, 0, 0, 0]);
    assert.is(ours.numbers[5], 0); // the build hook
    assert.equal(ours.numbers.length, theirs.numbers.length);
    for (const name of ["build-timeout", "build-max-silent-time"]) {
      assert.is(ours.pairs.get(name), theirs.pairs.get(name));
      assert.ok(ours.pairs.has(name));
    }
  });

  for (const name of Object.keys(OPERATIONS)) {
    test(`${name} from Guix ${version} fails where it is cut`, async () => {
      const turns = goldenTurns(daemon, name);
      const all = turns.reduce((sum, [, { length }]) => sum + length, 0);
      for (let size = 0; size < all; size++) {
        const peer = new Peer(cut(turns, size));
        const work = openStore(peer, "daemon").then((store) =>
          OPERATIONS[name]!(store, daemon)
        );
        // What is cut before its status counts as failed with status 1.
        await rejects(work, /^daemon: unexpected end of data$|^path|^build of/);
      }
    });
  }
}

test.run();

import { Buffer } from "node:buffer";
import { Duplex } from "node:stream";
import { buffer } from "node:stream/consumers";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  buildCall,
  ByteReader,
  encode,
  importPaths,
  isOutOfStep,
  openStore,
  operateAll,
  queryPathInfos,
  queryValidPaths,
  READ_SIZE,
} from "../mod.ts";
import type { StoreConnection, WireValue } from "../mod.ts";
import { addTextToStore } from "../plugins/_own_machine.ts";
import { chunks, Peer, rejects } from "./helpers.ts";
import { addTempRoots, exportPath } from "../plugins/_quick_operations.ts";

const test = suite("wire");

const MISSING = `/gnu/store/${"0".repeat(32)}-missing`;
const HELLO = encode(0x6e697863, 0x164, 0, 0);
const GREETING = encode(0x6478696f, 0x164, 0x616c7473);
const NEXT = 0x6f6c6d67;
const READ = 0x64617461;
const WRITE = 0x64617416;
const LAST = 0x616c7473;
const ERROR = 0x63787470;

function reader(...values: readonly WireValue[]): ByteReader {
  return new ByteReader(chunks(encode(...values)), "peer");
}

/** Opens a store whose daemon says `values`, whatever it is asked. */
function hostile(...values: readonly WireValue[]): Promise<StoreConnection> {
  const stream = new Duplex({ read() {}, write: (_, __, done) => done() });
  stream.push(Buffer.concat([GREETING, encode(...values)]));
  stream.push(null);
  return openStore(stream, "guix-daemon on 'w1'");
}

test("openStore() refuses what is no guix-daemon", async () => {
  const answers: [Uint8Array, RegExp][] = [
    [Buffer.from("SSH-2.0-OpenSSH_9.2p1\r\n"), /^peer: .*(greeting|number)/],
    [encode(0x6478696f + 1, 0x164, LAST), /^peer: not a guix-daemon/],
    [encode(0x6478696f, 0x264, LAST), /^peer: unsupported protocol 0x264$/],
    [encode(0x6478696f, 0x160, LAST), /^peer: unsupported protocol 0x160$/],
    [encode(0x6478696f, 0x100000164, LAST), /^peer: unsupported protocol/],
    [encode(0x6478696f, 0x164, 0x12345), /^peer: unexpected message 0x12345$/],
    // The daemon sends no status for early errors.
    [encode(0x6478696f, 0x164, ERROR, "no space\n"), /^no space$/],
  ];
  for (const [answer, pattern] of answers) {
    await rejects(openStore(new Peer([[HELLO, answer]]), "peer"), pattern);
  }
});

test("operations refuse absurd lengths and counts", async () => {
  const path = (store: StoreConnection) =>
    addTextToStore(store, "x", Buffer.of(), []);
  const paths = (store: StoreConnection) => queryValidPaths(store, []);
  const data = (store: StoreConnection) => buffer(exportPath(store, MISSING));
  const absurd = [5000, 2 ** 31, 2 ** 32, 2 ** 40, 2 ** 53 - 1];
  for (const size of absurd) {
    const long = size === 5000 ? "x".repeat(5000) : size;
    await rejects(hostile(LAST, long).then(path), /unexpected number/);
    await rejects(hostile(LAST, 1, long).then(paths), /unexpected number/);
    if (size === 5000) continue;
    for (const code of [NEXT, WRITE, ERROR]) {
      await rejects(hostile(code, size).then(data), /unexpected number/);
    }
    await rejects(hostile(LAST, size).then(paths), /unexpected number/);
  }
  const huge = Buffer.alloc(8, 0xff);
  const stream = new Peer([[HELLO, GREETING], [Buffer.alloc(0), huge]]);
  await rejects(openStore(stream, "peer").then(paths), /unexpected number/);
});

test("requests that came together are not waited for without end", async () => {
  const open = () => {
    const stream = new Duplex({ read() {}, write: (_, __, done) => done() });
    stream.push(GREETING);
    return openStore(stream, "guix-daemon on 'w1'", READ_SIZE, 0.05);
  };
  const store = await open();
  const alone = addTempRoots(store, [MISSING]);
  const other = await open();
  const build = buildCall([MISSING]);
  const built = operateAll(other, [build, build]);
  const [together] = await Promise.allSettled([
    addTempRoots(await open(), [MISSING, MISSING]),
  ]);
  assert.is(together!.status, "rejected");
  assert.ok(isOutOfStep((together as PromiseRejectedResult).reason));
  // As late as that, what came alone and builds are answered.
  store.stream.push(encode(LAST, 1));
  other.stream.push(encode(LAST, 1, LAST, 1));
  await Promise.all([alone, built]);
});

test("operations refuse more than makes sense in all", async () => {
  const root = (store: StoreConnection) => addTempRoots(store, [MISSING]);
  const log = Array<string>(17).fill("x".repeat(2 ** 20))
    .flatMap((text) => [NEXT, text]);
  await rejects(hostile(...log, LAST, 1).then(root), /too many messages$/);
  const paths = Array<string>(9000).fill("x".repeat(4096));
  const all = (store: StoreConnection) => queryValidPaths(store, []);
  await rejects(hostile(LAST, paths).then(all), /a list that is too long$/);
});

test("ByteReader reads byte by byte what comes so", async () => {
  const bytes = Buffer.alloc(100_000, "0123456789");
  const parts = Array.from(bytes, (_, at) => bytes.subarray(at, at + 1));
  const reader = new ByteReader(chunks(...parts), "peer");
  assert.ok(bytes.equals(await reader.read(bytes.length)));
  assert.not(await reader.more());
});

test("operations refuse what they didn't ask for", async () => {
  const root = (store: StoreConnection) => addTempRoots(store, [MISSING]);
  const data = (store: StoreConnection) => buffer(exportPath(store, MISSING));
  await rejects(hostile(WRITE, "x").then(root), /unexpected data$/);
  await rejects(hostile(READ, 8).then(root), /unexpected message 0x64617461$/);
  await rejects(hostile(0).then(root), /unexpected message 0x0$/);
  await rejects(hostile(LAST, 2).then(data), /failed to export/);
});

/**
 * Opens a daemon that knows of all items but `MISSING`, and takes requests as
 * the real one does: what it is sent must all be there when it reads. Notes the
 * sizes of the messages.
 */
async function strict(pieceSize: number, sizes: number[]) {
  const request = encode(26, MISSING).length;
  const stream: Duplex = new Duplex({
    read() {},
    write(bytes: Buffer, _, done) {
      if (bytes.equals(HELLO)) stream.push(GREETING);
      else sizes.push(bytes.length);
      for (let at = 0; bytes.length % request === 0; at += request) {
        const part = bytes.subarray(at, at + request);
        if (part.length === 0) break;
        stream.push(
          part.equals(encode(26, MISSING))
            ? encode(ERROR, "not valid", 1)
            : encode(LAST, "", "ab", [String(part.subarray(16, 32))], 0, 120),
        );
      }
      done();
    },
  });
  return await openStore(stream, "guix-daemon", pieceSize);
}

const item = (index: number) =>
  `/gnu/store/${String(index).padStart(32, "0")}-missing`;

test("queryPathInfos() asks for as much at once as a daemon reads", async () => {
  const paths = Array.from({ length: 1000 }, (_, index) => item(index + 1));
  const request = encode(26, MISSING).length;
  const cases = [[0, 1], [1000, 13], [32768, 455], [99999, 455]];
  for (const [pieceSize, most] of cases) {
    const sizes: number[] = [];
    const store = await strict(pieceSize!, sizes);
    const infos = await queryPathInfos(store, paths);
    assert.equal([...infos.keys()], paths);
    assert.is(infos.get(paths[7]!)!.narSize, 120);
    assert.is(sizes.length, Math.ceil(1000 / most!));
    assert.is(sizes[0], most! * request);
  }
});

test("what a daemon refuses leaves a connection of use", async () => {
  const store = await strict(32768, []);
  const paths = [item(1), MISSING, item(2), MISSING, item(3)];
  for (let again = 0; again < 3; again++) {
    await rejects(queryPathInfos(store, paths), /^not valid$/);
  }
  const infos = await queryPathInfos(store, [item(4), item(5)]);
  assert.equal([...infos.keys()], [item(4), item(5)]);
});

test("importPaths() answers an absurd wish with no more than a chunk", async () => {
  let given = 0;
  async function* endless(): AsyncGenerator<Uint8Array> {
    for (const mebibyte = Buffer.alloc(1 << 20); given < 100; given++) {
      yield mebibyte;
    }
  }
  const store = await hostile(READ, 2 ** 40);
  await rejects(importPaths(store, endless()), /unexpected/);
  assert.ok(given <= 20, `it took ${given} MiB`);
});

test("exportPath() goes on after empty data", async () => {
  const store = await hostile(WRITE, "", WRITE, "abc", WRITE, "", LAST, 1);
  const reader = new ByteReader(exportPath(store, MISSING), "peer");
  let text = "";
  while (await reader.more()) {
    const some = await reader.readSome(2);
    assert.ok(some.length > 0, "nothing, endlessly");
    text += some;
  }
  assert.is(text, "abc");
});

test("operations name the stream that breaks", async () => {
  const cause = Object.assign(new Error("read"), { code: "ECONNRESET" });
  for (const error of [cause, undefined]) {
    const stream = new Duplex({ read() {}, write() {} });
    const store = openStore(stream, "guix-daemon on 'w1'");
    stream.destroy(error);
    await rejects(store, /^guix-daemon on 'w1': /);
  }
});

test("importPaths() ends where the daemon stops reading", async () => {
  let writes = 0;
  const stream: Duplex = new Duplex({
    highWaterMark: 1,
    read() {},
    write(_, __, done) {
      if (writes++ > 1) return stream.destroy();
      stream.push(writes === 1 ? GREETING : encode(READ, 32768));
      done();
    },
  });
  const store = await openStore(stream, "guix-daemon on 'w1'");
  const bundle = chunks(Buffer.alloc(99999));
  await rejects(importPaths(store, bundle), /^guix-daemon on 'w1': /);
});

test("encode() writes numbers, strings and lists as guix-daemon reads them", () => {
  const hex = (...values: WireValue[]) => encode(...values).toString("hex");
  assert.is(hex(0x164), "6401000000000000");
  assert.is(hex(2 ** 40 + 5), "0500000000010000");
  assert.is(hex(true, false), "01000000000000000000000000000000");
  assert.is(hex(""), "0000000000000000");
  assert.is(hex("abc"), "03000000000000006162630000000000");
  assert.is(hex("12345678"), "08000000000000003132333435363738");
  assert.is(hex("é"), "0200000000000000c3a9000000000000");
  assert.is(hex(Buffer.of(0xff)), "0100000000000000ff00000000000000");
  assert.is(hex(["a"]), "010000000000000001000000000000006100000000000000");
});

test("ByteReader refuses padding that is not zero", async () => {
  for (const at of [9, 12, 15]) {
    const bytes = encode("a");
    bytes[at] = 1;
    const reader = new ByteReader(chunks(bytes), "peer");
    await rejects(reader.bytes(1), /^peer: padding that is not zero$/);
  }
});

test("ByteReader bounds what it reads", async () => {
  assert.is(await reader(7).number(7), 7);
  await rejects(
    reader(8).number(7),
    /^peer: unexpected number 8, more than 7$/,
  );
  assert.is(await reader("abc").string(3), "abc");
  await rejects(reader("abc").string(2), /^peer: unexpected number 3/);
  await rejects(reader().number(), /^peer: unexpected end of data$/);
  await rejects(reader().readSome(1), /^peer: unexpected end of data$/);
});

test("ByteReader hashes what is read in between", async () => {
  const source = reader("abc");
  await source.read(8);
  source.startHash();
  await source.readSome(2);
  await source.read(1);
  const hash = source.finishHash().toString("hex");
  await source.padding(3);
  assert.match(hash, /^ba7816bf8f01cfea414140de5dae2223b00361a3/);
});

test.run();

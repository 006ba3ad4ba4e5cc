import { Buffer } from "node:buffer";
import { lstatSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { statSync, symlinkSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  ByteReader,
  encode,
  OffloadError,
  restoreNar,
  restoreOutputs,
} from "../mod.ts";
import {
  chunks,
  daemons,
  goldenExport,
  makeRandom,
  rejects,
  withDirectory,
} from "./helpers.ts";
import {
  directory,
  file,
  link,
  nar,
  program,
  refuses,
  restore,
  restores,
} from "./nars.ts";
import type { Node } from "./nars.ts";

const test = suite("archives");

const bytes = (hex: string): Buffer => Buffer.from(hex, "hex");

async function goldenNar(version: string): Promise<Buffer> {
  const data = await goldenExport(daemons[version]!);
  // Behind it: a number, and the metadata with the export's magic number.
  return data.subarray(0, data.indexOf(encode(0x4558494e)));
}

for (const version of Object.keys(daemons)) {
  test(`restoreNar() restores a tree from Guix ${version}`, async () => {
    const archive = await goldenNar(version);
    assert.ok(archive.includes(bytes("636166e9"))); // no UTF-8
    await restores(archive);
  });
}

test("restoreNar() does not depend on the chunks", async () => {
  const archive = await goldenNar("1.5");
  const random = makeRandom(1);
  for (let round = 0; round < 10; round++) {
    const parts = [];
    for (let rest = archive; rest.length > 0;) {
      const size = Math.floor(random() * 30); // also none
      parts.push(rest.subarray(0, size));
      rest = rest.subarray(size);
    }
    await restores(archive, ...parts);
  }
});

test("restoreNar() fails where the archive is cut", async () => {
  const inner = directory(["empty", directory()], [bytes("ff"), program("x")]);
  const archive = nar(directory(["a", inner], ["b", link("x")], ["c", file()]));
  await withDirectory(async (directory) => {
    const target = `${directory}/target`;
    for (let size = 0; size < archive.length; size++) {
      const work = restore(target, archive.subarray(0, size));
      await rejects(work, /^archive: unexpected end of data$/);
      rmSync(target, { recursive: true, force: true });
    }
    assert.equal(readdirSync(directory), []);
  });
});

test("restoreNar() restores files, links and directories of all kinds", async () => {
  await restores(nar(file()));
  await restores(nar(program("#!/bin/sh\n")));
  await restores(nar(directory()));
  for (const target of ["x", "/", "a//b/./c/", "../..", " ", "file:///x"]) {
    await restores(nar(link(target)));
  }
  await restores(nar(link("x".repeat(4095))));
  for (const size of [1, 7, 8, 9, 65535, 65536, 1 << 20]) {
    await restores(nar(file(Buffer.alloc(size, "contents"))));
  }
  const names = [" ", "$(x)", "-rf", "...", "A", "\\", "a", "a\nb", "é", "猫"];
  await restores(nar(directory(
    ...names.map((name) => [name, directory([name, file(name)])] as const),
    ["\u{1f9ca}".repeat(63), program()],
  )));
});

test("restoreNar() tells beforehand what the disk must hold", async () => {
  const many = Array.from(
    { length: 100 },
    (_, number) => [`${100 + number}`, file(Buffer.from("x"))] as const,
  );
  const cases: [Node, number][] = [
    [link("x"), 4096],
    [directory(), 4096],
    [file(Buffer.alloc(0)), 4096],
    [file(Buffer.alloc(1)), 8192],
    [file(Buffer.alloc(4096)), 8192],
    [file(Buffer.alloc(4097)), 12288],
    [directory(...many), 4096 + 100 * 8192],
  ];
  for (const [node, expected] of cases) {
    await withDirectory(async (directory) => {
      let taken = 0;
      await restoreNar(
        new ByteReader(chunks(nar(node)), "archive"),
        `${directory}/target`,
        (size) => taken += size,
      );
      assert.is(taken, expected);
    });
  }
});

test("restoreOutputs() writes no more than it may", async () => {
  const many = Array.from(
    { length: 1000 },
    (_, number) => [`${1000 + number}`, file(Buffer.from("x"))] as const,
  );
  await withDirectory(async (directory_) => {
    const bundle = Buffer.concat([encode(1), nar(directory(...many))]);
    const reader = new ByteReader(chunks(bundle), "archive");
    const outputs = [`${directory_}/output`];
    const work = restoreOutputs(reader, outputs, new Set(), 2 ** 20);
    await rejects(work, /^more than 1\.0 MiB came back$/);
    const written = readdirSync(`${outputs[0]}.chroot`).length;
    assert.ok(written > 100 && written <= 128, `${written} files`);
  });
});

test("restoreNar() makes executable what is, and nothing else", async () => {
  await withDirectory(async (directory) => {
    await restore(`${directory}/program`, nar(program()));
    await restore(`${directory}/file`, nar(file()));
    assert.is(statSync(`${directory}/program`).mode & 0o100, 0o100);
    assert.is(statSync(`${directory}/file`).mode & 0o111, 0);
  });
});

test("restoreNar() restores names and targets that are no UTF-8", async () => {
  const [latin, cut, low, high] = ["636166e9", "c3", "fe", "ff"].map(bytes);
  await restores(nar(link(high!)));
  await restores(nar(directory(
    ["caf", file("ascii")],
    [latin!, program("latin")],
    [cut!, directory([low!, link(high!)], [high!, directory()])],
    // Both are U+FFFD to who takes them for UTF-8.
    [low!, directory(["plain", file("x")], [high!, file("y")])],
    [high!, link(low!)],
  )));
});

test("restoreNar() refuses hostile names", async () => {
  const names = ["../x", "a/b", "/", "/x", ".", "..", "", "a\0b", "\0", "a/"];
  for (const name of names) {
    const pattern = /^archive: invalid nar: file name "/;
    await refuses(nar(directory([name, file("evil")])), pattern);
    const inner = directory([name, file("evil")]);
    await refuses(nar(directory(["inner", inner])), pattern);
    await refuses(nar(directory([name, directory()])), pattern);
    await refuses(nar(directory([name, link("x")])), pattern);
  }
  const high = Buffer.concat([bytes("ff"), Buffer.from("/../x")]);
  await refuses(nar(directory([high, file()])), /file name/);
  const long = "x".repeat(256);
  await refuses(nar(directory([long, file()])), /unexpected number 256/);
});

test("restoreNar() refuses names that repeat or are out of order", async () => {
  const pattern = /^archive: invalid nar: file name '.*' is out of order$/;
  for (const [one, two] of [["a", "a"], ["b", "a"], ["a", "B"], ["ab", "a"]]) {
    await refuses(nar(directory([one!, file()], [two!, file()])), pattern);
  }
  // Bytes count: in UTF-16 these would be in order.
  const two = directory(["\u{1f9ca}", file()], ["\uffee", file()]);
  await refuses(nar(two), pattern);
});

test("restoreNar() never writes through a symlink", async () => {
  for (const target of ["..", "../outside", "/tmp"]) {
    const first = ["a", link(target)] as const;
    await refuses(nar(directory(first, ["a", file()])), /out of order/);
    const inside = directory(["outside", file("evil")]);
    await refuses(nar(directory(first, ["a", inside])), /out of order/);
    await refuses(nar(directory(first, ["a/x", file()])), /file name/);
  }
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/outside`, "as before");
    symlinkSync("outside", `${directory}/target`);
    const work = restore(`${directory}/target`, nar(file("evil")));
    const error = await work.catch((error) => error);
    assert.instance(error, Error);
    assert.ok(lstatSync(`${directory}/target`).isSymbolicLink());
    assert.is(readFileSync(`${directory}/outside`, "utf8"), "as before");
  });
});

test("restoreNar() refuses absurd lengths", async () => {
  const magic = encode("nix-archive-1", "(", "type");
  for (const size of [5000, 2 ** 31, 2 ** 40, 2 ** 53 - 1]) {
    const type = Buffer.concat([magic, encode(size)]);
    await refuses(type, /unexpected number/);
    const target = encode("symlink", "target", size, "x");
    await refuses(Buffer.concat([magic, target]), /unexpected number/);
    const contents = encode("regular", "contents", size, "x");
    await refuses(Buffer.concat([magic, contents]), /unexpected end of data/);
    const name = encode("directory", "entry", "(", "name", size, "x");
    await refuses(Buffer.concat([magic, name]), /unexpected number/);
  }
  const most = Buffer.concat([magic, encode("regular", "contents")]);
  const pattern = /unexpected number 18446744073709551615/;
  await refuses(Buffer.concat([most, Buffer.alloc(8, 0xff)]), pattern);
});

test("restoreNar() refuses padding that is not zero", async () => {
  const nodes = [file("x"), link("x"), directory(["x", file("12345678")])];
  for (const archive of nodes.map(nar)) {
    const padding = [];
    for (let at = 0, size; at < archive.length; at += size) {
      const length = archive.readUInt32LE(at);
      size = 8 + length + (8 - length % 8) % 8;
      if (length % 8 > 0) padding.push(at + 8 + length, at + size - 1);
    }
    for (const at of padding) {
      const evil = Buffer.from(archive);
      evil[at] = 1;
      await refuses(evil, /padding that is not zero|invalid nar: expected/);
    }
  }
});

test("restoreNar() refuses what it does not know", async () => {
  const nodes: Node[] = [
    ["(", "type", "fifo", ")"],
    ["(", "type", "", ")"],
    ["(", "kind", "regular", "contents", "", ")"],
    ["[", "type", "regular", "contents", "", "]"],
    ["(", "type", "regular", ")"],
    ["(", "type", "regular", "content", "x", ")"],
    ["(", "type", "regular", "setuid", "", "contents", "", ")"],
    ["(", "type", "regular", "executable", "no", "contents", "", ")"],
    ["(", "type", "regular", "contents", "", "contents", "", ")"],
    ["(", "type", "symlink", ")", "", ""],
    ["(", "type", "symlink", "target", "", ")"],
    ["(", "type", "symlink", "target", "a\0b", ")"],
    ["(", "type", "symlink", "target", "a", "contents", "", ")"],
    ["(", "type", "directory", "file", "(", ")"],
    ["(", "type", "directory", "node", ...directory(["a", file()]).slice(4)],
    ["(", "type", "directory", "entry", "(", "node", "(", ")", ")"],
    directory(["a", ["(", "type", "fifo", ")"]]),
  ];
  for (const node of nodes) {
    const archive = Buffer.concat([nar(node), Buffer.alloc(64)]);
    await refuses(archive, /^archive: (invalid nar: |unexpected number)/);
  }
  await refuses(encode("nix-archive-2", ...file()), /invalid nar: expected/);
});

test("restoreNar() bounds how deep directories nest", async () => {
  const name = "d".repeat(255);
  const nest = (depth: number): Node =>
    depth === 0 ? directory() : directory([name, nest(depth - 1)]);
  await restores(nar(nest(10)));
  await refuses(nar(nest(20)), /^archive: /);
  // Its name is only given to it at the end, when it is too late to refuse.
  const high = (depth: number): Node =>
    depth === 0
      ? directory([Buffer.alloc(255, 0xff), file()])
      : directory(["d".repeat(199), high(depth - 1)]);
  await refuses(nar(high(20)), /^archive: invalid nar: a file name is too/);
});

test("restoreNar() survives archives that are damaged", async () => {
  const archive = await goldenNar("1.5");
  const random = makeRandom(2);
  const pick = (count: number) => Math.floor(random() * count);
  let refused = 0;
  await withDirectory(async (directory) => {
    for (let round = 0; round < 200; round++) {
      const damaged = Buffer.from(archive);
      for (let left = 1 + pick(3); left > 0; left--) {
        damaged[pick(damaged.length)]! ^= 1 << pick(8);
      }
      try {
        await restore(`${directory}/target`, damaged);
      } catch (error) {
        if (!(error instanceof OffloadError)) throw error;
        refused++;
      }
      rmSync(`${directory}/target`, { recursive: true, force: true });
      assert.equal(readdirSync(directory), []);
    }
  });
  // Where contents, names or targets are hit, nothing is wrong with the form.
  assert.ok(refused > 100 && refused < 200, `${refused} were refused`);
});

test.run();

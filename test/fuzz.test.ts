/**
 * What comes from outside, damaged and made up: it must be read or refused,
 * in time, without another error than ours and without a trace elsewhere.
 */

import { Buffer } from "node:buffer";
import { createHash, createSign, generateKeyPairSync } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { writeFileSync } from "node:fs";
import { Duplex } from "node:stream";
import { buffer } from "node:stream/consumers";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  ByteReader,
  checkSignature,
  encode,
  importPaths,
  OffloadError,
  openStore,
  operateAll,
  optionsCall,
  parseAcl,
  parseRequest,
  parseSexp,
  queryPathInfos,
  queryValidPaths,
  restoreNar,
  restoreOutputs,
} from "../mod.ts";
import type { StoreConnection } from "../mod.ts";
import { addTextToStore } from "../plugins/_own_machine.ts";
import {
  aclOf,
  chunks,
  daemons,
  field,
  fuzz,
  golden,
  goldenExport,
  goldenTurns,
  hash,
  keys,
  settled,
  withDirectory,
} from "./helpers.ts";
import type { Random } from "./helpers.ts";
import { directory, file, link, nar, pack, program } from "./nars.ts";
import type { Bytes, Node } from "./nars.ts";
import {
  addTempRoots,
  buildThings,
  exportPath,
} from "../plugins/_quick_operations.ts";
import { parseFacts } from "../plugins/_remote.ts";

const test = suite("fuzz");

const pick = <T>(random: Random, from: readonly T[]): T =>
  from[Math.floor(random() * from.length)]!;

const below = (random: Random, limit: number): number =>
  Math.floor(random() * limit);

/** Numbers at which something may break. */
const NUMBERS = [0n, 1n, 7n, 8n, 255n, 256n, 4095n, 4096n, 1n << 20n, 1n << 31n]
  .concat([
    1n << 32n,
    (1n << 53n) - 1n,
    1n << 53n,
    1n << 63n,
    (1n << 64n) - 1n,
  ]);

/** Damages bytes in a few places. */
function damage(bytes: Buffer, random: Random): Buffer {
  for (let left = 1 + below(random, 4); left > 0; left--) {
    const at = below(random, bytes.length + 1);
    const end = Math.min(bytes.length, at + below(random, 64));
    const aligned = Math.max(0, Math.min(at & ~7, bytes.length - 8));
    const [before, after] = [bytes.subarray(0, at), bytes.subarray(at)];
    const kind = below(random, 6);
    if (kind === 0 && bytes.length > at) {
      bytes = Buffer.from(bytes);
      bytes[at]! ^= 1 << below(random, 8);
    } else if (kind === 1 && bytes.length >= 8) {
      bytes = Buffer.from(bytes);
      bytes.writeBigUInt64LE(pick(random, NUMBERS), aligned);
    } else if (kind === 2) {
      bytes = Buffer.concat([before, bytes.subarray(end)]);
    } else if (kind === 3) {
      bytes = Buffer.concat([before, bytes.subarray(at, end), after]);
    } else if (kind === 4) bytes = before;
    else bytes = Buffer.concat([before, encode(pick(random, TOKENS)), after]);
  }
  return bytes;
}

/** Damages a text in a few places. */
function damageText(text: string, random: Random): string {
  for (let left = 1 + below(random, 4); left > 0; left--) {
    const at = below(random, text.length + 1);
    const end = at + below(random, 40);
    const piece = pick(random, [...TOKENS, text.slice(at, end)]);
    text = text.slice(0, at) + piece + text.slice(pick(random, [at, end]));
  }
  return text;
}

/** Words of all formats. */
const TOKENS: readonly string[] = [
  ...["nix-archive-1", "(", ")", "type", "regular", "executable", "contents"],
  ...["symlink", "target", "directory", "entry", "name", "node", "", "..", "."],
  ...["a/b", "x", "\0", "\ufeff", "#", "#41#", "|", '"', "\\", "\n", "\t"],
  ...["(acl", "(entry", "(tag (guix import))", "public-key", "ecc", "curve"],
  ...[
    "q",
    "hash",
    "sha256",
    "sig-val",
    "rsa",
    "n",
    "e",
    "(r #00#)",
    "(s #01#)",
  ],
  ...[
    "-1",
    "1e999",
    "NaN",
    "__proto__",
    " 0 ",
    "\xff",
    "\u732b",
    "0".repeat(99),
  ],
];

/** In pieces of random lengths, some of them empty. */
function cut(bytes: Buffer, random: Random): Buffer[] {
  const parts = [];
  while (bytes.length > 0) {
    const size = below(random, pick(random, [2, 20, 5000]));
    parts.push(bytes.subarray(0, size));
    bytes = bytes.subarray(size);
  }
  return parts;
}

/** Waits for what may only fail with an error of ours; whether it did not. */
async function survives(work: () => unknown): Promise<boolean> {
  try {
    await settled((async () => await work())());
    return true;
  } catch (error) {
    if (error instanceof OffloadError) return false;
    throw error;
  }
}

/** Calls `work` with a path below `outer`, beside which nothing may change. */
async function confined(
  outer: string,
  work: (target: string) => Promise<void>,
): Promise<void> {
  const inner = `${outer}/a/b`;
  mkdirSync(inner, { recursive: true });
  writeFileSync(`${outer}/a/outside`, "as before");
  await work(`${inner}/target`);
  for (const name of readdirSync(inner)) {
    assert.match(name, /^target/);
    rmSync(`${inner}/${name}`, { recursive: true });
  }
  assert.equal(readdirSync(`${outer}/a`), ["b", "outside"]);
  assert.is(readFileSync(`${outer}/a/outside`, "utf8"), "as before");
  assert.equal(readdirSync(outer), ["a"]);
}

const NAMES: readonly Bytes[] = ["a", "b", "aa", "é", "\ufeff", "\ufeffa", "猫"]
  .map((name): Bytes => name)
  .concat([Buffer.of(0xff), Buffer.of(0xc3), Buffer.of(0x61, 0xe9)])
  .concat(["..", ".", "", "a/b", "../x", "x".repeat(255), "x".repeat(256)])
  .concat(["__proto__", "a\nb", " ", "-rf", "\\", "a\0"]);

/** Whether a file can have that name. */
const isName = (name: Bytes) => {
  const text = Buffer.from(name).toString("latin1");
  return !/^\.{0,2}$|[/\0]/.test(text) && text.length < 256;
};

/** Makes a node; a good one holds nothing that must be refused. */
function makeNode(random: Random, good: boolean, depth = 0): Node {
  const kind = below(random, depth > 5 ? 3 : 5);
  const contents = Buffer.alloc(below(random, 3) ** 8, "contents");
  if (kind === 0) return file(contents);
  if (kind === 1) return program(contents);
  if (kind === 2) {
    return link(pick(random, good ? NAMES.filter(isName) : NAMES));
  }
  const names = NAMES.filter((name) => random() < 0.3 && isName(name) || !good);
  names.sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)));
  const some = names.filter(() => random() < (good ? 1 : 0.2));
  return directory(
    ...some.map((name) => [name, makeNode(random, good, depth + 1)] as const),
  );
}

test("restoreNar() survives archives that are damaged", async () => {
  const items = await Promise.all(Object.values(daemons).map(goldenExport));
  await withDirectory((outer) =>
    fuzz(100, (random) => {
      const good = random() < 0.5
        ? pick(random, items)
        : nar(makeNode(random, true));
      const parts = cut(damage(good, random), random);
      return confined(outer, async (target) => {
        const reader = new ByteReader(chunks(...parts), "archive");
        await survives(() => restoreNar(reader, target));
      });
    })
  );
});

test("restoreNar() survives archives that are made up", async () => {
  await withDirectory((outer) =>
    fuzz(100, (random) => {
      const archive = nar(makeNode(random, random() < 0.3));
      return confined(outer, async (target) => {
        const reader = new ByteReader(chunks(archive), "archive");
        await survives(() => restoreNar(reader, target));
      });
    })
  );
});

test("restoreNar() restores what is good as it was", async () => {
  await withDirectory((outer) =>
    fuzz(10, (random) => {
      const archive = nar(makeNode(random, true));
      return confined(outer, async (target) => {
        const parts = cut(archive, random);
        const reader = new ByteReader(chunks(...parts), "archive");
        await restoreNar(reader, target);
        const packed = await pack(target);
        assert.is(packed.toString("latin1"), archive.toString("latin1"));
      });
    })
  );
});

const signing = generateKeyPairSync("rsa", { modulusLength: 1024 });

/** A number of a key, as s-expressions have them. */
function hex(base64: string | undefined): string {
  return `#00${Buffer.from(base64!, "base64url").toString("hex")}#`;
}

const { n: modulus, e: exponent } = signing.publicKey.export({ format: "jwk" });
const publicKey = `(public-key (rsa (n ${hex(modulus)}) (e ${hex(exponent)})))`;

/** Signs the export of a node. */
function signedItem(node: Node, path: string): Buffer {
  const metadata = encode(0x4558494e, path, [path], "");
  const unsigned = Buffer.concat([nar(node), metadata]);
  const value = createSign("sha256").update(unsigned).sign(signing.privateKey);
  const digest = createHash("sha256").update(unsigned).digest("hex");
  const signature =
    `(signature (data (flags pkcs1) (hash sha256 #${digest}#)) ` +
    `(sig-val (rsa (s #${value.toString("hex")}#))) ${publicKey})`;
  return Buffer.concat([unsigned, encode(1, signature)]);
}

test("restoreOutputs() accepts nothing but what was signed", async () => {
  const acl = parseAcl(aclOf(publicKey), "acl");
  const tree = (text: string) => directory(["x", program(text)]);
  let accepted = 0;
  await withDirectory((outer) =>
    fuzz(150, (random) =>
      confined(outer, async (target) => {
        const outputs = [`${target}-1`, `${target}-2`];
        const [one, two] = outputs.map((it) => signedItem(tree(it), it));
        const items = [encode(1), one!, encode(1), two!, encode(0)];
        if (random() < 0.3) items.splice(below(random, 5), below(random, 2));
        const bundle = random() < 0.1
          ? Buffer.concat(items)
          : damage(Buffer.concat(items), random);
        const parts = cut(bundle, random);
        const reader = new ByteReader(chunks(...parts), "archive");
        let files: ReadonlyMap<string, string> = new Map();
        const good = await survives(async () => {
          files = await restoreOutputs(reader, outputs, acl);
        });
        if (!good) return;
        accepted++;
        assert.equal([...files.keys()].sort(), outputs);
        for (const [output, file] of files) {
          assert.is(readFileSync(`${file}/x`, "utf8"), output);
          assert.equal(readdirSync(file), ["x"]);
        }
      }))
  );
  assert.ok(accepted > 2, `${accepted} were accepted`);
});

test("checkSignature() survives signatures that are damaged", async () => {
  const { ecdsa, rsa } = keys;
  const acl = parseAcl(aclOf(ecdsa.key, rsa.key), "acl");
  await fuzz(1500, (random) => {
    const [key, names] = random() < 0.2
      ? [ecdsa, ["r", "s"]] as const
      : [rsa, ["s"]] as const;
    const damaged = damageText(key.signature, random);
    return survives(() => {
      if (checkSignature(damaged, hash, acl) !== undefined) return;
      // Its numbers are there still; the rest is nobody's business.
      const digits = damaged.replace(/\s/g, "").toUpperCase();
      for (const name of names) assert.match(digits, field(key, name));
    });
  });
});

test("parseSexp() and parseAcl() survive texts that are damaged", async () => {
  const text = aclOf(keys.ecdsa.key, keys.rsa.key, daemons["1.5"]!.key);
  const all = parseAcl(text, "acl");
  await fuzz(3000, (random) => {
    const damaged = damageText(text, random);
    return survives(() => {
      parseSexp(damaged, "file");
      for (const key of parseAcl(damaged, "file")) {
        // One bit more or less is another key, which nobody has.
        assert.ok(all.has(key) || damaged !== text);
      }
    });
  });
});

/** A daemon that says these things, whatever it is asked. */
function peer(bytes: Buffer, random: Random): Duplex {
  const parts = cut(bytes, random).filter(({ length }) => length > 0);
  const write = (_: unknown, __: unknown, done: () => void) => done();
  const read = () => void stream.push(parts.shift() ?? null);
  const stream: Duplex = new Duplex({ read, write });
  return stream;
}

const PATH = daemons["1.5"]!.output;

/** What is asked, and in which conversation the answer was recorded. */
const OPERATIONS: Record<string, (store: StoreConnection) => Promise<unknown>> =
  {
    "set-options": (store) =>
      operateAll(store, [
        optionsCall({ maxSilentTime: 1, buildTimeout: 1 }),
      ]),
    "add-text-to-store": (store) => addTextToStore(store, "x", hash, []),
    "add-temp-root": (store) => addTempRoots(store, [PATH]),
    "query-valid-paths": (store) => queryValidPaths(store, [PATH]),
    "query-path-info": (store) => queryPathInfos(store, [PATH]),
    "error": (store) => queryPathInfos(store, [PATH]),
    "build-things": (store) => buildThings(store, [PATH], () => {}),
    "build-failure": (store) => buildThings(store, [PATH], () => {}),
    "export-path": (store) => buffer(exportPath(store, PATH)),
    "import-paths": (store) => importPaths(store, chunks(hash, hash)),
  };

test("operations survive daemons that are damaged", async () => {
  const daemon = daemons["1.5"]!;
  await fuzz(1500, (random) => {
    const name = pick(random, Object.keys(OPERATIONS));
    const received = goldenTurns(daemon, name).map(([, bytes]) => bytes);
    const bytes = damage(Buffer.concat(received), random);
    return survives(async () => {
      await OPERATIONS[name]!(await openStore(peer(bytes, random), "peer"));
    });
  });
});

/** What the messages of a daemon begin with (guix/store.scm). */
const MESSAGES = [0x6f6c6d67, 0x64617461, 0x64617416, 0x616c7473, 0x63787470];

test("operations survive daemons that are made up", async () => {
  await fuzz(1500, (random) => {
    const values = [];
    for (let left = below(random, 12); left > 0; left--) {
      const kind = random();
      if (kind < 0.5) values.push(pick(random, MESSAGES));
      else if (kind < 0.7) values.push(pick(random, ["", "x", PATH, "\0"]));
      else values.push(below(random, 3));
    }
    const greeting = [0x6478696f, 0x164, 0x616c7473];
    const bytes = encode(...greeting, ...values);
    const operation = pick(random, Object.values(OPERATIONS));
    return survives(async () => {
      await operation(await openStore(peer(bytes, random), "peer"));
    });
  });
});

const PROBE = "uname Linux w1 6.1 x86_64\ncores 4\nload 0.10 0.2 0.3 1/9 7\n" +
  "memory MemAvailable:  812 kB\ncpu some avg10=0.1 avg60=0.0\n" +
  "store-bytes overlay 9 1 8 1% /\nstore-inodes overlay 9 1 8 1% /\n" +
  "clock 1700000000.5\n";

test("parseFacts() makes facts or none of anything", async () => {
  await fuzz(2000, (random) => {
    const facts = parseFacts(damageText(PROBE, random), 0, 1);
    const numbers = [facts.load, facts.cores, facts.memory, facts.clock]
      .concat([facts.store?.bytes, facts.store?.inodes, facts.build?.bytes]);
    for (const number of numbers) {
      assert.ok(number === undefined || !Number.isNaN(number));
    }
    return Promise.resolve();
  });
});

test("parseRequest() survives lines that are damaged", async () => {
  const requests = golden<{ lines: string[] }>("requests-1.5.json");
  const line =
    JSON.stringify(requests).match(/[01] \S+ \/\S+\.drv \S*?(?=")/)![0];
  await fuzz(
    2000,
    (random) =>
      survives(() => Promise.resolve(parseRequest(damageText(line, random)))),
  );
});

test.run();

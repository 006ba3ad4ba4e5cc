import { Buffer } from "node:buffer";
import { createHash, generateKeyPairSync, privateEncrypt } from "node:crypto";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { verifyEcdsa } from "../deps.ts";
import { ByteReader, checkSignature, parseAcl, restoreNar } from "../mod.ts";
import {
  aclOf,
  chunks,
  daemons,
  field,
  goldenExport,
  hash,
  keys,
  makeRandom,
  throws,
  withDirectory,
} from "./helpers.ts";
import type { Signed } from "./helpers.ts";

const test = suite("signatures");

const { ecdsa, other, rsa, nist, eddsa } = keys;

const bytes = (hex: string): Buffer => Buffer.from(hex, "hex");

/** Checks a signature by a key that is authorized. */
function check({ key, signature }: Signed, signed = hash): string | undefined {
  return checkSignature(signature, signed, parseAcl(aclOf(key), "acl"));
}

/** Replaces in both parts. */
function alter(signed: Signed, from: string | RegExp, to: string): Signed {
  return {
    key: signed.key.replaceAll(from, to),
    signature: signed.signature.replaceAll(from, to),
  };
}

/** What becomes of a value for each of its bytes with one bit flipped. */
function* flips(hex: string): Generator<string> {
  const random = makeRandom(3);
  for (let at = 0; at < hex.length / 2; at++) {
    const flipped = bytes(hex);
    flipped[at]! ^= 1 << Math.floor(8 * random());
    yield flipped.toString("hex").toUpperCase();
  }
}

test("verifyEcdsa() verifies a signature made by libgcrypt", () => {
  const parts = [
    bytes("56B06A2A978E6343F428A2326D1B3A48AA9E7961AA50FB7654679A6C39CAB2DC"),
    Buffer.alloc(32, 0xaa),
    bytes("0257F118D838162171C54CA5480FE57E0D44936187A00FD0966EEDFED3148BF1"),
    bytes("00BF8EA47BEFFC0CD2B13865F7973E1ABA4BE1128D53A072F108E300151CD481"),
  ] as const;
  assert.ok(verifyEcdsa(...parts));
  for (const index of parts.keys()) {
    const changed = parts.map((part) => Buffer.from(part));
    changed[index]![31]! ^= 8; // 3 bits of the hash are not signed
    const [q, hash, r, s] = changed;
    assert.not.ok(verifyEcdsa(q!, hash!, r!, s!), `part ${index}`);
  }
});

test("checkSignature() accepts what Guix signs with ECDSA and RSA keys", () => {
  for (const signed of [ecdsa, other, rsa]) {
    assert.is(check(signed), undefined);
    // Signed by one of several.
    const acl = parseAcl(aclOf(nist.key, eddsa.key, signed.key), "acl");
    assert.is(checkSignature(signed.signature, hash, acl), undefined);
  }
});

test("checkSignature() refuses keys that are not in the ACL", () => {
  for (const signed of [ecdsa, rsa, nist]) {
    for (const acl of ["(acl)", aclOf(other.key, eddsa.key)]) {
      const problem = checkSignature(
        signed.signature,
        hash,
        parseAcl(acl, "acl"),
      );
      assert.is(problem, "unauthorized public key");
    }
  }
});

test("checkSignature() refuses the signature of another key", () => {
  const value = (part: string) => field(other, part);
  const forged = ["r", "s"].reduce(
    (signed, part) => alter(signed, field(ecdsa, part), value(part)),
    ecdsa,
  );
  assert.is(check(forged), "invalid signature");
  const key = alter(ecdsa, field(ecdsa, "q"), field(other, "q"));
  assert.is(check(key), "invalid signature");
});

test("checkSignature() refuses the signature of another hash", () => {
  const digest = createHash("sha256").update("Offload").digest();
  for (const signed of [ecdsa, rsa]) {
    assert.is(check(signed, digest), "invalid hash");
    assert.is(check(signed, hash.subarray(1)), "invalid hash");
    const hex = digest.toString("hex");
    const changed = alter(signed, field(signed, "hash sha256"), hex);
    assert.is(check(changed, digest), "invalid signature");
    assert.is(check(changed), "invalid hash");
  }
});

test("checkSignature() refuses an ECDSA signature with any byte changed", () => {
  for (const part of ["r", "s", "q", "hash sha256"]) {
    for (const value of flips(field(ecdsa, part))) {
      const changed = alter(ecdsa, field(ecdsa, part), value);
      const signed = part.startsWith("hash") ? bytes(value) : hash;
      // 3 bits of the hash are not signed.
      if ((signed.at(-1)! ^ hash.at(-1)!) & 7) continue;
      assert.is(
        check(changed, signed),
        "invalid signature",
        `${part} ${value}`,
      );
    }
  }
});

test("checkSignature() refuses an RSA signature with any byte changed", () => {
  for (const part of ["s", "n", "e", "hash sha256"]) {
    for (const value of flips(field(rsa, part))) {
      const changed = alter(rsa, field(rsa, part), value);
      const signed = part.startsWith("hash") ? bytes(value) : hash;
      assert.is(
        check(changed, signed),
        "invalid signature",
        `${part} ${value}`,
      );
    }
  }
});

test("checkSignature() wants in an RSA signature a SHA-256 hash, alone", () => {
  const pair = generateKeyPairSync("rsa", { modulusLength: 1024 });
  const { n, e } = pair.publicKey.export({ format: "jwk" });
  const [modulus, exponent] = [n, e].map((part) =>
    Buffer.from(part!, "base64url").toString("hex")
  );
  const key = `(public-key (rsa (n #00${modulus}#) (e #${exponent}#)))`;
  const checkText = (...parts: readonly (string | Buffer)[]) => {
    const text = Buffer.concat(
      parts.map((part) => typeof part === "string" ? bytes(part) : part),
    );
    const value = privateEncrypt(pair.privateKey, text).toString("hex");
    const signature = `(signature (data (hash sha256 #${hash.toString("hex")}#))
      (sig-val (rsa (s #${value}#))) ${key})`;
    return check({ key, signature });
  };
  const sha256 = "3031300d060960864801650304020105000420";
  const sha3 = sha256.replace("0201", "0208");
  assert.is(checkText(sha256, hash), undefined);
  for (const parts of [[hash], [sha3, hash], [sha256, hash, "00"], []]) {
    assert.is(checkText(...parts), "invalid signature");
  }
  assert.is(checkText("00", sha256, hash), "invalid signature");
});

test("checkSignature() refuses numbers out of range", () => {
  const order =
    "1000000000000000000000000000000014DEF9DEA2F79CD65812631A5CF5D3ED";
  const more = (value: string) =>
    (BigInt(`0x${value}`) + BigInt(`0x${order}`)).toString(16);
  const one = `01${"00".repeat(31)}`; // the point at infinity
  const values = {
    r: ["", "00", order, more(field(ecdsa, "r")), "FF".repeat(5000)],
    s: ["", "00", order, more(field(ecdsa, "s")), "FF".repeat(5000)],
    q: ["", "00", "FF".repeat(32), `${field(ecdsa, "q")}00`, one],
  };
  for (const [part, replacements] of Object.entries(values)) {
    for (const value of replacements) {
      const changed = alter(ecdsa, field(ecdsa, part), value);
      assert.is(check(changed), "invalid signature", `${part} ${value}`);
    }
  }
  for (const value of ["", "00", "01", `01${field(rsa, "s")}`]) {
    const changed = alter(rsa, field(rsa, "s"), value);
    assert.is(check(changed), "invalid signature", value);
  }
  for (const part of ["n", "e"]) {
    for (const value of ["", "00", "01"]) {
      const changed = alter(rsa, field(rsa, part), value);
      assert.is(check(changed), "invalid signature", `${part} ${value}`);
    }
  }
});

test("checkSignature() refuses signatures that lack a part", () => {
  for (const signed of [ecdsa, rsa]) {
    const acl = parseAcl(aclOf(signed.key), "acl");
    for (const part of ["data", "hash", "public-key"]) {
      const without = signed.signature.replace(`(${part} `, "(x ");
      const problem = checkSignature(without, hash, acl);
      assert.is(problem, "corrupt signature data", part);
    }
    for (const part of ["sig-val", "r", "s"]) {
      if (part === "r" && signed === rsa) continue;
      const without = signed.signature.replace(`(${part} `, "(x ");
      const problem = checkSignature(without, hash, acl);
      assert.is(problem, "invalid signature", part);
    }
    for (const text of ["x", "()", "(signature)", "((()))", "#00#"]) {
      const problem = checkSignature(text, hash, acl);
      assert.is(problem, "corrupt signature data", text);
    }
  }
});

test("checkSignature() says that it can't verify other kinds of keys", () => {
  const pattern = /^unsupported type of key: .*Ed25519/;
  assert.match(check(nist)!, pattern);
  // Guix makes EdDSA keys, but no signatures with them.
  const data = ecdsa.signature.replace(/\(public-key[^]*/, `${eddsa.key})`);
  assert.match(check({ key: eddsa.key, signature: data })!, pattern);
  const name = alter(ecdsa, "(q ", "(Q ");
  assert.match(check(name)!, pattern);
});

test("checkSignature() fails on texts that are damaged", () => {
  const acl = parseAcl(aclOf(ecdsa.key), "acl");
  const { signature } = ecdsa;
  for (let size = 0; size < signature.trimEnd().length; size++) {
    const cut = signature.slice(0, size);
    throws(() => checkSignature(cut, hash, acl), /^signature: invalid s-exp/);
  }
});

/** An exported item with the hash that is signed and the signature. */
async function readItem(data: Buffer, directory: string) {
  const reader = new ByteReader(chunks(data), "archive");
  reader.startHash();
  await restoreNar(reader, `${directory}/item`);
  assert.is(await reader.number(), 0x4558494e);
  const path = await reader.string(4096);
  const references = await reader.strings();
  const deriver = await reader.string(4096);
  const hash = reader.finishHash();
  assert.is(await reader.number(), 1);
  const signature = (await reader.bytes(4096)).toString();
  assert.not.ok(await reader.more());
  return { path, references, deriver, hash, signature };
}

for (const [version, daemon] of Object.entries(daemons)) {
  const { acl, drv, output } = daemon;

  test(`checkSignature() accepts an export from Guix ${version}`, async () => {
    await withDirectory(async (directory) => {
      const item = await readItem(await goldenExport(daemon), directory);
      assert.is(item.path, output);
      assert.ok(item.references.includes(output));
      assert.is(item.deriver, drv);
      const { signature, hash } = item;
      const trusted = parseAcl(acl, "acl");
      assert.is(checkSignature(signature, hash, trusted), undefined);
      const others = parseAcl(aclOf(ecdsa.key), "acl");
      const problem = checkSignature(signature, hash, others);
      assert.is(problem, "unauthorized public key");
    });
  });

  test(`checkSignature() notices changes to one from Guix ${version}`, async () => {
    const data = await goldenExport(daemon);
    const places = ["echo hello", "twin-b", output, drv];
    for (const place of places) {
      await withDirectory(async (directory) => {
        const changed = Buffer.from(data);
        changed[changed.lastIndexOf(place) + place.length - 1]! ^= 1;
        const { signature, hash } = await readItem(changed, directory);
        const problem = checkSignature(signature, hash, parseAcl(acl, "acl"));
        assert.is(problem, "invalid hash", place);
      });
    }
  });
}

test.run();

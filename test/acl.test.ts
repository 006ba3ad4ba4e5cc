import { Buffer } from "node:buffer";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { checkSignature, parseAcl, parseSexp } from "../mod.ts";
import type { Sexp } from "../mod.ts";
import { aclOf, field, hash, keys, throws } from "./helpers.ts";

const test = suite("acl");

const { ecdsa, other, rsa } = keys;

/** An s-expression as arrays of strings of bytes. */
function show(sexp: Sexp): unknown {
  if (sexp instanceof Buffer) return sexp.toString("latin1");
  return (sexp as readonly Sexp[]).map(show);
}

test("parseSexp() reads all forms of atoms", () => {
  const read = (text: string) => show(parseSexp(text, "text"));
  assert.is(read("atom"), "atom");
  assert.equal(read(" ( a-b:c.d  (e)\n()\t) "), ["a-b:c.d", ["e"], []]);
  assert.equal(read('("" "a b" "()" "#")'), ["", "a b", "()", "#"]);
  assert.equal(read("(#00fF# # 41\n42 # ##)"), ["\0\xff", "AB", ""]);
  assert.equal(read("(|YWJj| |Y W\nI=| ||)"), ["abc", "ab", ""]);
  assert.equal(read("(a#42#|Yg==|b)"), ["a", "B", "b", "b"]);
  const escapes = String.raw`"\"\\\n\t\x41\x00\101\'"`;
  assert.is(read(escapes), "\"\\\n\tA\0A'");
  assert.is(read('"one\\\n line"'), "one line");
  assert.is(read('"\xe9"'), "\xe9");
});

test("parseSexp() refuses what is no s-expression", () => {
  const texts = [
    "",
    " ",
    "(",
    ")",
    "(a",
    "a)",
    "a b",
    "(a))",
    "()()",
    "(a (b)",
  ];
  texts.push('"a', '"a\\"', "#41", "#4G#", "#4#", "|YQ==", "|*|", "(a |b)");
  for (const text of texts) {
    throws(
      () => parseSexp(text, "file"),
      /^file: invalid s-expression at \d+$/,
    );
  }
});

test("parseSexp() bounds how deep lists nest", () => {
  const nest = (depth: number) => "(".repeat(depth) + ")".repeat(depth);
  assert.ok(parseSexp(nest(20), "file"));
  throws(() => parseSexp(nest(100_000), "file"), /^file: invalid s-expression/);
});

test("parseAcl() reads every way to write an entry", () => {
  const q = field(ecdsa, "q");
  const base64 = Buffer.from(q, "hex").toString("base64");
  const lines = q.replace(/.{16}/g, "$&\n  ").toLowerCase();
  const ways = [
    ecdsa.key,
    ecdsa.key.replace(`#${q}#`, `|${base64}|`),
    ecdsa.key.replace(`#${q}#`, `#\n  ${lines}#`),
    `("public-key"("ecc"("curve"|RWQyNTUxOQ==|)(q #${q}#)))`,
  ];
  for (const key of ways) {
    const acl = parseAcl(aclOf(rsa.key, key), "acl");
    assert.is(checkSignature(ecdsa.signature, hash, acl), undefined);
    const tag = '("tag" (|Z3VpeA==| #696d706f7274#))';
    const other = parseAcl(`(acl\n(entry\n${key}${tag}))`, "acl");
    assert.is(checkSignature(ecdsa.signature, hash, other), undefined);
  }
});

test("parseAcl() leaves out entries for anything but import", () => {
  for (const tag of ["(guix export)", "(guix)", "guix", "(guix import more)"]) {
    const text = `(acl (entry ${ecdsa.key} (tag ${tag}))` +
      `(entry ${other.key} (tag (guix import))))`;
    const acl = parseAcl(text, "acl");
    const problem = checkSignature(ecdsa.signature, hash, acl);
    assert.is(problem, "unauthorized public key");
    assert.is(checkSignature(other.signature, hash, acl), undefined);
  }
});

test("parseAcl() refuses what is no access-control list", () => {
  const entry = `(entry ${ecdsa.key} (tag (guix import)))`;
  const texts = ["x", "()", entry, `(x ${entry})`, `((acl ${entry}))`];
  texts.push("(acl x)", "(acl ())", `(acl (entry ${ecdsa.key}))`);
  texts.push("(acl (entry (tag (guix import))))", `(acl ${ecdsa.key})`);
  texts.push(`(acl ; a comment\n${entry})`);
  texts.push(`(acl ${entry.replace("entry", "exit")})`, `(acl (${entry}))`);
  for (const text of texts) {
    const pattern = /^\/etc\/guix\/acl: invalid access-control list$/;
    throws(() => parseAcl(text, "/etc/guix/acl"), pattern);
  }
  throws(() => parseAcl("", "/etc/guix/acl"), /^\/etc\/guix\/acl: invalid s-/);
});

test.run();

import { Buffer } from "node:buffer";
import { copyFileSync, readFileSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { ssh2 } from "../deps.ts";
import { readPrivateKey } from "../mod.ts";
import { run, throws, withDirectory } from "./helpers.ts";

const test = suite("keys");

const PASSPHRASE = "open sesame";

interface Kind {
  readonly name: string;
  /** What ssh-keygen calls it. */
  readonly type: readonly string[];
  /** The forms that ssh-keygen writes it in. */
  readonly forms: readonly string[];
}

const KINDS: readonly Kind[] = [
  { name: "RSA", type: ["rsa", "-b", "2048"], forms: ["RFC4716", "PEM"] },
  { name: "Ed25519", type: ["ed25519"], forms: ["RFC4716"] },
  ...["256", "384", "521"].map((bits) => ({
    name: `ECDSA ${bits}`,
    type: ["ecdsa", "-b", bits],
    forms: ["RFC4716", "PEM"],
  })),
];

async function tool(program: string, ...args: string[]): Promise<void> {
  const { code, stderr } = await run(program, args);
  assert.is(code, 0, `${program} ${args.join(" ")}: ${stderr}`);
}

function generate(file: string, kind: Kind, passphrase = ""): Promise<void> {
  const type = [...kind.type, "-C", "a comment", "-N", passphrase];
  return tool("ssh-keygen", "-q", "-f", file, "-t", ...type);
}

/** Writes a copy of a key in another form and returns its file name. */
async function convert(
  file: string,
  form: string,
  passphrase: string,
): Promise<string> {
  const copy = `${file}.${form}`;
  copyFileSync(file, copy);
  const change = ["-q", "-p", "-P", "", "-N", passphrase];
  await tool("ssh-keygen", ...change, "-m", form, "-f", copy);
  return copy;
}

/** Writes a copy of a PEM key as PKCS #8 and returns its file name. */
async function toPkcs8(pem: string, passphrase: string): Promise<string> {
  const protect = passphrase === ""
    ? ["-nocrypt"]
    : ["-passout", `pass:${passphrase}`];
  const args = ["-topk8", "-in", pem, "-out", `${pem}.pkcs8`];
  await tool("openssl", "pkcs8", ...args, ...protect);
  return `${pem}.pkcs8`;
}

/** Writes a key in all its forms and returns their file names. */
async function writeForms(
  directory: string,
  kind: Kind,
  passphrase: string,
): Promise<string[]> {
  const file = `${directory}/key`;
  await generate(file, kind);
  const files = [];
  for (const form of kind.forms) {
    files.push(await convert(file, form, passphrase));
  }
  if (kind.forms.includes("PEM")) {
    const plain = await convert(file, "PEM", "");
    files.push(await toPkcs8(plain, passphrase));
    if (passphrase !== "") await convert(file, "PEM", passphrase);
  }
  return files;
}

/** Checks that `key` signs what the public key in `file` verifies. */
function checkPair(key: string, file: string): void {
  const pair = ssh2.utils.parseKey(key);
  const subject = ssh2.utils.parseKey(readFileSync(file));
  if (pair instanceof Error) throw pair;
  if (subject instanceof Error) throw subject;
  assert.ok(pair.isPrivateKey());
  assert.is(pair.type, subject.type);
  assert.equal(pair.getPublicSSH(), subject.getPublicSSH());
  const signature = pair.sign(Buffer.from("data"));
  if (signature instanceof Error) throw signature;
  assert.ok(subject.verify(Buffer.from("data"), signature) === true);
  assert.not.ok(subject.verify(Buffer.from("date"), signature) === true);
}

for (const kind of KINDS) {
  test(`readPrivateKey() reads ${kind.name} keys in all forms`, async () => {
    await withDirectory(async (directory) => {
      for (const file of await writeForms(directory, kind, "")) {
        checkPair(readPrivateKey(file), `${directory}/key.pub`);
      }
    });
  });

  test(`readPrivateKey() refuses protected ${kind.name} keys`, async () => {
    await withDirectory(async (directory) => {
      for (const file of await writeForms(directory, kind, PASSPHRASE)) {
        const { hint } = throws(
          () => readPrivateKey(file),
          /^failed to load SSH private key from '.*': .* by a passphrase$/,
        );
        assert.match(hint!, `ssh-keygen -p -f ${file}`);
      }
    });
  });
}

/** How long a key's secret number is, as OpenSSH wrote it. */
function secretLength(file: string): number {
  const key = ssh2.utils.parseKey(readFileSync(file));
  if (key instanceof Error) throw key;
  const pem = key.getPrivatePEM().replace(/-----.*-----/g, "");
  const der = Buffer.from(pem, "base64");
  return der[der.indexOf(Buffer.of(2, 1, 1, 4)) + 4]!;
}

test("readPrivateKey() reads ECDSA keys whose number fills all its bits", async () => {
  for (const kind of KINDS.slice(2, 4)) {
    await withDirectory(async (directory) => {
      const size = Number(kind.type.at(-1)) / 8;
      let file;
      // OpenSSH puts a zero before a number whose first bit is set.
      for (let round = 0;; round++) {
        file = `${directory}/${round}`;
        await generate(file, kind);
        if (secretLength(file) === size + 1) break;
      }
      checkPair(readPrivateKey(file), `${file}.pub`);
    });
  }
});

test("readPrivateKey() reads Ed25519 keys as PKCS #8", async () => {
  await withDirectory(async (directory) => {
    const file = `${directory}/key`;
    await tool("openssl", "genpkey", "-algorithm", "ed25519", "-out", file);
    const key = readPrivateKey(file);
    // OpenSSH must find nothing wrong with it either.
    writeFileSync(`${directory}/ours`, key, { mode: 0o600 });
    const { code, stdout, stderr } = await run(
      "ssh-keygen",
      ["-y", "-f", `${directory}/ours`],
    );
    assert.is(code, 0, stderr);
    writeFileSync(`${directory}/ours.pub`, stdout);
    checkPair(key, `${directory}/ours.pub`);
    const pem = ["pkey", "-in", file, "-pubout", "-outform", "DER"];
    const der = (await run("openssl", pem)).stdout;
    const blob = Buffer.from(stdout.toString().split(" ")[1]!, "base64");
    assert.equal(blob.subarray(-32), der.subarray(-32));
    const protect = ["-topk8", "-in", file, "-out", `${file}.enc`];
    await tool(
      "openssl",
      "pkcs8",
      ...protect,
      "-passout",
      `pass:${PASSPHRASE}`,
    );
    throws(() => readPrivateKey(`${file}.enc`), /by a passphrase$/);
  });
});

test("readPrivateKey() refuses what is no private key it knows", async () => {
  await withDirectory(async (directory) => {
    const file = `${directory}/key`;
    const pattern = /^failed to load SSH private key from '.*\/key': ./;
    const none = throws(() => readPrivateKey(file), pattern);
    assert.match(none.message, /: no such file or directory$/);
    throws(() => readPrivateKey(directory), /^failed to load .*': ./);
    const ed25519 = KINDS[1]!;
    await generate(`${directory}/pair`, ed25519);
    const pem = readFileSync(`${directory}/pair`, "utf8");
    const pkcs8 = (body: string) =>
      `-----BEGIN PRIVATE KEY-----\n${body}\n-----END PRIVATE KEY-----\n`;
    await tool("openssl", "genpkey", "-algorithm", "x25519", "-out", file);
    const texts = [
      "",
      "\0\xff",
      "ssh-ed25519 AAAA",
      pem.slice(0, pem.length / 2),
      pem.slice(40),
      pkcs8(""),
      pkcs8("AAAA"),
      readFileSync(file, "utf8"), // x25519, which can't sign
      readFileSync(`${directory}/pair.pub`, "utf8"),
    ];
    for (const text of texts) {
      writeFileSync(file, text);
      const { message } = throws(() => readPrivateKey(file), pattern);
      assert.not.match(message, /passphrase/);
    }
  });
});

test.run();

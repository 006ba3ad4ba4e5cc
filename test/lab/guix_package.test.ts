/** The package for Guix that scripts/guix.scm gives, in a daemon's hands. */

import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  writeFileSync,
} from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertOffloaded,
  build,
  down,
  inHost,
  lab,
  makeWork,
  offloadCommand,
  outputsOf,
  PATIENT,
  root,
  run,
  start,
  up,
  useMachines,
  watch,
  within,
} from "./lab.ts";
import {
  copyRelease,
  endRelease,
  OLDEST_NODE,
  register,
  serveRelease,
} from "./release.ts";

const PACKAGE = "/root/release/guix.scm";

/** What keeps it from the garbage collector. */
const KEPT = "/root/offload";

/** Where completions are, for shells that find them below a profile. */
const COMPLETIONS = {
  bash: "bash-completion/completions/offload",
  zsh: "zsh/site-functions/_offload",
  fish: "fish/vendor_completions.d/offload.fish",
};

const test = suite("the package for Guix");

/** Puts a program into head's store, as what stands for a package's. */
function standIn(item: string, name: string, program: string): void {
  const file = `${root("head")}${item}/bin/${name}`;
  if (existsSync(file)) return;
  mkdirSync(`${root("head")}${item}/bin`, { recursive: true });
  copyFileSync(program, file);
  register("head", item);
}

test.before(async () => {
  up("head", "w1");
  await serveRelease("release");
  copyRelease("head");
  useMachines("head", ["w1"]);
  const derivationOf = (...what: string[]) =>
    inHost("head", "guix", "build", "-d", ...what).trim();
  const text = readFileSync(
    root("head") + derivationOf("-f", PACKAGE),
    "utf8",
  );
  const [, guile] = /"([^"]*)\/bin\/guile"/.exec(text)!;
  const node = outputsOf("head", derivationOf("node")).out!;
  // Nothing can be fetched here. Debian's Guile builds outside of a chroot.
  const debians = inHost("head", "readlink", "-f", "/usr/bin/guile").trim();
  standIn(guile!, "guile", root("head") + debians);
  standIn(node, "node", OLDEST_NODE);
  for (const name of ["gzip", "tar"]) {
    const item = outputsOf("head", derivationOf(name)).out!;
    standIn(item, name, `${root("head")}/usr/bin/${name}`);
  }
  lab("daemon", "head", "--", "--disable-chroot");
});

test.after(() => {
  endRelease();
  down("head"); // with what stood for others
  up("head", "w1");
});

/** Builds the package of a definition of it. */
async function buildPackage(file: string, ...options: readonly string[]) {
  const command = ["guix", "build", "--no-offload", "-f", file, ...options];
  // This process serves what is fetched.
  return await within("the build", watch(start("head", ...command)).ended);
}

test("guix builds it, all in its place", async () => {
  const { status, stderr } = await buildPackage(PACKAGE, `--root=${KEPT}`);
  assert.is(status, 0, stderr);
  const inKept = (name: string) =>
    readFileSync(
      `${root("head")}${inHost("head", "readlink", KEPT).trim()}/${name}`,
    );
  for (const [shell, file] of Object.entries(COMPLETIONS)) {
    const text = inHost("head", ...offloadCommand("node", "completion", shell));
    assert.is(inKept(`share/${file}`).toString(), text);
  }
  const released = (name: string) =>
    readFileSync(`${root("head")}/root/release/${name}`);
  assert.equal(inKept("share/man/man1/offload.1"), released("offload.1"));
  for (const name of ["offload.d.mts", "contract.mjs", "contract.d.mts"]) {
    assert.equal(inKept(`lib/offload/${name}`), released(name), name);
  }
  const version = inHost("head", `${KEPT}/bin/offload`, "--version");
  assert.match(
    inHost("head", "readlink", KEPT),
    version.trim().replace(" ", "-"),
  );
});

test("guix.scm alone fetches the rest, by its checksum", async () => {
  const alone = `${root("head")}/root/alone`;
  mkdirSync(alone);
  const text = readFileSync(`${root("head")}${PACKAGE}`, "utf8");
  writeFileSync(`${alone}/guix.scm`, text);
  const { status, stdout, stderr } = await buildPackage("/root/alone/guix.scm");
  assert.is(status, 0, stderr);
  inHost("head", "diff", "--recursive", stdout.trim(), `${KEPT}/`);
  // Another one of that name is refused, there or here.
  const wrong = text.replace(/(sha256sum ")(.)/, (_, before, first) => {
    return before + (first === "0" ? "1" : "0");
  });
  writeFileSync(`${alone}/guix.scm`, wrong);
  const refused = await buildPackage("/root/alone/guix.scm");
  assert.is.not(refused.status, 0);
  assert.match(refused.stderr, /sha256 hash mismatch/);
  writeFileSync(`${root("head")}/root/release/wrong.scm`, wrong);
  const other = await buildPackage("/root/release/wrong.scm");
  assert.is.not(other.status, 0);
  assert.match(other.stderr, "it is not of the same release");
});

test("a daemon offloads by it, whatever is collected", () => {
  const guix = `GUIX=${KEPT}/lib/offload/guix`;
  lab("daemon", "head", guix, PATIENT);
  inHost("head", "guix", "gc");
  const [derivation] = makeWork("head");
  assertOffloaded(derivation!, build("head", derivation!), ["w1"]);
  const { status, stderr } = run("head", `${KEPT}/bin/offload`, "test");
  assert.is(status, 0, stderr);
});

test.run();

/** The package for Guix that scripts/guix.scm gives, in a daemon's hands. */

import { copyFileSync, existsSync, mkdirSync, readFileSync } from "node:fs";
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
  up,
  useMachines,
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
  await serveRelease();
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
  lab("daemon", "head", "--", "--disable-chroot");
});

test.after(() => {
  endRelease();
  down("head"); // with what stood for others
  up("head", "w1");
});

test("guix builds it, all in its place", () => {
  const build = ["guix", "build", "--no-offload", "-f", PACKAGE];
  inHost("head", ...build, `--root=${KEPT}`);
  const inKept = (name: string) =>
    readFileSync(
      `${root("head")}${inHost("head", "readlink", KEPT).trim()}/${name}`,
    );
  for (const [shell, file] of Object.entries(COMPLETIONS)) {
    const text = inHost("head", ...offloadCommand("node", "completion", shell));
    assert.is(inKept(`share/${file}`).toString(), text);
  }
  assert.equal(
    inKept("share/man/man1/offload.1"),
    readFileSync(`${root("head")}/root/release/offload.1`),
  );
  const version = inHost("head", `${KEPT}/bin/offload`, "--version");
  assert.match(
    inHost("head", "readlink", KEPT),
    version.trim().replace(" ", "-"),
  );
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

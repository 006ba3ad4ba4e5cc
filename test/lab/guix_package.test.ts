/**
 * The package for Guix that scripts/guix.scm gives: built, in a profile, in the
 * declaration of a system, in a daemon's hands. What Guix would fetch is not to
 * be had here: something else stands for Guile, Node, tar and gzip, and nothing
 * for what a profile's hooks need of fonts and of info files, which there are
 * none of. No system is built of its declaration.
 */

import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { basename } from "node:path";
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
  ROOT,
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

/** Where `guix package` puts it, unless told. */
const PROFILE = "/root/.guix-profile";

/** Where README has the release on Guix System. */
const DECLARED = "/etc/offload";

/** How guix-daemon builds by Debian's Guile. */
const OUTSIDE = ["--", "--disable-chroot"];

const README = readFileSync(`${ROOT}README.md`, "utf8");

/** What a profile's hooks name, as Guix has it. */
const NAMED_BY_HOOKS = [
  "(@ (gnu packages texinfo) texinfo)",
  "((@ (gnu packages base) libc-utf8-locales-for-target))",
  "(@ (gnu packages xorg) mkfontscale)",
  "(@ (gnu packages xorg) mkfontdir)",
];

const test = suite("the package for Guix");

/** Prints the derivations of what options of `guix build` name. */
function derivationsOf(...what: readonly string[]): string[] {
  return inHost("head", "guix", "build", "--derivations", ...what)
    .trim().split("\n");
}

/** Puts an item into head's store, with a program that stands for its own. */
function standIn(item: string, name?: string, program?: string): void {
  const directory = root("head") + item;
  if (existsSync(directory)) return;
  mkdirSync(`${directory}/bin`, { recursive: true });
  if (program) copyFileSync(program, `${directory}/bin/${name}`);
  register("head", item);
}

/** Has Debian's Guile build a derivation, outside of a chroot. */
function standInForGuile(derivation: string): void {
  const text = readFileSync(root("head") + derivation, "utf8");
  const [, guile] = /"([^"]*)\/bin\/guile"/.exec(text)!;
  const debians = inHost("head", "readlink", "-f", "/usr/bin/guile").trim();
  standIn(guile!, "guile", root("head") + debians);
}

/** Has head build itself, by what is in its store alone. */
function listNoMachine(): void {
  writeFileSync(`${root("head")}/etc/guix/machines.scm`, "(list)\n");
}

test.before(async () => {
  up("head", "w1");
  await serveRelease("release");
  copyRelease("head");
  listNoMachine();
  standInForGuile(derivationsOf("-f", PACKAGE)[0]!);
  const programs = ["node", "gzip", "tar"].map((name) =>
    name === "node" ? OLDEST_NODE : `${root("head")}/usr/bin/${name}`
  );
  for (const program of programs) {
    const name = basename(program);
    const [derivation] = derivationsOf(name);
    standIn(outputsOf("head", derivation!).out!, name, program);
  }
  const named = NAMED_BY_HOOKS.flatMap((it) => ["-e", it]);
  for (const derivation of derivationsOf(...named)) {
    standIn(outputsOf("head", derivation).out!);
  }
  lab("daemon", "head", ...OUTSIDE);
});

test.after(() => {
  endRelease();
  down("head"); // with what stood for others
  up("head", "w1");
});

/** Builds the package of a definition of it. */
async function buildPackage(file: string, ...options: readonly string[]) {
  const command = ["guix", "build", "-f", file, ...options];
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

test("in a checkout it is what scripts/release has made there", () => {
  const checkout = `${root("head")}/root/checkout`;
  mkdirSync(`${checkout}/scripts`, { recursive: true });
  copyFileSync(`${ROOT}scripts/guix.scm`, `${checkout}/scripts/guix.scm`);
  const args = ["guix", "build", "-d", "-f", "/root/checkout/scripts/guix.scm"];
  const without = run("head", ...args);
  assert.is(without.status, 1);
  assert.match(without.stderr, "run scripts/release first, which makes it");
  inHost("head", "cp", "-r", "/root/release", "/root/checkout/dist");
  assert.equal([inHost("head", ...args).trim()], derivationsOf("-f", PACKAGE));
});

test("a line of README puts it into a profile, another takes it out", () => {
  const [line, removal] = ["guix package -f guix.scm", "guix remove offload"];
  assert.ok([line!, removal!].every((it) => README.includes(`\`${it}\``)));
  const type = (command: string) =>
    inHost("head", "sh", "-c", `cd /root/release && ${command}`);
  const installed = () => inHost("head", "guix", "package", "-I");
  type(line!);
  assert.match(installed(), /^offload\t\S+\tout\t\/gnu\/store\/\S+\n$/);
  const places = Object.values(COMPLETIONS).concat("man/man1/offload.1");
  for (const place of places) {
    assert.ok(
      existsSync(
        `${root("head")}${
          inHost("head", "readlink", "-f", `${PROFILE}/share/${place}`).trim()
        }`,
      ),
      place,
    );
  }
  type(removal!);
  assert.is(installed(), "");
  type(line!);
});

/** README's declaration of a system, with what stands for its dots. */
function declaration(): string {
  const [, text] = /^```scheme\n(\(define offload [^]*?)^```$/m.exec(README)!;
  const [machine] = /\(build-machine[^]*\)(?=\s*\)\s*$)/
    .exec(lab("machines", "head", "w1"))!;
  const rest = `(host-name "head")
  (timezone "Etc/UTC")
  (bootloader (bootloader-configuration
                (bootloader grub-bootloader)
                (targets '("/dev/sda"))))
  (file-systems (cons (file-system
                        (device "/dev/sda1")
                        (mount-point "/")
                        (type "ext4"))
                      %base-file-systems))`;
  assert.match(text!, DECLARED);
  const filled = text!.replace(";; …", rest)
    .replace("(build-machine …)", machine!);
  assert.not.match(filled, "…");
  return `(use-modules (gnu))\n${filled}`;
}

/** Prints the environment that the file of a service of Shepherd gives it. */
const ENVIRONMENT_SCRIPT = `
(define (definition-of name form)
  (and (pair? form)
       (if (and (eq? (car form) 'define) (eq? (cadr form) name))
           (caddr form)
           (or (definition-of name (car form)) (definition-of name (cdr form))))))
(define form (call-with-input-file (cadr (command-line)) read))
(for-each (lambda (variable) (display variable) (newline))
          (eval \`(let ((proxy #f))
                   ,(definition-of 'environment-variables form))
                (current-module)))
`;

/** Computes the system that README declares; returns all that is a part of it. */
function computeSystem(): string[] {
  inHost("head", "cp", "-r", "/root/release", DECLARED);
  const file = "/root/config.scm";
  writeFileSync(root("head") + file, declaration());
  const system = inHost("head", "guix", "system", "build", "-d", file).trim();
  return inHost("head", "guix", "gc", "--requisites", system).split("\n");
}

test("a system is computed of README's declaration, and a daemon obeys it", () => {
  const parts = computeSystem();
  const partOf = (end: string) => parts.find((it) => it.endsWith(end))!;
  const [offload] = derivationsOf("-f", `${DECLARED}/guix.scm`);
  assert.ok(parts.includes(offload!));
  // Its machine file is built, and put where the system's activation does.
  standInForGuile(partOf("-machines.scm.drv"));
  const machines = inHost("head", "guix", "build", partOf("-machines.scm.drv"));
  const file = "/etc/guix/machines.scm";
  inHost("head", "ln", "-sfn", machines.trim(), file);
  const withoutGuile = [
    "env",
    "OFFLOAD_GUIX=/bin/false",
    `${KEPT}/bin/offload`,
  ];
  assert.match(inHost("head", ...withoutGuile, "machines"), /^w1:22\t/m);
  // What its daemon's environment is; that has next to nothing in PATH.
  writeFileSync(`${root("head")}/tmp/environment.scm`, ENVIRONMENT_SCRIPT);
  const service = partOf("-shepherd-guix-daemon.scm-builder");
  const variables = inHost(
    ...["head", "guix", "repl", "--", "/tmp/environment.scm", service] as const,
  ).trim().split("\n");
  const guix = "GUIX=/run/current-system/profile/lib/offload/guix";
  assert.ok(variables.includes(guix), variables.join(" "));
  inHost("head", "mkdir", "-p", "/run/current-system");
  inHost("head", "ln", "-sfn", PROFILE, "/run/current-system/profile");
  // Debian's guix has none of Guix's locales, and what it says of that would be
  // taken for a signature.
  const words = variables.concat(PATIENT)
    .map((it) => `'${it.replace(/^LC_ALL=.*/, "LC_ALL=C.UTF-8")}'`).join(" ");
  const hook = `${root("head")}/tmp/guix`;
  writeFileSync(
    hook,
    `#!/bin/sh\nexec /usr/bin/env -i ${words} ${guix.slice(5)} "$@"\n`,
  );
  chmodSync(hook, 0o755);
  lab("daemon", "head", "GUIX=/tmp/guix");
  const [derivation] = makeWork("head");
  const result = build("head", derivation!);
  rmSync(root("head") + file); // what it leads to is the store's
  assertOffloaded(derivation!, result, ["w1"]);
});

test("a daemon offloads by it, whatever is collected", () => {
  const guix = `GUIX=${KEPT}/lib/offload/guix`;
  lab("daemon", "head", guix, PATIENT);
  useMachines("head", ["w1"]);
  inHost("head", "guix", "gc");
  inHost("head", `${PROFILE}/bin/offload`, "--version");
  const [derivation] = makeWork("head");
  assertOffloaded(derivation!, build("head", derivation!), ["w1"]);
  const { status, stderr } = run("head", `${KEPT}/bin/offload`, "test");
  assert.is(status, 0, stderr);
});

test.run();

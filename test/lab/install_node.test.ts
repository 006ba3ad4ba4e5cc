/** install.sh on a machine that has Guix and no runtime: Guix has one. */

import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readlinkSync,
  rmSync,
  symlinkSync,
} from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertOffloaded,
  build,
  down,
  inHost,
  makeWork,
  outputsOf,
  root,
  run,
  until,
  up,
  useMachines,
} from "./lab.ts";
import {
  assertRefused,
  changes,
  copyRelease,
  endRelease,
  HOSTS,
  install,
  LIBRARY,
  listing,
  makeFresh,
  nextVersion,
  OLDEST_NODE,
  pipe,
  register,
  restartDaemon,
  serveRelease,
  SHIM,
} from "./release.ts";

/** In w1, a signed archive of what 'guix build node' would make. */
const ARCHIVE = "/tmp/node.nar";

let item = "";

/** Puts what stands for Guix's Node into w1's store, and makes an archive. */
function makeArchive(): void {
  item = outputsOf("w1", inHost("w1", "guix", "build", "node", "-d").trim())
    .out!;
  const bin = `${root("w1")}${item}/bin`;
  mkdirSync(bin, { recursive: true });
  copyFileSync(OLDEST_NODE, `${bin}/node`);
  chmodSync(`${bin}/node`, 0o555);
  register("w1", item);
  inHost("w1", "sh", "-c", `guix archive --export ${item} >${ARCHIVE}`);
}

/** The garbage collector's roots that are links elsewhere. */
function roots(host: string): string[] {
  const directory = `${root(host)}/var/guix/gcroots/auto`;
  return existsSync(directory) ? readdirSync(directory).sort() : [];
}

const test = suite("install, with Guix's Node");
const derivations: Record<string, string> = {};

test.before(async () => {
  await serveRelease();
  up("fresh:master", "ufresh:master:unprivileged", "w1");
  makeArchive();
  for (const host of Object.keys(HOSTS)) {
    copyFileSync(root("w1") + ARCHIVE, root(host) + ARCHIVE);
    inHost(host, "sh", "-c", `guix archive --import <${ARCHIVE}`);
    useMachines(host, ["w1"]);
    [derivations[host]] = makeWork(host) as [string];
    makeFresh(host, undefined);
  }
});

test.after(() => {
  endRelease();
  down(...Object.keys(HOSTS));
  inHost("w1", "rm", "-f", ARCHIVE);
});

for (const [host, account] of Object.entries(HOSTS)) {
  test(`${account}'s daemon goes over and back`, async () => {
    restartDaemon(host);
    const [before, rootsBefore] = [listing(host), roots(host)];
    const installed = await pipe(host, "sh", "--yes");
    assert.is(installed.status, 0, installed.stderr);
    const said = `using ${LIBRARY}/node/bin/node, to run Offload as ${account}`;
    assert.match(installed.stdout, said);
    assert.match(installed.stdout, /^w1:22\tok\t/m, installed.stderr);
    // No process has it open, which would keep it.
    assert.not.match(inHost(host, "guix", "gc", "--list-dead"), item);
    restartDaemon(host, `GUIX=${SHIM}`);
    const derivation = derivations[host]!;
    assertOffloaded(derivation, build(host, derivation), ["w1"]);
    const { status } = run(host, "/usr/local/bin/offload", "test");
    assert.is(status, 0);
    restartDaemon(host);
    const gone = run(host, "sh", `${LIBRARY}/install.sh`, "--uninstall");
    assert.is(gone.status, 0, gone.stderr);
    assert.equal(changes(before, listing(host)), []);
    assert.equal(roots(host), rootsBefore);
    // Once the process that stayed has ended, which is at once or so.
    const isDead = () =>
      inHost(host, "guix", "gc", "--list-dead").includes(item);
    await until("nothing to keep it", isDead);
  });
}

test("Guix is not asked for it unless somebody says so", () => {
  copyRelease("fresh");
  const before = listing("fresh");
  const refused = install("fresh");
  assertRefused("fresh", before, refused, /neither Node 22\.14 nor Deno 2/);
  assert.match(refused.stderr, "to have Guix get Node, add --yes; or install");
  const dry = install("fresh", "--dry-run");
  assert.is(dry.status, 0, dry.stderr);
  assert.match(dry.stdout, "would get Node from Guix\n");
  assert.match(dry.stdout, `would install ${LIBRARY}/node\n`);
  assert.equal(changes(before, listing("fresh")), []);
});

test("where guix has none, that is said", () => {
  copyRelease("fresh");
  const before = listing("fresh");
  inHost("fresh", "mv", "/var/guix/daemon-socket/socket", "/tmp/socket");
  const result = install("fresh", "--yes");
  inHost("fresh", "mv", "/tmp/socket", "/var/guix/daemon-socket/socket");
  assertRefused("fresh", before, result, /'guix build node' failed/);
});

test("an upgrade keeps it, and what fails leaves it as it was", () => {
  const directory = copyRelease("fresh");
  const bin = "/usr/local/bin";
  const [before, rootsBefore] = [listing("fresh"), roots("fresh")];
  const fail = () => {
    const [before, rootsBefore] = [listing("fresh"), roots("fresh")];
    inHost("fresh", "mount", "--bind", bin, bin);
    inHost("fresh", "mount", "-o", "remount,bind,ro", bin);
    const { status, stderr } = install("fresh", "--yes");
    inHost("fresh", "umount", bin);
    assert.match(stderr, "offload: nothing was changed\n");
    assert.is.not(status, 0);
    assert.equal(changes(before, listing("fresh")), []);
    assert.equal(roots("fresh"), rootsBefore);
  };
  fail();
  assert.is(install("fresh", "--yes").status, 0);
  const rootsThen = roots("fresh");
  assert.is(rootsThen.length, rootsBefore.length + 1);
  nextVersion(directory);
  const upgraded = install("fresh");
  assert.is(upgraded.status, 0, upgraded.stderr);
  assert.not.match(upgraded.stdout, `${LIBRARY}/node\n`);
  assert.equal(roots("fresh"), rootsThen);
  // One that can't be used any more is replaced; a link that leads elsewhere
  // is put back as that.
  const link = `${root("fresh")}${LIBRARY}/node`;
  rmSync(link);
  symlinkSync("/usr/local", link);
  rmSync(`${root("fresh")}${bin}/offload`);
  const names = readdirSync(`${root("fresh")}/usr/local`);
  fail();
  assert.is(readlinkSync(link), "/usr/local");
  assert.equal(readdirSync(`${root("fresh")}/usr/local`), names);
  assert.is(install("fresh", "--yes").status, 0);
  assert.is(readlinkSync(link), item);
  const gone = run("fresh", "sh", `${LIBRARY}/install.sh`, "--uninstall");
  assert.is(gone.status, 0, gone.stderr);
  assert.equal(changes(before, listing("fresh")), []);
  assert.equal(roots("fresh"), rootsBefore);
});

test.run();

/** Builds that the daemon of head offloads to other machines. */

import { lstatSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { closure } from "./hook.ts";
import {
  assertLikeLocal,
  assertOffloaded,
  assertStoreIsSound,
  build,
  bytesPath,
  inHost,
  makeWork,
  outputsOf,
  pathInfo,
  root,
  RUNTIMES,
  storeNames,
  up,
  useMachines,
  useOffload,
} from "./lab.ts";
import type { Runtime } from "./lab.ts";

const MACHINES = ["w1", "w2"];
const STORE_FILE = { file: 0o100444, program: 0o100555, directory: 0o40555 };

for (const runtime of RUNTIMES) suiteUnder(runtime);

function suiteUnder(runtime: Runtime): void {
  const test = suite(`builds under ${runtime}`);

  test.before(() => {
    up("head", ...MACHINES);
    useOffload("head", runtime);
  });

  test.before.each(() => useMachines("head", MACHINES));

  test("a trivial build equals a local one", () => {
    const [derivation] = makeWork("head", "--name=trivial", "--log-lines=2");
    const result = build("head", derivation!);
    const machine = assertOffloaded(derivation!, result, MACHINES);
    assert.match(result.stderr, "building trivial\nline 1 of 2\nline 2 of 2\n");
    assert.is(result.stdout.trim(), outputsOf("head", derivation!).out);
    assertStoreIsSound("head");
    assertLikeLocal("head", derivation!, machine);
  });

  test("the daemon keeps no more than a local build leaves", () => {
    const [derivation] = makeWork("head");
    const before = storeNames("head");
    assert.is(build("head", derivation!).status, 0);
    const added = storeNames("head").filter((name) => !before.includes(name));
    const { out } = outputsOf("head", derivation!);
    assert.equal(added.map((name) => `/gnu/store/${name}`), [out]);
  });

  test("several outputs come back, each with its references", () => {
    const [derivation] = makeWork("head", "--outputs=out,lib,doc", "--flat");
    const result = build("head", derivation!);
    const machine = assertOffloaded(derivation!, result, MACHINES);
    const outputs = outputsOf("head", derivation!);
    const { out, lib, doc } = outputs;
    assert.is(Object.keys(outputs).length, 3);
    const info = pathInfo("head", Object.values(outputs));
    assert.equal(info[out!]!.references, [lib]);
    assert.equal(info[lib!]!.references, [doc]);
    assert.equal(info[doc!]!.references, []);
    assertStoreIsSound("head");
    assertLikeLocal("head", derivation!, machine);
  });

  test("a tree of all that a nar can hold comes back byte for byte", () => {
    const [derivation] = makeWork(
      "head",
      ...["--tree", "--bytes", "--outputs=out,more"],
    );
    const result = build("head", derivation!);
    const machine = assertOffloaded(derivation!, result, MACHINES);
    for (const output of Object.values(outputsOf("head", derivation!))) {
      assertTree(output);
    }
    assertStoreIsSound("head");
    assertLikeLocal("head", derivation!, machine);
  });

  test("a new machine gets every input of a build", () => {
    useMachines("head", ["w1"]);
    inHost("w1", "guix", "gc");
    const [first, second] = makeWork(
      "head",
      ...["--count=2", "--chain", "--inputs=50", "--references=50"],
      ...["--text-inputs=5", "--input-files=20", "--input-size=5000"],
    );
    assertOffloaded(first!, build("head", first!), ["w1"]);
    const items = closure("head", first!);
    assert.ok(items.length > 55, `${items.length} items`);
    assert.equal(pathInfo("w1", items), pathInfo("head", items));
    // The output of the first, with its references, is an input of the second.
    useMachines("head", ["w2"]);
    inHost("w2", "guix", "gc");
    const result = build("head", second!);
    const machine = assertOffloaded(second!, result, ["w2"]);
    const { out } = outputsOf("head", first!);
    // Its deriver is dropped, as by any import that comes before the deriver.
    const [sent, original] = ["w2", "head"].map((host) =>
      pathInfo(host, [out!])[out!]
    );
    assert.is(sent?.references.length, 50);
    assert.equal(sent?.references, original?.references);
    assert.is(sent?.hash, original?.hash);
    assertStoreIsSound("head");
    assertStoreIsSound("w2");
    assertLikeLocal("head", second!, machine);
  });

  test("a failing build fails for good, and its log is seen", () => {
    const [derivation] = makeWork("head", "--fail", "--log-lines=2");
    const { status, stderr } = build("head", derivation!);
    assert.is(status, 1);
    assert.match(stderr, "line 2 of 2\nfailing, as told to\n");
    assert.match(stderr, `offloading build of ${derivation} to 'w`);
    assert.match(stderr, /offloaded to 'w\d' failed/);
    // Not "hook-failed" or the like.
    assert.match(stderr, `error: build of \`${derivation}' failed`);
    assert.equal(
      pathInfo("head", Object.values(outputsOf("head", derivation!))),
      {},
    );
    // A failure is not remembered, unless the daemon is told to.
    assert.is(build("head", derivation!).status, 1);
  });

  test.run();
}

/** Demands what `--tree --bytes` makes, as a daemon registers it. */
function assertTree(output: string): void {
  const path = root("head") + output;
  const modes = {
    ".": STORE_FILE.directory,
    "deep/er/still": STORE_FILE.directory,
    "empty-directory": STORE_FILE.directory,
    "bin/hello": STORE_FILE.program,
    "empty-file": STORE_FILE.file,
    "name with spaces": STORE_FILE.directory,
    "caf\u00e9": STORE_FILE.file,
  };
  for (const [name, mode] of Object.entries(modes)) {
    const file = lstatSync(`${path}/${name}`);
    assert.is(file.mode, mode, name);
    assert.is(file.mtimeMs, 1000, name);
    assert.is(file.uid, 0, name);
  }
  assert.is(lstatSync(`${path}/empty-file`).size, 0);
  assert.equal(readdirSync(`${path}/empty-directory`), []);
  assert.is(readlinkSync(`${path}/dangling`), "nowhere");
  assert.is(readlinkSync(`${path}/deep/er/relative`), "../../bin/hello");
  assert.match(readlinkSync(`${path}/absolute`), /^\/gnu\/store\/.*-busybox/);
  assert.is(readlinkSync(`${path}/own`), `${output}/bin`);
  assert.is(readFileSync(bytesPath(path, "caf\u00e9"), "utf8"), "latin\n");
  const target = readlinkSync(`${path}/bytes-link`, { encoding: "buffer" });
  assert.is(target.toString("latin1"), "to-\u00ff\u00fe");
}

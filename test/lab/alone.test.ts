/** mod.ts and deps.ts without plugins/: a complete offloader of plain files. */

import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertLikeLocal,
  assertOffloaded,
  assertStoreIsSound,
  build,
  buildCommand,
  buildOneByOne,
  inHost,
  lab,
  makeWork,
  oneSlot,
  ROOT,
  root,
  run,
  RUNTIMES,
  start,
  until,
  up,
  useMachines,
  watch,
} from "./lab.ts";
import type { Runtime } from "./lab.ts";
import { relayed, startRelay } from "./relay.ts";

/** Where they are on the host: with what starts them, and the libraries. */
const ALONE = "/tmp/alone";

const FILES = [
  ...["mod.ts", "deps.ts", "package.json"],
  ...["scripts/guix", "scripts/runtime.sh"],
];

for (const runtime of RUNTIMES) suiteUnder(runtime);

function suiteUnder(runtime: Runtime): void {
  const test = suite(`mod.ts and deps.ts alone, under ${runtime}`);

  const use = (...variables: string[]) =>
    lab(
      ...["daemon", "head", `GUIX=${ALONE}/scripts/guix`] as const,
      ...[`OFFLOAD_RUNTIME=${runtime}`, "OFFLOAD_PLUGINS=/none", ...variables],
    );

  test.before(() => {
    up("head", "w1", "w2");
    inHost("head", "rm", "-rf", ALONE);
    mkdirSync(`${root("head")}${ALONE}/scripts`, { recursive: true });
    for (const file of FILES) {
      copyFileSync(ROOT + file, `${root("head")}${ALONE}/${file}`);
    }
    const libraries = ["/offload/node_modules", `${ALONE}/node_modules`];
    inHost("head", "ln", "-s", ...libraries);
    use();
  });
  test.before.each(() => useMachines("head", ["w1"]));
  test.after(() => void inHost("head", "rm", "-rf", ALONE));

  test("a build gets its inputs there, and its outputs back", () => {
    const [derivation] = makeWork(
      "head",
      ...["--tree", "--bytes", "--outputs=out,lib", "--inputs=20"],
      ...["--references=20", "--input-size=20000", "--text-inputs=5"],
    );
    assertOffloaded(derivation!, build("head", derivation!), ["w1"]);
    assertStoreIsSound("head");
    assertLikeLocal("head", derivation!, "w1");
  });

  test("another machine does what one fails at", async () => {
    const relay = await startRelay("w1", "--cut-up", "100000");
    useMachines(
      "head",
      ["w1", "w2"],
      (text) => relayed(text.replace('(name "w1")', "$& (speed 9.)"), "w1"),
    );
    try {
      const [derivation] = makeWork(
        ...["head", "--inputs=1", "--input-size=1000000"],
      );
      const result = build("head", derivation!);
      assertOffloaded(derivation!, result, ["w2"]);
      assert.match(result.stderr, "'w1' failed: trying another machine...");
    } finally {
      await relay.stop();
    }
  });

  test("what nobody trusts does not come into the store", () => {
    const acl = `${root("head")}/etc/guix/acl`;
    const before = readFileSync(acl);
    const own = readFileSync(`${root("head")}/etc/guix/signing-key.pub`);
    writeFileSync(acl, `(acl (entry ${own} (tag (guix import))))`);
    try {
      use("OFFLOAD_ATTEMPTS=1");
      const [derivation] = makeWork("head");
      const { status, stderr } = build("head", derivation!);
      assert.is(status, 1);
      assert.match(stderr, "unauthorized public key");
    } finally {
      writeFileSync(acl, before);
      use();
    }
  });

  test("no more is built than there are slots", async () => {
    useMachines("head", ["w1"], oneSlot);
    await buildOneByOne(3);
  });

  test("a server that forwards to no socket is left out", () => {
    lab("sshd", "w1", "-o", "AllowStreamLocalForwarding=no");
    useMachines(
      "head",
      ["w1", "w2"],
      (text) => text.replace('(name "w1")', "$& (speed 9.)"),
    );
    try {
      const [derivation] = makeWork("head");
      const result = build("head", derivation!);
      assertOffloaded(derivation!, result, ["w2"]);
      assert.match(result.stderr, "failed to connect to guix-daemon on 'w1'");
      assert.match(
        result.stderr,
        "not forward to sockets, have Offload's plugins/ beside mod.ts",
      );
    } finally {
      lab("sshd", "w1");
    }
  });

  test("what is lacking is told where it is asked for", async () => {
    const offload = (...args: string[]) =>
      run(
        ...["head", "env", `OFFLOAD_RUNTIME=${runtime}`] as const,
        ...[`${ALONE}/scripts/guix`, "offload", ...args],
      );
    for (const args of [["status"], ["--help"], []]) {
      const { status, stderr } = offload(...args);
      assert.is(status, 2, stderr);
      assert.match(stderr, "error: there are no commands here");
      assert.match(stderr, "hint: have Offload's plugins/ beside mod.ts");
    }
    useMachines("head", ["w1"], (text) => `(append ${text})`);
    const [derivation] = makeWork("head");
    await waitFor(derivation!, /machines.scm:\d+:\d+: \(append …: only Guile/);
    await waitFor(
      derivation!,
      /hint: have Offload's plugins\/ beside mod.ts, /,
    );
    use("OFFLOAD_TRANSPORT=archive-command");
    await waitFor(
      derivation!,
      /there is no built-in transport 'archive-command', only 'guix'/,
    );
    use();
  });

  /** Waits for what is told of a build that has no place to be done at. */
  async function waitFor(derivation: string, text: RegExp): Promise<void> {
    const building = watch(start("head", ...buildCommand([derivation])));
    await until(String(text), () => text.test(building.text()));
    building.child.kill();
    await building.ended;
  }

  test.run();
}

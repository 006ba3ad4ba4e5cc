/** How archives get to the machines and back. */

import { writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertLikeLocal,
  assertOffloaded,
  assertStoreIsSound,
  build,
  inHost,
  lab,
  makeWork,
  root,
  RUNTIMES,
  up,
  useMachines,
  useOffload,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** Makes work, builds it through one of the machines, and gives the log. */
function buildWork(...options: string[]): [derivation: string, Result] {
  const [derivation] = makeWork("head", ...options);
  return [derivation!, build("head", derivation!)];
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`transfer under ${runtime}`);

  test.before(() => {
    up("head", "w1", "w2");
    useOffload("head", runtime);
  });
  test.before.each(() => useMachines("head", ["w1"]));

  test("hundreds of inputs of all kinds arrive", () => {
    const [derivation, result] = buildWork(
      ...["--inputs=150", "--text-inputs=30", "--input-files=20", "--tree"],
    );
    assertOffloaded(derivation, result, ["w1"]);
    assertLikeLocal("head", derivation, "w1");
  });

  test("inputs that were built elsewhere are signed, and arrive", () => {
    useMachines("head", ["w1"]);
    const [first, second] = makeWork("head", "--count=2", "--chain", "--tree");
    assertOffloaded(first!, build("head", first!), ["w1"]);
    useMachines("head", ["w2"]);
    assertOffloaded(second!, build("head", second!), ["w2"]);
  });

  test("bulk goes through guix archive, both ways", () => {
    const size = 80 * 2 ** 20;
    const [derivation, result] = buildWork(
      ...[`--inputs=1`, `--input-size=${size}`, `--output-size=${size}`],
    );
    assertOffloaded(derivation, result, ["w1"]);
    assert.match(
      result.stderr,
      /^sending \d+ store items \(80\.\d MiB\) to 'w1'/m,
    );
    assertStoreIsSound("head");
    assertStoreIsSound("w1");
  });

  test("bulk that the machine refuses is told, and goes elsewhere", () => {
    const acl = `${root("w1")}/etc/guix/acl`;
    const before = inHost("w1", "cat", "/etc/guix/acl");
    writeFileSync(acl, "(acl)");
    useMachines(
      "head",
      ["w1", "w2"],
      (text) => text.replace('(name "w1")', '(name "w1") (speed 9.)'),
    );
    try {
      const [derivation, result] = buildWork(
        ...["--inputs=1", `--input-size=${40 * 2 ** 20}`],
      );
      assertOffloaded(derivation, result, ["w2"]);
      assert.match(result.stderr, /'guix archive --import' failed on .*'w1'/);
      assert.match(result.stderr, "unauthorized");
    } finally {
      writeFileSync(acl, before);
    }
  });

  test("a server that forwards to no socket is reached by a relay", () => {
    lab("sshd", "w1", "-o", "AllowStreamLocalForwarding=no");
    try {
      const [derivation, result] = buildWork(
        ...["--inputs=40", "--tree", "--bytes", "--outputs=out,lib"],
      );
      assertOffloaded(derivation, result, ["w1"]);
      assertLikeLocal("head", derivation, "w1");
    } finally {
      lab("sshd", "w1");
    }
  });

  test("a machine without a daemon is told so", () => {
    inHost("w1", "sh", "-c", "kill $(cat /run/guix-daemon.pid)");
    useMachines(
      "head",
      ["w1", "w2"],
      (text) => text.replace('(name "w1")', '(name "w1") (speed 9.)'),
    );
    try {
      const [derivation, result] = buildWork();
      assertOffloaded(derivation, result, ["w2"]);
      assert.match(result.stderr, "failed to connect to guix-daemon on 'w1'");
      assert.match(result.stderr, "check that guix-daemon runs there");
    } finally {
      lab("daemon", "w1");
    }
  });

  test.run();
}

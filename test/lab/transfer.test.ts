/** How archives get to the machines and back. */

import { writeFileSync } from "node:fs";
import { basename } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertLikeLocal,
  assertOffloaded,
  assertStoreIsSound,
  build,
  buildCommand,
  holdUploads,
  inHost,
  lab,
  makeWork,
  outputsOf,
  root,
  RUNTIMES,
  start,
  storeNames,
  until,
  up,
  useMachines,
  useOffload,
  watch,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";

for (const runtime of RUNTIMES) {
  suiteUnder(runtime);
  contract(runtime, "OFFLOAD_TRANSPORT=guix");
  contract(runtime, "OFFLOAD_TRANSPORT=archive-command");
  contract(runtime, "OFFLOAD_CONNECT=openssh");
}

/** Makes work, builds it through one of the machines, and gives the log. */
function buildWork(...options: string[]): [derivation: string, Result] {
  const [derivation] = makeWork("head", ...options);
  return [derivation!, build("head", derivation!)];
}

/** What every transport, and every connection, must do. */
function contract(runtime: Runtime, variable: string): void {
  const test = suite(`${variable} under ${runtime}`);

  test.before(() => {
    up("head", "w1", "w2");
    useOffload("head", runtime, variable);
  });
  test.before.each(() => useMachines("head", ["w1"]));

  test("inputs of all kinds arrive, and outputs come back", () => {
    const [derivation, result] = buildWork(
      ...["--inputs=20", "--text-inputs=5", "--input-files=20"],
      ...["--tree", "--bytes", "--outputs=out,lib,doc", "--references=5"],
    );
    assertOffloaded(derivation, result, ["w1"]);
    assertLikeLocal("head", derivation, "w1");
  });

  test("inputs that were built elsewhere are signed, and arrive", () => {
    const [first, second] = makeWork("head", "--count=2", "--chain", "--tree");
    assertOffloaded(first!, build("head", first!), ["w1"]);
    useMachines("head", ["w2"]);
    assertOffloaded(second!, build("head", second!), ["w2"]);
  });

  test("what is there is not sent again", () => {
    const [derivation, result] = buildWork("--inputs=10");
    assertOffloaded(derivation, result, ["w1"]);
    const again = makeWork("head")[0]!;
    const second = build("head", again);
    assertOffloaded(again, second, ["w1"]);
    assert.match(second.stderr, "sending 1 store item (0.0 MiB) to 'w1'");
  });

  test("bulk goes both ways", () => {
    const size = 40 * 2 ** 20;
    const [derivation, result] = buildWork(
      ...[`--inputs=1`, `--input-size=${size}`, `--output-size=${size}`],
    );
    assertOffloaded(derivation, result, ["w1"]);
    assert.match(
      result.stderr,
      /^sending \d+ store items \(40\.\d MiB\) to 'w1'/m,
    );
  });

  test("what the machine refuses is told, and goes elsewhere", () => {
    const acl = `${root("w1")}/etc/guix/acl`;
    const before = inHost("w1", "cat", "/etc/guix/acl");
    writeFileSync(acl, "(acl)");
    const options = ["--inputs=1", `--input-size=${40 * 2 ** 20}`];
    useOffload("head", runtime, variable, "OFFLOAD_ATTEMPTS=1");
    try {
      const [, { status, stderr }] = buildWork(...options);
      assert.is(status, 1, stderr);
      assert.match(stderr, "unauthorized");
      // It is tried first, unless it is slow to say how it is.
      useOffload("head", runtime, variable);
      useMachines("head", ["w1", "w2"], preferred);
      const [derivation, result] = buildWork(...options);
      assertOffloaded(derivation, result, ["w2"]);
    } finally {
      writeFileSync(acl, before);
    }
  });

  test("more than the limit is refused", () => {
    useMachines("head", ["w1"]);
    const limit = `OFFLOAD_MAXIMUM_ARCHIVE_SIZE=${2 ** 20}`;
    useOffload("head", runtime, variable, limit);
    try {
      const [derivation, result] = buildWork(`--output-size=${2 ** 21}`);
      assert.is(result.status, 1);
      assert.match(result.stderr, "more than 1.0 MiB came back");
      const names = storeNames("head").filter((name) =>
        Object.values(outputsOf("head", derivation))
          .some((output) => name.startsWith(basename(output)))
      );
      assert.equal(names.filter((name) => !name.endsWith(".lock")), []);
    } finally {
      useOffload("head", runtime, variable);
    }
  });

  test.after(() => assertStoreIsSound("w1"));
  test.run();
}

/** Makes two derivations that share a new input of 60 MiB. */
const SHARING = `
(use-modules (guix store) (guix derivations))
(system* "dd" "if=/dev/urandom" "of=/tmp/shared" "bs=1M" "count=60"
         "status=none")
(with-store store
  (let ((busybox (add-to-store store "busybox" #t "sha256" "/opt/work/busybox"))
        (shared (add-to-store store "shared" #t "sha256" "/tmp/shared")))
    (for-each
     (lambda (name)
       (format #t "~a~%"
               (derivation-file-name
                (derivation store name (string-append busybox "/bin/sh")
                            (list "-c" "echo built > $out")
                            #:sources (list busybox shared)))))
     '("one" "other"))))
`;

/** Makes w1 the fastest. */
function preferred(text: string): string {
  return text.replace('(name "w1")', '(name "w1") (speed 9.)');
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

  test("two builds that need the same bulk at once send it once", async () => {
    writeFileSync(`${root("head")}/tmp/sharing.scm`, SHARING);
    const work = inHost("head", "guix", "repl", "--", "/tmp/sharing.scm")
      .trim().split("\n");
    const release = await holdUploads("head", "w1");
    const builds = work.map((derivation) =>
      watch(start("head", ...buildCommand([derivation])))
    );
    const waits = "waiting for another upload to 'w1'";
    await until(
      "both wait",
      () => builds.every((it) => it.text().includes(waits)),
    );
    await release();
    const results = await Promise.all(builds.map(({ ended }) => ended));
    for (const { status, stderr } of results) assert.is(status, 0, stderr);
    const text = results.map(({ stderr }) => stderr).join("");
    // The builder, too, where w1 is new.
    assert.is(text.match(/^sending .*\(6[02]\.\d MiB\)/gm)?.length, 1, text);
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

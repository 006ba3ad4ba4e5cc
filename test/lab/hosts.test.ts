/** Masters and build machines of other kinds: unprivileged, and Guix 1.2. */

import { lstatSync, rmSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  assertLikeLocal,
  assertOffloaded,
  assertStoreIsSound,
  build,
  down,
  inHost,
  makeWork,
  outputsOf,
  root,
  RUNTIMES,
  STATE,
  up,
  useMachines,
  useOffload,
} from "./lab.ts";

/** What is brought up, and taken down at the end. */
const HOSTS = {
  uhead: "uhead:master:unprivileged",
  uw: "uw:unprivileged",
  old: "old:bullseye",
};

/** Who offloads to whom. */
const PAIRS = [
  { master: "head", machine: "uw", name: "an unprivileged build machine" },
  { master: "uhead", machine: "w1", name: "an unprivileged master" },
  { master: "uhead", machine: "uw", name: "two unprivileged daemons" },
  { master: "head", machine: "old", name: "a build machine with Guix 1.2" },
  { master: "uhead", machine: "old", name: "an unprivileged master, Guix 1.2" },
];

const test = suite("hosts");

test.before(() => up("head", "w1", ...Object.values(HOSTS)));
test.after(() => {
  down(...Object.keys(HOSTS));
  up("head", "w1"); // who is gone leaves the machine files
});

for (const runtime of RUNTIMES) {
  for (const { master, machine, name } of PAIRS) {
    test(`${name} takes part under ${runtime}`, () => {
      useOffload(master, runtime);
      useMachines(master, [machine]);
      const [first, second, failing] = [
        ["--tree", "--bytes", "--outputs=out,more", "--log-lines=2"],
        ["--inputs=20", "--references=20", "--text-inputs=3"],
        ["--fail", "--log-lines=1"],
      ].flatMap((options) => makeWork(master, ...options));
      for (const derivation of [first!, second!]) {
        const result = build(master, derivation);
        assertOffloaded(derivation, result, [machine]);
        assert.match(result.stderr, "\nbuilt work\n");
        assertStoreIsSound(master);
        assertLikeLocal(master, derivation, machine);
      }
      const result = build(master, failing!);
      assert.is(result.status, 1);
      assert.match(result.stderr, "line 1 of 1\nfailing, as told to\n");
      assert.match(result.stderr, `offloaded to '${machine}' failed`);
    });
  }
}

test("an unprivileged master's daemon owns what comes back", () => {
  useOffload("uhead", "node");
  useMachines("uhead", ["w1"]);
  const [derivation] = makeWork("uhead", "--tree");
  assertOffloaded(derivation!, build("uhead", derivation!), ["w1"]);
  const owner = Number(inHost("uhead", "id", "-u", "guix-daemon"));
  assert.is.not(owner, 0);
  const output = root("uhead") + outputsOf("uhead", derivation!).out;
  for (const name of [".", "bin/hello", "dangling"]) {
    assert.is(lstatSync(`${output}/${name}`).uid, owner, name);
  }
});

test("what root looks at stays the daemon's to write", () => {
  useOffload("uhead", "node");
  useMachines("uhead", ["w1"]);
  rmSync(root("uhead") + STATE, { recursive: true });
  const [derivation] = makeWork("uhead");
  const shim = "/offload/scripts/guix";
  inHost("uhead", shim, "offload", "explain", derivation!);
  assertOffloaded(derivation!, build("uhead", derivation!), ["w1"]);
});

test("the build machine with Guix 1.2 has Guix 1.2", () => {
  assert.match(inHost("old", "guix", "--version"), /\(GNU Guix\) 1\.2\./);
});

test.run();

/** What a process that stays stands on. */

import {
  existsSync,
  mkdirSync,
  rmSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  differentVariable,
  Ground,
  isReadOnly,
  parseEnvironment,
  withoutRuntime,
} from "../plugins/_ground.ts";
import { withDirectory } from "./helpers.ts";

const test = suite("ground");

test("parseEnvironment() reads what /proc has of a process", () => {
  const text = "HOME=/root\0EMPTY=\0A=b=c\nd\0odd\0";
  assert.equal(parseEnvironment(text), {
    HOME: "/root",
    EMPTY: "",
    A: "b=c\nd",
  });
  assert.equal(parseEnvironment(""), {});
});

test("differentVariable() finds what builds depend on", () => {
  const ours = { HOME: "/root", GUIX: "/a/guix", TERM: "xterm" };
  assert.is(differentVariable(ours, { ...ours, TERM: "dumb" }), undefined);
  assert.is(differentVariable(ours, { ...ours, HOME: "/" }), "HOME");
  for (const name of ["OFFLOAD_ATTEMPTS", "NIX_STORE", "GUIX_STATE", "PATH"]) {
    assert.is(differentVariable(ours, { ...ours, [name]: "1" }), name);
    assert.is(differentVariable({ ...ours, [name]: "1" }, ours), name);
  }
});

test("differentVariable() minds nothing that the shim sets", () => {
  const names = ["OFFLOAD_SHIM", "OFFLOAD_SELF", "OFFLOAD_DEPTH"];
  for (const name of [...names, "OFFLOAD_REQUEST", "OFFLOAD_GUIX"]) {
    assert.is(differentVariable({ [name]: "1" }, {}), undefined);
  }
  const theirs = { OFFLOAD_GUIX: "/b/guix" };
  const ours = { OFFLOAD_GUIX: "/a/guix" };
  assert.is(differentVariable(ours, theirs), "OFFLOAD_GUIX");
});

test("withoutRuntime() leaves out what Deno puts into PATH", () => {
  const PATH = "/root/.cache/deno/node_compat_bin:/usr/bin:/bin";
  assert.equal(withoutRuntime({ PATH, A: "b" }), {
    A: "b",
    PATH: "/usr/bin:/bin",
  });
  assert.equal(withoutRuntime({ PATH: "/x/node_compat_bin" }), {});
  assert.equal(withoutRuntime({}), {});
});

test("isReadOnly() is so of no directory that is writable, or not there", () =>
  withDirectory((directory) => {
    for (const place of [directory, `${directory}/none`]) {
      assert.is(isReadOnly(place), false);
    }
    assert.ok(existsSync(directory));
  }));

test("Ground sees new, changed and removed files", () =>
  withDirectory((directory) => {
    const file = `${directory}/settings.json`;
    const changes: readonly (() => void)[] = [
      () => writeFileSync(file, "{}"),
      () => writeFileSync(file, '{"attempts": 2}'),
      () => utimesSync(file, 1, 1),
      () => rmSync(file),
      () => mkdirSync(`${directory}/more`),
      () => writeFileSync(`${directory}/more/helper.ts`, "export {};"),
      () => writeFileSync(`${directory}/more/helper.ts`, "export { };"),
      () => symlinkSync(directory, `${directory}/more/link`),
    ];
    for (const change of changes) {
      const ground = new Ground(directory);
      assert.is(ground.changed(), undefined);
      change();
      assert.match(ground.changed() ?? "", directory);
    }
    mkdirSync(`${directory}/node_modules`);
    const ground = new Ground(directory);
    writeFileSync(`${directory}/node_modules/package.json`, "{}");
    assert.is(ground.changed(), undefined);
    const none = new Ground(`${directory}/none`);
    assert.is(none.changed(), undefined);
    mkdirSync(`${directory}/none`);
    assert.is(none.changed(), `${directory}/none`);
  }));

test.run();

/** scripts/bundle: what is installed, and the file in it that runs by itself. */

import { createHash, generateKeyPairSync } from "node:crypto";
import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { performance } from "node:perf_hooks";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { countFigures } from "../plugins/_report_figures.ts";
import { makePage } from "../plugins/_report_page.ts";
import { machine } from "./context.ts";
import { bundle, ROOT, run, runtimes, withDirectory } from "./helpers.ts";

const test = suite("bundle");

const directory = mkdtempSync(`${tmpdir()}/offload-release-`);
let printed = "";

test.before(async () => {
  printed = await bundle(directory);
});

test.after(() => rmSync(directory, { recursive: true }));

test("bundle prints the checksums of all files that it makes", () => {
  assert.is(readFileSync(`${directory}/SHA256SUMS`, "utf8"), printed);
  const names = [];
  for (const line of printed.trimEnd().split("\n")) {
    const [hash, name] = line.split("  ");
    const content = readFileSync(`${directory}/${name}`);
    assert.is(hash, createHash("sha256").update(content).digest("hex"));
    names.push(name!);
  }
  assert.equal([...names, "SHA256SUMS"].sort(), readdirSync(directory).sort());
  for (const name of ["guix", "install.sh", "offload"]) {
    assert.is(statSync(`${directory}/${name}`).mode & 0o777, 0o755, name);
  }
});

test("bundle keeps the licenses of what is in it", () => {
  const text = readFileSync(`${directory}/offload.mjs`, "utf8");
  for (const name of ["guix-offload", "ssh2", "cac", "tweetnacl", "globrex"]) {
    assert.match(text, new RegExp(`^// ${name} [0-9.]+: \\w+$`, "m"));
  }
  assert.match(
    text,
    "// The above copyright notice and this permission notice",
  );
});

test("bundle names no place of the checkout", () => {
  const text = readFileSync(`${directory}/offload.mjs`, "utf8");
  assert.not.match(text, ROOT);
});

const DERIVATION = 'Derive([("out","/gnu/store/a-b","","")],[],[],' +
  '"x86_64-linux","/bin/sh",[],[("name","b")])';

/** A site: a plugin in TypeScript with a machine that refuses connections. */
function makeSite(directory: string): Record<string, string> {
  const { privateKey } = generateKeyPairSync("rsa", {
    modulusLength: 2048,
    privateKeyEncoding: { type: "pkcs1", format: "pem" },
    publicKeyEncoding: { type: "pkcs1", format: "pem" },
  });
  writeFileSync(`${directory}/key`, privateKey);
  writeFileSync(`${directory}/b.drv`, DERIVATION);
  mkdirSync(`${directory}/plugins`, { mode: 0o755 });
  const listed = machine({
    name: "127.0.0.1",
    port: 1,
    privateKey: `${directory}/key`,
  });
  const plugin = `import type { Machine, Plugin } from "/nowhere/mod.ts";
    const machine: Machine = ${JSON.stringify(listed)};
    const plugin = { name: "farm", machines: () => [machine] } satisfies Plugin;
    export default plugin as Plugin;`;
  writeFileSync(`${directory}/plugins/farm.ts`, plugin, { mode: 0o644 });
  return {
    HOME: directory,
    OFFLOAD_PLUGINS: `${directory}/plugins`,
    GUIX_CONFIGURATION_DIRECTORY: directory,
    GUIX_STATE_DIRECTORY: `${directory}/state`,
  };
}

/** The names of the functions in a page's script; esbuild numbers some. */
function namesIn(page: string): string[] {
  const [, script] = /<script>([^]*?)<\/script>/.exec(page)!;
  new Function(script!); // it can be read
  return [...script!.matchAll(/^(?:async )?function (\w+)/gm)]
    .map(([, name]) => name!.replace(/\d+$/, "")).sort();
}

/** Demands that a page's script has what one from source has. */
function assertSameScript(page: string): void {
  const none = countFigures([], [], [], { since: 0, until: 1 });
  assert.equal(namesIn(page), namesIn(makePage([], [], none)));
}

for (const [name, [program, ...options]] of Object.entries(runtimes)) {
  test(`offload.mjs runs alone under ${name}, with a site's plugin`, async () => {
    await withDirectory(async (alone) => {
      const file = `${alone}/offload.mjs`;
      copyFileSync(`${directory}/offload.mjs`, file);
      const env = { ...makeSite(alone), OFFLOAD_DEBUG: "yes" };
      const offload = (...args: string[]) =>
        run(program, [...options, file, ...args], { env });
      const explained = await offload("explain", `${alone}/b.drv`);
      assert.is(explained.code, 1, explained.stderr);
      const text = explained.stdout.toString();
      assert.match(
        text,
        /^127\.0\.0\.1:1\b.*connection refused/m,
        text + explained.stderr,
      );
      // The page's script is made of functions that are in there.
      const reported = await offload("report", "--html", `${alone}/page.html`);
      assert.match(reported.stderr, "wrote '", reported.stderr);
      assertSameScript(readFileSync(`${alone}/page.html`, "utf8"));
      // Whose trace can be read, by the names of its functions.
      const failed = await offload("explain", `${alone}/none.drv`);
      assert.match(failed.stderr, `failed to read '${alone}/none.drv'`);
      assert.match(failed.stderr, /at (async )?explainCommand \(.*mjs:\d+:\d+/);
    });
  });

  test(`offload.mjs starts quickly under ${name}`, async () => {
    const env = { PATH: "/usr/bin:/bin", HOME: directory };
    const file = `${directory}/offload.mjs`;
    const empty = `${directory}/empty.mjs`;
    writeFileSync(empty, "");
    const start = async (...args: string[]) => {
      const begun = performance.now();
      const { code, stderr } = await run(program, [...options, ...args], {
        env,
      });
      assert.is(code, 0, stderr);
      return performance.now() - begun;
    };
    const times: number[] = [];
    const least: number[] = [];
    for (let i = 0; i < 3; i++) {
      times.push(await start(file, "x86_64-linux", "3600", "true", "86400"));
      least.push(await start(empty));
    }
    // It takes 0.1 s where nothing else runs, and 0.04 s are the runtime's.
    const ratio = Math.min(...times) / Math.min(...least);
    assert.ok(ratio < 10, `${ratio} times as long as nothing takes`);
  });
}

test.run();

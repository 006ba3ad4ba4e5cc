/** What is published: the packages for npm and JSR, and their versions. */

import {
  cpSync,
  globSync,
  mkdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { ownRuntime, ROOT, run, runtimes, withDirectory } from "./helpers.ts";

const test = suite("packages");

function readJson(name: string) {
  return JSON.parse(readFileSync(`${ROOT}/${name}`, "utf8"));
}

const manifest = readJson("package.json");

test("all that names the version names the same", async () => {
  const lock = readJson("package-lock.json");
  const changes = readFileSync(`${ROOT}/CHANGELOG.md`, "utf8");
  const [program, ...options] = ownRuntime;
  const args = [...options, `${ROOT}/mod.ts`, "--version"];
  const { stdout, stderr } = await withDirectory((directory) =>
    run(program, args, { env: { PATH: "/usr/bin:/bin", HOME: directory } })
  );
  const names = {
    "package-lock.json": lock.version,
    "package-lock.json, packages": lock.packages[""].version,
    "deno.json": readJson("deno.json").version,
    "CHANGELOG.md": /^## \[(.*?)\]/m.exec(changes)?.[1],
    "offload --version": /\d+\.\d+\.\d+/.exec(stdout.toString())?.[0],
  };
  for (const [name, version] of Object.entries(names)) {
    assert.is(version, manifest.version, `${name} ${stderr}`);
  }
});

test("deps.ts names all packages that a release is made of", () => {
  const text = readFileSync(`${ROOT}/deps.ts`, "utf8");
  const named = [...text.matchAll(/ from "(?!node:)(.*)"/g)]
    .map(([, name]) => name!);
  for (const name of named) {
    assert.ok(manifest.devDependencies[name], `${name} is not in package.json`);
  }
});

/** Runs npm without a registry. */
async function npm(directory: string, ...args: readonly string[]) {
  const env = {
    ...process.env,
    OFFLOAD_RUNTIME: ownRuntime[0],
    npm_config_cache: `${directory}/cache`,
    npm_config_offline: "true",
    npm_config_update_notifier: "false",
  };
  const result = await run("npm", ["--prefix", directory, ...args], { env });
  assert.is(result.code, 0, result.stderr);
  return result.stdout.toString();
}

test("the npm package has what a release has, and runs from there", async () => {
  await withDirectory(async (directory) => {
    // Where `npm pack` makes a release, another test may be at it as well.
    const checkout = `${directory}/checkout`;
    const names = ["mod.ts", "deps.ts", "plugins", "scripts", "package.json"];
    for (const name of [...names, "LICENSE", "README.md", "CHANGELOG.md"]) {
      cpSync(`${ROOT}/${name}`, `${checkout}/${name}`, { recursive: true });
    }
    symlinkSync(`${ROOT}/node_modules`, `${checkout}/node_modules`);
    const packed = await npm(
      checkout,
      ...["pack", checkout, "--json", "--pack-destination", directory],
    );
    const [{ filename, files }] = JSON.parse(packed.slice(packed.indexOf("[")));
    const paths = files.map((file: { path: string }) => file.path).sort();
    const sums = readFileSync(`${checkout}/dist/SHA256SUMS`, "utf8");
    const released = [...sums.matchAll(/ {2}(.*)$/gm)].map(([, name]) => name);
    assert.equal(
      paths,
      ["CHANGELOG.md", "LICENSE", "README.md", "package.json"]
        .concat(globSync(["plugins/*.md", "scripts/*.svg"], { cwd: ROOT }))
        .concat(["SHA256SUMS", ...released].map((name) => `dist/${name}`))
        .sort(),
    );

    const empty = `${directory}/empty`;
    mkdirSync(empty);
    writeFileSync(`${empty}/package.json`, "{}\n");
    await npm(empty, "install", `${directory}/${filename}`);
    for (const [program] of Object.values(runtimes)) {
      const env = { PATH: "/usr/bin:/bin", OFFLOAD_RUNTIME: program };
      const command = `${empty}/node_modules/.bin/offload`;
      const { code, stdout, stderr } = await run(command, ["--version"], {
        env: { ...env, HOME: directory },
      });
      assert.is(code, 0, stderr);
      assert.match(stdout.toString(), manifest.version);
    }
  });
});

test.run();

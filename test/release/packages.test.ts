/** What is published: a release, the packages for npm and JSR, one version. */

import {
  cpSync,
  globSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { ownRuntime, ROOT, run, runtimes, withDirectory } from "../helpers.ts";

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
    "CHANGELOG.md": /^## \[(.*?)\]/m.exec(changes)?.[1],
    "offload --version": /\d+\.\d+\.\d+/.exec(stdout.toString())?.[0],
  };
  for (const [name, version] of Object.entries(names)) {
    assert.is(version, manifest.version, `${name} ${stderr}`);
  }
  // JSR is told by `deno publish --set-version`.
  assert.is(readJson("deno.json").version, undefined);
});

test("deps.ts names all packages that a release is made of", () => {
  const text = readFileSync(`${ROOT}/deps.ts`, "utf8");
  const named = [...text.matchAll(/ from "(?!node:)(.*)"/g)]
    .map(([, name]) => name!);
  for (const name of named) {
    assert.ok(manifest.devDependencies[name], `${name} is not in package.json`);
  }
});

const releases = mkdtempSync(`${tmpdir()}/offload-releases-`);
const RELEASE = `${releases}/release`;
const ARCHIVE = `guix-offload-${manifest.version}.tgz`;

/** Makes a release with a program of a checkout, in an environment. */
async function release(
  checkout: string,
  to: string,
  runtime: keyof typeof runtimes,
  umask: string,
  environment: Readonly<Record<string, string>>,
): Promise<string> {
  const env = {
    ...{ ...process.env, ...environment },
    OFFLOAD_RUNTIME: runtimes[runtime][0],
  };
  const program = `${checkout}/scripts/release`;
  const script = `umask ${umask}; exec "$@"`;
  const args = ["-c", script, "sh", program, "--url", "https://x.org/1", to];
  const { code, stdout, stderr } = await run("sh", args, { env });
  assert.is(code, 0, stderr);
  return stdout.toString();
}

/** The files of a directory: mode and content. */
function filesOf(directory: string): Record<string, string> {
  return Object.fromEntries(
    readdirSync(directory).map((name) => {
      const file = `${directory}/${name}`;
      const mode = (statSync(file).mode & 0o7777).toString(8);
      return [name, `${mode} ${readFileSync(file, "latin1")}`];
    }),
  );
}

/** Makes another checkout, as a clone with its packages is. */
function copyCheckout(to: string): void {
  const programs = ["node", "@deno"].map((name) => `node_modules/${name}`);
  const leftOut = [".git", "dist", "test", ...programs]
    .concat(["node-oldest", "deno-oldest"].map((it) => `node_modules/${it}`))
    .map((name) => ROOT + name);
  cpSync(ROOT, to, {
    recursive: true,
    filter: (file) => !leftOut.includes(file),
  });
  for (const name of programs) symlinkSync(ROOT + name, `${to}/${name}`);
}

test.before(async () => {
  const environment = { TZ: "UTC", LC_ALL: "C" };
  await release(ROOT, RELEASE, "node", "022", environment);
});

test.after(() => rmSync(releases, { recursive: true }));

test("a release has the same bytes whoever makes it, where and when", async () => {
  const checkout = `${releases}/some where/else`;
  copyCheckout(checkout);
  const environment = {
    ...{ TZ: "Pacific/Kiritimati", LC_ALL: "tr_TR.UTF-8", LANG: "tr_TR.UTF-8" },
    ...{ HOME: `${releases}/home`, DENO_DIR: `${releases}/deno` },
  };
  const other = `${releases}/other`;
  const printed = await release(checkout, other, "deno", "077", environment);
  assert.is(printed, readFileSync(`${RELEASE}/SHA256SUMS`, "utf8"));
  assert.equal(filesOf(other), filesOf(RELEASE));
});

test("a release is told by its checksums, of all its files", async () => {
  const args = ["--check", "--strict", "SHA256SUMS"];
  const { code, stdout } = await run("sha256sum", args, { cwd: RELEASE });
  assert.is(code, 0, stdout.toString());
  const checked = [...stdout.toString().matchAll(/^(.*): OK$/gm)]
    .map(([, name]) => name!);
  const there = readdirSync(RELEASE).sort();
  assert.equal([...checked, "SHA256SUMS"].sort(), there);
});

test("guix.scm has the checksum of the archive, and where it is", () => {
  const text = readFileSync(`${RELEASE}/guix.scm`, "utf8");
  const sums = readFileSync(`${RELEASE}/SHA256SUMS`, "utf8");
  const sum = sums.split("\n").find((line) => line.endsWith(`  ${ARCHIVE}`))!;
  assert.match(text, `(define version "${manifest.version}")`);
  assert.match(text, `(define sha256sum "${sum.split(" ")[0]}")`);
  assert.match(text, '(define url "https://x.org/1")');
  assert.not.match(text, /@[A-Z]/);
});

test("release refuses what does not agree, and leaves what is there", async () => {
  const checkout = `${releases}/some where/else`;
  const env = { ...process.env, OFFLOAD_RUNTIME: ownRuntime[0] };
  const program = `${checkout}/scripts/release`;
  const refuses = async (args: string[], code: number, words: RegExp) => {
    const result = await run(program, args, { env });
    assert.match(result.stderr, words);
    assert.is(result.code, code);
  };
  await refuses(["--url", "http://x.org"], 2, /^usage: release/);
  await refuses(["a", "b"], 2, /^usage: release/);
  await refuses(
    [checkout],
    1,
    /else\/.*' is of no release\nhint: name another/,
  );
  const before = filesOf(RELEASE);
  const edit = async (
    name: string,
    from: RegExp,
    to: string,
    words: RegExp,
  ) => {
    const text = readFileSync(`${checkout}/${name}`, "utf8");
    assert.match(text, from);
    writeFileSync(`${checkout}/${name}`, text.replace(from, to));
    await refuses([RELEASE], 1, words);
    writeFileSync(`${checkout}/${name}`, text);
  };
  const { version } = manifest;
  const first = RegExp(`^## \\[${version}\\]`, "m");
  await edit(
    "CHANGELOG.md",
    first,
    "## [Unreleased]",
    /hint: begin it with '## \[/,
  );
  await edit(
    ...["package-lock.json", RegExp(`"version": "${version}"`)] as const,
    ...[
      '"version": "9.9.9"',
      /package-lock\.json has the version 9\.9\.9/,
    ] as const,
  );
  const check = /export function checkPlugin\(/;
  await edit(
    "plugins/_contract.ts",
    check,
    "function odd(",
    /failed to run .*check/,
  );
  assert.equal(filesOf(RELEASE), before);
  const left = readdirSync(releases).filter((it) => it.startsWith("release"));
  assert.equal(left, ["release"]);
});

/** Runs npm without a registry. */
async function npm(directory: string, ...args: readonly string[]) {
  const env = {
    ...process.env,
    npm_config_cache: `${directory}/cache`,
    npm_config_offline: "true",
    npm_config_update_notifier: "false",
  };
  const result = await run("npm", ["--prefix", directory, ...args], { env });
  assert.is(result.code, 0, result.stderr);
}

test("npm packs no checkout, which is no release", async () => {
  const { code, stderr } = await run("npm", ["pack", "--dry-run"], {
    cwd: ROOT,
    env: { ...process.env, npm_config_update_notifier: "false" },
  });
  assert.is.not(code, 0);
  assert.match(stderr, "usage: release [--url URL] [DIRECTORY]");
});

/** What an author's program does with the package: types, and values. */
const AUTHORS = `import type { Plugin } from "guix-offload";
import { checkPlugin } from "guix-offload/contract";
const plugin = { name: "near", score: () => 1 } satisfies Plugin;
checkPlugin(plugin as Plugin);
console.log("kept");
`;

test("the npm package has what is installed, runs, and is for authors", async () => {
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/package.json`, '{"type": "module"}\n');
    await npm(directory, "install", `${RELEASE}/${ARCHIVE}`);
    const own = `${directory}/node_modules/guix-offload`;
    const names = ["CHANGELOG.md", "LICENSE", "README.md", "package.json"]
      .concat(globSync(["plugins/*.md", "scripts/*.{png,svg}"], { cwd: ROOT }));
    const there = readdirSync(own, { recursive: true }) as string[];
    const files = there.filter((name) => /^(?!dist\/).*\./.test(name));
    assert.equal(files.concat("LICENSE").sort(), names.sort());
    const packed = [ARCHIVE, "guix.scm", "SHA256SUMS"];
    for (const name of readdirSync(RELEASE)) {
      if (packed.includes(name)) continue;
      const [there, here] = [`${own}/dist/${name}`, `${RELEASE}/${name}`];
      assert.equal(readFileSync(there), readFileSync(here), name);
    }
    const { devDependencies, scripts } = readJson("package.json");
    const published = JSON.parse(readFileSync(`${own}/package.json`, "utf8"));
    assert.equal({ ...published, scripts, devDependencies }, manifest);
    writeFileSync(`${directory}/plugin.ts`, AUTHORS);
    const [deno] = runtimes.deno;
    const env = { PATH: "/usr/bin:/bin", HOME: directory };
    const checked = await run(deno, ["check", "plugin.ts"], {
      cwd: directory,
      env,
    });
    assert.is(checked.code, 0, checked.stderr);
    for (const [program, ...options] of Object.values(runtimes)) {
      const command = `${directory}/node_modules/.bin/offload`;
      const { code, stdout, stderr } = await run(command, ["--version"], {
        env: { ...env, OFFLOAD_RUNTIME: program },
      });
      assert.is(code, 0, stderr);
      assert.match(stdout.toString(), manifest.version);
      const args = [...options, "plugin.ts"];
      const kept = await run(program, args, { cwd: directory, env });
      assert.is(kept.stdout.toString(), "kept\n", kept.stderr);
    }
  });
});

test.run();

/**
 * Makes and checks all that is published of a version: what is installed, the
 * package for npm, which is also the archive of the one for Guix, that one's
 * definition, and the checksums. What JSR would get is tried out.
 *
 * The same sources make the same bytes.
 *
 * @module
 */

import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmodSync,
  copyFileSync,
  existsSync,
  globSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { isProgram } from "../deps.ts";
import { makeLog, OffloadError, reason } from "../mod.ts";
import { VERSION } from "../plugins/_commands.ts";
import { checksums, makeBundle } from "./bundle.ts";

const ROOT = fileURLToPath(new URL("..", import.meta.url));

const USAGE = `usage: release [--url URL] [DIRECTORY]

Makes and checks all that is published, in DIRECTORY, 'dist' of this checkout
unless told, and prints its checksums. Nothing is published.

  --url URL  where DIRECTORY is going to be, for the package for Guix`;

/** The package for npm. */
const ARCHIVE = `guix-offload-${VERSION}.tgz`;

/** The runtimes of this checkout. */
const NODE = `${ROOT}/node_modules/node/bin/node`;
const DENO = globSync(`${ROOT}/node_modules/@deno/*/deno`)[0] ?? "deno";

/** Runs a program that must succeed; returns what it printed. */
function run(
  program: string,
  args: readonly string[],
  cwd: string,
  environment: Readonly<Record<string, string>> = {},
): string {
  const { status, stdout, stderr, error } = spawnSync(program, args, {
    ...{ cwd, encoding: "utf8" },
    env: { ...process.env, ...environment },
  });
  if (status === 0) return stdout;
  const why = error === undefined ? stdout + stderr : reason(error);
  const command = [program, ...args].join(" ");
  throw new OffloadError(`failed to run '${command}': ${why.trimEnd()}`);
}

/** Runs npm by Node as it is here, and without a registry. */
function npm(args: readonly string[], cwd: string): string {
  return run("npm", args, cwd, {
    PATH: `${ROOT}/node_modules/node/bin:${process.env.PATH}`,
    npm_config_cache: `${cwd}/.npm`,
    npm_config_offline: "true",
    npm_config_update_notifier: "false",
  });
}

/** Gives some work a directory of its own, which goes with it. */
function withDirectory<T>(work: (directory: string) => T): T {
  const directory = mkdtempSync(`${tmpdir()}/offload-`);
  try {
    return work(directory);
  } finally {
    rmSync(directory, { recursive: true });
  }
}

/** Demands that all that tells the version tells that of package.json. */
function checkVersions(): void {
  const lock = JSON.parse(readFileSync(`${ROOT}/package-lock.json`, "utf8"));
  const changes = readFileSync(`${ROOT}/CHANGELOG.md`, "utf8");
  const [, version, date] = /^## \[(.*?)\](?: - (\S+))?/m.exec(changes) ?? [];
  if (lock.version !== VERSION) {
    const hint = `run 'npm version ${VERSION} --allow-same-version'`;
    const message = `package-lock.json has the version ${lock.version}`;
    throw new OffloadError(message, { hint });
  }
  if (version === VERSION && !Number.isNaN(Date.parse(date ?? ""))) return;
  throw new OffloadError(`CHANGELOG.md does not begin with ${VERSION}`, {
    hint: `begin it with '## [${VERSION}] - YYYY-MM-DD'`,
  });
}

/** Puts a file in place, with a mode that no umask changes. */
function put(file: string, content: string | Uint8Array, mode = 0o644): void {
  writeFileSync(file, content);
  chmodSync(file, mode);
}

/** The files of a directory, with their modes as programs have them. */
function copyAll(from: string, to: string): void {
  makeDirectory(to);
  for (const name of readdirSync(from)) {
    copyFileSync(`${from}/${name}`, `${to}/${name}`);
  }
}

/** The manifest, as far as it concerns who uses the package. */
function publishedManifest(): string {
  const manifest = JSON.parse(readFileSync(`${ROOT}/package.json`, "utf8"));
  const { devDependencies: _, scripts: __, ...published } = manifest;
  return `${JSON.stringify(published, null, 2)}\n`;
}

/** What else npm packs: what there is to read, as the manifest says. */
function documents(): string[] {
  const { files } = JSON.parse(readFileSync(`${ROOT}/package.json`, "utf8"));
  const patterns = ["LICENSE", "README.md", ...files]
    .filter((pattern) => pattern !== "dist");
  return globSync(patterns, { cwd: ROOT });
}

/** Makes a directory where there is none, with a mode that no umask changes. */
function makeDirectory(directory: string): void {
  mkdirSync(directory, { recursive: true });
  chmodSync(directory, 0o755);
}

/** Makes the package for npm of what is installed. */
function pack(bundle: string): Uint8Array {
  return withDirectory((directory) => {
    const stage = `${directory}/stage`;
    mkdirSync(stage);
    copyAll(bundle, `${stage}/dist`);
    put(`${stage}/package.json`, publishedManifest());
    for (const name of documents()) {
      makeDirectory(dirname(`${stage}/${name}`));
      put(`${stage}/${name}`, readFileSync(`${ROOT}/${name}`));
    }
    npm(["pack", stage, "--ignore-scripts"], directory);
    return readFileSync(`${directory}/${ARCHIVE}`);
  });
}

/** Fills in the package for Guix. */
function guixPackage(archive: Uint8Array, url: string): string {
  const values: Record<string, string> = {
    VERSION,
    SHA256: createHash("sha256").update(archive).digest("hex"),
    URL: url,
  };
  return readFileSync(`${ROOT}/scripts/guix.scm`, "utf8")
    .replace(/@([A-Z0-9]+)@/g, (_, name) => values[name]!);
}

/** A plugin and its test, as an author has them. */
const AUTHORS: Readonly<Record<string, string>> = {
  "plugin.ts": `import type { Plugin } from "./offload.mjs";
const plugin = { name: "near", score: () => 1 } satisfies Plugin;
export default plugin as Plugin;
`,
  "check.ts": `import { checkPlugin, checkScore } from "./contract.mjs";
import plugin from "./plugin.ts";
checkPlugin(plugin);
await checkScore(plugin);
`,
};

/** Demands that what is installed runs, and has what authors need. */
function checkBundle(bundle: string): void {
  withDirectory((directory) => {
    copyAll(bundle, `${directory}/lib`);
    const lib = `${directory}/lib`;
    run("sha256sum", ["--check", "--quiet", "SHA256SUMS"], lib);
    for (const [name, text] of Object.entries(AUTHORS)) {
      writeFileSync(`${lib}/${name}`, text);
    }
    const place = { DENO_DIR: `${directory}/deno`, HOME: directory };
    run(DENO, ["check", "plugin.ts", "check.ts"], lib, place);
    for (const runtime of [NODE, DENO]) {
      checkProgram(`${lib}/offload`, { ...place, OFFLOAD_RUNTIME: runtime });
    }
    run(NODE, ["check.ts"], lib);
    run(DENO, ["run", "--allow-all", "check.ts"], lib, place);
  });
}

/** Demands that a program is of this version. */
function checkProgram(
  program: string,
  environment: Readonly<Record<string, string>>,
): void {
  const said = run(program, ["--version"], "/", environment);
  if (said === `offload ${VERSION}\n`) return;
  throw new OffloadError(`'${program}' says it is '${said.trim()}'`);
}

/** Demands that the package for npm is one. */
function checkArchive(archive: Uint8Array): void {
  withDirectory((directory) => {
    writeFileSync(`${directory}/package.json`, "{}\n");
    writeFileSync(`${directory}/${ARCHIVE}`, archive);
    npm(["install", `./${ARCHIVE}`], directory);
    const program = `${directory}/node_modules/.bin/offload`;
    checkProgram(program, { OFFLOAD_RUNTIME: NODE, HOME: directory });
  });
}

/** Demands that JSR would take the sources. */
function checkJsr(): void {
  const options = ["--dry-run", "--allow-dirty", "--set-version", VERSION];
  run(DENO, ["publish", ...options], ROOT);
}

/** Refuses a directory that has more than an earlier release. */
function checkPlace(directory: string): void {
  if (!existsSync(directory)) return;
  const sums = `${directory}/SHA256SUMS`;
  const text = existsSync(sums) ? readFileSync(sums, "utf8") : "";
  const own = ["SHA256SUMS", ...text.split("\n").map((line) => line.slice(66))];
  const other = readdirSync(directory).find((name) => !own.includes(name));
  if (other === undefined) return;
  const message = `'${directory}/${other}' is of no release`;
  throw new OffloadError(message, { hint: "name another directory" });
}

/** Makes and checks all files of a release, in a new directory. */
async function makeRelease(directory: string, url: string): Promise<string> {
  await makeBundle(directory);
  checkBundle(directory);
  const archive = pack(directory);
  checkArchive(archive);
  checkJsr();
  put(`${directory}/${ARCHIVE}`, archive);
  put(`${directory}/guix.scm`, guixPackage(archive, url));
  const files = readdirSync(directory)
    .filter((name) => name !== "SHA256SUMS").sort()
    .map((name) => [name, readFileSync(`${directory}/${name}`)]);
  const sums = checksums(Object.fromEntries(files));
  put(`${directory}/SHA256SUMS`, sums);
  return sums;
}

/** Makes the release in a directory, all or nothing; returns its checksums. */
async function release(directory: string, url: string): Promise<string> {
  checkVersions();
  checkPlace(directory);
  mkdirSync(dirname(directory), { recursive: true });
  const fresh = mkdtempSync(`${directory}.`);
  try {
    const sums = await makeRelease(fresh, url);
    chmodSync(fresh, 0o755);
    rmSync(directory, { recursive: true, force: true });
    renameSync(fresh, directory);
    return sums;
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
}

/** Reads the command line; `undefined` where it is wrong. */
function readArguments(args: string[]) {
  try {
    return parseArgs({
      args,
      allowPositionals: true,
      options: { url: { type: "string" }, help: { type: "boolean" } },
    });
  } catch {
    return undefined;
  }
}

async function main(args: string[]): Promise<number> {
  const { values, positionals = [] } = readArguments(args) ?? {};
  const { help, url = "" } = values ?? {};
  const isRight = values !== undefined && positionals.length < 2 &&
    /^(https:\/\/[\w.:\/~-]+[^\/])?$/.test(url);
  if (help || !isRight) {
    console[help ? "log" : "error"](USAGE);
    return help ? 0 : 2;
  }
  try {
    const directory = resolve(positionals[0] ?? `${ROOT}/dist`);
    const sums = await release(directory, url);
    console.log(sums.trimEnd());
    return 0;
  } catch (error) {
    makeLog(process.env).error(error);
    return 1;
  }
}

if (isProgram(import.meta)) process.exit(await main(process.argv.slice(2)));

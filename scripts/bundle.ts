/**
 * Makes a release: Offload as one JavaScript file that needs a runtime and
 * nothing else, with the programs that stand around it and their checksums.
 *
 * The same sources make the same bytes, wherever they are. Names and lines are
 * kept: who looks at a stack trace, or at what root is to run, can read it.
 *
 * @module
 */

import { buildSync } from "esbuild";
import { createHash } from "node:crypto";
import {
  chmodSync,
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { manual } from "./manual.ts";

const ROOT = fileURLToPath(new URL("..", import.meta.url));

const USAGE = `usage: bundle [DIRECTORY]

Makes a release in DIRECTORY, 'dist' of this checkout unless told, and prints
its checksums.`;

/** What of scripts/ is part of a release, with its mode. */
const SCRIPTS: Readonly<Record<string, number>> = {
  "choose.sh": 0o644,
  "guix": 0o755,
  "guix.scm": 0o644,
  "install.sh": 0o755,
  "offload": 0o755,
  "runtime.sh": 0o644,
};

/** What CommonJS packages expect to be there. */
const BANNER = `import { createRequire } from "node:module";
const require = createRequire(import.meta.url);
const __dirname = import.meta.dirname;`;

/** The plugins, which a bundle finds by this list of their files. */
function plugins(): string {
  return readdirSync(`${ROOT}/plugins`).filter((file) => file.endsWith(".ts"))
    .sort().join(" ");
}

/** Bundles the script, its plugins and its packages. */
function bundle(): { script: string; inputs: readonly string[] } {
  const { outputFiles, metafile } = buildSync({
    absWorkingDir: ROOT,
    entryPoints: ["mod.ts"],
    outfile: "offload.mjs",
    write: false,
    metafile: true,
    bundle: true,
    platform: "node",
    format: "esm",
    target: "node22.14",
    define: { BUNDLED_PLUGINS: JSON.stringify(plugins()) },
    // Compiled for some machine, and ssh2 does without.
    external: ["*.node", "cpu-features"],
    banner: { js: BANNER },
    legalComments: "none", // all is said at the end
    logLevel: "warning",
  });
  const inputs = Object.keys(metafile.inputs).sort();
  return { script: makeLazy(outputFiles[0]!.text), inputs };
}

/**
 * Has CommonJS packages run when they are used first. ssh2 takes longer for it
 * than all the rest for an answer to guix-daemon, which needs no connection.
 */
function makeLazy(script: string): string {
  const imports = /^( +import_\w+) = __toESM\((require_\w+)\(\), 1\);$/gm;
  if (!imports.test(script)) throw new Error("found no import of a package");
  return script.replace(
    imports,
    "$1 = { get default() { return __toESM($2(), 1).default; } };",
  );
}

/** The licenses of Offload and of the packages in it, as a comment. */
function licenses(inputs: readonly string[]): string {
  const packages = inputs.map((file) =>
    /^.*node_modules\/(@[^/]+\/)?[^/]+/.exec(file)?.[0]
  );
  const texts = [...new Set([".", ...packages])].map((directory) => {
    if (directory === undefined) return "";
    const { name, version, license } = JSON.parse(
      readFileSync(`${ROOT}/${directory}/package.json`, "utf8"),
    );
    const file = readdirSync(`${ROOT}/${directory}`)
      .find((file) => /^licen[cs]e/i.test(file));
    const text = file && readFileSync(`${ROOT}/${directory}/${file}`, "utf8");
    return `${name} ${version}: ${license}\n\n${text ?? ""}`;
  });
  const lines = texts.filter(Boolean).join("\n").trimEnd().split(/\r?\n/);
  return lines.map((line) => `// ${line}`.trimEnd()).join("\n");
}

/** The checksums of files, as `sha256sum` writes them. */
function checksums(directory: string, files: readonly string[]): string {
  return files.map((file) => {
    const hash = createHash("sha256").update(
      readFileSync(`${directory}/${file}`),
    );
    return `${hash.digest("hex")}  ${file}\n`;
  }).join("");
}

/** Makes the release; returns its checksums. */
function release(directory: string): string {
  mkdirSync(directory, { recursive: true });
  const { script, inputs } = bundle();
  writeFileSync(
    `${directory}/offload.mjs`,
    `${script}\n${licenses(inputs)}\n`,
  );
  const changes = readFileSync(`${ROOT}/CHANGELOG.md`, "utf8");
  const date = /^## \[.*\] - (.*)$/m.exec(changes)![1]!;
  writeFileSync(`${directory}/offload.1`, manual(date));
  for (const [name, mode] of Object.entries(SCRIPTS)) {
    copyFileSync(`${ROOT}/scripts/${name}`, `${directory}/${name}`);
    chmodSync(`${directory}/${name}`, mode);
  }
  const files = ["offload.mjs", "offload.1", ...Object.keys(SCRIPTS)];
  const sums = checksums(directory, files);
  writeFileSync(`${directory}/SHA256SUMS`, sums);
  return sums;
}

function main(args: readonly string[]): number {
  if (args.length > 1 || args[0]?.startsWith("-")) {
    const asked = args[0] === "--help";
    console[asked ? "log" : "error"](USAGE);
    return asked ? 0 : 2;
  }
  console.log(release(args[0] ?? `${ROOT}/dist`).trimEnd());
  return 0;
}

process.exit(main(process.argv.slice(2)));

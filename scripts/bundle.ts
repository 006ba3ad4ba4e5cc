/**
 * Makes what is installed: Offload as one JavaScript file that needs a runtime
 * and nothing else, with the programs that stand around it, what authors of
 * plugins need, and their checksums.
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
  mkdirSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import ts from "typescript";
import { isProgram } from "../deps.ts";
import { loadCommands } from "../plugins/_commands.ts";
import { completion } from "../plugins/completion.ts";
import { manual } from "./manual.ts";

const ROOT = fileURLToPath(new URL("..", import.meta.url));

const USAGE = `usage: bundle [DIRECTORY]

Makes what is installed in DIRECTORY, 'dist' of this checkout unless told, and
prints its checksums. 'release' makes all that is published.`;

/** What of scripts/ is installed, or installs it. */
const SCRIPTS = ["choose.sh", "guix", "install.sh", "offload", "runtime.sh"]
  .concat("tell.sh");

/** What of that is run. */
const PROGRAMS = ["guix", "install.sh", "offload"];

/** What editors check files of JSON by. */
const SCHEMAS = ["machines.schema.json", "settings.schema.json"];

/** The shells that a release has completions for. */
const SHELLS = ["bash", "fish", "zsh"];

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

/** The head of a module that has its types beside it, for Deno. */
function typedBy(file: string): string {
  return `// @ts-self-types="./${file}"\n`;
}

/** The types of the script, and of the contract tests of plugins. */
function types(): Record<string, string> {
  const files: Record<string, string> = {};
  const program = ts.createProgram(
    [`${ROOT}/mod.ts`, `${ROOT}/plugins/_contract.ts`],
    {
      ...{ module: ts.ModuleKind.NodeNext, target: ts.ScriptTarget.ESNext },
      ...{ strict: true, exactOptionalPropertyTypes: true },
      ...{ allowImportingTsExtensions: true, resolveJsonModule: true },
      // `deno check` does that; what names a package is of no use elsewhere.
      ...{ noCheck: true, stripInternal: true },
      ...{ declaration: true, emitDeclarationOnly: true },
      ...{ types: ["node"], newLine: ts.NewLineKind.LineFeed },
    },
    { ...ts.createCompilerHost({}), getCurrentDirectory: () => ROOT },
  );
  program.emit(undefined, (file, text) => {
    files[file.replace(/^.*\//, "")] = text;
  });
  return {
    "offload.d.mts": files["mod.d.ts"]!,
    "contract.d.mts": besideScript(files["_contract.d.ts"]!),
  };
}

/** The text of a plugin's file for where mod.ts is the script of a release. */
function besideScript(text: string): string {
  return text.replaceAll('"../mod.ts"', '"./offload.mjs"');
}

/** The contract tests of plugins, of which the script has most. */
function contract(): string {
  const { outputFiles } = buildSync({
    absWorkingDir: ROOT,
    entryPoints: ["plugins/_contract.ts"],
    write: false,
    bundle: true,
    platform: "node",
    format: "esm",
    target: "node22.14",
    external: ["../mod.ts"],
  });
  return typedBy("contract.d.mts") + besideScript(outputFiles[0]!.text);
}

/** The completions of the commands, by the file's name. */
async function completions(): Promise<Record<string, string>> {
  const commands = await loadCommands();
  return Object.fromEntries(SHELLS.map((shell) => {
    return [`offload.${shell}`, `${completion(shell, commands)}\n`];
  }));
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
export function checksums(
  files: Readonly<Record<string, string | Uint8Array>>,
): string {
  return Object.entries(files).map(([name, content]) => {
    const hash = createHash("sha256").update(content);
    return `${hash.digest("hex")}  ${name}\n`;
  }).join("");
}

/** The day of the version, as the changelog has it. */
function day(): string {
  const changes = readFileSync(`${ROOT}/CHANGELOG.md`, "utf8");
  return /^## \[.*\] - (.*)$/m.exec(changes)![1]!;
}

/** All that is installed, and SHA256SUMS of it, by the file's name. */
async function contents(): Promise<Record<string, string>> {
  const { script, inputs } = bundle();
  const read = (directory: string, names: readonly string[]) =>
    Object.fromEntries(names.map((name) => {
      return [name, readFileSync(`${ROOT}/${directory}/${name}`, "utf8")];
    }));
  const files = {
    "offload.mjs": `${typedBy("offload.d.mts")}${script}\n${
      licenses(inputs)
    }\n`,
    "offload.1": manual(day()),
    "contract.mjs": contract(),
    ...types(),
    ...await completions(),
    ...read("plugins", SCHEMAS),
    ...read("scripts", SCRIPTS),
  };
  return { ...files, SHA256SUMS: checksums(files) };
}

/** Makes what is installed in a directory; returns its checksums. */
export async function makeBundle(directory: string): Promise<string> {
  const files = await contents();
  mkdirSync(directory, { recursive: true });
  for (const [name, text] of Object.entries(files)) {
    writeFileSync(`${directory}/${name}`, text);
    chmodSync(`${directory}/${name}`, PROGRAMS.includes(name) ? 0o755 : 0o644);
  }
  return files.SHA256SUMS!;
}

async function main(args: readonly string[]): Promise<number> {
  if (args.length > 1 || args[0]?.startsWith("-")) {
    const asked = args[0] === "--help";
    console[asked ? "log" : "error"](USAGE);
    return asked ? 0 : 2;
  }
  console.log((await makeBundle(args[0] ?? `${ROOT}/dist`)).trimEnd());
  return 0;
}

if (isProgram(import.meta)) process.exit(await main(process.argv.slice(2)));

/** The contract tests of plugins: all built-in ones pass, broken ones don't. */

import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { loadBuiltins, machineToJson } from "../mod.ts";
import type { Hooks, JournalEntry, Plugin } from "../mod.ts";
import {
  checkEnded,
  checkExclude,
  checkMachines,
  checkPlugin,
  CHECKS,
  checkScore,
  MACHINE,
  makePluginContext,
} from "../plugins/_contract.ts";
import { bundle, runtimes } from "./helpers.ts";

const test = suite("contract");
const builtinPlugins = await loadBuiltins();
const root = new URL("..", import.meta.url);

/** Options with which a plugin needs nothing but files of this directory. */
function optionsFor(name: string, directory: string): Record<string, string> {
  const list = `${directory}/machines.json`;
  writeFileSync(list, JSON.stringify([machineToJson(MACHINE)]));
  writeFileSync(`${directory}/drain`, `${MACHINE.name}\n`);
  if (name === "json-machines") return { file: list };
  if (name === "command") return { command: `cat ${list}` };
  return name === "drain" ? { file: `${directory}/drain` } : {};
}

/** Calls `work` with the context of a plugin that has its files. */
async function withContext(
  plugin: Plugin,
  work: (context: ReturnType<typeof makePluginContext>) => Promise<unknown>,
): Promise<void> {
  const directory = mkdtempSync(`${tmpdir()}/offload-`);
  try {
    const options = optionsFor(plugin.name, directory);
    const context = makePluginContext(plugin, options);
    // A program may take its time on a busy machine.
    const settings = { ...context.settings, hookTimeout: 60 };
    await work({ ...context, settings, stateDirectory: directory });
  } finally {
    rmSync(directory, { recursive: true });
  }
}

const checks = {
  machines: checkMachines,
  exclude: checkExclude,
  score: checkScore,
};

/** The same, with what the page's examples do something by. */
const allChecks = { ...checks, ended: checkEnded };

for (const plugin of builtinPlugins) {
  test(`'${plugin.name}' keeps the contract`, async () => {
    checkPlugin(plugin);
    for (const [hook, check] of Object.entries(checks)) {
      // That needs a daemon of Avahi: test/lab/plugins.test.ts.
      if (plugin.name === "dns-sd" || !(hook in plugin)) continue;
      await withContext(plugin, (context) => check(plugin, context));
    }
  });
}

/** Demands that a check finds something wrong with a hook. */
async function refuses(hooks: Partial<Hooks>, message: RegExp): Promise<void> {
  const plugin = { name: "odd", ...hooks } as Plugin;
  const [hook] = Object.keys(hooks) as (keyof typeof allChecks)[];
  try {
    await allChecks[hook!](plugin);
  } catch (error) {
    assert.match(String(error), message);
    return;
  }
  assert.unreachable(`${message}`);
}

test("the checks find what is wrong", async () => {
  const failing = { ended: ({ sent }: JournalEntry) => void sent!.toFixed() };
  await refuses(failing, /undefined/);
  assert.throws(() => checkPlugin({ name: "x" }), /it has no hook/);
  assert.throws(() => checkPlugin({ name: "x", skore() {} }), /'skore'/);
  await refuses({ score: () => NaN }, /score: NaN of no facts/);
  await refuses({ score: ({ facts }) => facts!.load }, /undefined/);
  await refuses(
    { score: ({ facts }) => (facts?.load ?? 1) / (facts?.cores ?? 0) },
    /score: Infinity/,
  );
  await refuses({
    score: ({ machine }) => {
      (machine as { speed: number }).speed = 2;
      return 1;
    },
  }, /speed/);
  await refuses(
    { machines: () => [{ ...MACHINE, port: 0 }] },
    /'port' must be an integer/,
  );
  await refuses({ machines: () => [MACHINE, MACHINE] }, /listed twice/);
  await refuses({ machines: () => ({}) as [] }, /expected a list/);
  await refuses({ machines: () => new Promise(() => {}) }, /no answer within/);
  const exclude = (answer: unknown) => ({ exclude: () => answer as never });
  await refuses(exclude({ isBusy: true }), /why\?/);
  await refuses(exclude({ why: "so", isBusy: "no" }), /isBusy/);
  await refuses(exclude({ why: "so", isBusy: true, start: 1 }), /start/);
  const vague = { why: "so", isBusy: true, isStarting: "soon" };
  await refuses(exclude(vague), /isStarting/);
});

// ---------------------------------------------------------------------------
// plugins/README.md
// ---------------------------------------------------------------------------

const page = readFileSync(new URL("plugins/README.md", root), "utf8");

/** The examples of the page: file name, behind `//`, and text. */
const examples = [...page.matchAll(/^```ts\n\/\/ (\S+)\n([^]*?)^```$/gm)]
  .map(([, name, text]) => ({ name: name!, text: text! }));

/** What an author has, as it is installed. */
const installed = mkdtempSync(`${tmpdir()}/offload-installed-`);

test.before(async () => {
  await bundle(installed);
});

test.after(() => rmSync(installed, { recursive: true }));

/** Writes the examples, as an author does who has no checkout. */
function writeExamples(): string {
  const directory = mkdtempSync(`${tmpdir()}/offload-plugins-`);
  for (const { name, text } of examples) {
    const here = text.replaceAll("/usr/local/lib/offload", installed);
    writeFileSync(`${directory}/${name}`, here);
  }
  return directory;
}

test("the page has an example of each hook, and a test", () => {
  const text = examples.map(({ text }) => text).join("\n");
  for (const hook of Object.keys(CHECKS)) {
    assert.match(text, new RegExp(`^  (async )?${hook}[(:]`, "m"), hook);
    assert.match(page, `### \`${hook}`);
  }
  assert.ok(examples.some(({ name }) => name.endsWith(".test.ts")));
});

test("the page's examples are plugins, type-checked, that work", async () => {
  const directory = writeExamples();
  try {
    const [deno] = runtimes.deno;
    const files = examples.map(({ name }) => `${directory}/${name}`);
    // Nothing is fetched for it.
    const env = { PATH: "/usr/bin:/bin", DENO_DIR: `${directory}/deno` };
    const options = { cwd: directory, env, stdio: "pipe" } as const;
    execFileSync(deno, ["check", ...files], options);
    for (const { name } of examples) {
      if (name.endsWith(".test.ts")) continue;
      const { default: plugin } = await import(`${directory}/${name}`);
      checkPlugin(plugin);
      for (const [hook, check] of Object.entries(checks)) {
        if (hook in plugin) await check(plugin);
      }
    }
  } finally {
    rmSync(directory, { recursive: true });
  }
});

test("the page's example of 'ended' sends mail of what went wrong", async () => {
  const directory = writeExamples();
  try {
    const { default: plugin } = await import(`${directory}/notify.ts`);
    const program = `${directory}/sendmail`;
    const mails = `${directory}/mails`;
    const text = `#!/bin/sh\n{ echo "to $1"; cat; } >>${mails}\n`;
    writeFileSync(program, text, { mode: 0o755 });
    await checkEnded(plugin, makePluginContext(plugin, { program, to: "me" }));
    const sent = readFileSync(mails, "utf8");
    const subjects = [...sent.matchAll(/^Subject: (.*)$/gm)];
    assert.equal(
      subjects.map(([, subject]) => subject),
      ["failed", "timed-out", "lost"].map((it) => `hello-2.12 ${it}`),
    );
    assert.match(sent, /^to me\n/);
    assert.match(sent, "\nexample:22: lost connection");
  } finally {
    rmSync(directory, { recursive: true });
  }
});

test("the page's test passes, and can fail", () => {
  const directory = writeExamples();
  try {
    const own = examples.find(({ name }) => name.endsWith(".test.ts"))!;
    const file = `${directory}/${own.name}`;
    const [node, ...options] = runtimes.node;
    const runTest = () =>
      execFileSync(node, [...options, "--test", file], { stdio: "pipe" });
    runTest();
    const plugin = `${directory}/${own.name.replace(".test.ts", ".ts")}`;
    const text = readFileSync(plugin, "utf8");
    writeFileSync(plugin, text.replace("-Infinity", "NaN"));
    assert.throws(runTest, /failed/i);
  } finally {
    rmSync(directory, { recursive: true });
  }
});

test("the page's settings are settings", async () => {
  const { loadPlugins, readSettings } = await import("../mod.ts");
  const blocks = [...page.matchAll(/^```json\n([^]*?)^```$/gm)];
  assert.ok(blocks.length > 0);
  const names = new Set<string>();
  for (const [, text] of blocks) {
    const value = JSON.parse(text!);
    if (!("use" in value)) continue;
    const directory = mkdtempSync(`${tmpdir()}/offload-`);
    writeFileSync(`${directory}/settings.json`, text!);
    const settings = readSettings(directory, {});
    const { log } = makePluginContext(builtinPlugins[0]!);
    await loadPlugins(directory, settings, log);
    Object.keys(settings.use).forEach((name) => names.add(name));
    rmSync(directory, { recursive: true });
  }
  const withOptions = builtinPlugins.filter(({ options }) => options);
  assert.equal([...names].sort(), withOptions.map(({ name }) => name).sort());
});

test("the page lists all built-in plugins and their options", () => {
  for (const { name, options = {} } of builtinPlugins) {
    assert.ok(page.includes(`| \`${name}\` |`), name);
    for (const [option, { default: usual }] of Object.entries(options)) {
      assert.ok(page.includes(`| \`${option}\` | \`${usual}\` |`), option);
    }
  }
});

test.run();

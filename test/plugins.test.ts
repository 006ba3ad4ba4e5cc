/** Plugins: how they are found, checked and asked. */

import { execFileSync } from "node:child_process";
import {
  chmodSync,
  globSync,
  mkdtempSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { fileURLToPath } from "node:url";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  listMachines,
  loadPlugins,
  readSettings,
  scoreCandidates,
} from "../mod.ts";
import type { Context, Plugin } from "../mod.ts";
import { candidate, machine, makeContext, request } from "./context.ts";

const test = suite("plugins");
const root = fileURLToPath(new URL("..", import.meta.url));
let directory = "";

// In the checkout, so that they can be type-checked against it.
test.before.each(() => {
  directory = mkdtempSync(`${root}test/plugins-`);
});
test.after.each(() => rmSync(directory, { recursive: true }));

function write(name: string, text: string): void {
  writeFileSync(`${directory}/${name}`, text);
}

/** Loads what was written; returns the site's plugins and the warnings. */
async function load() {
  const { context, warnings } = makeContext();
  const settings = readSettings(directory, {});
  const plugins = await loadPlugins(directory, settings, context.log);
  const builtin = ["guix", "locality", "guile-machines", "archive-command"];
  const names = plugins.map(({ name }) => name);
  return {
    plugins,
    names: names.filter((name) => !builtin.includes(name)),
    all: names,
    warnings,
  };
}

const named = (name: string) =>
  `export default { name: "${name}", score: () => 1 };`;

test("loadPlugins() loads files by name, before the built-in ones", async () => {
  write("20-b.js", named("b"));
  write("10-a.mjs", named("a"));
  write("30-c.ts", named("c") + "\nconst n: number = 1; void n;");
  write("_hidden.ts", named("hidden"));
  write(".dot.ts", named("dot"));
  write("notes.txt", "no plugin");
  const { all, warnings } = await load();
  assert.equal(all.slice(0, 4), ["a", "b", "c", "guix"]);
  assert.equal(warnings, []);
});

test("loadPlugins() reports file and key of what is no plugin", async () => {
  const bad: Record<string, [string, RegExp]> = {
    "a.ts": ['export default { name: "a", scor: () => 1 };', /key 'scor'/],
    "b.ts": ["export default { score: () => 1 };", /it has no 'name'/],
    "c.ts": ['export default { name: "c" };', /it has no hook/],
    "d.ts": ['export default { name: "d", score: 1 };', /'score' is no funct/],
    "e.ts": ["export const x = 1;", /its default export is no plugin/],
    "f.ts": ["export default {", /failed to load plugin/],
    "g.ts": ['throw new Error("boom");', /boom/],
    "h.ts": [named("guix"), /the name 'guix' is taken/],
  };
  for (const [name, [text]] of Object.entries(bad)) write(name, text);
  write("z.ts", named("good"));
  const { names, warnings } = await load();
  assert.equal(names, ["good"]);
  assert.is(warnings.length, Object.keys(bad).length);
  for (const [index, [name, [, message]]] of Object.entries(bad).entries()) {
    assert.ok(warnings[index]!.includes(`${directory}/${name}`), name);
    assert.match(warnings[index]!, message);
  }
});

test("loadPlugins() refuses a file that others can write", async () => {
  write("a.ts", named("a"));
  chmodSync(`${directory}/a.ts`, 0o666);
  const { names, warnings } = await load();
  assert.equal(names, []);
  assert.match(warnings[0]!, /a\.ts: others than root .* can write it/);
});

test("loadPlugins() knows the built-in scores", async () => {
  const { context } = makeContext();
  const settings = { ...readSettings(directory, {}), score: "fastest" };
  try {
    await loadPlugins(directory, settings, context.log);
    assert.unreachable();
  } catch (error) {
    assert.match(String(error), /no built-in score 'fastest'.*'guix'/);
  }
});

test("a plugin is type-checked against mod.ts", () => {
  const [deno] = globSync(`${root}node_modules/@deno/*/deno`);
  const check = (text: string) => {
    write("plugin.ts", text);
    execFileSync(deno!, ["check", `${directory}/plugin.ts`], { stdio: "pipe" });
  };
  const plugin = (hook: string) =>
    'import type { Plugin } from "../../mod.ts";\n' +
    `const plugin = { name: "x", ${hook} } satisfies Plugin;\n` +
    "export default plugin as Plugin;\n";
  check(
    plugin("score: ({ machine }) => machine.cores ? 1 : undefined")
      .replace("machine.cores", "machine.speed"),
  );
  assert.throws(() => check(plugin("scor: () => 1")), /scor/);
  assert.throws(() => check(plugin('score: () => "1"')), /string/);
});

/** Scores of three machines, as the plugins give them. */
async function scores(...plugins: Plugin[]) {
  const { context, warnings } = makeContext({ plugins });
  const candidates = ["a", "b", "c"].map((name) => candidate({ name }));
  const all = await scoreCandidates(candidates, request(), context);
  return { totals: all.map(({ total }) => total), all, warnings };
}

test("scoreCandidates() sums, lets abstain and veto", async () => {
  const { totals, all, warnings } = await scores(
    { name: "one", score: ({ machine }) => machine.name === "b" ? 2 : 1 },
    {
      name: "two",
      score: ({ machine }) => machine.name === "c" ? 5 : undefined,
    },
    {
      name: "three",
      score: async ({ machine }) =>
        await Promise.resolve(
          machine.name === "a" ? -Infinity : undefined,
        ),
    },
  );
  assert.equal(totals, [-Infinity, 2, 6]);
  assert.equal(all[2]!.byPlugin, { one: 1, two: 5 });
  assert.equal(warnings, []);
});

test("scoreCandidates() passes over a plugin that fails", async () => {
  const good: Plugin = { name: "good", score: () => 1 };
  const bad: Record<string, [Plugin["score"], RegExp]> = {
    throws: [() => {
      throw new Error("boom");
    }, /plugin 'throws': score: boom/],
    rejects: [() => Promise.reject(new Error("bang")), /bang/],
    nan: [() => NaN, /plugin 'nan': score: expected a number, got NaN/],
    text: [() => "1" as unknown as number, /expected a number, got 1/],
    infinite: [() => Infinity, /expected a number, got Infinity/],
    hangs: [() => new Promise(() => {}), /'hangs': score: no answer within/],
  };
  for (const [name, [score, message]] of Object.entries(bad)) {
    const { totals, warnings } = await scores({ name, score: score! }, good);
    assert.equal(totals, [1, 1, 1], name);
    assert.is(warnings.length, 1, name);
    assert.match(warnings[0]!, message);
  }
});

test("a plugin's hook may use the plugin", async () => {
  const plugin: Plugin & { bonus?: number } = {
    name: "self",
    score() {
      return this.name === "self" ? 7 : 0;
    },
  };
  assert.equal((await scores(plugin)).totals, [7, 7, 7]);
});

test("listMachines() concatenates; the first NAME:PORT wins", async () => {
  const list = (name: string, ...machines: Partial<Context>[]): Plugin => ({
    name,
    machines: () => machines.map((fields) => machine(fields)),
  });
  const { context, warnings } = makeContext({
    plugins: [
      list("one", { name: "a", speed: 2 } as object),
      list(
        "two",
        { name: "a", speed: 1 } as object,
        { name: "a", port: 2222 } as object,
        { name: "b", systems: ["x86_64-linux"] } as object,
        { name: "b", systems: ["i686-linux"] } as object,
      ),
    ],
  });
  const machines = await listMachines(context);
  const text = machines.map(({ name, port, speed }) => [name, port, speed]);
  assert.equal(text, [["a", 22, 2], ["a", 2222, 1], ["b", 22, 1], [
    "b",
    22,
    1,
  ]]);
  assert.equal(warnings, []);
});

test("listMachines() leaves out what is no machine, and says so", async () => {
  const bad = [machine({ name: "a", port: 0 }), machine({ name: "b" })];
  const { context, warnings } = makeContext({
    plugins: [
      { name: "odd", machines: () => bad },
      { name: "none", machines: () => "no list" as unknown as [] },
      { name: "late", machines: () => new Promise(() => {}) },
    ],
  });
  const machines = await listMachines(context);
  assert.equal(machines.map(({ name }) => name), ["b"]);
  assert.is(warnings.length, 3);
  assert.match(warnings[1]!, /plugin 'none': machines: expected a list/);
  assert.match(warnings[2]!, /plugin 'late': machines: no answer within/);
});

test.run();

/** Plugins: how they are found, checked and asked. */

import { execFileSync } from "node:child_process";
import {
  chmodSync,
  globSync,
  mkdtempSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { buffer } from "node:stream/consumers";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  chooseBuildMachine,
  listMachines,
  loadBuiltins,
  loadPlugins,
  openSession,
  readSettings,
  sumScores,
} from "../mod.ts";
import type {
  Assignment,
  Connection,
  Context,
  Exclusion,
  Plugin,
  Transport,
} from "../mod.ts";
import { checkAnswers } from "../plugins/_site.ts";
import { candidate, machine, makeContext, request } from "./context.ts";
import { greeter, rejects } from "./helpers.ts";

const test = suite("plugins");
const builtinPlugins = await loadBuiltins();
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
  const settings = { ...readSettings(directory, {}), hookTimeout: 60 };
  const plugins = await loadPlugins(directory, settings, context.log);
  const builtin = ["guix", ...builtinPlugins.map(({ name }) => name)];
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

test("loadPlugins() asks built-in ones in the order of 'use'", async () => {
  for (const names of [["dns-sd", "command"], ["command", "dns-sd"]]) {
    const use = Object.fromEntries(names.map((name) => [name, {}]));
    const plugins = await loadUsing(use);
    const found = plugins.map(({ name }) => name);
    assert.equal(found.filter((name) => names.includes(name)), names);
  }
});

test("a site's transport is used with all its methods, and named", async () => {
  const refuse = () => Promise.reject(new Error("no"));
  const transport: Required<Transport> = {
    missing: refuse,
    reserve: refuse,
    send: refuse,
    prepare: () => {
      throw new Error("no");
    },
    retrieve: async function* () {
      yield* [];
      await refuse();
    },
  };
  const { context } = makeContext();
  const check = async (transport: Transport) => {
    const plugin = checkAnswers({ name: "own", transport: () => transport });
    const checked = await plugin.transport!(machine(), context as never);
    return checked as Required<Transport>;
  };
  const used = await check(transport);
  assert.equal(Object.keys(used).sort(), Object.keys(transport).sort());
  const named = /^plugin 'own': transport: no$/;
  await rejects(Promise.resolve(used.missing([])), named);
  await rejects(Promise.resolve(used.reserve(1)), named);
  await rejects(Promise.resolve(used.send(new Map())), named);
  assert.throws(() => used.prepare("x"), named);
  await rejects(buffer(used.retrieve([])), named);
  const odd = await check({
    ...transport,
    reserve: () => ({} as { release(): void }),
  });
  const lacking = /^plugin 'own': transport: 'release' is no function$/;
  await rejects(Promise.resolve(odd.reserve(1)), lacking);
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
  const all = await sumScores(candidates, request(), context);
  return { totals: all.map(({ total }) => total), all, warnings };
}

test("sumScores() sums, lets abstain and veto", async () => {
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

test("sumScores() passes over a plugin that fails", async () => {
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

/** Loads what was written with this setting `use`. */
function loadUsing(use: Record<string, Record<string, unknown>>) {
  const { context } = makeContext();
  write("settings.json", JSON.stringify({ use }));
  const settings = { ...readSettings(directory, {}), hookTimeout: 60 };
  return loadPlugins(directory, settings, context.log);
}

test("loadPlugins() checks the options in the setting 'use'", async () => {
  write(
    "roomy.ts",
    'export default { name: "roomy", score: ({}, {}, { options }) => ' +
      'options.bonus, options: { bonus: { default: 2, description: "" } } };',
  );
  await loadUsing({ drain: {}, roomy: { bonus: 3 } });
  const refusals: [Record<string, Record<string, unknown>>, RegExp][] = [
    [{ drian: {} }, /setting 'use': there is no plugin 'drian'/],
    [{ drain: { files: "x" } }, /setting 'use.drain': unknown setting 'files'/],
    [{ drain: { file: 1 } }, /'use.drain': 'file': expected a string, got 1/],
    [{ command: { lifetime: 0 } }, /'lifetime': 0 is not between 1 and 86400/],
    [{ roomy: { bonus: "3" } }, /'use.roomy': 'bonus': expected a number/],
    [{ drain: [] as never }, /setting 'use.drain': no object/],
  ];
  for (const [use, message] of refusals) await rejects(loadUsing(use), message);
});

test("loadPlugins() lets pass what a plugin that fails may have meant", async () => {
  write("roomy.ts", 'throw new Error("boom");');
  await loadUsing({ roomy: { bonus: 3 } });
});

test("a plugin gets its own options, those told over the usual ones", async () => {
  const plugin: Plugin = {
    name: "own",
    options: {
      bonus: { default: 2, description: "" },
      other: { default: 5, description: "" },
    },
    score: (_candidate, _request, { options }) =>
      Number(options.bonus) + Number(options.other),
  };
  assert.equal((await scores(plugin)).totals, [7, 7, 7]);
  const { context } = makeContext({ plugins: [plugin] });
  const settings = { ...context.settings, use: { own: { bonus: 30 } } };
  const told = { ...context, settings };
  const [{ total } = { total: 0 }] = await sumScores(
    ...[[candidate()], request(), told] as const,
  );
  assert.is(total, 35);
});

test("the settings choose among built-in plugins; 'use' adds", async () => {
  const { context } = makeContext({ plugins: builtinPlugins });
  const names = async (score: string, use: Context["settings"]["use"]) => {
    const settings = { ...context.settings, score, use };
    const told = { ...context, settings };
    const [first] = await sumScores([candidate()], request(), told);
    return Object.keys(first!.byPlugin);
  };
  assert.equal(await names("locality", {}), ["locality"]);
  assert.equal(await names("round-robin", {}), ["round-robin"]);
  assert.equal(await names("pressure", {}), ["pressure"]);
  assert.equal(await names("locality", { pressure: {} }), [
    "locality",
    "pressure",
  ]);
});

/** Chooses among machines that nothing but `exclude` keeps from a build. */
async function chooseWith(
  exclude: (name: string) => Exclusion | undefined,
  ...names: string[]
) {
  const plugin: Plugin = {
    name: "out",
    exclude: ({ name }) => exclude(name),
    connect: () => {
      throw new Error("asked");
    },
  };
  const { context, warnings } = makeContext({ plugins: [plugin] });
  const machines = names.map((name, index) =>
    machine({ name, speed: 9 - index })
  );
  return {
    choice: await chooseBuildMachine(machines, request(), context),
    warnings,
  };
}

test("a machine that is excluded is not asked", async () => {
  const out = { why: "out", isBusy: false };
  assert.equal(await chooseWith(() => out, "a", "b"), {
    choice: "unreachable",
    warnings: [],
  });
  const some = await chooseWith((name) => name === "a" ? out : undefined, "a");
  assert.is(some.choice, "unreachable");
});

test("builds wait for a machine that is excluded as busy", async () => {
  const busy = { why: "starting", isBusy: true };
  assert.is((await chooseWith(() => busy, "a", "b")).choice, "busy");
});

test("one machine at a time is started, the fastest", async () => {
  const started: string[] = [];
  const off = (name: string): Exclusion => ({
    why: "off",
    isBusy: true,
    start: () => void started.push(name),
  });
  assert.is((await chooseWith(off, "a", "b")).choice, "busy");
  assert.equal(started, ["a"]);
  const starting = { why: "starting", isBusy: true, isStarting: true };
  await chooseWith((name) => name === "a" ? starting : off(name), "a", "b");
  assert.equal(started, ["a"]);
  const taken = { why: "others use it", isBusy: true };
  await chooseWith((name) => name === "a" ? taken : off(name), "a", "b");
  assert.equal(started, ["a", "b"]);
});

test("what a start throws, and answers that are none, are told", async () => {
  const start = () => {
    throw new Error("no power");
  };
  const off = { why: "off", isBusy: true, start };
  const { choice, warnings } = await chooseWith(() => off, "a");
  assert.is(choice, "busy");
  assert.match(warnings.join(), /plugin 'out': exclude: no power/);
  const odd = await chooseWith(() => ({ busy: true }) as never, "a");
  assert.match(
    odd.warnings[0]!,
    /plugin 'out': exclude: expected { why, isBusy }, got {"busy":true}/,
  );
});

test("a machine has time to be connected to, beside one that is", async () => {
  const { context } = makeContext({
    plugins: [{
      name: "keeping",
      async connect({ name }) {
        if (name === "cold") await delay(150); // what ssh takes, nearby
        return {
          failure: () => undefined,
          openSocket: () => Promise.resolve(greeter(request().derivation)),
          exec: () => Promise.reject(new Error("none")),
          close: () => {},
        };
      },
    }],
  });
  const machines = [
    machine({ name: "cold", speed: 9 }),
    machine({ name: "kept", speed: 1 }),
  ];
  const choice = await chooseBuildMachine(machines, request(), context);
  assert.is((choice as Assignment).prospect.machine.name, "cold");
});

test("openSession() connects by the first plugin that does", async () => {
  const plugin = (name: string, connect: Plugin["connect"]): Plugin => ({
    name,
    connect: connect!,
  });
  const connection = (name: string): Connection => ({
    failure: () => new Error(name),
    openSocket: () => Promise.reject(new Error("none")),
    exec: () => Promise.reject(new Error("none")),
    close: () => {},
  });
  const open = (...plugins: Plugin[]) =>
    openSession(machine(), makeContext({ plugins }).context);
  const session = await open(
    plugin("not mine", () => undefined),
    plugin("first", () => connection("first")),
    plugin("second", () => connection("second")),
  );
  assert.is(session.failure()?.message, "first");
  await rejects(
    session.exec("true"),
    /'true' .* plugin 'first': connect: none/,
  );
  await rejects(open(plugin("none", () => undefined)), /no plugin connects to/);
  const hint = "do that";
  const error = await rejects(
    open(plugin("bad", () => {
      throw Object.assign(new Error("boom"), { hint });
    })),
    /^plugin 'bad': connect: boom$/,
  );
  assert.is(error.hint, hint);
});

test.run();

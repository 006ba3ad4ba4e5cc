/** Keeps the house: how large its rooms are, and which doors they have. */

import { readdirSync, readFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { builtinNames, loadBuiltin } from "../mod.ts";
import { ROOT } from "./helpers.ts";

const test = suite("house");

/** How many lines a file may have, and a function. */
const LINES = { "mod.ts": 6923, others: 600, function: 40 } as const;

const PLUGINS = readdirSync(`${ROOT}/plugins`)
  .filter((file) => file.endsWith(".ts")).map((file) => `plugins/${file}`);

/** Of which files the house is made. */
const ROOMS = ["deps.ts", "mod.ts", ...PLUGINS];

/** What else there is to read: scripts and tests, but no data. */
const AROUND = ["scripts", "scripts/lab"]
  .concat("test")
  .concat(["faults", "fixtures", "lab", "release"].map((it) => `test/${it}`))
  .flatMap((directory) =>
    readdirSync(`${ROOT}/${directory}`, { withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map(({ name }) => `${directory}/${name}`)
  );

function read(file: string): string {
  return readFileSync(`${ROOT}/${file}`, "utf8");
}

/** What a file imports: from where, and whether more than types. */
function importsOf(file: string): { from: string; isType: boolean }[] {
  const pattern =
    /^(?:import|export)( type)? (?:[\w*{][^"';]*? from )?"([^"]+)";$/gm;
  return [...read(file).matchAll(pattern)].map(([, type, from]) => ({
    from: from!.startsWith(".")
      ? new URL(from!, `file:///${file}`).pathname.slice(1)
      : from!,
    isType: type !== undefined,
  }));
}

/** Where a function or a method begins, as `deno fmt` writes it. */
const BEGINNING =
  /^( *)(?:export )?(?:async |static |get |set )*(function\*? )?[*#]?\w+(?=[<(]).*[({<]$/;

/** How many lines the function has that begins there; 0 where none does. */
function functionLength(lines: readonly string[], first: number): number {
  const [begins, indent = "", isFunction] = BEGINNING.exec(lines[first]!) ?? [];
  if (begins === undefined || (indent === "" && !isFunction)) return 0;
  // Text that spans lines may stand at the margin.
  const after = RegExp(indent === "" ? "^}$" : `^${indent}[^\\s)>]`);
  const length =
    lines.slice(first).findIndex((line, index) =>
      index > 0 && after.test(line)
    ) + 1;
  return /^ *\},?$/.test(lines[first + length - 1]!) ? length : 0;
}

test("no room is too large: what is no part of it goes into another", () => {
  for (const file of [...ROOMS, ...AROUND]) {
    const most = file === "mod.ts" ? LINES[file] : LINES.others;
    const lines = read(file).trimEnd().split("\n").length;
    assert.ok(lines <= most, `${file} has ${lines} lines, of ${most} at most`);
  }
});

test("no function is too long: what has a name of its own gets it", () => {
  const scripts = AROUND.filter((file) => /^scripts\/.*\.ts$/.test(file));
  for (const file of [...ROOMS, ...scripts]) {
    const lines = read(file).split("\n");
    for (const [index, line] of lines.entries()) {
      const length = functionLength(lines, index);
      const place = `${file}:${index + 1}: '${line.trim()}'`;
      const text = `${place} has ${length} lines, of ${LINES.function} at most`;
      assert.ok(length <= LINES.function, text);
    }
  }
});

test("mod.ts and deps.ts stand without plugins/", () => {
  for (const file of ["deps.ts", "mod.ts"]) {
    const doors = importsOf(file).filter(({ from }) => /^plugins/.test(from));
    assert.equal(doors, [], `${file}: load it by its name, when it is needed`);
  }
});

test("the map of mod.ts shows its sections and what is in them", () => {
  const text = read("mod.ts");
  const [map] = /^\/\*\*[^]*?\*\//.exec(text)!;
  const sections = [...text.matchAll(/^\/\/ -+\n\/\/ (\w[^:\n]*)/gm)];
  const shown = [...map.matchAll(/^ \* {5}([A-Z][\w ]*?)(?: {2}|$)/gm)];
  assert.equal(
    shown.map(([, name]) => name),
    sections.map(([, name]) => name),
  );
  const places = [...map.matchAll(/(\w+)\(\)/g)].map(([, name]) => {
    const pattern = RegExp(`^(export )?(async )?function\\*? ${name}\\(`, "m");
    return pattern.exec(text)?.index;
  });
  assert.ok(places.every((place) => place !== undefined), "a name is gone");
});

test("packages are named in deps.ts alone", () => {
  for (const file of ROOMS.filter((file) => file !== "deps.ts")) {
    const packages = importsOf(file).map(({ from }) => from)
      .filter((from) => !from.startsWith("node:") && !ROOMS.includes(from));
    assert.equal(packages, [], `${file}: have deps.ts hand it on`);
  }
});

test("no room leads back to itself", () => {
  const seen = new Map<string, "open" | "done">();
  const visit = (file: string, way: readonly string[]) => {
    if (seen.get(file) === "done") return;
    const text = `${[...way, file].join(" -> ")}: move what both need`;
    assert.is.not(seen.get(file), "open", text);
    seen.set(file, "open");
    for (const { from, isType } of importsOf(file)) {
      if (!isType && ROOMS.includes(from)) visit(from, [...way, file]);
    }
    seen.set(file, "done");
  };
  for (const file of ROOMS) visit(file, []);
});

test("files are called as their plugins, and say what they are for", async () => {
  for (const file of ROOMS) {
    assert.match(read(file), /^\/\*\*\n \* \S[^]*?\n \* @module\n \*\//, file);
  }
  for (const name of builtinNames()) {
    assert.is((await loadBuiltin(name))?.name, name);
  }
});

test("a plugin that is no command asks mod.ts for types alone", async () => {
  for (const name of builtinNames()) {
    const file = `plugins/${name.replaceAll("-", "_")}.ts`;
    const { command, transport } = (await loadBuiltin(name))!;
    if (command || transport) continue; // these are built of what it has
    const values = importsOf(file).filter(({ from, isType }) =>
      from === "mod.ts" && !isType
    );
    assert.equal(values, [], `${file}: the hook's context has what it needs`);
  }
});

test.run();

/** The reader of machine files: how fast it is, and that it survives anything. */

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { OffloadError } from "../mod.ts";
import { fuzz, processorTime } from "./helpers.ts";
import { corpus, corpusNames } from "./lab_machine_file.ts";
import { evaluate, machine } from "./scheme.ts";

const speed = suite("machine file: speed");

speed("reads no machine of a long list slower", () => {
  /** Milliseconds of processor time that a list takes, the best of three. */
  const timeReading = (count: number) => {
    const entries = Array.from({ length: count }, () => machine());
    const text = `(list ${entries.join("\n")})`;
    const times = Array.from({ length: 3 }, () => {
      const start = processorTime();
      assert.is(evaluate(text).machines.length, count);
      return processorTime() - start;
    });
    return Math.min(...times);
  };
  const [some, many] = [timeReading(1000), timeReading(10_000)];
  // What looks at each machine for each machine takes 100 times as long.
  assert.ok(many < 40 * some, `${some} ms, ${many} ms`);
});

speed.run();

const fuzzed = suite("machine file: fuzz");

const pieces = [
  "(",
  ")",
  "[",
  "]",
  "'",
  "`",
  ",",
  ",@",
  '"',
  "\\",
  ";",
  "#|",
  "|#",
  "#;",
  "\n",
  " ",
  "#t",
  "#f",
  "1",
  "2.",
  "-1",
  "list",
  "define",
  "lambda",
  "let",
  "let*",
  "if",
  "and",
  "or",
  "map",
  "append",
  "apply",
  "filter",
  "quote",
  "begin",
  "build-machine",
  "inherit",
  "name",
  "user",
  "host-key",
  "systems",
  "port",
  "(define (f x) (f x))",
  "(f 1)",
  "x",
  "string-append",
  "getenv",
  "call-with-input-file",
  "use-modules",
  "(srfi srfi-1)",
  "append-map",
  "fold",
  "define-module",
  "@",
  ".",
  "#:use-module",
  "\\x41",
  "\u00e9",
  "\0",
  "\ufeff",
  "\ud83d",
  "__proto__",
  "constructor",
  "toString",
];

/** Changes a text in some places. */
function mutate(text: string, random: () => number): string {
  for (let n = 1 + Math.floor(random() * 4); n > 0; n--) {
    const at = Math.floor(random() * text.length);
    const end = at + Math.floor(random() * random() * 60);
    const piece = random() < 0.5
      ? pieces[Math.floor(random() * pieces.length)]!
      : "";
    const other = random() < 0.2 ? text.slice(at, end) : "";
    text = text.slice(0, at) + piece + other +
      text.slice(random() < 0.5 ? at : end);
  }
  return text;
}

/** Makes an expression of known names. */
function generate(random: () => number, depth: number): string {
  const templates = [
    '"a"',
    "1",
    "#f",
    "x",
    "list",
    '\'(1 "b")',
    "(list _ _)",
    "(quote _)",
    "(define x _)",
    "(f _)",
    "((@ (srfi srfi-1) append-map) f (list _))",
    machine("(private-key _)"),
    "(build-machine (inherit x) (features _))",
  ];
  const length = depth > 6 ? 6 : templates.length;
  const template = templates[Math.floor(random() * length)]!;
  return template.replace(/_(?!6)/g, () => generate(random, depth + 1));
}

/** Evaluates a text, which must not fail in another way than it may. */
function survive(text: string): void {
  const start = processorTime();
  try {
    const { needsGuile, machines } = evaluate(text);
    assert.ok(needsGuile === undefined || machines.length === 0);
  } catch (error) {
    assert.instance(error, OffloadError, `${error}: ${text}`);
    assert.match((error as Error).message, /^f\.scm:\d+:\d+: /);
  }
  assert.ok(processorTime() - start < 5000, text);
}

fuzzed("survives mutations of the corpus", () => {
  const texts = corpusNames().map((name) =>
    readFileSync(join(corpus, `${name}.scm`), "utf8")
  );
  return fuzz(20, (random) => {
    for (const text of texts) survive(mutate(text, random));
  });
});

fuzzed("survives what a grammar makes", () =>
  fuzz(3000, (random) => {
    survive(
      `(define x ${generate(random, 0)}) (define y ${generate(random, 2)}) ` +
        `(list x y ${generate(random, 1)})`,
    );
  }));

fuzzed("survives noise", () =>
  fuzz(3000, (random) => {
    const length = Math.floor(random() * 40);
    survive(
      Array.from({ length }, () => pieces[Math.floor(random() * pieces.length)])
        .join(random() < 0.5 ? " " : ""),
    );
  }));

fuzzed.run();

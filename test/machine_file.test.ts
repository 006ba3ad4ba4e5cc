import {
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { userInfo } from "node:os";
import { join } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { OffloadError } from "../mod.ts";
import {
  evaluateMachineFile,
  type Machine,
  machineFromFields,
  machineToJson,
  makeContext,
} from "../mod.ts";
import { makeContext as anyContext } from "./context.ts";
import { processorTime, withDirectory } from "./helpers.ts";
import {
  corpus,
  corpusInLab,
  corpusNames,
  differences,
  find,
  recorded,
} from "./lab_machine_file.ts";
import { evaluate, key, machine } from "./scheme.ts";

/** The error that a text makes. */
function errorOf(text: string): string {
  try {
    const { needsGuile } = evaluate(text);
    return needsGuile === undefined ? "no error" : `Guile: ${needsGuile}`;
  } catch (error) {
    assert.instance(error, OffloadError);
    return (error as OffloadError).message;
  }
}

/** What a Scheme expression gives for a private key. */
function keyOf(expression: string, before = ""): unknown {
  const { machines, needsGuile, problems } = evaluate(
    `${before} (list ${machine(`(private-key ${expression})`)})`,
  );
  return needsGuile ?? machines[0]?.privateKey ?? problems[0]?.message;
}

/** Tells whether a text is left to Guile, and where that is. */
function guilePlace(text: string): string | undefined {
  return evaluate(text).needsGuile?.replace(/: .*$/s, "");
}

const conformance = suite("machine file: conformance");

for (const [name, expected] of Object.entries(recorded())) {
  conformance(`${name} is what the real Guix says`, () => {
    assert.equal(differences(expected, find(name)), []);
  });
}

conformance("the recording has all files and no more", () => {
  assert.equal(Object.keys(recorded()).sort(), corpusNames());
  assert.ok(corpusNames().length >= 60);
});

/** What of the corpus is a program, and so Guile's, by the start of its name. */
const PROGRAMS = new RegExp(`^(${
  [
    ...["guile", "bad", "append", "apply", "at-module", "begin"],
    ...[
      "define-(again|forward|lambda|module|procedure|public)",
      "filter",
      "first",
    ],
    ...["fold", "getenv", "if", "let", "map", "or", "quasiquote"],
    ...["inherit-(of-a-call|field-twice|sees)", "fields-see", "read-"],
  ].join("|")
})`);

conformance("what holds data needs no Guile, and all else does", () => {
  const left = corpusNames().filter((name) => find(name).needsGuile);
  assert.equal(left.filter((name) => !PROGRAMS.test(name)), []);
  const inline = corpusNames().filter((name) => !left.includes(name));
  assert.equal(
    inline.filter((name) => PROGRAMS.test(name) && !/^bad-/.test(name)),
    [],
  );
  assert.ok(inline.length > 70, `${inline.length}`);
});

conformance.run();

const reading = suite("machine file: reader");

reading("takes strings as Guile does", () => {
  assert.is(
    keyOf(String.raw`"a\x41;b\u00e9c\U01f600d\\e\"f\ng\
h"`),
    "aA;bécD".replace("D", "\u{1f600}d") + '\\e"f\ngh',
  );
  assert.is(keyOf('"a\r\nb"'), "a\r\nb");
});

reading("takes bytes with and without a byte-order mark", () => {
  const text = new TextEncoder().encode(`\ufeff(list ${machine()})`);
  assert.is(evaluate(text).machines.length, 1);
  assert.is(evaluate(text.slice(3)).machines.length, 1);
  assert.is(evaluate(`\ufeff(list ${machine()})`).machines.length, 1);
});

reading("leaves bytes that are not UTF-8 to Guile", () => {
  const text = new Uint8Array([0x28, 0x6c, 0xff, 0x29]);
  assert.ok(evaluate(text).needsGuile);
  assert.ok(evaluate(";; -*- coding: latin-1 -*-\n(list)").needsGuile);
  assert.not(evaluate(";; -*- coding: utf-8 -*-\n(list)").needsGuile);
});

reading("counts lines from 1 and columns from 0, as Guile does", () => {
  assert.is(
    errorOf("(list\n\t(build-machine))"),
    "f.scm:2:8: missing field initializers (name user host-key)",
  );
  assert.is(errorOf('"é🔑" (build-machine))').slice(0, 9), "f.scm:1:5");
  assert.is(errorOf("(list)\r(build-machine)").slice(0, 9), "f.scm:1:0");
});

reading("tells where what is not closed was opened", () => {
  try {
    evaluate("(list\n  (a (b)\n");
    assert.unreachable();
  } catch (error) {
    assert.is(
      (error as Error).message,
      "f.scm:3:1: unexpected end of input while searching for: )",
    );
    assert.is(
      (error as OffloadError).hint,
      "the '(' at f.scm:2:2 is not closed",
    );
  }
});

reading("evaluates what stands before an error first, as Guile does", () => {
  assert.is(errorOf("(fold)\n)"), "Guile: f.scm:1:0: (fold …");
  assert.is(
    errorOf("(build-machine)\n)"),
    "f.scm:1:0: missing field initializers (name user host-key)",
  );
});

reading("leaves what is rare to Guile", () => {
  for (
    const text of [
      "#\\a",
      "#(1)",
      "#vu8(1)",
      "#x10",
      "#e1.5",
      "1/2",
      "1e3",
      "+inf.0",
      "-nan.0",
      "+i",
      "(a . b)",
      "#!r6rs",
      "#!/bin/sh\n!#",
      "#~(a)",
      "#'a",
      "#{a}#",
      "#t1",
      "1.5.2",
      "192.0.2.1",
      '"\\q"',
      '"\\ud800"',
      "#",
    ]
  ) {
    assert.is(guilePlace(`\n ${text}`)?.slice(0, 7), "f.scm:2", text);
  }
});

reading.run();

const evaluating = suite("machine file: evaluator");

evaluating("takes constants, lists and machines by their names", () => {
  assert.is(keyOf("key", '(define key "/k")'), "/k");
  assert.is(keyOf("key", '(define-public key "/k") (use-modules)'), "/k");
  const { machines } = evaluate(
    `(use-modules (srfi srfi-1) (ice-9 match)) (define systems '("i686-linux"))
     (define ada ${
      machine("(systems systems)").replace(/\(systems '.*?\)\)/, "")
    })
     (define all (list ada (build-machine (inherit ada) (name "bea")))) all`,
  );
  assert.equal(
    machines.map(({ name, systems }) => [name, systems]),
    [["ada", ["i686-linux"]], ["bea", ["i686-linux"]]],
  );
});

evaluating("has the user's home for the key, or none", () => {
  assert.is(
    evaluate(`(list ${machine()})`).machines[0]!.privateKey,
    "/root/.ssh/id_rsa",
  );
  const { machines, problems } = evaluateMachineFile(
    ...[`(list ${machine()})`, "f.scm", undefined] as const,
  );
  assert.is(machines.length, 0);
  assert.match(problems[0]?.message ?? "", "'private-key'");
});

evaluating("takes what Guix System writes, and nothing like it", () => {
  const write = (list: string, entry = "entry") =>
    `((@ (srfi srfi-1) append-map) (lambda (${entry}) ` +
    `(if (build-machine? ${entry}) (list ${entry}) ${entry})) ${list})`;
  const list = `(list ${machine()} (list ${machine()}))`;
  assert.is(evaluate(write(list)).machines.length, 2);
  assert.ok(evaluate(write(list, "it")).needsGuile);
  assert.ok(evaluate(write("(list 1)")).needsGuile);
  const [paths] = readFileSync(join(corpus, "guix-system.scm"), "utf8")
    .split("((@ ");
  assert.is(evaluate(paths + write(list)).machines.length, 2);
  const changing = paths!.replace("(set! ", "(set! list map) (set! ");
  assert.ok(evaluate(changing + write(list)).needsGuile);
});

evaluating("leaves to Guile what is a program, or not sure", () => {
  for (
    const text of [
      "foo",
      "(foo)",
      "(1 2)",
      "()",
      "(list #:key)",
      "(list list)",
      "(if #t 1)",
      "(let ((x 1)) x)",
      "(lambda (x) x)",
      "((lambda () 1))",
      '(string-append "a" "b")',
      '(getenv "HOME")',
      "(append '(1) '(2))",
      "`(a ,b)",
      "(begin 1)",
      "(define (f) 1)",
      "(define list 1)",
      "(define build-machine 1)",
      "(define define 1)",
      "(list (define x 1))",
      "(define)",
      "(define x)",
      "(define x 1 2)",
      "(list x) (define x 1)",
      "(quote)",
      "(quote 1 2)",
      "(use-modules (no such module))",
      "(use-modules ((srfi srfi-1) #:prefix s:))",
      "(list (use-modules (srfi srfi-1)))",
      "(define-module (a))",
      "(@ (srfi srfi-1) fold)",
      "(set! x 1)",
      "(build-machine (inherit 1))",
      "(list build-machine)",
    ]
  ) {
    assert.ok(guilePlace(text), text);
  }
});

evaluating("ends where lists of lists hold too much", () => {
  const doubled = Array.from(
    { length: 40 },
    (_, i) => `(define x${i + 1} (list x${i} x${i}))`,
  ).join("");
  assert.match(
    errorOf(
      `(define x0 '("a")) ${doubled} (list ${machine("(features x40)")})`,
    ),
    /too deeply nested, or too large/,
  );
});

evaluating("ends on hostile texts, soon", () => {
  const texts = [
    "(",
    "[",
    "'",
    "`",
    ",",
    "#;",
    "#|",
    "(list ",
    "(quote (",
    "#;#|",
    '"\\',
    "((",
    ")",
    "|",
    "#",
  ].map((text) => text.repeat(100_000));
  texts.push(`(list ${"(".repeat(100_000)}${")".repeat(100_000)})`);
  texts.push(
    `"${"a".repeat(10_000_000)}"`,
    "a".repeat(10_000_000),
    "1".repeat(1_000_000),
  );
  texts.push(
    `'${"(".repeat(400)}${")".repeat(400)}`,
    `(list ${"1 ".repeat(200_000)})`,
  );
  for (const text of texts) {
    const start = processorTime();
    errorOf(text);
    assert.ok(processorTime() - start < 3000, text.slice(0, 20));
  }
});

evaluating.run();

const records = suite("machine file: machines");

records("has the defaults of Guix 1.5", () => {
  assert.equal(evaluate(`(list ${machine()})`).machines, [{
    name: "ada",
    port: 22,
    systems: ["x86_64-linux"],
    user: "u",
    privateKey: "/root/.ssh/id_rsa",
    hostKey: key,
    compression: "zlib@openssh.com,zlib",
    compressionLevel: 3,
    daemonSocket: "/var/guix/daemon-socket/socket",
    overloadThreshold: 0.8,
    parallelBuilds: 1,
    speed: 1,
    features: [],
  }]);
});

records("warns of the field 'system' and takes it", () => {
  const text =
    `(list (build-machine (name "ada") (system "i686-linux") (user "u") (host-key "${key}")))`;
  const { machines, problems } = evaluate(text);
  assert.equal(machines[0]?.systems, ["i686-linux"]);
  assert.equal(problems, [{
    severity: "warning",
    message:
      "f.scm:1:6: The 'system' field is deprecated, please use 'systems' instead.",
  }]);
});

records("names the machine, the field and the place of a bad value", () => {
  const cases: [string, string][] = [
    ["(port 0)", "port"],
    ["(port 65536)", "port"],
    ["(port 22.5)", "port"],
    ['(port "22")', "port"],
    ["(parallel-builds -1)", "parallel-builds"],
    ["(speed #f)", "speed"],
    ["(speed 'fast)", "speed"],
    ["(overload-threshold #t)", "overload-threshold"],
    ["(overload-threshold '(0.5))", "overload-threshold"],
    ['(overload-threshold "0.5")', "overload-threshold"],
    ["(compression-level 0)", "compression-level"],
    ["(compression 'zlib)", "compression"],
    ['(compression "")', "compression"],
    ["(compression-level 10)", "compression-level"],
    ["(parallel-builds 1.5)", "parallel-builds"],
    ["(parallel-builds #f)", "parallel-builds"],
    ["(features 'kvm)", "features"],
    ["(features '(kvm))", "features"],
    ["(private-key #f)", "private-key"],
    ["(daemon-socket 1)", "daemon-socket"],
  ];
  for (const [field, name] of cases) {
    const { machines, problems } = evaluate(
      `(list ${machine("", '"bea"')}\n${machine(field)})`,
    );
    assert.equal(machines.map((machine) => machine.name), ["bea"], field);
    assert.is(problems.length, 1, field);
    assert.match(
      problems[0]!.message,
      `f.scm:2:0: machine 'ada': field '${name}' must be `,
      field,
    );
  }
});

records("takes what the reference works with, if for another value", () => {
  const { username } = userInfo();
  const cases: [string, keyof Machine, unknown][] = [
    ["(overload-threshold 1.8)", "overloadThreshold", 1.8],
    ["(overload-threshold 80)", "overloadThreshold", 80],
    ["(overload-threshold -0.1)", "overloadThreshold", -0.1],
    ["(parallel-builds 0)", "parallelBuilds", 0],
    ["(parallel-builds 2.0)", "parallelBuilds", 2],
    ["(parallel-builds 20000)", "parallelBuilds", 9999],
    ["(speed 0)", "speed", 0],
    ["(speed -1)", "speed", -1],
    ["(compression #f)", "compression", "none"],
    ['(compression "no")', "compression", "none"],
    ['(compression "none,zlib")', "compression", "none"],
    ['(compression "zlib,none")', "compression", "zlib,none"],
    ["(compression-level #f)", "compressionLevel", 7],
    ["(features #f)", "features", []],
    ['(features \'("kvm" big "x y"))', "features", ["kvm", "x y"]],
    ['(systems \'(a "i686-linux" #f "b"))', "systems", ["i686-linux", "b"]],
    ["(user #f)", "user", username],
    ['(user "a b")', "user", "a b"],
    ['(daemon-socket "unix:///a/b")', "daemonSocket", "/a/b"],
    ['(daemon-socket "file:///a/b")', "daemonSocket", "/a/b"],
  ];
  for (const [field, name, value] of cases) {
    const [, word] = /^\((\S+)/.exec(field)!;
    const others = machine().replace(
      RegExp(`\\(${word} [^()]*(\\([^()]*\\))?\\)`),
      "",
    );
    const { machines, problems } = evaluate(
      `(list ${others.slice(0, -1)} ${field}))`,
    );
    assert.equal(problems, [], field);
    assert.equal(machines[0]?.[name], value, field);
  }
});

records("knows host keys", () => {
  const fields = machineToJson(evaluate(`(list ${machine()})`).machines[0]!);
  const accepts = (key: unknown) =>
    !("severity" in machineFromFields({ ...fields, "host-key": key }, ""));
  const data = key.split(" ")[1]!;
  for (
    const good of [
      key,
      `${key} root@ada`,
      `${key} a comment\n`,
      ` ${key}`,
      "ssh-ed25519 AAAA",
    ]
  ) {
    assert.ok(accepts(good), good);
  }
  for (
    const bad of [
      "",
      "ssh-ed25519",
      data,
      `ssh-rsa ${data}`,
      `ssh-foo ${data}`,
      "ssh-ed25519 AAAAC3Nza…",
      `${data} ssh-ed25519`,
      5,
      undefined,
      `ssh-ed25519 ${data}=x`,
    ]
  ) {
    assert.not.ok(accepts(bad), String(bad));
  }
});

records("gives fields back as it took them", () => {
  for (
    const machine of evaluate(
      readFileSync(join(corpus, "literal-every-field.scm")),
    ).machines
  ) {
    assert.equal(machineFromFields(machineToJson(machine), ""), machine);
  }
});

records("says what is wrong with other fields than Scheme's", () => {
  assert.equal(
    machineFromFields({ name: "ada" }, "") as unknown as { severity: string },
    {
      severity: "error",
      message:
        (machineFromFields({ name: "ada" }, "") as { message: string }).message,
    },
  );
  assert.match(
    (machineFromFields({}, "here") as { message: string }).message,
    /^here: machine 'undefined': field 'name'/,
  );
});

records("are made anew once a machine file says something else", async () => {
  await withDirectory(async (directory) => {
    const { context: { buildOptions, log, signal } } = anyContext();
    const file = `${directory}/machines.scm`;
    const { machineFile } = await makeContext(
      { system: "x86_64-linux", buildOptions },
      { GUIX_CONFIGURATION_DIRECTORY: directory },
      log,
      signal,
    );
    const names = async () =>
      (await machineFile()).machines.map(({ name }) => name);
    const write = (name: string, to = file) =>
      writeFileSync(to, `(list ${machine("", `"${name}"`)})`);
    assert.equal(await names(), []);
    write("ada");
    assert.equal(await names(), ["ada"]);
    const first = await machineFile();
    assert.is(await machineFile(), first, "it is the same");
    const { atime, mtime } = statSync(file);
    write("bob"); // of the same size, and no later
    utimesSync(file, atime, mtime);
    assert.equal(await names(), ["bob"]);
    write("eve", `${file}.new`);
    renameSync(`${file}.new`, file);
    assert.equal(await names(), ["eve"]);
    writeFileSync(file, "(list 1");
    assert.throws(machineFile, /machines.scm:1/);
    write("eve");
    assert.equal(await names(), ["eve"]);
    rmSync(file);
    assert.equal(await names(), []);
  });
});

records.run();

// Where the corpus is in the lab is part of what was recorded.
assert.match(readFileSync(join(corpus, "expected.json"), "utf8"), corpusInLab);

/** The commands, as far as they need no host: help, arguments, formats. */

import { Buffer } from "node:buffer";
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  checkSignature,
  evaluateMachineFile,
  parseAcl,
  parseSexp,
} from "../mod.ts";
import { addToAcl, replaceFile } from "../plugins/_authorization.ts";
import { EXIT_CODES, loadCommands } from "../plugins/_commands.ts";
import { drain, undrain } from "../plugins/_drain.ts";
import { progressBar } from "../plugins/_screen.ts";
import { completion } from "../plugins/completion.ts";
import { formatJunit } from "../plugins/test.ts";
import { addToMachineFile } from "../plugins/trust.ts";
import { HOST_KEY, machine, makeContext } from "./context.ts";
import {
  aclOf,
  hash,
  keys,
  ownRuntime,
  rejects,
  ROOT,
  run,
  settled,
  throws,
  withDirectory,
} from "./helpers.ts";

const test = suite("commands");
const COMMANDS = await loadCommands();

/** Runs Offload with these arguments. */
function offload(...args: readonly string[]) {
  return runOffload({ OFFLOAD_PLUGINS: "/nonexistent" }, args);
}

/** Runs it in a directory, with the plugins and the machine file there. */
function offloadIn(directory: string, ...args: readonly string[]) {
  const env = {
    OFFLOAD_PLUGINS: `${directory}/offload`,
    GUIX_CONFIGURATION_DIRECTORY: directory,
  };
  return runOffload(env, args, directory);
}

async function runOffload(
  settings: Record<string, string>,
  args: readonly string[],
  cwd = ".",
) {
  const [program, ...options] = ownRuntime;
  const words = [...options, `${ROOT}/mod.ts`, ...args];
  const env = { ...process.env, ...settings };
  const { stdout, ...rest } = await settled(run(program, words, { cwd, env }));
  return { ...rest, stdout: stdout.toString() };
}

/** Writes a machine file with a machine of each name, none of which is there. */
function writeMachines(directory: string, ...names: string[]): string {
  const file = `${directory}/machines.scm`;
  const { hostKey, user } = machine();
  const forms = names.map((name) =>
    `(build-machine (name "${name}") (systems '("x86_64-linux"))
       (user "${user}") (private-key "/none") (host-key "${hostKey}"))`
  );
  writeFileSync(file, `(list ${forms.join("\n")})`);
  return file;
}

test("--help shows each command, with options and examples", async () => {
  const general = await offload("--help");
  assert.is(general.code, 0);
  assert.match(general.stdout, /^Usage: offload COMMAND ARGUMENT\.\.\.\n/);
  for (const { name, summary, options, examples } of COMMANDS) {
    assert.ok(general.stdout.includes(` ${name} `), name);
    const { code, stdout, stderr } = await offload(name, "--help");
    assert.is(code, 0);
    assert.is(stderr, "");
    assert.match(stdout, RegExp(`^Usage: offload ${name} .*\n${summary}\\.\n`));
    for (const [option] of options) assert.match(stdout, `  ${option} `);
    for (const [line] of examples) assert.match(stdout, `  ${line} `);
    assert.ok(stdout.split("\n").every((line) => line.length <= 100), name);
  }
});

test("a site's command is found, listed and run", async () => {
  await withDirectory(async (directory) => {
    mkdirSync(`${directory}/offload`, { mode: 0o755 });
    const plugin = `export default { name: "hello", command: {
      usage: "NAME", summary: "Greet", description: [], examples: [],
      options: [["--loud", "Shout"]],
      run: ([name], { loud }) =>
        Promise.resolve({ output: name + (loud ? "!" : ""), exitCode: 3 }),
    } };`;
    const file = `${directory}/offload/hello.ts`;
    writeFileSync(file, plugin, { mode: 0o644 });
    const { code, stdout } = await offloadIn(directory, "hello", "x", "--loud");
    assert.equal([code, stdout], [3, "x!\n"]);
    const general = await offloadIn(directory, "--help");
    assert.match(general.stdout, /^ {2}hello +Greet$/m);
    const own = await offloadIn(directory, "hello", "--help");
    assert.match(own.stdout, /^ {2}--loud +Shout$/m);
    const bare = plugin.replaceAll("hello", "bare").replace("NAME", "");
    const other = `${directory}/offload/bare.ts`;
    writeFileSync(other, bare, { mode: 0o644 });
    assert.is((await offloadIn(directory, "bare")).stdout, "undefined\n");
    const lacking = bare.replace("description: [],", "");
    writeFileSync(other, lacking, { mode: 0o644 });
    const { code: failed, stderr } = await offloadIn(directory, "bare");
    assert.is(failed, 2);
    assert.match(stderr, `${other}: 'command' lacks 'description'`);
    const wrong = await offloadIn(directory, "hello");
    assert.is(wrong.code, 2);
    const completed = await offloadIn(directory, "completion", "bash");
    assert.match(completed.stdout, /\bhello\b[^]*--loud/);
  });
});

test("help is what --help is", async () => {
  const general = await offload("--help");
  for (const args of [["help"], ["help", "--help"], ["-h"]]) {
    assert.equal(await offload(...args), general);
  }
  const onTest = await offload("test", "--help");
  assert.equal(await offload("help", "test"), onTest);
  for (const [code, meaning] of EXIT_CODES) {
    assert.match(onTest.stdout, `  ${code}  ${meaning}`);
  }
});

test("--version prints the version of the package", async () => {
  const { code, stdout } = await offload("--version");
  assert.is(code, 0);
  assert.match(stdout, /^offload \d+\.\d+\.\d+\n$/);
});

test("wrong arguments are told in Guix's words", async () => {
  await withDirectory(async (directory) => {
    const file = writeMachines(directory, "w1");
    const wrong: [string[], RegExp, hint?: RegExp][] = [
      [
        [],
        /missing command name$/m,
        /^hint: run 'offload test': .* 'offload -/m,
      ],
      [["bogus", "x"], /unknown command 'bogus'$/m],
      [["bogus", "--help"], /unknown command 'bogus'$/m],
      [["help", "bogus"], /unknown command 'bogus'$/m],
      [["statsu"], /unknown command 'statsu': did you mean 'status'\?$/m],
      [["mach"], /unknown command 'mach': did you mean 'machines'\?$/m],
      [["--bogus"], /--bogus: unrecognized option$/m],
      [["status", "--no-json"], /--no-json: unrecognized option$/m],
      [["test", "--no-junit"], /--no-junit: unrecognized option$/m],
      [["test", "--json=no"], /--json: it takes no value$/m],
      [["test", "--junit=a", "--junit=b"], /--junit: more than one value$/m],
      [["machines", "/none"], /failed to open machine file '\/none': no such/],
      [
        ["status", "a", "b", "c"],
        /: expected 'offload status \[FILE \[REGEXP]]'$/m,
      ],
      [
        ["explain"],
        /wrong number of arguments: .* 'offload explain DERIVATION'$/m,
      ],
      [["test", "/none"], /failed to open machine file '\/none': no such/],
      [["test", file, "("], /invalid regular expression '\('/],
      [["status", file, "w9"], /no machine's name matches 'w9'$/m],
      [["test", file, "--timeout", "soon"], /invalid .* seconds: 'soon'$/m],
      [["test", file, "--timeout"], /--timeout: its value is missing$/m],
      [["test", "--jnuit", "x"], /--jnuit: unrecognized option$/m],
      [["trust", "@"], /@: expected USER@HOST or USER@HOST:PORT$/m],
      [["trust", "w1"], /w1: expected USER@HOST or/, /'offload trust root@w1'/],
      [["trust", "root@w1:65536"], /w1:65536: expected USER@HOST or/],
      [["completion", "csh"], /csh: unknown shell: expected bash, zsh or fish/],
    ];
    for (const [args, message, hint] of wrong) {
      const { code, stdout, stderr } = await offloadIn(directory, ...args);
      assert.is(code, 2, stderr);
      assert.is(stdout, "");
      assert.match(stderr, /^offload: error: /);
      assert.match(stderr, message);
      const name = COMMANDS.find(({ name }) => name === args[0])?.name;
      const help = name === undefined ? "" : `${name} `;
      const usual = RegExp(`^hint: run 'offload ${help}--help'$`, "m");
      assert.match(stderr, hint ?? usual);
    }
    assert.equal(readdirSync(directory), ["machines.scm"]);
  });
});

test("status says where Offload is switched off", async () => {
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/machines.scm`, "(list)\n");
    mkdirSync(`${directory}/offload`);
    const off = `${directory}/offload/off`;
    const warning = `warning: '${off}' is there: 'guix offload' serves`;
    const on = await offloadIn(directory, "status");
    assert.not.match(on.stderr, warning);
    writeFileSync(off, "");
    assert.match((await offloadIn(directory, "status")).stderr, warning);
  });
});

test("status takes REGEXP as Guix does, and each machine once", async () => {
  await withDirectory(async (directory) => {
    const file = writeMachines(directory, "a1.none", "b2.none", "a1.none");
    const names = async (...regexp: string[]) => {
      const { code, stdout } = await offload("status", file, ...regexp);
      assert.is(code, 1);
      return stdout.match(/^\S+/gm);
    };
    assert.equal(await names(), ["a1.none", "b2.none"]);
    assert.equal(await names("2"), ["b2.none"]);
    assert.equal(await names("^[[:alpha:]][[:digit:]]"), [
      "a1.none",
      "b2.none",
    ]);
    assert.equal(await names("^(?!a1)"), ["b2.none"]);
  });
});

test("test fails where the machine file is wrong", async () => {
  await withDirectory(async (directory) => {
    const file = `${directory}/machines.scm`;
    writeFileSync(file, "(list (build-machine");
    const { code, stdout } = await offload("test", file, "--json");
    assert.is(code, 1);
    const [report, ...others] = JSON.parse(stdout);
    assert.equal(others, []);
    assert.is(report.machine, "machine file");
    assert.is(report.outcome, "failed");
    assert.match(report.steps[0].detail, /machines\.scm:1:\d+: unexpected end/);
  });
});

test("machines shows what plugins list, and fails where one can't", () =>
  withDirectory(async (directory) => {
    writeMachines(directory, "a1.none");
    mkdirSync(`${directory}/offload`);
    const list = `[${JSON.stringify(machine({ name: "b2.none" }))}]`;
    const write = (name: string, does: string) => {
      const text =
        `export default { name: "${name}", machines: () => ${does} }`;
      writeFileSync(`${directory}/offload/${name}.mjs`, text);
    };
    const names = async (code: number, ...args: string[]) => {
      const result = await offloadIn(directory, "machines", ...args, "--json");
      assert.is(result.code, code, result.stderr);
      const found: { name: string }[] = JSON.parse(result.stdout);
      return { ...result, names: found.map(({ name }) => name).sort() };
    };
    write("more", list);
    assert.equal((await names(0)).names, ["a1.none", "b2.none"]);
    const file = `${directory}/machines.scm`;
    assert.equal((await names(0, file)).names, ["a1.none"]);
    const sources: [does: string, told: RegExp][] = [
      ["{ throw new Error('away') }", /plugin 'wrong': machines: away$/m],
      ["'none'", /plugin 'wrong': machines: expected a list of machines$/m],
      ["[{}]", /warning: machine 1: /],
      ["", /failed to load plugin '.*wrong.mjs'/],
    ];
    for (const [does, told] of sources) {
      write("wrong", does);
      const { names: others, stderr } = await names(1);
      assert.equal(others, ["a1.none", "b2.none"]);
      assert.match(stderr, told);
      assert.is((await names(0, file)).code, 0);
    }
  }));

test("test leaves no report of the run before", () =>
  withDirectory(async (directory) => {
    const report = `${directory}/report.xml`;
    const settings = `${directory}/offload/settings.json`;
    const file = writeMachines(directory, "a1.none");
    mkdirSync(`${directory}/offload`);
    const check = async (exitCode: number, xml: RegExp, ...args: string[]) => {
      writeFileSync(report, "that of the run before");
      const words = ["test", ...args, "--junit", report];
      const { code, stderr } = await offloadIn(directory, ...words);
      assert.is(code, exitCode, stderr);
      assert.match(readFileSync(report, "utf8"), xml);
    };
    await check(1, /<failure message=".*" type="private-key">/, file);
    const error = (type: string, words: string) =>
      RegExp(`<error message="${words}.*" type="${type}">`);
    await check(2, error("usage", "failed to open machine file"), "/none");
    await check(2, error("usage", "no machine's name"), file, "b2");
    await check(2, error("usage", "--jsno: unrecognized"), file, "--jsno");
    await check(2, error("usage", "invalid number"), file, "--timeout=soon");
    await check(2, error("usage", "wrong number"), file, "a1", "b2");
    writeFileSync(settings, "{");
    await check(2, error("configuration", ".*settings.json"), file);
    writeFileSync(settings, "{}");
    // A crash: nothing is caught.
    const crash = "setTimeout(() => { throw new Error('crash') })";
    const machines = `() => { ${crash}; return new Promise(() => {}) }`;
    writeFileSync(
      `${directory}/offload/crash.mjs`,
      `export default { name: "crash", machines: ${machines} }`,
    );
    await check(1, error("failed", "it did not come to its end"));
  }));

test("test shows its table where the report can't be written", () =>
  withDirectory(async (directory) => {
    const file = writeMachines(directory, "a1.none");
    const junit = `${directory}/none/report.xml`;
    const result = await offload("test", file, "--junit", junit);
    assert.is(result.code, 1);
    assert.match(result.stdout, /^a1\.none:22\tfailed/m);
    assert.match(
      result.stderr,
      /error: failed to write '.*none\/report.xml': no/,
    );
  }));

test("test puts steps in order where a key is missing", () =>
  withDirectory(async (directory) => {
    const file = writeMachines(directory, "a1.none");
    const { code, stdout } = await offload("test", file, "--json");
    assert.is(code, 1);
    const { steps } = JSON.parse(stdout).at(-1);
    const came = (steps as { name: string; outcome: string; code?: string }[])
      .map(({ name, outcome, code }) => [name, outcome, code]);
    assert.equal(came.slice(0, 4), [
      ["connect", "skipped", undefined],
      ["host key", "skipped", undefined],
      ["authentication", "failed", "private-key"],
      ["daemon", "skipped", undefined],
    ]);
    // A type of key that its blob is not of.
    const key = readFileSync(file, "utf8").replace("AAAAC3Nza", "AAAAB3Nza");
    writeFileSync(file, key);
    const odd = JSON.parse((await offload("test", file, "--json")).stdout);
    assert.equal(odd.at(-1).steps[1].code, "host-key");
    assert.is(odd.at(-1).steps[0].outcome, "skipped");
  }));

test("formatJunit writes XML whatever is in a message", () => {
  const detail = `"<a>" & 'b'\x1b\ud800`;
  const step = { name: "daemon", outcome: "failed", detail, seconds: 1 };
  const skipped = { name: "clock", outcome: "skipped", detail, seconds: 0 };
  const xml = formatJunit([{
    machine: "w1:22",
    outcome: "failed",
    seconds: 1.23456,
    steps: [{ ...step, hint: "a < b" }, skipped] as never,
  }]);
  assert.is(
    xml,
    `<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="offload test">
<testsuite name="w1:22" tests="2" failures="1" skipped="1" time="1.235">
<testcase classname="w1:22" name="daemon" time="1.000">` +
      `<failure message="&quot;&lt;a&gt;&quot; &amp; 'b'\ufffd\ufffd" ` +
      `type="failed">` +
      `a &lt; b</failure></testcase>
<testcase classname="w1:22" name="clock" time="0.000"><skipped/></testcase>
</testsuite>
</testsuites>
`,
  );
});

test("addToAcl adds an entry and leaves all else as it is", () => {
  const acl = aclOf(keys.ecdsa.key, keys.rsa.key);
  const other = parseSexp(keys.other.key, "key");
  for (const text of [acl, ` ${acl}\n\n`, "(acl)", "(acl\n)\n"]) {
    const changed = addToAcl(text, [other], "acl");
    const end = text.lastIndexOf(")");
    assert.ok(changed.startsWith(text.slice(0, end)));
    assert.ok(changed.endsWith(text.slice(end)));
    const [before, after] = [text, changed].map((it) => parseAcl(it, "acl"));
    assert.is(after!.size, before!.size + 1);
    for (const key of before!) assert.ok(after!.has(key));
    assert.is(checkSignature(keys.other.signature, hash, after!), undefined);
    assert.is(addToAcl(changed, [other], "acl"), changed);
  }
  throws(() => addToAcl("(al)", [other], "acl"), /acl: invalid access-control/);
});

test("addToMachineFile adds a form and leaves all else as it is", () => {
  const form = (name: string) =>
    `(build-machine (name "${name}") (systems '("x86_64-linux")) (user "u")
       (private-key "/k") (host-key "${HOST_KEY}"))`;
  const add = (text: string) =>
    addToMachineFile(text, form("new"), "machines.scm", "/root");
  const namesIn = (text: string) =>
    evaluateMachineFile(text, "machines.scm", "/root").machines
      .map(({ name }) => name);
  const texts: [string, string[]][] = [
    ["", []],
    ["; none yet (nor soon)\n;; see the manual", []],
    ["(list)", []],
    [`; ours (old)\n(list ${form("a")} ; one (1)\n ${form("b")}) ; end)\n`, [
      "a",
      "b",
    ]],
    [`(define a ${form("a")})\n(list a)\n#| ) |#`, ["a"]],
  ];
  for (const [text, names] of texts) {
    const changed = add(text);
    assert.ok(changed !== undefined, text);
    assert.equal(namesIn(changed), [...names, "new"]);
    const [start] = /^(?!.*list)/s.test(text)
      ? [text]
      : changed.split('\n (build-machine (name "new');
    assert.ok(text.startsWith(start!), changed);
    assert.ok(changed.endsWith(text.slice(start!.length)));
  }
  const programs = [
    `(let ((a ${form("a")}))\n  (list a))`,
    `(map car (list (list ${form("a")})))`,
  ];
  for (const text of ["'()", ...programs]) {
    assert.is(add(text), undefined, text);
  }
});

test("drain and undrain edit the list", async () => {
  await withDirectory(async (directory) => {
    const file = `${directory}/drain`;
    const listing = {
      name: "list",
      machines: () => [machine({ name: "w1" }), machine({ name: "w2" })],
    };
    const { context } = makeContext({ plugins: [listing] });
    const use = { drain: { file } };
    const used = { ...context, settings: { ...context.settings, use } };
    await rejects(drain("w1", "", context), /'drain' is not in use$/);
    await rejects(drain("w3", "", used), /no machine 'w3', only w1:22, w2:22$/);
    assert.is(existsSync(file), false);
    await drain("w1", " new\n disk ", used);
    await drain("w2:22", undefined, used);
    await drain("w1", "still", used);
    assert.is(readFileSync(file, "utf8"), "w2:22\nw1 # still\n");
    await rejects(undrain("w2", used), /^'w2' is not in '.*drain'$/);
    await undrain("w2:22", used);
    assert.is(readFileSync(file, "utf8"), "w1 # still\n");
  });
});

test("replaceFile() leaves nothing beside what it can't replace", async () => {
  await withDirectory((directory) => {
    const { context } = makeContext();
    const file = `${directory}/acl`;
    writeFileSync(file, "old", { mode: 0o640 });
    replaceFile(file, Buffer.from("new"), context);
    assert.is(readFileSync(file, "utf8"), "new");
    assert.is(statSync(file).mode & 0o777, 0o640);
    mkdirSync(`${directory}/busy`); // as a mount point is
    throws(
      () => replaceFile(`${directory}/busy`, Buffer.from("new"), context),
      /^failed to replace '.*\/busy': /,
    );
    assert.equal(readdirSync(directory), ["acl", "busy"]);
  });
});

test("progressBar() shows the part that is done, where there is room", () => {
  const bar = (done: number, columns: number, isUnicode = true) =>
    progressBar("asking machines", done, 50, columns, isUnicode);
  assert.is(bar(25, 33), "asking machines 25/50 ▕████    ▏");
  assert.is(bar(12, 35), "asking machines 12/50 ▕██▍       ▏");
  assert.is(bar(12, 35, false), "asking machines 12/50 [##        ]");
  assert.is(bar(0, 30), "asking machines  0/50 ▕     ▏");
  assert.is(bar(50, 30, false), "asking machines 50/50 [#####]");
  assert.is(bar(3, 27), "asking machines  3/50");
  assert.is(bar(3, 10), "asking ma");
  for (let columns = 0; columns < 120; columns++) {
    const widths = [0, 1, 17, 49, 50].map((done) => bar(done, columns).length);
    assert.is(new Set(widths).size, 1, `${columns}: ${widths}`);
    assert.ok(widths[0]! < Math.max(columns, 1), `${columns}: ${widths}`);
  }
});

test("completion knows all commands and options", () => {
  for (const shell of ["bash", "zsh", "fish"]) {
    const script = completion(shell, COMMANDS);
    for (const { name, options } of COMMANDS) {
      assert.match(script, name);
      for (const [usage] of options) {
        const [option] = usage.split(" ");
        const pattern = shell === "fish"
          ? `from ${name}' -l ${option!.slice(2)} `
          : RegExp(`${name}:-.*${option} `);
        assert.match(script, pattern);
      }
    }
  }
});

test.run();

/** Machines that JSON files and commands list, and their JSON Schema. */

import {
  chmodSync,
  chownSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  asOwner,
  contextFor,
  listMachines,
  loadBuiltins,
  machineToJson,
  writableDirectory as writable,
} from "../mod.ts";
import type { Plugin, Settings } from "../mod.ts";
import { parseMachines } from "../plugins/_machine_list.ts";
import { privateDirectory } from "../plugins/_programs.ts";
import { HOST_KEY, machine, makeContext } from "./context.ts";
import { until } from "./helpers.ts";
import { conforms } from "./schema.ts";

const [command, jsonMachines] = await loadBuiltins([
  "command",
  "json-machines",
]) as [Plugin, Plugin];

const test = suite("machine lists");
let directory = "";

test.before.each(() => {
  directory = mkdtempSync(`${tmpdir()}/offload-`);
});
test.after.each(async () => {
  // What runs in the background still writes there.
  await until("the commands end", () => !runsInBackground());
  rmSync(directory, { recursive: true });
});

/** Where the plugin 'command' keeps what commands print. */
function programFiles(): string[] {
  const programs = `${directory}/offload/programs-${process.getuid!()}`;
  if (!existsSync(programs)) return [];
  return readdirSync(programs).map((name) => `${programs}/${name}`);
}

/** Whether a command runs: the last that it does is to remove that file. */
function runsInBackground(): boolean {
  return programFiles().some((file) => file.endsWith(".asked"));
}

/** Lets a minute pass, twice the time for which an answer is to be kept. */
function age(seconds = 2 * LIFETIME): void {
  const before = Date.now() / 1000 - seconds;
  for (const file of programFiles()) utimesSync(file, before, before);
}

/** For how many seconds answers are kept here. */
const LIFETIME = 30;

/** A machine with all that is required, and more. */
function fields(more: Record<string, unknown> = {}): Record<string, unknown> {
  return {
    ...{ name: "w1", systems: ["x86_64-linux"], user: "offload" },
    ...{ "private-key": "/etc/guix/key", "host-key": HOST_KEY, ...more },
  };
}

/** A context in which a plugin has these options. */
function contextWith(plugin: Plugin, options: Settings["use"][string]) {
  const { context, warnings } = makeContext({ plugins: [plugin] });
  // Commands are run, which may take a while.
  const settings = {
    ...{ ...context.settings, hookTimeout: 30 },
    use: { [plugin.name]: options },
  };
  return { context: { ...context, settings }, warnings };
}

/** Parses a list; returns the machines' names and what was reported. */
function parse(list: unknown) {
  const { context, warnings } = makeContext();
  const text = JSON.stringify(list);
  const machines = parseMachines(text, "list", context, new Map());
  return { machines, names: machines.map(({ name }) => name), warnings };
}

const schemaFile = new URL("../plugins/machines.schema.json", import.meta.url);
const schema = JSON.parse(readFileSync(schemaFile, "utf8"));

test("privateDirectory() believes nothing in another account's state", () => {
  const own = process.getuid!();
  const daemon = own === 0 ? 65534 : own;
  chownSync(directory, daemon, process.getgid!());
  const name = `test-${process.pid}`;
  const made = privateDirectory(name, {
    stateDirectory: directory,
    asOwner,
    writable,
  });
  const state = own === 0 ? "/run" : directory;
  try {
    assert.is(made, `${state}/offload/${name}-${own}`);
    assert.is(statSync(made).uid, own);
    assert.is(statSync(made).mode & 0o777, 0o700);
  } finally {
    rmSync(made, { recursive: true });
    chownSync(directory, own, process.getgid!());
  }
});

test("privateDirectory() refuses what somebody else made", () => {
  const context = { stateDirectory: directory, asOwner, writable };
  const made = privateDirectory("x", context);
  chmodSync(made, 0o777);
  assert.is(privateDirectory("x", context), made);
  assert.is(statSync(made).mode & 0o777, 0o700);
  rmSync(made, { recursive: true });
  symlinkSync("/etc", made);
  assert.throws(
    () => privateDirectory("x", context),
    (error: Error & { hint: string }) =>
      error.message === `'${made}' is not this account's directory` &&
      error.hint === `run 'rm -r ${made}'`,
  );
  rmSync(made);
});

test("parseMachines() has the defaults of the machine file", () => {
  const { machines, warnings } = parse([fields()]);
  assert.equal(warnings, []);
  const compression = "zlib@openssh.com,zlib";
  assert.equal(machines, [
    machine({ name: "w1", privateKey: "/etc/guix/key", compression }),
  ]);
});

test("parseMachines() reads what 'offload machines --json' prints", () => {
  const made = machine({ speed: 2.5, overloadThreshold: false });
  assert.equal(parse([machineToJson(made)]).machines, [made]);
  assert.equal(parse({ machines: [machineToJson(made)] }).machines, [made]);
});

/** What is no machine, and why. */
const BAD: readonly [object | string, RegExp][] = [
  [fields({ speeds: 1 }), /list: machine 'w1': unknown field 'speeds'/],
  [fields({ "host-key": undefined }), /'w1': field 'host-key' must be a key/],
  [fields({ "host-key": "ssh-ed448 AAAA" }), /'host-key' must be a key/],
  [fields({ systems: "x86_64-linux" }), /'systems' must be a list of systems/],
  [fields({ systems: ["linux"] }), /'systems' must be a list of systems/],
  [fields({ port: 0 }), /'port' must be an integer from 1 to 65535, not 0/],
  [fields({ port: 22.5 }), /'port' must be an integer/],
  [fields({ speed: "2" }), /'speed' must be a number/],
  [fields({ "overload-threshold": "2" }), /must be a number, or #f/],
  [fields({ "overload-threshold": true }), /must be a number, or #f/],
  [fields({ "parallel-builds": -1 }), /'parallel-builds' must be an integer/],
  [fields({ "parallel-builds": 1.5 }), /'parallel-builds' must be an integer/],
  [fields({ name: "a b" }), /machine 'a b': field 'name' must be a host name/],
  [fields({ user: "" }), /'user' must be an account name/],
  [fields({ features: [1] }), /'features' must be a list of strings/],
  [fields({ "private-key": "" }), /'private-key' must be a file name/],
  [fields({ "compression-level": 10 }), /'compression-level' must be an int/],
  [fields({ start: "on" }), /'w1': field 'stop' must be a command/],
  [fields({ stop: "off" }), /'w1': field 'start' must be a command/],
  [fields({ start: "", stop: "off" }), /field 'start' must be a command/],
  [
    fields({ start: "on", stop: "off", "idle-time": 1.5 }),
    /field 'idle-time' must be whole seconds/,
  ],
  ["w1", /list: machine 1: expected an object/],
];

const GOOD = [
  fields({}),
  fields({ port: 2222, speed: 0.5, "overload-threshold": false }),
  fields({ features: ["kvm"], "parallel-builds": 4, compression: "none" }),
  fields({ start: "on", stop: "off", "boot-timeout": 5, "idle-time": 60 }),
  fields({ "host-key": `${HOST_KEY} root@w1` }),
  fields({ "overload-threshold": 1.8, speed: 0, "parallel-builds": 0 }),
  fields({ "overload-threshold": -1, speed: -1, systems: [] }),
  fields({ compression: false, "compression-level": false, user: false }),
  fields({ features: false, systems: ["none", "x86_64-linux"] }),
];

test("parseMachines() reports what is wrong with a machine", () => {
  for (const [bad, message] of BAD) {
    const { names, warnings } = parse([bad, fields({ name: "good" })]);
    assert.equal(names, ["good"]);
    assert.is(warnings.length, 1);
    assert.match(warnings[0]!, message);
  }
});

test("machines.schema.json says the same", () => {
  for (const good of GOOD) {
    assert.equal(parse([good]).warnings, []);
    assert.ok(conforms([good], schema), JSON.stringify(good));
    assert.ok(conforms({ $schema: "x", machines: [good] }, schema));
  }
  for (const [bad] of BAD) {
    const plain = JSON.parse(JSON.stringify(bad));
    assert.not.ok(conforms([plain], schema), JSON.stringify(bad));
  }
  const { properties } = schema.$defs.machine;
  const [usual] = parse([fields({ "private-key": "x" })]).machines;
  for (const [name, value] of Object.entries(machineToJson(usual!))) {
    const { default: said = value } = properties[name];
    assert.equal(said, value, name);
  }
});

test("json-machines names the file and what is wrong with it", async () => {
  const file = `${directory}/machines.json`;
  const { context, warnings } = contextWith(jsonMachines, { file });
  const expected: [string | undefined, RegExp][] = [
    [undefined, /^failed to read '.*machines\.json': no such file/],
    ['[{"name": ]', /^.*machines\.json: .*JSON.*/],
    ['"w1"', /^.*machines\.json: expected a list of machines$/],
    ['{"machine": []}', /^.*machines\.json: expected a list of machines$/],
  ];
  for (const [text, message] of expected) {
    if (text !== undefined) writeFileSync(file, text);
    assert.equal(await listMachines(context), []);
    assert.match(warnings.pop()!, message);
  }
  writeFileSync(file, JSON.stringify({ machines: [fields()] }));
  assert.is((await listMachines(context)).length, 1);
  assert.equal(warnings, []);
});

/** Runs the plugin 'command'; returns names and warnings. */
async function listBy(options: Settings["use"][string], stateDirectory = "") {
  const { context, warnings } = contextWith(command, options);
  const own = stateDirectory === "" ? context : { ...context, stateDirectory };
  const machines = await listMachines(own);
  return { names: machines.map(({ name }) => name), warnings };
}

test("command lists what is printed, and keeps it", async () => {
  const list = JSON.stringify([fields()]);
  const options = {
    command: `echo run >>${directory}/runs; echo '${list}'`,
    lifetime: LIFETIME,
  };
  const runs = () => readFileSync(`${directory}/runs`, "utf8").length / 4;
  assert.equal(await listBy(options, directory), {
    names: ["w1"],
    warnings: [],
  });
  await listBy(options, directory);
  assert.is(runs(), 1);
  // An old answer is given once more, at once, and then there is a new one.
  age();
  assert.equal((await listBy(options, directory)).names, ["w1"]);
  await until("another run", () => !runsInBackground());
  assert.is(runs(), 2);
});

test("command asks again where the clock was set back", async () => {
  const options = {
    command: `echo run >>${directory}/runs; echo '[]'`,
    lifetime: LIFETIME,
  };
  const runs = () => readFileSync(`${directory}/runs`, "utf8").length / 4;
  await listBy(options, directory);
  age(-3600);
  assert.equal(await listBy(options, directory), { names: [], warnings: [] });
  await until("another run", () => !runsInBackground());
  assert.is(runs(), 2);
  // Another one asked, and was killed.
  age();
  writeFileSync(`${programFiles()[0]}.asked`, "");
  age(-3600);
  await listBy(options, directory);
  await until("a third run", () => !runsInBackground());
  assert.is(runs(), 3);
});

test("command tells how the command failed, and runs it no more", async () => {
  const cases: [string, number, RegExp][] = [
    ["echo broken >&2; exit 3", 50, /^'echo.*' failed: broken$/],
    ["exit 3", 50, /failed: exit code 3$/],
    ["sleep 300", 1, /^'sleep 300' failed: it took more than 1 s$/],
  ];
  for (const [text, timeout, message] of cases) {
    const counted = `echo run >>${directory}/runs; ${text}`;
    for (const command of [text, counted, counted]) {
      const options = { command, timeout };
      const { names, warnings } = await listBy(options, directory);
      assert.equal(names, []);
      if (command === text) assert.match(warnings.join(), message);
    }
  }
  assert.is(readFileSync(`${directory}/runs`, "utf8"), "run\n".repeat(3));
});

test("command does not wait for a command where it has an answer", async () => {
  const marker = `${directory}/slow`;
  const list = JSON.stringify([fields()]);
  const text = `while [ -e ${marker} ]; do sleep 0.02; done; echo '${list}'`;
  const options = { command: text, lifetime: LIFETIME, timeout: 50 };
  await listBy(options, directory);
  writeFileSync(marker, "");
  age();
  assert.equal((await listBy(options, directory)).names, ["w1"]);
  assert.ok(runsInBackground(), "it was waited for");
  rmSync(marker);
});

test("contextFor() gives a plugin its options", () => {
  const { context } = contextWith(command, { timeout: 3 });
  const { options } = contextFor(command, context);
  assert.is(options.timeout, 3);
  assert.is(options.lifetime, 60);
});

test.run();

import { suite } from "uvu";
import * as assert from "uvu/assert";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import plugin from "../plugins/guile_machines.ts";
import type { PluginContext, Problem } from "../mod.ts";
import { makeContext } from "./context.ts";
import { until } from "./helpers.ts";

const plugins = suite("guile machines");

const directory = fs.mkdtempSync(join(tmpdir(), "guile-machines-"));
const machineFile = join(directory, "machines.scm");
const other = join(directory, "key.pub");
const runs = join(directory, "runs");
const guix = join(directory, "guix");

const fields = {
  name: "ada",
  port: 22,
  systems: ["x86_64-linux"],
  user: "u",
  "private-key": "/k",
  "host-key": "ssh-ed25519 AAAA",
  compression: "none",
  "compression-level": 3,
  "daemon-socket": "/s",
  "overload-threshold": false,
  "parallel-builds": 1,
  speed: 1,
  features: [],
};

const nothingRead = {
  files: [],
  modules: [],
  variables: [],
  host: false,
  volatile: false,
};

/** Plays a guix that writes this outcome, and after it runs a command. */
function playGuix(outcome: unknown, command = ""): void {
  const line = JSON.stringify(outcome);
  fs.writeFileSync(
    guix,
    `#!/bin/sh
cat >/dev/null
echo >>'${runs}'
${command}
printf '(repl-version 0 1 1)\\n\\036%s\\n' '${line.replaceAll("'", "'\\''")}'
`,
    { mode: 0o755 },
  );
  fs.rmSync(runs, { force: true });
}

/** How often guix was run. */
function countRuns(): number {
  return fs.existsSync(runs) ? fs.readFileSync(runs, "utf8").length : 0;
}

/** Asks the plugin for machines. */
async function ask(changes: Partial<PluginContext> = {}) {
  const problems: Problem[] = [];
  const { context } = makeContext({
    machineFile: () => ({
      file: machineFile,
      machines: [],
      problems: [],
      needsGuile: `${machineFile}:2:5: (match …`,
    }),
    report: (problem) => problems.push(problem),
    stateDirectory: join(directory, "state"),
    guix,
    environment: { PATH: "/usr/bin:/bin" },
    ...changes,
  });
  return { machines: await plugin.machines!(context), problems };
}

/** The message of what asking throws. */
async function failureOf(changes: Partial<PluginContext> = {}) {
  try {
    await ask(changes);
  } catch (error) {
    return (error as Error).message;
  }
  return "no failure";
}

plugins.before.each(() => {
  fs.rmSync(join(directory, "state"), { recursive: true, force: true });
  fs.writeFileSync(machineFile, "(match)\n(foo bar)\n");
  fs.writeFileSync(other, "key");
});

plugins.after(() => fs.rmSync(directory, { recursive: true }));

plugins("runs nothing where Guile is not needed", async () => {
  playGuix({ ...nothingRead, machines: [] });
  const machineFile = () =>
    Promise.resolve({ file: "f", machines: [], problems: [] });
  assert.equal((await ask({ machineFile })).machines, []);
  assert.is(countRuns(), 0);
});

plugins("gives machines, and reports those with a bad field", async () => {
  playGuix({
    ...nothingRead,
    machines: [
      { fields, place: "f:1:6" },
      { fields: { ...fields, port: 0 }, place: "f:2:6" },
      {
        fields: { ...fields, systems: false, system: "i686-linux" },
        place: "f:3:6",
      },
    ],
  });
  const { machines, problems } = await ask();
  assert.equal(machines.map(({ systems }) => systems), [["x86_64-linux"], [
    "i686-linux",
  ]]);
  assert.equal(problems.map(({ severity }) => severity), ["error", "warning"]);
  assert.match(problems[0]!.message, "f:2:6: machine 'ada': field 'port' ");
  assert.match(problems[1]!.message, "f:3:6: The 'system' field is deprecated");
});

plugins(
  "runs again only when something it depends on has changed",
  async () => {
    playGuix({
      ...nothingRead,
      machines: [{ fields, place: null }],
      files: [other, join(directory, "absent")],
      modules: [guix],
      variables: ["CITY"],
      host: true,
    });
    for (const _ of [1, 2, 3]) assert.is((await ask()).machines.length, 1);
    assert.is(countRuns(), 1);
    fs.writeFileSync(other, "another key");
    await ask();
    await ask();
    assert.is(countRuns(), 2);
    fs.writeFileSync(join(directory, "absent"), "");
    await ask();
    await ask();
    assert.is(countRuns(), 3);
    fs.appendFileSync(machineFile, ";\n");
    await ask();
    await ask();
    assert.is(countRuns(), 4);
    await ask({ environment: { PATH: "/usr/bin:/bin", CITY: "Bath" } });
    assert.is(countRuns(), 5);
    fs.rmSync(join(directory, "absent"));
  },
);

plugins("keeps errors, too, but nothing that changes by itself", async () => {
  const error = { message: "oh", place: null, variable: null };
  playGuix({ ...nothingRead, error });
  for (const _ of [1, 2]) {
    assert.equal((await ask()).problems, [
      { severity: "error", message: `${machineFile}:2:5: oh` },
    ]);
  }
  assert.is(countRuns(), 1);
});

/** Makes what is kept for seconds as old as that. */
function age(): void {
  const file = join(directory, "state", "offload", "guile-machines.json");
  const kept = JSON.parse(fs.readFileSync(file, "utf8"));
  for (const entry of Object.values<{ until?: number }>(kept.entries)) {
    if (entry.until === undefined) continue;
    assert.ok(entry.until > Date.now() && entry.until < Date.now() + 6000);
    entry.until = Date.now() - 1;
  }
  fs.writeFileSync(file, JSON.stringify(kept));
}

plugins("keeps what may change by itself for seconds only", async () => {
  playGuix({ ...nothingRead, volatile: true, machines: [] });
  for (const runs of [1, 1]) {
    await ask();
    assert.is(countRuns(), runs);
  }
  age();
  await ask();
  assert.is(countRuns(), 2);
  fs.appendFileSync(machineFile, ";\n");
  await ask();
  assert.is(countRuns(), 3);
});

plugins("does not trust what was read while it changed", async () => {
  fs.mkdirSync(join(directory, "keys"), { recursive: true });
  const key = join(directory, "keys", "key.pub");
  const files = [key];
  for (const change of [`echo new >'${key}'`, `rm -f '${key}'`]) {
    fs.writeFileSync(key, "old");
    playGuix({ ...nothingRead, files, machines: [] }, change);
    await ask();
    age();
    await ask();
    assert.is(countRuns(), 2, change);
  }
  playGuix({ ...nothingRead, files: ["/proc/loadavg"], machines: [] });
  await ask();
  age();
  await ask();
  assert.is(countRuns(), 2, "/proc");
});

plugins("finds where an unbound variable stands", async () => {
  const error = {
    message: "Unbound variable: bar",
    place: null,
    variable: "bar",
  };
  playGuix({ ...nothingRead, error });
  assert.match(
    (await ask()).problems[0]!.message,
    `${machineFile}:2:5: Unbound`,
  );
  playGuix({ ...nothingRead, error: { ...error, variable: "match" } });
  assert.match(
    (await ask()).problems[0]!.message,
    `${machineFile}:1:1: Unbound`,
  );
});

plugins("says that a file has no list of machines", async () => {
  playGuix(nothingRead);
  assert.match((await ask()).problems[0]!.message, "did not return a list");
});

plugins("keeps outcomes to itself, and does without", async () => {
  playGuix({ ...nothingRead, machines: [] });
  await ask();
  const file = join(directory, "state", "offload", "guile-machines.json");
  assert.is(fs.statSync(file).mode & 0o777, 0o600);
  assert.equal(fs.readdirSync(join(directory, "state", "offload")), [
    "guile-machines.json",
  ]);
  fs.writeFileSync(file, "{");
  assert.equal((await ask()).machines, []);
  assert.is(countRuns(), 2);
  await ask({ stateDirectory: "/dev/null" });
  assert.is(countRuns(), 3);
});

plugins("says why Guile gives no result", async () => {
  playGuix({}, "echo no such thing >&2; exit 3");
  assert.match(await failureOf(), /:2:5: \(match …: .* failed: no such thing$/);
  playGuix({}, "exit 3");
  assert.match(await failureOf(), /failed: it ended with code 3$/);
  assert.match(await failureOf({ guix: "/nonexistent" }), /ENOENT/);
});

plugins("kills Guile when it is told to stop", async () => {
  playGuix({}, "sleep 60 & echo $! >>'" + runs + "'; wait");
  const controller = new AbortController();
  const failure = failureOf({ signal: controller.signal });
  await until(
    "Guile runs",
    () => fs.existsSync(runs) && /\d\n/.test(fs.readFileSync(runs, "utf8")),
  );
  controller.abort();
  assert.match(await failure, /failed: interrupted$/);
  const pid = fs.readFileSync(runs, "utf8").trim();
  const stateOf = () => {
    try {
      return fs.readFileSync(`/proc/${pid}/stat`, "utf8").split(" ")[2]!;
    } catch {
      return "gone";
    }
  };
  const hasEnded = () => ["gone", "X", "Z"].includes(stateOf());
  await until("it has ended", hasEnded);
});

plugins.run();

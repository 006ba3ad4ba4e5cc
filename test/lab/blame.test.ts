/** Whose fault it is: what a build does itself is not its machine's. */

import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { startHook } from "./hook.ts";
import {
  assertOffloaded,
  build,
  buildCommand,
  builds,
  makeWork,
  OBSERVATIONS,
  offloadCommand,
  onDatabase,
  root,
  run,
  RUNTIMES,
  start,
  until,
  up,
  useMachines,
  useOffload,
  watch,
  within,
} from "./lab.ts";
import type { Running, Runtime } from "./lab.ts";
import { relayed, startRelay } from "./relay.ts";

const PLUGINS = "/etc/guix/offload";

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** How often machines are noted to have failed, by NAME:PORT. */
function failures(): Record<string, unknown> {
  const sql = "SELECT id, failures FROM machine ORDER BY id";
  const rows = onDatabase(OBSERVATIONS, sql);
  return Object.fromEntries(rows.map(({ id, failures }) => [id, failures]));
}

function startBuild(derivation: string): Running {
  return watch(start("head", ...buildCommand([derivation])));
}

/** To which machines a build was offloaded, in order. */
function triesOf(text: string): string[] {
  return [...text.matchAll(/offloading build of \S+ to '(.*)'/g)]
    .map(([, machine]) => machine!);
}

/** Has the first machine be the best one, by far. */
function fast(text: string): string {
  return text.replace('(name "w1")', "$& (speed 9.)");
}

/** Kills what is built on w1, as soon as it runs. */
async function killOnFirst(client: Running): Promise<void> {
  await until("a builder", () => builds("w1") > 0);
  // Some of them may end by themselves meanwhile.
  run("w1", "sh", "-c", "kill -KILL $(pgrep -G guixbuild)");
  const { status, stderr } = await within("the build", client.ended);
  assert.is(status, 0, stderr);
  assert.equal(triesOf(stderr), ["w1", "w2"], stderr);
}

/** Writes a plugin whose `admit` notes when it is asked, and does that. */
function writeAdmission(body: string): void {
  const text = `import { appendFileSync, readFileSync } from "node:fs";
    const file = "/tmp/asked";
    export default { name: "site", admit({ name }) {
      appendFileSync(file, \`\${name} \${Date.now()}\\n\`);
      const times = readFileSync(file, "utf8").trim().split("\\n").length;
      ${body}
    } };`;
  mkdirSync(root("head") + PLUGINS, { recursive: true });
  writeFileSync(`${root("head")}${PLUGINS}/site.mjs`, text);
  rmSync(`${root("head")}/tmp/asked`, { force: true });
}

/** When the plugin was asked about which machine. */
function asked(): { machine: string; time: number }[] {
  const text = readFileSync(`${root("head")}/tmp/asked`, "utf8");
  return text.trim().split("\n").map((line) => {
    const [machine, time] = line.split(" ");
    return { machine: machine!, time: Number(time) };
  });
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`blame under ${runtime}`);

  test.before(() => {
    up("head", "w1", "w2");
    const variables = ["ATTEMPTS=2", `MAXIMUM_ARCHIVE_SIZE=${2 ** 20}`];
    useOffload("head", runtime, ...variables.map((it) => `OFFLOAD_${it}`));
  });
  test.before.each(() => {
    rmSync(root("head") + PLUGINS, { recursive: true, force: true });
    useMachines("head", ["w1", "w2"]);
  });

  test("a builder that is killed by what it does blames no machine", async () => {
    const clients = makeWork("head", "--die", "--count=2").map(startBuild);
    for (const client of clients) {
      const { status, stderr } = await within("the end", client.ended);
      assert.is(status, 1, stderr);
      assert.equal(triesOf(stderr).sort(), ["w1", "w2"], stderr);
      assert.match(stderr, "failed due to signal 9");
    }
    assert.equal(failures(), { "w1:22": 0, "w2:22": 0 });
    const [derivation] = makeWork("head");
    assertOffloaded(derivation!, build("head", derivation!), ["w1", "w2"]);
  });

  test("a machine on which several builds are killed comes last", async () => {
    useMachines("head", ["w1", "w2"], fast);
    for (const derivation of makeWork("head", "--seconds=3", "--count=2")) {
      await killOnFirst(startBuild(derivation));
      assert.is(failures()["w1:22"], 0);
    }
    const [another, last, first] = makeWork("head", "--count=3");
    assertOffloaded(another!, build("head", another!), ["w2"]);
    const { stdout } = run("head", ...offloadCommand(runtime, "status"));
    const told = /comes last: 2 builds failed that did well elsewhere/g;
    assert.is(stdout.match(told)?.length, 1, stdout);
    useMachines("head", ["w1"], fast);
    assertOffloaded(last!, build("head", last!), ["w1"]);
    useMachines("head", ["w1", "w2"], fast);
    assertOffloaded(first!, build("head", first!), ["w1"]);
  });

  test("more than may come back is no machine's fault at once", () => {
    const [derivation] = makeWork("head", `--output-size=${2 ** 21}`);
    const { status, stderr } = build("head", derivation!);
    assert.is(status, 1, stderr);
    assert.match(stderr, /more than 1\.0 MiB came back/);
    assert.equal(triesOf(stderr).sort(), ["w1", "w2"], stderr);
    assert.equal(failures(), { "w1:22": 0, "w2:22": 0 });
  });

  test("files count at what they take on the disk", () => {
    for (const [files, isTooMuch] of [[100, false], [200, true]] as const) {
      const [derivation] = makeWork("head", `--output-files=${files}`);
      const { status, stderr } = build("head", derivation!);
      assert.is(status, isTooMuch ? 1 : 0, stderr);
      assert.is(/more than 1\.0 MiB came back/.test(stderr), isTooMuch);
    }
  });

  test("a machine that a plugin refuses is left to others", () => {
    useMachines("head", ["w1", "w2"], fast);
    writeAdmission('return name !== "w1";');
    const [derivation] = makeWork("head");
    assertOffloaded(derivation!, build("head", derivation!), ["w2"]);
    assert.equal(asked().map(({ machine }) => machine), ["w1", "w2"]);
  });

  test("the only machine is asked again in growing intervals", () => {
    useMachines("head", ["w1"]);
    writeAdmission("return times > 2;");
    const [derivation] = makeWork("head");
    assertOffloaded(derivation!, build("head", derivation!), ["w1"]);
    const [first, second, third] = asked().map(({ time }) => time);
    assert.is(asked().length, 3);
    assert.ok(second! - first! >= 1000, `${second! - first!} ms`);
    assert.ok(third! - second! >= 2000, `${third! - second!} ms`);
  });

  test("of many hooks at once one asks a machine", async () => {
    const relay = await startRelay("w1");
    useMachines("head", ["w1"], relayed);
    const [derivation] = makeWork("head");
    const hooks = Array.from(
      { length: 8 },
      () => startHook("head", { runtime }),
    );
    try {
      const answers = await Promise.all(
        hooks.map((hook) => hook.ask(derivation!)),
      );
      const accepted = answers.filter((answer) => answer === "accept").length;
      assert.ok(accepted > 0 && accepted < 5, answers.join());
      // Who asked may have lost the slot to another one, who connects anew,
      // but not each does.
      const { connections } = await relay.count();
      const text = `${connections} connections for ${accepted} accepted`;
      assert.ok(connections < hooks.length, text);
    } finally {
      hooks.forEach((hook) => hook.close());
      await within("the hooks", Promise.all(hooks.map(({ ended }) => ended)));
      await relay.stop();
    }
  });

  test.run();
}

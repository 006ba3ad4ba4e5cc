/** `offload metrics` and its plugin, as far as they need no machine. */

import { readFileSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { acquireBuildSlot } from "../mod.ts";
import type { Context, JournalEntry, Screen } from "../mod.ts";
import { formatMetrics } from "../plugins/_metrics_format.ts";
import { finishedPhases } from "../plugins/_phases.ts";
import plugin from "../plugins/metrics.ts";
import { machine, makeContext } from "./context.ts";
import { settled, withDirectory } from "./helpers.ts";
import { makeEntry } from "./journal.ts";

const test = suite("metrics");

/** A context that has machines. */
function withMachines(
  parts: Partial<Context> = {},
): ReturnType<typeof makeContext> {
  const machines = [
    machine({ name: "w1", parallelBuilds: 2 }),
    machine({ name: 'w"2\\', parallelBuilds: 1 }),
    machine({ name: "w3", parallelBuilds: 0 }),
  ];
  const exclude = ({ name }: { name: string }) =>
    name === 'w"2\\' ? { why: 'drained: "so\n', isBusy: false } : undefined;
  const plugins = [{ name: "list", machines: () => machines, exclude }];
  return makeContext({ plugins, ...parts });
}

/** A screen that nothing is shown on. */
const SCREEN: Screen = {
  isTerminal: false,
  paint: (_, text) => text,
  size: () => [80, 24],
  bar: () => "",
  print: () => {},
  progress: () => ({ step: () => {}, end: () => {} }),
};

/** What the command prints. */
async function print(context: Context, text = true): Promise<string> {
  const make = () => Promise.resolve(context);
  const { output } = await plugin.command!.run([], { text }, make, SCREEN);
  return `${output}\n`;
}

/** Its numbers, by all that stands before them. */
function numbers(text: string): Record<string, number> {
  const lines = text.split("\n").filter((line) => /^[^#]/.test(line));
  return Object.fromEntries(
    lines.map((line) => {
      const [, name, value] = /^(.*) (\S+)$/.exec(line)!;
      return [name!, Number(value)];
    }),
  );
}

test("finishedPhases() tells what a build came to the end of", () => {
  assert.equal(finishedPhases(makeEntry()), {
    waiting: 0.5,
    connecting: 0.5,
    sending: 1,
    building: 5,
    retrieving: 2,
  });
  const entry = makeEntry();
  const { built: _, retrieved: __, ...begun } = entry;
  const phases = { waiting: 0.5, connecting: 0.5, sending: 1 };
  const failed = { ...begun, outcome: "failed" } as const;
  assert.equal(finishedPhases(failed), { ...phases, building: 7 });
  assert.equal(finishedPhases({ ...begun, outcome: "lost" }), phases);
  const { asked, accepted } = begun;
  const set = { ...begun, accepted: asked - 1e6, outcome: "lost" } as const;
  assert.is(finishedPhases(set).waiting, 0, "the clock was set back");
  const attempt = { machine: "w2:22", slot: 0, began: accepted, problem: "" };
  const earlier = [{ ...attempt, ended: accepted + 100 }];
  const again = { ...entry, earlier, began: accepted + 300 };
  assert.is(finishedPhases(again)["failed attempts"], 0.3);
});

test("builds are counted, for as long as they are not kept, too", async () => {
  const { context } = withMachines();
  const settings = { ...context.settings, journalBuilds: 0 };
  const { journal } = context.observations;
  const save = (fields: Partial<JournalEntry>) =>
    journal!.save(makeEntry(fields), settings);
  const slot = { file: "/0", inode: "" };
  context.observations.useSlot("w1:22", slot, makeEntry().derivation);
  save({ machine: "gone:22" }); // nobody has used it for a month
  for (let count = 0; count < 100; count++) save({});
  const times = { began: 1000, ended: 3000 };
  const attempt = { machine: "w2:22", slot: 0, ...times, problem: "gone" };
  save({ outcome: "failed", machine: "w2:22", earlier: [attempt, attempt] });
  save({ outcome: "lost", bytesSent: 10 });
  const text = await print(context);
  assert.not.match(text, "gone:22");
  const all = numbers(text);
  const has = (name: string, value: number) => assert.is(all[name], value);
  has('offload_builds_total{machine="w1:22",outcome="built"}', 100);
  has('offload_builds_total{machine="w1:22",outcome="lost"}', 1);
  has('offload_builds_total{machine="w2:22",outcome="failed"}', 1);
  has('offload_attempts_failed_total{machine="w2:22"}', 2);
  has('offload_attempts_failed_total{machine="w1:22"}', 1);
  has('offload_sent_bytes_total{machine="w1:22"}', 1_234_510);
  has('offload_retrieved_bytes_total{machine="w2:22"}', 23_456);
  has('offload_busy_seconds_total{machine="w2:22"}', 12.5);
  has('offload_phase_seconds_count{phase="building"}', 103);
  has('offload_phase_seconds_sum{phase="building"}', 515);
  has('offload_phase_seconds_bucket{phase="building",le="3.0"}', 0);
  has('offload_phase_seconds_bucket{phase="building",le="10.0"}', 103);
  has('offload_phase_seconds_bucket{phase="building",le="+Inf"}', 103);
});

test("machines are told of, and why they take nothing", async () => {
  const { context } = withMachines();
  const { observations, settings, stateDirectory } = context;
  const w1 = machine({ name: "w1", parallelBuilds: 2 });
  const slots = [1, 2].map(() => acquireBuildSlot(w1, stateDirectory)!);
  observations.saveFacts("w1:22", { time: Date.now() });
  const idle = "offload_machine_idle_reason";
  let all = numbers(await print(context));
  assert.is(
    all[`${idle}{machine="w1:22",reason="all its slots are taken"}`],
    1,
  );
  assert.is(all['offload_slots_taken{machine="w1:22"}'], 2);
  assert.is(all['offload_slots{machine="w1:22"}'], 2);
  assert.is(all['offload_machine_reachable{machine="w1:22"}'], 1);
  slots.forEach((slot) => slot.release());
  const odd = 'machine="w\\"2\\\\:22"';
  assert.is(all[`${idle}{${odd},reason="drained: \\"so"}`], 1);
  assert.is(all[`offload_slots{${odd}}`], 1);
  const none = 'machine="w3:22",reason="its parallel-builds is 0"';
  assert.is(all[`${idle}{${none}}`], 1);
  observations.saveFailure(w1, "gone at 12:30", settings);
  all = numbers(await print(context));
  assert.is(all[`${idle}{machine="w1:22",reason="left alone"}`], 1);
  assert.is(all['offload_machine_reachable{machine="w1:22"}'], 0);
  assert.is(all['offload_machine_failures{machine="w1:22"}'], 1);
  const left = all['offload_machine_left_alone_seconds{machine="w1:22"}']!;
  assert.ok(left > 8 && left <= 10, `${left}`);
});

test("the formats differ in the names of counters, and the end", async () => {
  const { context } = withMachines();
  context.observations.journal!.save(makeEntry(), context.settings);
  const text = await print(context);
  const open = await print(context, false);
  assert.match(text, "# TYPE offload_builds_total counter\n");
  assert.match(open, "# TYPE offload_builds counter\n");
  assert.match(open, /\n# EOF\n$/);
  const plain = open.replace(
    /^# (HELP|TYPE) (\S+)/gm,
    (line, _, name) =>
      text.includes(`${line}_total `) ? `${line}_total` : name && line,
  )
    .replace("# EOF\n", "");
  assert.equal(plain.split("\n"), text.split("\n"));
});

test("a label ends neither at a quote nor at the end of a line", () => {
  const labels = { machine: '"}\\\n# HELP \ud800\r\x1b\x9b' };
  const sample = { labels, value: 1 };
  const family = { name: "x", help: "X.", type: "gauge" } as const;
  const text = formatMetrics([{ ...family, samples: [sample] }], "text");
  const shown = 'x{machine="\\"}\\\\\\n# HELP \ufffd   "} 1';
  assert.is(text, `# HELP x X.\n# TYPE x gauge\n${shown}\n`);
});

/** A context of the plugin, which writes to that file. */
function withFile(file: string, signal?: AbortSignal) {
  const made = withMachines(signal && { signal });
  return { ...made, context: { ...made.context, options: { file } } };
}

test("the file is written at once and whole, then again by one for all", async () => {
  await withDirectory(async (directory) => {
    const file = `${directory}/offload.prom`;
    const controller = new AbortController();
    const { context, warnings } = withFile(file, controller.signal);
    const { journal } = context.observations;
    const build = makeEntry();
    const ended = async () => {
      const saved = journal!.save(build, context.settings);
      await plugin.ended!(saved, context);
    };
    const counted = () =>
      numbers(readFileSync(file, "utf8"))[
        'offload_builds_total{machine="w1:22",outcome="built"}'
      ];
    await settled(ended());
    assert.is(counted(), 1);
    assert.is(statSync(file).mode & 0o777, 0o644);
    const first = ended(); // it has just been written
    for (let more = 0; more < 5; more++) await settled(ended());
    assert.is(counted(), 1);
    controller.abort(); // as the end of a process does
    await settled(first);
    assert.is(counted(), 7, "the last state is written");
    const [later, before] = [Date.now() / 1000 + 1e5, 0];
    utimesSync(file, later, later); // the clock was set back
    await settled(ended());
    assert.is(counted(), 8);
    utimesSync(file, before, before);
    await settled(ended());
    assert.is(counted(), 9);
    assert.equal(warnings, []);
  });
});

test("a file that can't be written is an error that says why", async () => {
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/file`, "");
    const { context } = withFile(`${directory}/file/offload.prom`);
    const failed = (async () => await plugin.ended!(makeEntry(), context))();
    const error = await settled(failed.then(() => undefined, (it) => it));
    assert.match(error.message, `failed to write '${directory}/file/`);
    assert.match(error.hint, "option 'file'");
  });
});

test.run();

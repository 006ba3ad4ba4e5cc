/** `offload report`: a real run, and its page in a real browser. */

import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { pathToFileURL } from "node:url";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { capacities, countFigures } from "../../plugins/_report_figures.ts";
import { makePage } from "../../plugins/_report_page.ts";
import { withBrowser } from "../../scripts/_browser.ts";
import type { BrowserPage } from "../../scripts/_browser.ts";
import { HOSTILE, makeDay, MORNING, morningBuild } from "../day.ts";
import { conforms } from "../schema.ts";
import { closure, startHook } from "./hook.ts";
import {
  buildCommand,
  inHost,
  lab,
  makeWork,
  offloadCommand,
  outputsOf,
  PLUGINS,
  ROOT,
  root,
  run,
  RUNTIMES,
  start,
  SYSTEM,
  until,
  up,
  useMachines,
  useOffload,
  watch,
  within,
  writePlugin,
} from "./lab.ts";

const test = suite("report");

const directory = mkdtempSync(`${tmpdir()}/offload-report-`);

/** The page of the run, and its address. */
const PAGE = `${directory}/page.html`;
const ADDRESS = pathToFileURL(PAGE).href;

/** The figures of the run, as each runtime prints them. */
const figures: Record<string, ReturnType<typeof JSON.parse>> = {};

/** A port on which nobody listens. */
const CLOSED = 2;

/**
 * Machines: a quick one with two slots; another one; one that is always too
 * busy; one that refuses connections, and would be the best; one that is
 * drained, and is not even there; and one that builds for others.
 */
function editMachines(text: string): string {
  const [head, ...machines] = text.split(/(?=\(build-machine)/);
  assert.is(machines.length, 6);
  const w1 = '(name "w1")';
  return head! + [
    machines[0]!.replace("(name", "(speed 9.) $&"),
    machines[1]!,
    machines[2]!.replace("(overload-threshold #f)", "(overload-threshold 0.)"),
    machines[3]!.replace(w1, `$& (speed 20.) (port ${CLOSED})`),
    machines[4]!.replace(w1, '(name "away")'),
    machines[5]!.replace(w1, '(name "other")')
      .replace(`"${SYSTEM}"`, '"riscv64-linux"'),
  ].join("");
}

/** Why a machine is drained, in words that are odd. */
const DRAINED = "disk 2 <b>&amp;";

/** Drains the machine that is not there. */
function drain(): void {
  writePlugin("settings.json", '{ "use": { "drain": {} } }');
  inHost("head", ...offloadCommand("node", "drain", "away", DRAINED));
}

/** Builds at the same time, whatever comes of it. */
async function buildAll(...options: readonly (readonly string[])[]) {
  const clients = options.map((each) =>
    watch(start("head", ...buildCommand(makeWork("head", ...each))))
  );
  return await Promise.all(
    clients.map(({ ended }) => within("the builds", ended)),
  );
}

/** Has a build take longer than it may, as far as its machine knows. */
async function exceedTime(): Promise<void> {
  const [derivation] = makeWork("head", "--name=slow", "--seconds=30");
  const hook = startHook("head", { runtime: "node", buildTimeout: 1 });
  assert.is(await hook.ask(derivation!), "accept");
  const outputs = Object.values(outputsOf("head", derivation!));
  hook.work(closure("head", derivation!), outputs);
  const { status, stderr } = await within("the build", hook.ended);
  assert.is(status, 101, stderr);
}

/** Has a build lose its machine, and be done by the other one. */
async function loseMachine(): Promise<void> {
  const [derivation] = makeWork("head", "--name=twice", "--seconds=2");
  const client = watch(start("head", ...buildCommand([derivation!])));
  await until("the build", () => /^building twice$/m.test(client.text()));
  inHost("w1", "sh", "-c", "kill -KILL $(pgrep -x guix-daemon)");
  const { status, stderr } = await within("the build", client.ended);
  assert.is(status, 0, stderr);
  lab("daemon", "w1");
}

test.before(async () => {
  lab("browser");
  up("head", "w1", "w2", "w3");
  useMachines("head", ["w1", "w2", "w3", "w1", "w1", "w1"], editMachines);
  drain();
  useOffload("head", "node", "OFFLOAD_CONNECT_TIMEOUT=10");
  const many = ["one", "two", "three"].map((name) => [
    ...[`--name=${name}`, "--seconds=0.5", "--inputs=5"],
    "--output-size=100000",
  ]);
  const results = await buildAll(
    ...many,
    ["--name=broken", "--seconds=0.2", "--fail"],
  );
  const codes = results.map(({ status }) => status);
  assert.equal(codes.slice(0, 3), [0, 0, 0], results[0]!.stderr);
  assert.ok(codes.slice(3).every((code) => code !== 0));
  await exceedTime();
  await loseMachine();
  for (const runtime of RUNTIMES) {
    const files = ["--html", "/tmp/page.html", "--trace", "/tmp/trace.json"];
    const command = offloadCommand(runtime, "report", "--json", ...files);
    const { status, stdout, stderr } = run("head", ...command);
    assert.is(status, 0, stderr);
    figures[runtime] = JSON.parse(stdout);
  }
  writeFileSync(PAGE, readFileSync(`${root("head")}/tmp/page.html`));
});

test.after(() => {
  rmSync(directory, { recursive: true });
  rmSync(root("head") + PLUGINS, { recursive: true });
});

test("the figures are those of what was built", () => {
  const { node, deno } = figures;
  assert.equal(node.outcomes, {
    ...{ built: 4, failed: 1, "timed-out": 1, lost: 0, interrupted: 0 },
  });
  assert.equal(deno.outcomes, node.outcomes);
  assert.equal(deno.phases, node.phases);
  const machines = new Map(
    // deno-lint-ignore no-explicit-any
    node.machines.map((it: any) => [it.machine, it]),
  ) as Map<string, typeof node>;
  assert.equal([...machines.keys()].sort(), [
    "away:22",
    "other:22",
    "w1:2",
    "w1:22",
    "w2:22",
    "w3:22",
  ]);
  assert.is(machines.get("w1:22").lost, 1);
  assert.is(machines.get("w3:22").builds, 0);
  const reasons = (machine: string) =>
    machines.get(machine).idle.map(({ why }: { why: string }) => why);
  assert.equal(reasons("other:22"), [], "it was asked for nothing");
  assert.equal(reasons("w3:22"), ["overloaded"]);
  assert.equal(reasons("away:22"), [
    `drained by '${PLUGINS}/drain': ${DRAINED}`,
  ]);
  const [refused] = machines.get(`w1:${CLOSED}`).idle;
  assert.match(refused.why, "connection refused");
  assert.ok(refused.seconds > 0);
  const [twice] = node.unluckiest;
  assert.equal([twice.name, twice.attempts, twice.outcome], [
    "twice",
    2,
    "built",
  ]);
  assert.ok(node.phases.building > 3 && node.phases.building < 60);
  assert.ok(machines.get("w2:22").bytesRetrieved > 0);
});

test("the trace is as its schema says, with a track for each slot", () => {
  const file = `${root("head")}/tmp/trace.json`;
  const trace = JSON.parse(readFileSync(file, "utf8"));
  const schema = `${ROOT}test/data/trace.schema.json`;
  assert.ok(conforms(trace, JSON.parse(readFileSync(schema, "utf8"))));
  const slots = figures.node.machines
    // deno-lint-ignore no-explicit-any
    .reduce((sum: number, it: any) => sum + it.slots, 0);
  // deno-lint-ignore no-explicit-any
  const tracks = trace.traceEvents.filter((it: any) =>
    it.name === "thread_name" && /^slot /.test(it.args.name)
  );
  assert.is(tracks.length, slots);
});

// ---------------------------------------------------------------------------
// The page
// ---------------------------------------------------------------------------

/** Waits until the browser has drawn. */
async function drawn(page: BrowserPage): Promise<void> {
  const frame = "new Promise((done) => requestAnimationFrame(done))";
  await page.evaluate(`${frame}.then(() => ${frame})`);
}

/** What details are shown, by their names; `undefined`: none. */
async function details(
  page: BrowserPage,
): Promise<Record<string, string> | undefined> {
  return await page.evaluate(`(() => {
    if (document.getElementById("details").hidden) return undefined;
    const text = (id) => document.getElementById(id).textContent;
    const names = [...document.querySelectorAll("#facts dt")];
    return Object.fromEntries([
      ["title", text("title")],
      ["how", text("how")],
      ...names.map((it) => [it.textContent, it.nextSibling.textContent]),
    ]);
  })()`) ?? undefined;
}

/** Goes through all that is in the timeline, by keys alone. */
async function walk(page: BrowserPage): Promise<Record<string, string>[]> {
  const found: Record<string, string>[] = [];
  const press = async (key: string) => {
    const before = JSON.stringify(await details(page));
    await page.press(key);
    return JSON.stringify(await details(page)) !== before;
  };
  await page.evaluate('document.getElementById("timeline").focus()');
  await page.press("Escape", "ArrowRight");
  do {
    while (await press("ArrowLeft"));
    do found.push((await details(page))!); while (await press("ArrowRight"));
  } while (await press("ArrowDown"));
  return found;
}

/** What is drawn now. */
async function drawing(page: BrowserPage): Promise<string> {
  await drawn(page);
  return await page.evaluate(
    'document.getElementById("timeline").toDataURL()',
  );
}

/** How many pixels there are of each colour of the style sheet. */
async function pixels(page: BrowserPage): Promise<Record<string, number>> {
  await drawn(page);
  return await page.evaluate(`(() => {
    const { width, height } = document.getElementById("timeline");
    const copy = new OffscreenCanvas(width, height).getContext("2d");
    copy.drawImage(document.getElementById("timeline"), 0, 0);
    const { data } = copy.getImageData(0, 0, width, height);
    const style = getComputedStyle(document.documentElement);
    const names = ["connecting", "sending", "building", "retrieving",
      "failed", "timed-out", "lost"];
    return Object.fromEntries(names.map((name) => {
      const colour = parseInt(style.getPropertyValue("--" + name).slice(1), 16);
      let count = 0;
      for (let at = 0; at < data.length; at += 4) {
        count += data[at] * 65536 + data[at + 1] * 256 + data[at + 2] === colour;
      }
      return [name, count];
    }));
  })()`);
}

/** Sets what the filter asks for. */
async function filter(page: BrowserPage, id: string, value: string) {
  return await page.evaluate(`(() => {
    const it = document.getElementById("${id}");
    it.value = ${JSON.stringify(value)};
    it.dispatchEvent(new Event("input", { bubbles: true }));
    return document.getElementById("count").textContent;
  })()`);
}

/** Opens a page; it must say nothing to the console, and ask for no more. */
async function onPage(
  url: string,
  use: (page: BrowserPage) => Promise<void>,
): Promise<void> {
  await withBrowser(async (page) => {
    await page.show({ width: 1200, height: 900 });
    await page.open(url);
    await drawn(page);
    await use(page);
    assert.equal(page.messages, []);
    assert.equal(page.requests, [url]);
  });
}

test("keys lead to all that happened, and say what it was", () =>
  onPage(ADDRESS, async (page) => {
    const found = await walk(page);
    const count = (pattern: RegExp, key: "title" | "how") =>
      found.filter((it) => pattern.test(it[key]!)).length;
    assert.is(count(/^built$/, "how"), 4);
    assert.is(count(/^failed$/, "how"), 1);
    assert.is(count(/^timed-out$/, "how"), 1);
    assert.is(count(/^attempt that failed$/, "how"), 1);
    assert.ok(count(/^took nothing$/, "how") >= 4);
    assert.is(count(/^(one|two|three|broken|slow)$/, "title"), 5);
    assert.is(count(/^twice$/, "title"), 2);
    const twice = found.find(({ title, how }) =>
      title === "twice" && how === "built"
    )!;
    assert.match(twice.machine!, /^w2:22, slot \d$/);
    assert.match(twice["failed attempts"]!, / (ms|s)$/);
    assert.match(twice["tried before"]!, /^w1:22: /);
    assert.match(twice.derivation!, /^\/gnu\/store\/.*-twice\.drv$/);
    const reasonOf = (name: string) =>
      found.find(({ title }) => title === name)?.why;
    assert.match(reasonOf(`w1:${CLOSED}`)!, "connection refused");
    assert.is(reasonOf("w3:22"), "overloaded");
    assert.match(reasonOf("away:22")!, `: ${DRAINED}`);
  }));

test("it is drawn in the colours of what happened, light and dark", () =>
  onPage(ADDRESS, async (page) => {
    const light = await pixels(page);
    for (const [name, count] of Object.entries(light)) {
      if (name !== "connecting") assert.ok(count > 0, name);
    }
    assert.ok(light.building! > light.sending!);
    await page.show({ width: 1200, height: 900, scheme: "dark" });
    const dark = await pixels(page);
    for (const name of ["building", "failed", "timed-out", "lost"]) {
      assert.ok(dark[name]! > 0, name);
    }
  }));

test("keys zoom, and the mouse shows details", () =>
  onPage(ADDRESS, async (page) => {
    await page.evaluate('document.getElementById("timeline").focus()');
    await page.press("0");
    const whole = await drawing(page);
    await page.press("+");
    assert.is.not(await drawing(page), whole);
    await page.press("-");
    assert.is(await drawing(page), whole);
    const found = await walk(page);
    const last = found.at(-1)!;
    assert.is((await details(page))!.title, last.title);
    await page.press("Enter");
    assert.is.not(await drawing(page), whole);
    const [x, y] = await page.evaluate(`(() => {
      const stage = document.getElementById("timeline").getBoundingClientRect();
      const { left, top } = document.getElementById("details").style;
      return [stage.x + parseFloat(left) + 3, stage.y + parseFloat(top) - 12];
    })()`);
    await page.press("Escape");
    assert.is(await details(page), undefined);
    await page.point(x, y);
    assert.equal(await details(page), last);
    // A click keeps them there.
    await page.point(x, y, true);
    await page.point(5, 5);
    assert.equal(await details(page), last);
  }));

test("the filter finds builds by name, machine and outcome", () =>
  onPage(ADDRESS, async (page) => {
    const all = await drawing(page);
    assert.is(await filter(page, "name", "TWI"), "1 of 6 builds");
    assert.is.not(await drawing(page), all);
    const found = await walk(page);
    const names = found.filter(({ how }) => how !== "took nothing")
      .map(({ title }) => title);
    assert.equal([...new Set(names)], ["twice"]);
    const rows = 'document.querySelectorAll("#list tr").length';
    assert.is(await page.evaluate(rows), 1);
    assert.is(await filter(page, "name", ""), "6 of 6 builds");
    assert.is(await filter(page, "outcome", "timed-out"), "1 of 6 builds");
    assert.is(await filter(page, "outcome", "retried"), "1 of 6 builds");
    await filter(page, "outcome", "");
    const options = await page.evaluate(
      '[...document.getElementById("machine").options].map((it) => it.text)',
    );
    const idle = options.indexOf("other:22") - 1;
    assert.is(await filter(page, "machine", String(idle)), "0 of 6 builds");
    // A build of a table shows its place in spite of that.
    await page.evaluate(
      '[...document.querySelectorAll("[data-build]")].at(-1).click()',
    );
    assert.is((await details(page))!.title, "twice");
    assert.is(await page.evaluate(rows), 6);
  }));

test("it fits a phone", () =>
  onPage(ADDRESS, async (page) => {
    await page.show({ width: 360, height: 740, scale: 2 });
    await walk(page);
    const width = "document.documentElement.scrollWidth";
    assert.is(await page.evaluate(width), 360);
  }));

/** Opens the page of made-up builds. */
async function onMadeUp(
  { entries, absences }: ReturnType<typeof makeDay>,
  use: (page: BrowserPage) => Promise<void>,
): Promise<void> {
  const machines = capacities([], entries, absences);
  const until = Math.max(...entries.map(({ ended }) => ended)) + 1000;
  const span = { since: MORNING - 1000, until };
  const made = countFigures(entries, absences, machines, span);
  const file = `${directory}/made-up.html`;
  writeFileSync(file, makePage(entries, absences, made));
  await onPage(pathToFileURL(file).href, use);
}

test("hostile names do nothing in it but look odd", async () => {
  const entries = HOSTILE.map((text, index) =>
    morningBuild({
      name: text,
      derivation: text,
      machine: `${text}:22`,
      slot: index % 2,
      outcome: "lost",
      problem: text,
    })
  );
  const absences = entries.map(({ machine, name }) => (
    { machine, from: MORNING + 70_000, until: MORNING + 80_000, problem: name }
  ));
  await onMadeUp({ entries, absences }, async (page) => {
    const found = await walk(page);
    for (const text of HOSTILE) {
      assert.ok(found.some(({ title }) => title === text), text);
    }
    const builds = 'document.querySelectorAll("[data-build]").length';
    assert.is(await page.evaluate(builds), 10); // two tables of five
    assert.is(await page.evaluate("globalThis.harm"), undefined);
    assert.is(await page.evaluate("({}).harm"), undefined);
    await page.show({ width: 360, height: 740 });
    const width = "document.documentElement.scrollWidth";
    assert.is(await page.evaluate(width), 360);
  });
});

test("it is smooth with 10,000 builds", () =>
  onMadeUp(makeDay(10_000, 12, 4), async (page) => {
    const milliseconds = await page.evaluate(`(async () => {
      const canvas = document.getElementById("timeline");
      const frame = () => new Promise(requestAnimationFrame);
      const start = performance.now();
      for (let count = 0; count < 40; count++) {
        const key = count % 2 === 0 ? "-" : "+";
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
        await frame();
      }
      return (performance.now() - start) / 40;
    })()`);
    // It takes 17 ms, a frame of the screen, where nothing else runs.
    assert.ok(milliseconds < 150, `${milliseconds} ms a frame`);
    assert.is(
      await filter(page, "name", "chromium"),
      await page.evaluate(
        `JSON.parse(document.getElementById("data").textContent).builds
        .filter(({ name }) => name.includes("chromium")).length +
        " of 10000 builds"`,
      ),
    );
  }));

test.run();

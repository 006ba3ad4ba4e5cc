/** Builds that stay here, where guix-daemon is done with them sooner. */

import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { lockFile, processRequest } from "../mod.ts";
import type {
  Candidate,
  Context,
  PastBuild,
  Plugin,
  PluginContext,
  ScoredRequest,
  Settings,
  Slot,
} from "../mod.ts";
import { journalOf } from "../plugins/_journal.ts";
import { noteStay, staysHere } from "../plugins/_stays.ts";
import expected from "../plugins/expected.ts";
import { candidate, machine, makeContext, request } from "./context.ts";
import { greeter } from "./helpers.ts";

const test = suite("here");

/** A context with the plugin's options, and what it tells. */
function makeOwn(options: Readonly<Record<string, unknown>> = {}) {
  const { context } = makeContext();
  const told: string[] = [];
  const own = {
    ...context,
    log: { ...context.log, info: (text: string) => void told.push(text) },
    options: {
      ...{ learn: true, longestWait: 1800, localSpeed: 1, localBuilds: 1 },
      ...options,
    },
  } as PluginContext;
  return { own, told };
}

/** A request of a guix-daemon that has a slot: such builds took so long. */
function ask(
  seconds: number | undefined,
  more: Partial<ScoredRequest> = {},
): ScoredRequest {
  const past: PastBuild[] = seconds === undefined
    ? []
    : [{ machine: "old:22", seconds, speed: 1 }];
  return request({
    wantsLocal: true,
    history: () => past,
    similar: () => past,
    ...more,
  });
}

/** A machine, on which a build may run for some seconds that takes as many. */
function host(
  name: string,
  speed: number,
  more: Partial<Candidate> = {},
): Candidate {
  return { ...candidate({ name, speed }), running: () => [], ...more };
}

/** What the plugin says of a build, where these machines are. */
async function decide(
  candidates: readonly Candidate[],
  asked: ScoredRequest,
  own: PluginContext = makeOwn().own,
) {
  const scores = await Promise.all(
    candidates.map((each) => expected.score!(each, asked, own, candidates)),
  );
  const ranking = candidates
    .map((candidate, index) => ({ candidate, score: scores[index]! }))
    .sort((a, b) => b.score - a.score);
  return await expected.defer!(ranking, asked, own);
}

/** Whether it stays here. */
async function stays(...its: Parameters<typeof decide>): Promise<boolean> {
  return (await decide(...its))?.isHere === true;
}

test("a build stays here where it is done sooner", async () => {
  const { own, told } = makeOwn();
  assert.ok(await stays([host("slow", 0.5)], ask(10), own));
  const [text] = told;
  assert.match(
    text!,
    "stays here: it takes about 10 s here, and 20 s on 'slow'",
  );
  assert.not.ok(await stays([host("a", 0.5), host("quick", 2)], ask(10)));
  assert.not.ok(await stays([host("as quick", 1)], ask(10)));
});

test("what must be sent speaks for staying, even from the only machine", async () => {
  const big = {
    inputs: () => Promise.resolve([{ path: "/gnu/store/x", size: 1e9 }]),
  };
  const quick = host("quick", 4, { bandwidth: 1e7 });
  assert.not.ok(await stays([quick], ask(60)));
  assert.ok(await stays([quick], ask(60, big)));
  const has = { holds: (paths: readonly string[]) => [...paths] };
  assert.not.ok(await stays([{ ...quick, ...has }], ask(60, big)));
});

test("so does what runs there, and what waits for it", async () => {
  const now = Date.now();
  const busy = (seconds: number) =>
    host("quick", 4, {
      running: () => [{ name: "other", since: now - seconds * 1000 }],
      freeSlots: () => 0,
    });
  // 60 s here; 15 s there, of which the other build has some left.
  assert.ok(await stays([busy(0)], ask(60, { history: ofOther(400) })));
  assert.not.ok(await stays([busy(90)], ask(60, { history: ofOther(400) })));
  const waiting = [1, 2, 3, 4].map((number) => ({
    ...{ derivation: `/gnu/store/${number}.drv`, since: now, seen: now },
    ...{ why: "busy", rank: 9000, system: "x86_64-linux" },
  }));
  const more = { history: ofOther(400), waiting: () => waiting };
  assert.ok(await stays([busy(90)], ask(60, more)));
});

/** What is known, where builds called "other" took so many seconds. */
function ofOther(seconds: number) {
  return (name?: string): PastBuild[] => [{
    machine: "old:22",
    seconds: name === "other" ? seconds : 60,
    speed: 1,
  }];
}

test("what is over at once stays, if it is over here at once as well", async () => {
  const hosts = [host("quick", 4)];
  assert.ok(await stays(hosts, ask(0.5)));
  const { own } = makeOwn({ localSpeed: 0.2 });
  assert.not.ok(await stays(hosts, ask(0.5), own));
});

test("nothing stays that guix-daemon would not build now", async () => {
  const hosts = [host("slow", 0.1)];
  assert.ok(await stays(hosts, ask(60)));
  assert.not.ok(await stays(hosts, ask(60, { wantsLocal: false })));
  assert.not.ok(await stays(hosts, ask(60, { features: ["kvm"] })));
  assert.not.ok(await stays(hosts, ask(undefined)));
  for (const options of [{ localSpeed: 0 }, { localBuilds: 0 }]) {
    const { own, told } = makeOwn(options);
    assert.not.ok(await stays(hosts, ask(60), own));
    assert.equal(told, []);
  }
  // The option is off unless told.
  assert.is(expected.options!.localSpeed!.default, 0);
});

/** Derivations, and who holds the locks of their outputs as guix-daemon does. */
class Store {
  readonly #directory: string;
  readonly #locks = new Map<string, Slot>();

  constructor({ stateDirectory }: Pick<Context, "stateDirectory">) {
    this.#directory = `${stateDirectory}/store`;
    mkdirSync(this.#directory);
  }

  output(name: string): string {
    return `${this.#directory}/${name}`;
  }

  /** Makes a derivation that is being asked about. */
  ask(name: string): string {
    const file = `${this.output(name)}.drv`;
    writeFileSync(file, `Derive([("out","${this.output(name)}","","")],[],[])`);
    this.#locks.set(name, lockFile(`${this.output(name)}.lock`)!);
    return file;
  }

  /** Has its build end; where it did not do well, the lock's file stays. */
  end(name: string, isGood = false): void {
    mkdirSync(this.output(name));
    if (isGood) rmSync(`${this.output(name)}.lock`);
    this.#locks.get(name)!.release();
  }
}

test("as many builds stay here as may, until guix-daemon has done them", async () => {
  const { own } = makeOwn({ localBuilds: 2 });
  const store = new Store(own);
  const hosts = [host("slow", 0.1)];
  const staysBuild = (name: string) =>
    stays(hosts, ask(60, { derivation: store.ask(name) }), own);
  assert.ok(await staysBuild("a"));
  assert.ok(await staysBuild("b"));
  assert.not.ok(await staysBuild("c"));
  assert.is(staysHere(own).builds.length, 2);
  store.end("a");
  assert.is(staysHere(own).builds.length, 1);
  assert.ok(await staysBuild("d"));
  store.end("b", true);
  // Whatever becomes of what is asked for again, it is no longer here.
  store.end("d");
  const again = ask(60, { derivation: store.ask("d") });
  assert.not.ok(await stays([host("quick", 9)], again, own));
  assert.equal(staysHere(own).builds, []);
});

test("of many that ask at once, no more stay than may", async () => {
  const { own } = makeOwn();
  const store = new Store(own);
  const names = Array.from({ length: 8 }, (_, index) => `b${index}`);
  const noted = await Promise.all(
    names.map((name) => noteStay(store.ask(name), 60, 3, own)),
  );
  assert.is(noted.filter(Boolean).length, 3);
  assert.is(staysHere(own).builds.length, 3);
});

test("notes that make no sense are none", async () => {
  const { own } = makeOwn();
  const store = new Store(own);
  const file = `${own.stateDirectory}/offload/here/builds.json`;
  await noteStay(store.ask("a"), 60, 1, own);
  const good = readFileSync(file, "utf8");
  for (const text of ["", "{", "7", "[]", good.replace("60", '"x"')]) {
    writeFileSync(file, text);
    assert.equal(staysHere(own), { builds: [], quickness: 1 }, text);
  }
  assert.ok(await noteStay(store.ask("b"), 60, 1, own));
  assert.is(staysHere(own).builds.length, 1);
});

test("it is learned how quick this machine is, from what was built", async () => {
  const { own } = makeOwn({ localBuilds: 9 });
  const store = new Store(own);
  const file = `${own.stateDirectory}/offload/here/builds.json`;
  const run = async (name: string, took: number, isGood: boolean) => {
    await noteStay(store.ask(name), 60, 9, own);
    store.end(name, isGood);
    // It began so much earlier.
    const notes = JSON.parse(readFileSync(file, "utf8"));
    notes.builds[0].since -= took * 1000;
    writeFileSync(file, JSON.stringify(notes));
    await noteStay(store.ask(`${name}-next`), 60, 9, own);
    store.end(`${name}-next`);
    return staysHere(own).quickness;
  };
  assert.is(await run("failed", 240, false), 1);
  assert.is(await run("short", 0.1, true), 1);
  const slower = await run("slow", 240, true);
  assert.ok(slower < 0.8 && slower > 0.7, `${slower}`);
  // What takes 100 s by what is told takes longer by what was seen.
  const hosts = [host("a", 0.9)];
  assert.not.ok(await stays(hosts, ask(100), own));
  const options = { ...own.options, learn: false };
  assert.ok(await stays(hosts, ask(100), { ...own, options }));
});

/** What a request is answered, where a plugin has it stay here. */
async function answerTo(
  asked: Partial<ScoredRequest>,
  settings: Partial<Settings> = {},
) {
  const plugin: Plugin = {
    name: "fake",
    machines: () => [machine({ systems: ["x86_64-linux", "i586-gnu"] })],
    connect: () => ({
      openSocket: () => Promise.resolve(greeter(request().derivation)),
      exec: () => Promise.reject(new Error("it runs nothing")),
      failure: () => undefined,
      close: () => {},
    }),
    score: () => 1,
    defer: () => ({ why: "of the test", rank: 0, isHeld: false, isHere: true }),
  };
  const { context } = makeContext({ plugins: [plugin] });
  const own = { ...context, settings: { ...context.settings, ...settings } };
  const answers: string[] = [];
  const conversation = {
    readLine: () => Promise.resolve(undefined),
    answer: (word: string) => void answers.push(word),
  };
  const whole = request(asked);
  own.observations.journal!.saveWait(whole.derivation, "busy");
  await processRequest(whole, conversation, own);
  const journal = journalOf(own)!;
  return [answers.join(" "), journal.waiting().length, journal.counts().length];
}

test("what stays here is declined, and neither waits nor is counted", async () => {
  assert.equal(await answerTo({ wantsLocal: true }), ["decline", 0, 0]);
  const related = { wantsLocal: true, system: "x86_64-linux" };
  assert.equal(await answerTo(related), ["decline", 0, 0]);
});

test("what guix-daemon can't build is not declined, whatever plugins say", async () => {
  assert.equal(await answerTo({ wantsLocal: false }), ["postpone", 1, 0]);
  const foreign = { wantsLocal: true, system: "i586-gnu" };
  assert.equal(await answerTo(foreign), ["postpone", 1, 0]);
  const asked = { wantsLocal: true };
  const settings = { buildLocally: false };
  assert.equal(await answerTo(asked, settings), ["postpone", 1, 0]);
});

test.run();

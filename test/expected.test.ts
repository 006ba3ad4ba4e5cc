/** When builds will be done, and which of them wait. */

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { loadPlugins, pluginsWith, readSettings } from "../mod.ts";
import type {
  Candidate,
  Dependent,
  Machine,
  PastBuild,
  Plugin,
  PluginContext,
  RunningBuild,
  ScoredCandidate,
  ScoredRequest,
  Settings,
  WaitingBuild,
} from "../mod.ts";
import {
  expect,
  expectWork,
  learnQuickness,
  nameOfPackage,
} from "../plugins/_expectation.ts";
import { rankOf } from "../plugins/_order.ts";
import expected from "../plugins/expected.ts";
import { Farm } from "../scripts/_farm.ts";
import { makeChances, synthesize } from "../scripts/_workload.ts";
import type { Workload } from "../scripts/_workload.ts";
import { candidate, machine, makeContext, request } from "./context.ts";

const test = suite("expected");

const NOW = 1e12;

/** A context with the plugin's options. */
function makeOwn(options: Readonly<Record<string, unknown>> = {}) {
  const { context } = makeContext();
  return {
    ...context,
    options: { learn: true, longestWait: 1800, ...options },
  } as PluginContext;
}

/** Builds that run, each since so many seconds. */
function running(...builds: readonly [string, number][]): RunningBuild[] {
  return builds.map(([name, ago]) => ({ name, since: NOW - ago * 1000 }));
}

/** A machine on which these builds run. */
function host(
  name: string,
  speed: number,
  builds: readonly RunningBuild[] = [],
  more: Partial<Candidate> = {},
  fields: Partial<Machine> = {},
): Candidate {
  const made = candidate({ name, speed, ...fields });
  const { parallelBuilds } = made.machine;
  return {
    ...made,
    running: () => builds,
    freeSlots: () => parallelBuilds - builds.length,
    ...more,
  };
}

/** A request for a build of a name, where builds took so many seconds. */
function ask(
  works: Readonly<Record<string, number>>,
  more: Partial<ScoredRequest> = {},
): ScoredRequest {
  const past = (name: string): PastBuild[] => {
    const seconds = works[name];
    return seconds === undefined
      ? []
      : [{ machine: "old:22", seconds, speed: 1 }];
  };
  return request({
    name: "hello-2.12",
    time: NOW,
    history: (name = "hello-2.12") => past(name),
    similar: past,
    ...more,
  });
}

/** A build that waits for so many seconds. */
function waits(
  rank: number,
  seconds = 0,
  more: Partial<WaitingBuild> = {},
): WaitingBuild {
  return {
    derivation: `/gnu/store/${rank}-other.drv`,
    ...{ since: NOW - seconds * 1000, seen: NOW, why: "busy", rank },
    ...{ system: "x86_64-linux", features: [] },
    ...more,
  };
}

/** Scores machines as the hook does; the best comes first. */
async function rank(
  candidates: readonly Candidate[],
  asked: ScoredRequest,
  own: PluginContext = makeOwn(),
): Promise<ScoredCandidate[]> {
  const scores = await Promise.all(
    candidates.map((each) => expected.score!(each, asked, own, candidates)),
  );
  return candidates
    .map((candidate, index) => ({ candidate, score: scores[index]! }))
    .sort((a, b) => b.score - a.score);
}

/** What becomes of a build, where these machines are. */
async function decide(
  candidates: readonly Candidate[],
  asked: ScoredRequest,
  own: PluginContext = makeOwn(),
) {
  const ranking = await rank(candidates, asked, own);
  const deferral = await expected.defer!(ranking, asked, own);
  if (deferral !== undefined) return deferral;
  return ranking.find(({ candidate: { machine, running } }) =>
    running().length < machine.parallelBuilds
  )!.candidate.machine.name;
}

test("where nothing is known, the fastest is the best, as ever", async () => {
  const ranking = await rank([host("a", 1), host("b", 3)], ask({}));
  assert.equal(ranking.map(({ score }) => score), [3, 1]);
  const busy = host("c", 9, running(["gcc-15", 1]));
  assert.is(await decide([host("a", 1), busy], ask({})), "a");
});

test("it goes by the name, another version, or any build", () => {
  assert.equal(
    ["gcc-toolchain-13.2.0", "emacs", "r-4you-1.0-checkout"]
      .map(nameOfPackage),
    ["gcc-toolchain", "emacs", "r"],
  );
  const works = { "hello-2.12": 7, hello: 8, "": 9 };
  const find = (names: readonly (keyof typeof works)[]) => {
    const known = Object.fromEntries(names.map((name) => [name, works[name]]));
    const { seconds, source } = expectWork("hello-2.12", ask(known)) ?? {};
    return [seconds, source];
  };
  assert.equal(find(["hello-2.12", "hello", ""]), [7, "this name"]);
  assert.equal(find(["hello", ""]), [8, "another version"]);
  assert.equal(find([""]), [9, "any build"]);
  assert.equal(find([]), [undefined, undefined]);
});

test("of any build the mean counts, and who is not known may take as long again", async () => {
  const builds = [1, 1, 1, 97].map((seconds) => (
    { machine: "old:22", seconds, speed: 1 }
  ));
  const similar = (name: string) => name === "" ? builds : [];
  const asked = ask({ "gcc-15": 30 }, { similar });
  assert.is(expectWork("hello-2.12", asked)!.seconds, 25);
  const wait = async (name: string, ago: number) => {
    const busy = host("busy", 1, running([name, ago]));
    return (await expect([busy], asked, true))!.get(busy)!.wait;
  };
  assert.equal([await wait("gcc-15", 10), await wait("gcc-15", 40)], [20, 10]);
  assert.equal([await wait("new-1", 10), await wait("new-1", 80)], [25, 80]);
});

test("it counts the slot, the transfer and the build", async () => {
  const inputs = [{ path: "/gnu/store/x", size: 3e7 }];
  const asked = ask({ "hello-2.12": 60, "gcc-15": 100 }, {
    inputs: () => Promise.resolve([...inputs]),
  });
  const has = { holds: (paths: readonly string[]) => [...paths] };
  const hosts = [
    host("has it", 2, [], has),
    host("is slow", 1, [], { bandwidth: 1e6 }),
    host("is busy", 3, running(["gcc-15", 10]), has),
    host("knows it", 2, [], { ...has, id: "old:22" }),
  ];
  const expectations = await expect(hosts, asked, true);
  const parts = hosts.map((each) => {
    const { wait, transfer, build } = expectations!.get(each)!;
    return [wait, transfer, build].map((it) => Math.round(it * 10) / 10);
  });
  // Where it can't be done first, what it lacks is not looked up.
  assert.equal(parts, [[0, 0, 30], [0, 30, 60], [23.3, 30, 20], [0, 30, 60]]);
});

test("what is over at once goes to the fastest, without a look", async () => {
  const asked = ask({ "hello-2.12": 0.5 }, {
    inputs: () => Promise.reject(new Error("it was asked for")),
  });
  const ranking = await rank([host("a", 1), host("b", 3)], asked);
  assert.equal(ranking.map(({ score }) => score), [3, 1]);
});

test("a build waits for a machine that will be done sooner", async () => {
  const works = { "hello-2.12": 600, "gcc-15": 100, "": 10 };
  const slow = host("slow", 1);
  const busy = (ago: number) => host("fast", 4, running(["gcc-15", ago]));
  // 21 s until a slot, and 150 s there; 600 s here.
  const later = await decide([slow, busy(4)], ask(works));
  assert.ok(typeof later === "object");
  assert.is(later.candidate?.machine.name, "fast");
  assert.is(later.isHeld, false);
  assert.match(later.why, "'fast' will have a slot soon");
  const soon = await decide([slow, busy(23)], ask(works));
  assert.ok(typeof soon === "object" && soon.isHeld);
  // What should have ended long ago takes who knows how long.
  assert.is(await decide([slow, busy(3000)], ask(works)), "slow");
  // Little is gained.
  assert.is(await decide([host("a", 3.7), busy(23)], ask(works)), "a");
  // Others wait there, and are more urgent.
  const others = [9000, 9001, 9002]
    .map((rank) => waits(rank, 0, { machine: "fast:22" }));
  const long = { ...works, "gcc-15": 2000 };
  const turn = ask(long, { waiting: () => others });
  assert.is(await decide([slow, busy(400)], turn), "slow");
  // It has waited long enough, or may not wait for so long.
  const tired = ask(works, { waited: () => 1801 });
  assert.is(await decide([slow, busy(4)], tired), "slow");
  const hasty = makeOwn({ longestWait: 20 });
  assert.is(await decide([slow, busy(4)], ask(works), hasty), "slow");
});

test("the first of those that wait is held, the others ask again", async () => {
  const works = { "hello-2.12": 100, "": 10 };
  const full = [host("a", 1, running(["gcc-15", 5]))];
  const standing = async (more: Partial<ScoredRequest>) => {
    const decision = await decide(full, ask(works, more));
    assert.ok(typeof decision === "object");
    return [decision.why, decision.rank, decision.isHeld];
  };
  assert.equal(await standing({}), ["busy", 100, true]);
  const urgent = [waits(150)];
  assert.equal(await standing({ waiting: () => urgent }), ["busy", 100, false]);
  // Nor may it keep those from asking that other machines could build.
  const others = [waits(150, 0, { system: "riscv64-linux" })];
  assert.equal(await standing({ waiting: () => others }), ["busy", 100, false]);
  // Its turn comes before who is ahead asks again.
  const soon = { waiting: () => urgent, pace: () => 0.5 };
  assert.equal(await standing(soon), ["busy", 100, true]);
  const tired = { waiting: () => urgent, waited: () => 60 };
  assert.equal(await standing(tired), ["busy", 100, true]);
});

test("what was noted of hooks that were killed keeps no slot", async () => {
  const freed = { freeSlots: () => 1 };
  const full = host("a", 4, running(["gcc-15", 5]), freed);
  const own = makeOwn();
  const works = { "hello-2.12": 600, "gcc-15": 100, "": 10 };
  for (const hosts of [[full], [full, host("b", 1)]]) {
    const asked = ask(works, { waiting: () => [waits(9000)] });
    const ranking = await rank(hosts, asked, own);
    assert.is(ranking[0]!.candidate, full);
    assert.is(await expected.defer!(ranking, ask(works), own), undefined);
  }
});

test("a build of no time waits for nobody, and keeps nobody waiting", async () => {
  const hosts = [
    host("a", 4, running(["gcc-15", 5])),
    host("b", 1),
  ];
  const works = { "hello-2.12": 0.1, "gcc-15": 100, "": 10 };
  const more = {
    waiting: () => [waits(9000)],
    dependents: () => Promise.reject(new Error("it was asked for")),
  };
  assert.is(await decide(hosts, ask(works, more)), "b");
});

test("what takes too long to be found out is left out", async () => {
  const works = { "hello-2.12": 600, "": 10 };
  const answers = [
    () => new Promise<never>(() => {}),
    () => Promise.reject(new Error("no daemon")),
  ];
  for (const answer of answers) {
    const more = { inputs: answer, dependents: answer };
    const asked = ask(works, more);
    const hosts = [host("a", 4), host("b", 1)];
    assert.is((await expect(hosts, asked, true))!.size, 2);
    assert.is(await rankOf(asked), 600);
  }
});

test("builds leave slots to those on which more waits", async () => {
  const works = { "hello-2.12": 100, "": 10 };
  const free = host("b", 1);
  const hosts = [host("a", 1, running(["gcc-15", 5])), free];
  const after = (waiting: WaitingBuild[], more: Partial<ScoredRequest> = {}) =>
    decide(hosts, ask(works, { waiting: () => waiting, ...more }));
  const yields = await after([waits(150)]);
  assert.ok(typeof yields === "object");
  assert.is(yields.why, "more urgent builds go first");
  assert.is(yields.isHeld, false);
  assert.is(await after([waits(105)]), "b"); // hardly more
  assert.is(await after([waits(150)], { waited: () => 60 }), "b");
  assert.is(await after([waits(150)], { pace: () => 0.5 }), "b");
  // It could not have that slot, or waits for another one.
  assert.is(await after([waits(150, 0, { features: ["kvm"] })]), "b");
  assert.is(await after([waits(150, 0, { system: "riscv64-linux" })]), "b");
  assert.is(await after([waits(150, 0, { machine: "a:22" })]), "b");
  // Where nothing runs, nobody waits.
  const asked = ask(works, { waiting: () => [waits(150)] });
  assert.is(await decide([free], asked), "b");
  // There are slots for both.
  const two = host("c", 1, running(["gcc-15", 5]), {}, { parallelBuilds: 3 });
  assert.is(await decide([two], asked), "c");
});

test("rankOf() is the longest chain, and ends where one is a circle", async () => {
  const end: Dependent = { name: "gcc-15", dependents: [] };
  const works = { "hello-2.12": 1, "gcc-15": 10, middle: 3, "": 2 };
  const middle = { name: "middle", dependents: [end] };
  const circle = { name: "x", dependents: [] as Dependent[] };
  circle.dependents.push(circle, middle);
  const rank = (dependents: Dependent[]) =>
    rankOf(ask(works, { dependents: () => Promise.resolve(dependents) }));
  assert.is(await rank([]), 1);
  assert.is(await rank([end, middle]), 14);
  assert.is(await rank([circle]), 16);
});

test("learnQuickness() comes to how quick machines are", () => {
  const speeds = { a: 1, b: 0.25, c: 4 };
  const quickness = new Map<string, number>();
  const past: PastBuild[] = [];
  const { pick } = makeChances(1);
  for (let build = 0; build < 300; build++) {
    const [name, real] = Object.entries(speeds)[pick(3)]!;
    const its = machine({ name });
    const before = quickness.get(name) ?? 1;
    const seconds = 100 / real;
    const learned = learnQuickness(its, before, seconds, past);
    quickness.set(name, learned);
    past.unshift({ machine: `${name}:22`, seconds, speed: learned });
    past.splice(20);
  }
  const [a, b, c] = ["a", "b", "c"].map((name) => quickness.get(name)!);
  assert.ok(Math.abs(Math.log2(a! / b!) - 2) < 0.2, `${a! / b!}`);
  assert.ok(Math.abs(Math.log2(c! / a!) - 2) < 0.2, `${c! / a!}`);
  // What is short tells nothing, nor who only gets what no other takes.
  const last = machine({ speed: 0 });
  assert.is(learnQuickness(last, 1, 100, past), 1);
  const odd = [{ machine: "x:22", seconds: 100, speed: 0 }];
  assert.is(learnQuickness(machine(), 1, 100, odd), 1);
  assert.is(learnQuickness(machine(), 1, 0.5, past), 1);
});

test("Observations know builds of other versions, and of anything", () => {
  const { observations } = makeContext().context;
  const a = machine({ name: "a" });
  for (const name of ["gcc-14.3", "gcc-15.1", "gcc-toolchain-15", "gcc-x"]) {
    observations.saveBuild(a, name, name.length, []);
  }
  const seconds = (beginning: string) =>
    observations.similar(beginning).map((build) => build.seconds).sort();
  assert.equal(seconds("gcc"), [8, 8]);
  assert.equal(seconds("gcc-toolchain"), [16]);
  assert.equal(seconds("none"), []);
  assert.equal(seconds(""), [16, 5, 8, 8]);
});

test("it scores unless another does, and has builds wait only then", async () => {
  const { log } = makeContext().context;
  const site: Plugin = { name: "site", score: () => 1 };
  const chosen = async (
    told: Readonly<Record<string, unknown>>,
    more: readonly Plugin[] = [],
  ) => {
    const all = { ...readSettings("/nonexistent", {}), ...told } as Settings;
    const plugins = [...more, ...await loadPlugins("", all, log)];
    const context = { plugins, settings: all };
    return (["score", "defer"] as const).map((hook) =>
      pluginsWith(hook, context).map(({ name }) => name).join(" ")
    );
  };
  assert.equal(await chosen({}), ["expected", "expected"]);
  assert.equal(await chosen({}, [site]), ["site guix", ""]);
  assert.equal(await chosen({ use: { pressure: {} } }), ["guix pressure", ""]);
  assert.equal(await chosen({ score: "guix" }), ["guix", ""]);
  const own = { use: { expected: { longestWait: 5 } } };
  assert.equal(await chosen(own), ["expected", "expected"]);
  assert.equal(await chosen({ ...own, score: "locality" }), ["locality", ""]);
  const both = await chosen({ score: "expected" }, [site]);
  assert.equal(both, ["site expected", "expected"]);
});

const settings = { ...readSettings("/nonexistent", {}), score: "expected" };
const guix: Plugin = { name: "guix", score: ({ machine }) => machine.speed };

/** A farm of some machines, and what one to three clients want of it. */
function makeUp(seed: number): Workload {
  const { pick, heavyTailed } = makeChances(seed);
  const list = <T>(length: number, make: (index: number) => T) =>
    Array.from({ length }, (_, index) => make(index));
  const machines = list(1 + pick(5), (index) => ({
    ...{ name: `m${index}`, speed: [1, 2, 4][pick(3)]! },
    parallelBuilds: 1 + pick(3),
    features: index === 0 || pick(2) === 0 ? ["kvm"] : [],
  }));
  const durations = list(20, () => heavyTailed([2, 30, 300][pick(3)]!, 1));
  const builds = list(5 + pick(60), (index) => {
    const number = pick(durations.length);
    return {
      ...{ name: `p${number}`, id: `b${index}`, client: `c${pick(3)}` },
      seconds: durations[number]!,
      features: pick(5) === 0 ? ["kvm"] : [],
      inputs: list(Math.min(index, pick(3)), () => `b${pick(index)}`),
    };
  });
  return { machines, builds };
}

test("nothing waits for ever, whatever the farm", async () => {
  let [sum, reference] = [0, 0];
  for (let seed = 1; seed <= 150; seed++) {
    const farm = new Farm(makeUp(seed), `seed ${seed}`);
    const outcome = await farm.run([expected], seed, settings);
    assert.equal(outcome.problems, {}, `seed ${seed}`);
    assert.type(outcome.makespan, "number", `seed ${seed}`);
    const other = await farm.run([guix], seed, settings);
    sum += outcome.makespan! / farm.lowerBound();
    reference += other.makespan! / farm.lowerBound();
  }
  assert.ok(sum < reference, `${sum} >= ${reference}`);
});

test("a made-up workload is done sooner than by the reference", async () => {
  const farm = new Farm(synthesize(20, 600, 1), "made up");
  const [own, other] = [
    await farm.run([expected], 1, settings),
    await farm.run([guix], 1, settings),
  ];
  assert.ok(own.makespan! < 0.95 * other.makespan!);
});

test.run();

import { Buffer } from "node:buffer";
import { mkdirSync, writeFileSync } from "node:fs";
import process from "node:process";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import {
  acquireBuildSlot,
  machineMatches,
  parseRequest,
  processRequest,
} from "../mod.ts";
import type { Plugin } from "../mod.ts";
import { machine, makeContext, request } from "./context.ts";
import {
  golden,
  greeter,
  makeMachine,
  makeRandom,
  ownRuntime,
  rejects,
  ROOT,
  run,
  throws,
  withDirectory,
} from "./helpers.ts";
import { contentAddress, makeBatches } from "../plugins/_quick_contents.ts";
import type { Batch } from "../plugins/_quick_contents.ts";
import { shellLine } from "../plugins/_remote.ts";

const test = suite("requests");

/** What guix-daemon writes to a hook. */
interface GoldenRequests {
  /** Its arguments, `offload` first. */
  readonly args: string;
  /** Its input: for a plain derivation, and for one that wants features. */
  readonly requests: readonly [string, string];
}

const goldenRequests: Readonly<Record<string, GoldenRequests>> = {
  "1.5": golden("requests-1.5.json"),
  "1.2": golden("requests-1.2.json"),
};

const DRV = `/gnu/store/${"a".repeat(32)}-x.drv`;

for (const [version, { requests }] of Object.entries(goldenRequests)) {
  test(`parseRequest() reads what Guix ${version} writes`, () => {
    const [plain, picky] = requests.map(parseRequest);
    assert.match(plain!.derivation, /^\/gnu\/store\/\w{32}-plain\.drv$/);
    assert.match(picky!.derivation, /^\/gnu\/store\/\w{32}-picky\.drv$/);
    assert.equal(plain!.features, []);
    assert.equal(picky!.features, ["kvm", "big-parallel"]);
    for (const request of [plain!, picky!]) {
      assert.is(request.wantsLocal, true);
      assert.match(request.system, /^[a-z0-9_]+-linux$/);
    }
  });
}

test("parseRequest() reads every field", () => {
  assert.equal(parseRequest(`0 aarch64-linux ${DRV} kvm`), {
    wantsLocal: false,
    system: "aarch64-linux",
    derivation: DRV,
    features: ["kvm"],
  });
  assert.is(parseRequest(`1 i586-gnu ${DRV} `).wantsLocal, true);
});

test("parseRequest() refuses what is no request", () => {
  const lines = [
    "",
    "x",
    `2 x86_64-linux ${DRV} `,
    ` 1 x86_64-linux ${DRV} `,
    `1  ${DRV} `,
    `1 x86_64-linux x.drv `,
    `1 x86_64-linux /gnu/store/x `,
    `1 x86_64-linux ${DRV} a b`,
    `1 x86_64-linux ${DRV} \n1 x86_64-linux ${DRV} `,
    `1 ../x ${DRV} `,
  ];
  for (const line of lines) {
    const error = throws(() => parseRequest(line), /^invalid request line: "/);
    assert.match(error.message, JSON.stringify(line));
    assert.match(error.hint!, "SYSTEM");
  }
});

test("machineMatches() compares systems and features", () => {
  const machine = makeMachine({
    systems: ["x86_64-linux", "i686-linux"],
    features: ["kvm", "big-parallel"],
  });
  const matches = (rest: string) =>
    machineMatches(machine, parseRequest(`1 ${rest}`));
  assert.ok(matches(`x86_64-linux ${DRV} `));
  assert.ok(matches(`i686-linux ${DRV} kvm`));
  assert.ok(matches(`x86_64-linux ${DRV} big-parallel,kvm`));
  assert.not.ok(matches(`x86_64 ${DRV} `));
  assert.not.ok(matches(`aarch64-linux ${DRV} `));
  assert.not.ok(matches(`x86_64-linux ${DRV} kvm,benchmark`));
  assert.not.ok(matches(`x86_64-linux ${DRV} big`));
});

/** Checks that references come first, each item once, by the right means. */
function checkBatches(
  batches: readonly Batch[],
  references: ReadonlyMap<string, readonly string[]>,
): void {
  const done = new Set<string>();
  for (const { addressed, paths } of batches) {
    assert.ok(paths.length > 0);
    for (const path of paths) {
      assert.is(isDerivation(path), addressed, path);
      assert.not.ok(done.has(path), path);
      for (const target of references.get(path)!) {
        const fine = target === path || !references.has(target) ||
          done.has(target);
        assert.ok(fine, `${path} comes before ${target}`);
      }
      done.add(path);
    }
  }
  assert.is(done.size, references.size);
}

const isDerivation = (path: string) => path.endsWith(".drv");

test("makeBatches() puts references first", () => {
  const random = makeRandom(4);
  for (let round = 0; round < 200; round++) {
    const names = Array.from(
      { length: Math.floor(random() * 30) },
      (_, index) => `${index}${random() < 0.5 ? ".drv" : ""}`,
    );
    const entries = names.map((name, index) => {
      const targets = names.slice(0, index).filter(() => random() < 0.2);
      if (random() < 0.3) targets.push(name, "elsewhere");
      return [name, targets] as const;
    });
    entries.sort(() => random() - 0.5);
    const references = new Map(entries);
    checkBatches(makeBatches(references, isDerivation), references);
  }
});

test("makeBatches() makes few batches", () => {
  const batches = (entries: Record<string, string[]>) =>
    makeBatches(new Map(Object.entries(entries)), isDerivation)
      .map(({ paths }) => paths.toSorted().join(" "));
  assert.equal(batches({}), []);
  assert.equal(batches({ "a.drv": ["b.drv"], "b.drv": [] }), ["a.drv b.drv"]);
  assert.equal(
    batches({
      "top.drv": ["low.drv", "patch", "builder"],
      "low.drv": ["builder", "source"],
      "patch": [],
      "builder": ["source"],
      "source": [],
    }),
    ["builder patch source", "low.drv top.drv"],
  );
  assert.equal(
    batches({ "b": ["a.drv"], "a.drv": [], "c.drv": ["b"], "d": ["c.drv"] }),
    ["a.drv", "b", "c.drv", "d"],
  );
});

test("makeBatches() copes with long chains", () => {
  const references = new Map<string, string[]>();
  for (let index = 0; index < 20_000; index++) {
    references.set(`${index}.drv`, index > 0 ? [`${index - 1}.drv`] : []);
  }
  const batches = makeBatches(references, isDerivation);
  assert.is(batches.length, 1);
  checkBatches(batches, references);
});

/** A store item, and what its name follows from. */
interface AddressedItem {
  readonly kind: string;
  readonly path: string;
  readonly references: readonly string[];
  readonly narHash: string;
  readonly narSize: number;
  readonly contents: string;
}

test("contentAddress() knows what real names follow from", () => {
  for (const item of golden<AddressedItem[]>("addresses.json")) {
    const { kind, path, contents } = item;
    const read = () => Buffer.from(contents, "base64");
    assert.is(contentAddress(path, item, read) ?? "none", kind, path);
    const other = `${path}x`;
    assert.is(contentAddress(other, item, read), undefined, other);
    const referring = { ...item, references: ["/gnu/store/other"] };
    assert.is(contentAddress(path, referring, read), undefined, path);
    if (kind === "recursive") continue;
    const changed = () => Buffer.from("something else");
    assert.is(contentAddress(path, item, changed), undefined, path);
    assert.is(contentAddress(path, item, () => undefined), undefined, path);
  }
});

const HOST_KEY = Buffer.concat([
  Buffer.of(0, 0, 0, 11),
  Buffer.from("ssh-ed25519"),
  Buffer.of(0, 0, 0, 32),
  Buffer.alloc(32, 1),
]).toString("base64");

/** Runs the hook the way guix-daemon does. */
function hook(directory: string, args: string, input: string) {
  const [runtime, ...options] = ownRuntime;
  const rest = args.split(" ").slice(1);
  return run(runtime, [...options, `${ROOT}/mod.ts`, ...rest], {
    input,
    env: {
      ...process.env,
      GUIX_CONFIGURATION_DIRECTORY: directory,
      GUIX_STATE_DIRECTORY: directory,
    },
  });
}

for (const [version, golden] of Object.entries(goldenRequests)) {
  test(`the hook answers Guix ${version}, request by request`, async () => {
    await withDirectory(async (directory) => {
      const [plain, picky] = golden.requests;
      const { system } = parseRequest(plain);
      const machine = makeMachine({ systems: [system] });
      writeFileSync(
        `${directory}/machines.scm`,
        `(list (build-machine (name "${machine.name}")
           (systems (list "${system}"))
           (user "root")
           (private-key "/nowhere")
           (host-key "ssh-ed25519 ${HOST_KEY}")))\n`,
      );
      // Its only slot is taken, and it hasn't the features.
      const slot = acquireBuildSlot(machine, directory)!;
      const input = `${picky}\n${plain}\n${picky}\n`;
      const { code, stdout } = await hook(directory, golden.args, input);
      slot.release();
      assert.is(stdout.toString(), "# decline\n# postpone\n# decline\n");
      assert.is(code, 0);
    });
  });
}

test("processRequest() keeps nothing of a build that is given up", async () => {
  const only = machine({ name: "w1" });
  let closed = false;
  const plugin: Plugin = {
    name: "fake",
    machines: () => [only],
    connect: () => ({
      openSocket: () => Promise.resolve(greeter(request().derivation)),
      exec: () => Promise.reject(new Error("it runs nothing")),
      failure: () => undefined,
      close: () => void (closed = true),
    }),
    score: () => 1,
  };
  const { context } = makeContext({ plugins: [plugin] });
  const answers: string[] = [];
  const conversation = {
    readLine: () => Promise.resolve(undefined),
    answer: (word: string) => void answers.push(word),
  };
  const serving = processRequest(request(), conversation, context);
  await rejects(serving, /^guix-daemon gave up '/);
  assert.equal(answers, ["accept"]);
  assert.ok(closed, "its session is left open");
  const slot = acquireBuildSlot(only, context.stateDirectory);
  assert.ok(slot !== undefined, "its slot is taken");
  slot.release();
});

/** Asks a hook, in whose directory files have mistakes, twice each. */
async function askDespite(files: Readonly<Record<string, string>>) {
  return await withDirectory(async (directory) => {
    mkdirSync(`${directory}/offload`);
    for (const [name, text] of Object.entries(files)) {
      writeFileSync(`${directory}/${name}`, text);
    }
    const { args } = goldenRequests["1.5"]!;
    const [, own] = args.split(" ");
    const related = own === "aarch64-linux" ? "armhf-linux" : "i686-linux";
    const requests = [`1 ${own}`, `1 ${related}`, `0 ${own}`, "1 riscv64-none"]
      .map((request) => `${request} ${DRV} \n`);
    const input = requests.join("").repeat(2);
    return await hook(directory, args, input);
  });
}

test("what is wrong here fails no build that guix-daemon can't do", async () => {
  const mistakes: [files: Record<string, string>, message: string][] = [
    [{ "offload/settings.json": '{"atempts": 3}' }, "error: .*'?atempts"],
    [{ "machines.scm": "(list" }, "error: .*unexpected end of input"],
    [{ "machines.scm": "(list (build-machine))" }, "error: .*missing"],
    [{
      "offload/thrower.mjs":
        'export default { name: "thrower", machines() { throw "boom"; } };',
    }, "warning: plugin 'thrower': machines: boom"],
  ];
  for (const [files, message] of mistakes) {
    const { code, stdout, stderr } = await askDespite(files);
    assert.is(code, 0, stderr);
    const answers = stdout.toString().trim().split("\n");
    const expected = ["# decline", "# decline", "# postpone", "# postpone"];
    assert.equal(answers, [...expected, ...expected], stderr);
    assert.is(stderr.match(RegExp(message, "g"))?.length, 1, stderr);
    const waits = `offload: warning: '${DRV}' waits until that is corrected`;
    assert.is(stderr.split(waits).length, 2, stderr);
  }
  const fine = await askDespite({ "machines.scm": "(list)" });
  assert.is(fine.stdout.toString(), "# decline\n".repeat(8), fine.stderr);
});

test("shellLine() says the same to all shells", async () => {
  const command = `f() { printf '%s\\n' "$1: \`echo x\`" $2; }
f "it's \\\\ ! !! \\$HOME * ~ {a,b} %b %s" "$(cat)"
cat <<'END'
${"\t"}né 漢 'here' \\ !
END`;
  const line = shellLine(command);
  assert.match(line, /^exec [ -~]+$/);
  // What csh or fish would take for its own between single quotes.
  assert.match(line, /^[^']*'[^'!]*'[^']*'[^'!]*'$/);
  assert.not.match(line, /\\(?!0\d{3})/);
  const expected = "it's \\ ! !! $HOME * ~ {a,b} %b %s: x\ninput\n" +
    "\tné 漢 'here' \\ !\n";
  for (const shell of ["sh", "bash"]) {
    const result = await run(shell, ["-c", line], { input: "input" });
    assert.is(result.stdout.toString(), expected, result.stderr);
  }
});

test("the hook says what is wrong with a request", async () => {
  await withDirectory(async (directory) => {
    writeFileSync(`${directory}/machines.scm`, "(list)\n");
    const { args } = goldenRequests["1.5"]!;
    const result = await hook(directory, args, "what?\n");
    assert.is(result.code, 1);
    assert.is(result.stdout.toString(), "");
    assert.match(
      result.stderr,
      /error: invalid request line: "what\?"\nhint: /,
    );
  });
});

test.run();

import { execFileSync, spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import {
  chmodSync,
  chownSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { acquireBuildSlot, takenSlots } from "../mod.ts";
import type { Slot, UsedSlot } from "../mod.ts";
import { readJournal } from "../plugins/_journal.ts";
import clearLeftovers from "../plugins/_leftovers.ts";
import { SharedObservations } from "../plugins/_observations.ts";
import { makeContext } from "./context.ts";
import {
  FCNTL,
  makeMachine,
  ROOT,
  runtimes,
  settled,
  withDirectory,
} from "./helpers.ts";

const test = suite("slots");

const FILE = "offload/w1:22/0";

/** Locks a whole file as `guix offload` does, by fcntl. */
const HOLD = `${FCNTL}
$| = 1;
open my $file, "+>>", $ARGV[0] or die "$ARGV[0]: $!";
print lock_file($file, F_WRLCK) ? "held\\n" : "busy\\n";
<STDIN>`;

/** A process that holds what it could take until it is ended. */
interface Holder {
  /** What it printed. */
  readonly said: string;
  /** Ends it, so that its end can be told from its locks' release. */
  end(how: "orderly" | "SIGKILL"): Promise<void>;
}

async function hold(program: string, ...args: string[]): Promise<Holder> {
  const child: ChildProcess = spawn(program, args, {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const failed = once(child, "error").then(([cause]) => {
    throw new Error(`failed to run '${program}': is it there?`, { cause });
  });
  const lines = createInterface({ input: child.stdout! });
  const line = once(lines, "line");
  const ended = once(child, "exit");
  const early = ended.then(() => [""]);
  const [said] = await settled(Promise.race([line, early, failed]));
  const end = async (how: "orderly" | "SIGKILL") => {
    if (how === "SIGKILL") child.kill("SIGKILL");
    else child.stdin!.end();
    await settled(ended);
  };
  return { said, end };
}

/** Takes slots in a process of its own. */
function holdSlots(
  kind: "node" | "deno",
  directory: string,
  parallelBuilds: number,
  wanted: number,
): Promise<Holder> {
  const numbers = [parallelBuilds, wanted].map(String);
  const script = `${ROOT}/test/fixtures/slots.ts`;
  const [runtime, ...options] = runtimes[kind];
  return hold(runtime, ...options, script, directory, ...numbers);
}

function holdFcntl(directory: string): Promise<Holder> {
  return hold("perl", "-e", HOLD, `${directory}/${FILE}`);
}

function acquire(directory: string, parallelBuilds = 1): Slot | undefined {
  return acquireBuildSlot(makeMachine({ parallelBuilds }), directory);
}

test("acquireBuildSlot() hands out each slot once", async () => {
  await withDirectory((directory) => {
    const slots = [1, 2, 3].map(() => acquire(directory, 3)!);
    assert.equal(
      slots.map(({ file }) => file),
      [0, 1, 2].map((slot) => `${directory}/offload/w1:22/${slot}`),
    );
    assert.is(acquire(directory, 3), undefined);
    slots[1]!.release();
    const again = acquire(directory, 3)!;
    assert.is(again.file, slots[1]!.file);
    assert.is(acquire(directory, 3), undefined);
    for (const slot of [again, slots[0]!, slots[2]!]) slot.release();
    assert.is(acquire(directory, 0), undefined);
  });
});

test("acquireBuildSlot() takes another file by a held one's name", async () => {
  await withDirectory((directory) => {
    const taken = () => takenSlots(makeMachine({}), directory).length;
    const first = acquire(directory)!;
    assert.is(taken(), 1);
    rmSync(first.file);
    assert.is(taken(), 0);
    const second = acquire(directory)!;
    assert.is(taken(), 1);
    first.release();
    assert.is(acquire(directory), undefined);
    assert.is(taken(), 1);
    second.release();
    assert.is(taken(), 0);
  });
});

test("acquireBuildSlot() tells machines apart by name and port", async () => {
  await withDirectory((directory) => {
    const machines = [{}, { port: 2222 }, { name: "w2" }].map(makeMachine);
    const slots = machines.map((machine) =>
      acquireBuildSlot(machine, directory)!
    );
    assert.equal(
      readdirSync(`${directory}/offload`).sort(),
      ["w1:22", "w1:2222", "w2:22"],
    );
    for (const slot of slots) slot.release();
  });
});

test("acquireBuildSlot() leaves nothing but empty files", async () => {
  await withDirectory((directory) => {
    const check = () => {
      assert.equal(readdirSync(`${directory}/offload/w1:22`), ["0"]);
      assert.is(statSync(`${directory}/${FILE}`).size, 0);
    };
    const slot = acquire(directory)!;
    check();
    assert.is(acquire(directory), undefined);
    check();
    slot.release();
    check();
  });
});

for (const kind of ["node", "deno"] as const) {
  test(`acquireBuildSlot() respects what a ${kind} process holds`, async () => {
    await withDirectory(async (directory) => {
      const other = await holdSlots(kind, directory, 2, 1);
      assert.is(other.said, '["0"]');
      const ours = acquire(directory, 2)!;
      assert.match(ours.file, /\/1$/);
      assert.is(acquire(directory, 2), undefined);
      await other.end("orderly");
      const freed = acquire(directory, 2)!;
      assert.match(freed.file, /\/0$/);
      ours.release();
      freed.release();
    });
  });

  test(`acquireBuildSlot() keeps a ${kind} process from what is held`, async () => {
    await withDirectory(async (directory) => {
      const slot = acquire(directory)!;
      // Closing another descriptor of the file must not drop the lock.
      assert.is(acquire(directory), undefined);
      const none = await holdSlots(kind, directory, 1, 1);
      assert.is(none.said, "[null]");
      slot.release();
      const other = await holdSlots(kind, directory, 1, 2);
      assert.is(other.said, '["0",null]');
      await none.end("orderly");
      assert.is(acquire(directory), undefined);
      await other.end("SIGKILL");
      const freed = acquire(directory);
      assert.ok(freed, "what a killed process held is free");
      freed.release();
    });
  });
}

test("acquireBuildSlot() lets as many processes win as there are slots", async () => {
  await withDirectory(async (directory) => {
    const kinds = ["node", "deno", "node", "deno"] as const;
    const holders = await Promise.all(
      kinds.map((kind) => holdSlots(kind, directory, 3, 1)),
    );
    assert.equal(
      holders.map(({ said }) => said).sort(),
      ['["0"]', '["1"]', '["2"]', "[null]"],
    );
    await Promise.all(holders.map((holder) => holder.end("SIGKILL")));
  });
});

test("acquireBuildSlot() respects the locks of guix offload", async () => {
  await withDirectory(async (directory) => {
    mkdirSync(`${directory}/offload/w1:22`, { recursive: true });
    const guix = await holdFcntl(directory);
    assert.is(guix.said, "held");
    assert.is(acquire(directory), undefined);
    const next = acquire(directory, 2)!;
    assert.match(next.file, /\/1$/);
    next.release();
    await guix.end("SIGKILL");
    const slot = acquire(directory)!;
    assert.match(slot.file, /\/0$/);
    slot.release();
  });
});

test("acquireBuildSlot() keeps guix offload from what is held", async () => {
  await withDirectory(async (directory) => {
    const slot = acquire(directory)!;
    assert.is(acquire(directory), undefined);
    const busy = await holdFcntl(directory);
    assert.is(busy.said, "busy");
    await busy.end("orderly");
    slot.release();
    const guix = await holdFcntl(directory);
    assert.is(guix.said, "held");
    await guix.end("orderly");
  });
});

test("acquireBuildSlot() has slots in memory where there can't be files", async () => {
  const { context: { log }, warnings } = makeContext();
  // What is in memory has the machine's name, for all of this account.
  const only = makeMachine({ name: randomUUID(), parallelBuilds: 1 });
  const id = `${only.name}:${only.port}`;
  const check = (state: string) => {
    const acquire = () => acquireBuildSlot(only, state, log);
    const slot = acquire()!;
    assert.match(slot.file, `/dev/shm/guix-offload-`);
    assert.is(acquire(), undefined);
    slot.release();
    const again = acquire()!;
    again.release();
    rmSync(dirname(again.file), { recursive: true });
    const [warning] = warnings.splice(0);
    const failed = `failed to lock a build slot in '${state}/offload/${id}': `;
    assert.ok(warning!.startsWith(failed), warning);
  };
  await withDirectory((directory) => {
    writeFileSync(`${directory}/file`, "");
    check(`${directory}/file`); // where a directory must be, not of ours
    if (process.geteuid!() === 0) {
      mkdirSync(`${directory}/others`);
      chmodSync(directory, 0o711);
      // Who is led there is its owner, and may not make what he needs.
      mkdirSync(`${directory}/others/offload`, { mode: 0o500 });
      for (const it of ["others", "others/offload"]) {
        chownSync(`${directory}/${it}`, 65534, 65534);
      }
      chmodSync(`${directory}/others/offload`, 0o500);
      check(`${directory}/others`);
    }
  });
});

test("acquireBuildSlot() removes what is in the way", async () => {
  await withDirectory((directory) => {
    const id = `${directory}/offload/w1:22`;
    const obstacles = [
      () => mkdirSync(`${id}/0/more`, { recursive: true }),
      () => execFileSync("mkfifo", [`${id}/0`]),
      () => writeFileSync(id, ""),
      () => writeFileSync(dirname(id), ""),
    ];
    for (const [index, make] of obstacles.entries()) {
      rmSync(`${directory}/offload`, { recursive: true, force: true });
      mkdirSync([id, id, dirname(id), directory][index]!, {
        recursive: true,
      });
      make();
      const slot = acquire(directory)!;
      assert.is(slot.file, `${id}/0`);
      assert.is(acquire(directory), undefined);
      slot.release();
    }
    // A link to a file somewhere else is no obstacle.
    rmSync(`${id}/0`);
    writeFileSync(`${directory}/elsewhere`, "");
    symlinkSync(`${directory}/elsewhere`, `${id}/0`);
    acquire(directory)!.release();
    assert.ok(lstatSync(`${id}/0`).isSymbolicLink());
  });
});

test("acquireBuildSlot() empties what is in the way of a lock", async () => {
  await withDirectory(async (directory) => {
    mkdirSync(`${directory}/offload/w1:22`, { recursive: true });
    const damage = () =>
      writeFileSync(`${directory}/${FILE}`, "no lock file".repeat(99));
    damage();
    const slot = acquire(directory)!;
    assert.is(statSync(`${directory}/${FILE}`).size, 0);
    assert.is(acquire(directory), undefined);
    slot.release();
    damage();
    const guix = await holdFcntl(directory);
    assert.is(acquire(directory), undefined);
    await guix.end("orderly");
  });
});

/** A derivation, and what a hook of it has restored so far. */
function makeLeftovers(directory: string, name: string) {
  const output = `${directory}/${name}`;
  const derivation = `${output}.drv`;
  writeFileSync(
    derivation,
    `Derive([("out","${output}","","")],[],[],"x86_64-linux","/sh",[],[])`,
  );
  writeFileSync(`${output}.chroot`, "half of it");
  return { derivation, isThere: () => existsSync(`${output}.chroot`) };
}

/** A slot by its file. */
function nameOf(file: string): Pick<Slot, "file" | "inode"> {
  const { dev, ino } = statSync(file);
  return { file, inode: `${dev}:${ino}` };
}

/** A context whose database is in a directory. */
function contextIn(directory: string) {
  const { context } = makeContext();
  const observations = new SharedObservations(
    `${directory}/offload`,
    context.log,
  );
  return { ...context, observations };
}

test("clearLeftovers() clears what was killed, and no more", async () => {
  await withDirectory(async (directory) => {
    const context = contextIn(directory);
    const { observations } = context;
    const killed = makeLeftovers(directory, "killed");
    const alive = makeLeftovers(directory, "alive");
    const other = await holdSlots("node", directory, 3, 2);
    assert.is(other.said, '["0","1"]');
    const files = [0, 1].map((slot) => `${directory}/offload/w1:22/${slot}`);
    observations.useSlot("w1:22", nameOf(files[0]!), alive.derivation);
    const mine = acquire(directory, 3)!;
    observations.useSlot("w1:22", mine, killed.derivation);
    await clearLeftovers(mine, "/another.drv", context);
    assert.is(killed.isThere(), false, "my slot's former hook is dead");
    assert.is(alive.isThere(), true);
    const [noted, ...more] = readJournal(context, 0).entries;
    assert.equal(more, []);
    assert.is(noted!.derivation, killed.derivation);
    assert.is(noted!.outcome, "interrupted");
    assert.equal(observations.slots().map(({ file }) => file), [files[0]]);
    await other.end("SIGKILL");
    await clearLeftovers(mine, "/another.drv", context);
    assert.is(alive.isThere(), false);
    assert.equal(observations.slots(), []);
    // The lock that this took is free again, mine is not.
    const again = [acquire(directory, 3), acquire(directory, 3)];
    assert.equal(again.map((it) => it?.file), files);
    assert.is(acquire(directory, 3), undefined);
    [mine, ...again].forEach((slot) => slot!.release());
  });
});

test("clearLeftovers() spares a build that began since it looked", async () => {
  await withDirectory(async (directory) => {
    const context = contextIn(directory);
    const mine = acquire(directory, 2)!;
    const theirs = acquire(directory, 2)!;
    context.observations.useSlot("w1:22", theirs, "/killed.drv");
    theirs.release();
    const begun = makeLeftovers(directory, "begun");

    /** As slow as it takes for another hook to begin after each look. */
    class Slow extends SharedObservations {
      override slots(): UsedSlot[] {
        const slots = super.slots();
        super.useSlot("w1:22", theirs, begun.derivation);
        return slots;
      }
    }
    const { log } = context;
    const observations = new Slow(`${directory}/offload`, log);
    await clearLeftovers(mine, "/my.drv", { ...context, observations });
    assert.is(begun.isThere(), true, "its row was read, its slot free");
    const other = await holdSlots("node", directory, 2, 1);
    await clearLeftovers(mine, "/my.drv", { ...context, observations });
    assert.is(begun.isThere(), true, "its slot is taken");
    await other.end("orderly");
    mine.release();
  });
});

test("clearLeftovers() spares a build whose slot was made anew", async () => {
  await withDirectory(async (directory) => {
    const context = contextIn(directory);
    const alive = makeLeftovers(directory, "alive");
    const theirs = acquire(directory, 2)!;
    context.observations.useSlot("w1:22", theirs, alive.derivation);
    rmSync(`${directory}/offload/w1:22`, { recursive: true });
    const mine = acquire(directory, 2)!;
    assert.is(mine.file, theirs.file);
    await clearLeftovers(mine, "/another.drv", context);
    assert.is(alive.isThere(), true);
    assert.equal(context.observations.slots(), []);
    [mine, theirs].forEach((slot) => slot.release());
  });
});

test("clearLeftovers() spares a build that has another slot by now", async () => {
  await withDirectory(async (directory) => {
    const context = contextIn(directory);
    const alive = makeLeftovers(directory, "alive");
    const [mine, theirs, before] = [1, 2, 3].map(() => acquire(directory, 3)!);
    // The end of that could not be noted.
    context.observations.useSlot("w1:22", before!, alive.derivation);
    context.observations.useSlot("w1:22", theirs!, alive.derivation);
    before!.release();
    await clearLeftovers(mine!, "/another.drv", context);
    assert.is(alive.isThere(), true);
    assert.equal(readJournal(context, 0).entries, []);
    const left = context.observations.slots().map(({ file }) => file);
    assert.equal(left, [theirs!.file]);
    [mine, theirs].forEach((slot) => slot!.release());
  });
});

test("clearLeftovers() waits for another hook of the same build", async () => {
  await withDirectory(async (directory) => {
    const context = contextIn(directory);
    const same = makeLeftovers(directory, "same");
    const other = await holdSlots("node", directory, 2, 1);
    const file = `${directory}/offload/w1:22/0`;
    context.observations.useSlot("w1:22", nameOf(file), same.derivation);
    const mine = acquire(directory, 2)!;
    let isClear = false;
    const clear = clearLeftovers(mine, same.derivation, context)
      .then(() => isClear = true);
    // Others need not wait for it meanwhile.
    await clearLeftovers(mine, "/another.drv", context);
    assert.is(isClear, false);
    await other.end("orderly");
    await settled(clear);
    assert.is(same.isThere(), false);
    mine.release();
  });
});

test.run();

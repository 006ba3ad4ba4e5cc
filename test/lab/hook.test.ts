/** The hook, talked to by hand as the daemon talks to it. */

import { existsSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { closure, startHook } from "./hook.ts";
import type { Hook, HookOptions } from "./hook.ts";
import {
  assertOffloaded,
  build,
  buildCommand,
  buildLog,
  inHost,
  lab,
  makeWork,
  oneSlot,
  outputsOf,
  root,
  RUNTIMES,
  start,
  storeNames,
  until,
  up,
  useMachines,
  useOffload,
  watch,
  within,
  wrongKey,
} from "./lab.ts";
import type { Result, Runtime } from "./lab.ts";

for (const runtime of RUNTIMES) suiteUnder(runtime);

/** Runs `talk` with a hook that ends with it. */
async function withHook<T>(
  options: HookOptions,
  talk: (hook: Hook) => Promise<T>,
): Promise<T> {
  const hook = startHook("head", options);
  try {
    return await talk(hook);
  } finally {
    hook.close();
    await within("the end of the hook", hook.ended);
  }
}

/** Has a hook build something that is new; returns what came of it. */
function buildByHand(
  hook: Hook,
  derivation: string,
  outputs: readonly string[],
): Promise<Result> {
  hook.work(closure("head", derivation), outputs);
  return within("the end of the build", hook.ended);
}

function suiteUnder(runtime: Runtime): void {
  const test = suite(`hook under ${runtime}`);

  test.before(() => up("head", "w1", "w2"));
  test.before.each(() => useMachines("head", ["w1", "w2"]));

  test("requests are answered one after another, then one is built", () =>
    withHook({ runtime }, async (hook) => {
      const [derivation] = makeWork("head", "--log-lines=2");
      const outputs = Object.values(outputsOf("head", derivation!));
      const output = root("head") + outputs[0]!;
      assert.is(await hook.ask(derivation!, "riscv64-none"), "decline");
      assert.is(
        await hook.ask(derivation!, undefined, "nobody-has"),
        "decline",
      );
      assert.is(await hook.ask(derivation!), "accept");
      try {
        const { status, stderr } = await buildByHand(
          hook,
          derivation!,
          outputs,
        );
        assert.is(status, 0, stderr);
        assert.ok(existsSync(`${output}/result`));
        assert.match(
          stderr,
          RegExp(`^@ build-remote ${derivation} w[12]$`, "m"),
        );
        assert.is(
          hook.log(),
          "building work\nline 1 of 2\nline 2 of 2\nbuilt work\n",
        );
        assert.not.match(stderr, "line 1 of 2");
      } finally {
        rmSync(output, { recursive: true, force: true });
      }
    }));

  test("a feature that one machine has chooses it", () => {
    const [derivation] = makeWork("head");
    useMachines(
      "head",
      ["w1", "w2"],
      (text) =>
        text.replace('(name "w2")', '$&\n  (features (list "kvm" "big"))'),
    );
    return withHook({ runtime }, async (hook) => {
      assert.is(
        await hook.ask(derivation!, undefined, "big,kvm,no"),
        "decline",
      );
      assert.is(await hook.ask(derivation!, undefined, "big,kvm"), "accept");
      const outputs = Object.values(outputsOf("head", derivation!));
      const { status, stderr } = await buildByHand(hook, derivation!, outputs);
      rmSync(root("head") + outputs[0]!, { recursive: true, force: true });
      assert.is(status, 0, stderr);
      assert.ok(buildLog("w2", derivation!));
    });
  });

  test("a build that fails is exit code 100", () =>
    withHook({ runtime }, async (hook) => {
      const [derivation] = makeWork("head", "--fail", "--log-lines=1");
      const outputs = Object.values(outputsOf("head", derivation!));
      assert.is(await hook.ask(derivation!), "accept");
      const before = storeNames("head");
      const { status, stderr } = await buildByHand(hook, derivation!, outputs);
      assert.is(status, 100, stderr);
      assert.match(hook.log(), "line 1 of 1\nfailing, as told to\n");
      assert.match(stderr, `derivation '${derivation}' offloaded to 'w`);
      assert.equal(storeNames("head"), before);
    }));

  for (const limit of ["maxSilentTime", "buildTimeout"] as const) {
    test(`a build beyond its ${limit} is exit code 101`, () => {
      const [derivation] = makeWork("head", "--silent", "--seconds=20");
      const outputs = Object.values(outputsOf("head", derivation!));
      return withHook({ runtime, [limit]: 1 }, async (hook) => {
        assert.is(await hook.ask(derivation!), "accept");
        const result = await buildByHand(hook, derivation!, outputs);
        assert.is(result.status, 101, result.stderr);
        assert.match(
          hook.log(),
          `building of \`${derivation}' timed out after`,
        );
      });
    });
  }

  const pretended = [
    ...["timed out after 1 seconds of silence", "timed out after %2% seconds"]
      .map((what) => (derivation: string) =>
        `building of \`${derivation}' ${what}\n`
      ),
    (derivation: string) =>
      `builder for \`${derivation}' failed due to signal 9 (Killed)\n`,
  ];
  test("what a builder prints itself decides nothing", async () => {
    lab("daemon", "w1", "--", "--disable-chroot"); // it reads a file there
    useMachines("head", ["w1"]);
    try {
      for (const line of pretended) {
        const [derivation] = makeWork("head", "--fail", "--print=/tmp/lie");
        const outputs = Object.values(outputsOf("head", derivation!));
        const lie = line(derivation!);
        writeFileSync(`${root("w1")}/tmp/lie`, lie);
        await withHook({ runtime }, async (hook) => {
          assert.is(await hook.ask(derivation!), "accept");
          const result = await buildByHand(hook, derivation!, outputs);
          assert.ok(hook.log().includes(lie), hook.log());
          assert.is(result.status, 100, result.stderr);
        });
      }
    } finally {
      lab("daemon", "w1");
    }
  });

  test("a build with an input that is nowhere is transient", () =>
    withHook({ runtime }, async (hook) => {
      const [derivation] = makeWork("head");
      const outputs = Object.values(outputsOf("head", derivation!));
      const missing = `/gnu/store/${"0".repeat(32)}-missing`;
      assert.is(await hook.ask(derivation!), "accept");
      hook.work([derivation!, missing], outputs);
      const { status, stderr } = await within("the end", hook.ended);
      assert.is(status, 1, stderr);
      assert.match(stderr, /^offload: error: .*-missing/m);
    }));

  test("a line that is no request is told, with exit code 1", () =>
    withHook({ runtime }, async (hook) => {
      hook.say("good morning");
      const { status, stdout, stderr } = await within("the end", hook.ended);
      assert.is(status, 1);
      assert.is(stdout, "");
      assert.match(
        stderr,
        'error: invalid request line: "good morning"\nhint: ',
      );
      assert.not.match(stderr, "at "); // no stack
    }));

  test("guix offload builds where Offload does not start", () => {
    const copy = "/tmp/checkout";
    inHost("head", "mkdir", "-p", `${copy}/scripts`);
    const files = ["guix", "runtime.sh"].map((it) => `/offload/scripts/${it}`);
    inHost("head", "cp", ...files, `${copy}/scripts`);
    inHost("head", "ln", "-sfn", "/offload/node_modules", copy);
    writeFileSync(`${root("head")}${copy}/mod.ts`, "const = 1;\n");
    const ways = [
      ["OFFLOAD_RUNTIME=/none", /warning: neither Node .* takes over/],
      [`GUIX=${copy}/scripts/guix`, /' ended with exit code 1 .* takes over/],
    ] as const;
    try {
      for (const [variable, why] of ways) {
        useOffload("head", runtime, variable);
        const [derivation] = makeWork("head");
        const built = build("head", derivation!);
        assertOffloaded(derivation!, built, ["w1", "w2"]);
        assert.match(built.stderr, why);
        assert.is(built.stderr.split("takes over").length, 2);
      }
    } finally {
      useOffload("head", runtime);
    }
  });

  test("the hook works below busybox's shell", () => {
    const shell = "/tmp/guix";
    const script = '#!/bin/sh\nexec busybox sh /offload/scripts/guix "$@"\n';
    writeFileSync(root("head") + shell, script, { mode: 0o755 });
    useOffload("head", runtime, `GUIX=${shell}`);
    try {
      const [derivation, other] = makeWork("head", "--count=2");
      assertOffloaded(derivation!, build("head", derivation!), ["w1", "w2"]);
      useOffload("head", runtime, `GUIX=${shell}`, "OFFLOAD_RUNTIME=/none");
      const { stderr } = build("head", other!);
      assert.match(stderr, "'guix offload' takes over");
    } finally {
      useOffload("head", runtime);
    }
  });

  test("an input that ends ends the hook quietly", async () => {
    const [derivation] = makeWork("head");
    const ends = [[], ["riscv64-none"]].map((systems) =>
      withHook({ runtime }, async (hook) => {
        for (const system of systems) await hook.ask(derivation!, system);
        hook.close();
        const { status, stdout, stderr } = await within("the end", hook.ended);
        assert.is(status, 0);
        assert.is(stdout, systems.map(() => "# decline\n").join(""));
        assert.is(stderr, "");
      })
    );
    await Promise.all(ends);
  });

  test("an input that ends after an accept is an error", () =>
    withHook({ runtime }, async (hook) => {
      const [derivation] = makeWork("head");
      assert.is(await hook.ask(derivation!), "accept");
      hook.close();
      const { status, stderr } = await within("the end", hook.ended);
      assert.is(status, 1);
      assert.match(stderr, `guix-daemon gave up '${derivation}'`);
    }));

  test("slots are shared with guix offload", async () => {
    useMachines("head", ["w1", "w2"], oneSlot);
    const [derivation] = makeWork("head");
    const ask = (hook: Hook) => hook.ask(derivation!);
    await withHook({ runtime }, async (ours) => {
      await withHook({}, async (first) => {
        assert.is(await ask(first), "accept");
        await withHook({}, async (second) => {
          assert.is(await ask(second), "accept");
          assert.is(await ask(ours), "postpone");
        });
        assert.is(await ask(ours), "accept");
        await withHook({}, async (third) => {
          assert.is(await ask(third), "postpone");
        });
      });
    });
    // Who is gone holds nothing.
    await withHook({ runtime }, async (ours) => {
      assert.is(await ask(ours), "accept");
    });
  });

  test("slots are as many as the machine file says", async () => {
    useMachines("head", ["w1"]);
    const [derivation] = makeWork("head");
    await withHook({ runtime }, async (first) => {
      assert.is(await first.ask(derivation!), "accept");
      await withHook({ runtime }, async (second) => {
        assert.is(await second.ask(derivation!), "accept");
        await withHook({ runtime }, async (third) => {
          assert.is(await third.ask(derivation!), "postpone");
          second.close();
          await within("the end", second.ended);
          assert.is(await third.ask(derivation!), "accept");
        });
      });
    });
  });

  test("a mistake in the settings lets a build wait, not fail", async () => {
    useOffload("head", runtime);
    const directory = `${root("head")}/etc/guix/offload`;
    const settings = `${directory}/settings.json`;
    mkdirSync(directory, { recursive: true });
    writeFileSync(settings, '{"atempts": 3}');
    try {
      const [derivation] = makeWork("head");
      const building = watch(start("head", ...buildCommand([derivation!])));
      const error = /offload: error: .*atempts/g;
      await until("the mistake", () => error.test(building.text()));
      // However often the daemon asks again, it is told once.
      await withHook({ runtime }, async (hook) => {
        for (let asked = 0; asked < 3; asked++) {
          assert.is(await hook.ask(derivation!), "postpone");
        }
        assert.is(hook.text().match(error)?.length, 1, hook.text());
      });
      writeFileSync(settings, "{}");
      const result = await within("the end of the build", building.ended);
      assertOffloaded(derivation!, result, ["w1", "w2"]);
      assert.is(result.stderr.match(error)?.length, 1, result.stderr);
    } finally {
      rmSync(settings);
    }
  });

  test("a machine that shows another host key is named and left", () => {
    useMachines("head", ["w1"], wrongKey);
    const [derivation] = makeWork("head");
    return withHook({ runtime }, async (hook) => {
      assert.is(await hook.ask(derivation!), "postpone");
      assert.match(hook.text(), /warning: server at 'w1' returned host key/);
      assert.match(hook.text(), /^hint: .*host-key/m);
      // Once it is corrected, the same hook goes on.
      useMachines("head", ["w1"]);
      assert.is(await hook.ask(derivation!), "accept");
    });
  });

  test.run();
}

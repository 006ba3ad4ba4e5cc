import { spawn } from "node:child_process";
import { once } from "node:events";
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname } from "node:path";
import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { ROOT, run, runtimes, settled } from "./helpers.ts";
import {
  findTool,
  HOOK,
  type Sandbox,
  sandbox,
  SHELLS,
  STARTED,
} from "./sandbox.ts";

const test = suite("shim");

const NODE_OPTIONS =
  "--disable-warning=ExperimentalWarning\n--max-semi-space-size=2";
const DENO_OPTIONS =
  "run\n--v8-flags=--max-semi-space-size=2\n--allow-all\n--no-prompt";

test("guix hands other commands to the real guix", async () => {
  await sandbox(async (box) => {
    box.guix("bin/guix");
    for (const args of [["authenticate", "a b", ""], ["--version"], []]) {
      const { code, stdout, stderr } = await box.call(args);
      assert.is(stdout, `bin/guix:\n${args.join("\n")}\n`);
      assert.is(stderr, "");
      assert.is(code, 0);
    }
  });
});

test("guix passes on input, output and exit code", async () => {
  await sandbox(async (box) => {
    box.program("bin/guix", "cat; echo wrong >&2; exit 42");
    const result = await box.call(["substitute"], { input: "some\ninput" });
    assert.is(result.stdout, "some\ninput");
    assert.is(result.stderr, "wrong\n");
    assert.is(result.code, 42);
  });
});

test("guix takes the guix that OFFLOAD_GUIX names", async () => {
  await sandbox(async (box) => {
    box.guix("bin/guix");
    const env = { OFFLOAD_GUIX: box.guix("other guix") };
    const { stdout } = await box.call(["gc"], { env });
    assert.is(stdout, "other guix:\ngc\n");
    const empty = await box.call(["gc"], { env: { OFFLOAD_GUIX: "" } });
    assert.is(empty.stdout, "bin/guix:\ngc\n");
  });
});

test("guix does not take itself for the real guix", async () => {
  await sandbox(async (box) => {
    mkdirSync(`${box.directory}/links`);
    symlinkSync(box.shim, `${box.directory}/links/guix`);
    symlinkSync("../links/guix", `${box.directory}/checkout/guix`);
    box.guix("bin/guix");
    const shim = `${box.directory}/links/guix`;
    const bin = "checkout/scripts:links:checkout:bin";
    for (const program of [box.shim, shim]) {
      const { stdout } = await box.call(["gc"], { bin, shim: program });
      assert.is(stdout, "bin/guix:\ngc\n");
    }
  });
});

test("guix refuses to call itself for ever", async () => {
  await sandbox(async (box) => {
    // Whatever else there is, it leads back.
    const wrapper = box.program("bin/guix", `exec '${box.shim}' "$@"`);
    for (const guix of [box.shim, wrapper, ""]) {
      const env = { OFFLOAD_GUIX: guix };
      // The processor time that it may take, in seconds.
      const shim = box.program("limited", `ulimit -t 2; '${box.shim}' "$@"`);
      const { code, stderr } = await box.call(["gc"], { env, shim });
      assert.match(stderr, /^offload: error: .*guix.*\nhint: .*OFFLOAD_GUIX/);
      assert.is(code, 1);
    }
  });
});

test("guix says where there is no real guix", async () => {
  await sandbox(async (box) => {
    const env = { OFFLOAD_GUIX: `${box.directory}/none` };
    const { code, stderr } = await box.call(["gc"], { env });
    assert.match(stderr, `${box.directory}/none`);
    assert.ok(code !== 0);
  });
});

/** How the daemon starts its hook. */

test("guix offload runs mod.ts with Node, else Deno", async () => {
  await sandbox(async (box) => {
    const mod = `${box.directory}/checkout/mod.ts`;
    box.runtime("b/deno", "deno 2.9.5 (stable, release)\\nv8 15.0\\ntypes 6");
    const args = ["offload", "x86_64-linux", "3600", "true", "86400", "a b"];
    const rest = args.slice(1).join("\n");
    const deno = await box.call(args, { bin: "a:b" });
    assert.is(deno.stdout, `b/deno:\n${DENO_OPTIONS}\n${mod}\n${rest}\n`);
    box.runtime("a/node", "v24.1.0");
    const node = await box.call(args, { bin: "b:a" });
    assert.is(node.stdout, `a/node:\n${NODE_OPTIONS}\n${mod}\n${rest}\n`);
    symlinkSync(box.shim, `${box.directory}/guix`);
    const shim = `${box.directory}/guix`;
    const linked = await box.call(args, { bin: "a", shim });
    assert.is(linked.stdout, node.stdout);
  });
});

test("guix offload runs all commands of Offload", async () => {
  await sandbox(async (box) => {
    box.guix("bin/guix");
    box.runtime("bin/node", "v24.1.0");
    for (const args of [["test", "a b"], ["status"], ["--version"], []]) {
      const { code, stdout } = await box.call(["offload", ...args]);
      const mod = `${box.directory}/checkout/mod.ts`;
      const words = [NODE_OPTIONS, mod, ...args];
      assert.is(stdout, `bin/node:\n${words.join("\n")}\n`);
      assert.is(code, 0);
    }
  });
});

test("guix offload takes the runtime that OFFLOAD_RUNTIME names", async () => {
  await sandbox(async (box) => {
    box.runtime("bin/node", "v24.1.0");
    box.runtime("bin/deno", "deno 2.9.5");
    const call = async (OFFLOAD_RUNTIME: string) => {
      const env = { OFFLOAD_RUNTIME };
      return (await box.call(["offload"], { env })).stdout.split(":")[0];
    };
    assert.is(await call("node"), "bin/node");
    assert.is(await call("deno"), "bin/deno");
    assert.is(await call(""), "bin/node");
    assert.is(await call(box.runtime("my deno", "deno 3.0.0")), "my deno");
    assert.is(await call(box.runtime("my node", "v30.0.0")), "my node");
  });
});

test("guix offload takes the runtimes of the checkout where it must", async () => {
  await sandbox(async (box) => {
    const beside = "checkout/node_modules";
    const env = { OFFLOAD_RUNTIME: "deno" };
    box.runtime("bin/node", "v20.20.2");
    box.runtime(`${beside}/@deno/x/deno`, "deno 2.9.5");
    const deno = await box.call(["offload"], { env });
    assert.match(deno.stdout, `${beside}/@deno/x/deno:`);
    const other = await box.call(["offload"]);
    assert.is(other.stdout, deno.stdout);
    box.runtime(`${beside}/node/bin/node`, "v24.1.0");
    const node = await box.call(["offload"]);
    assert.match(node.stdout, `${beside}/node/bin/node:`);
  });
});

test("guix offload takes no Node without TypeScript, as Debian's is", async () => {
  await sandbox(async (box) => {
    const debians = ["v24.1.0", "echo ran", "false"] as const;
    const without = box.pretend("bin/node", ...debians);
    for (const OFFLOAD_RUNTIME of ["", "node", without]) {
      const env = { OFFLOAD_RUNTIME };
      const { code, stderr } = await box.call(["offload"], { env });
      assert.match(stderr, "Node has to run TypeScript");
      assert.is(code, 1);
    }
    const own = "checkout/node_modules/node/bin/node";
    box.runtime(own, "v24.1.0");
    const { stdout } = await box.call(["offload"]);
    assert.match(stdout, `${own}:`);
  });
});

test("guix offload runs the bundle of a release, with its runtime", async () => {
  await sandbox(async (box) => {
    const release = `${box.directory}/release`;
    box.runtime("bin/node", "v24.1.0");
    box.program("release/offload.mjs", "");
    for (const name of ["guix", "offload", "runtime.sh"]) {
      copyFileSync(`${ROOT}/scripts/${name}`, `${release}/${name}`);
    }
    const mod = `${release}/offload.mjs`;
    const shim = `${release}/guix`;
    const found = await box.call(["offload", "x"], { shim });
    assert.is(found.stdout, `bin/node:\n${NODE_OPTIONS}\n${mod}\nx\n`);
    // Where it was installed.
    symlinkSync(box.runtime("far/away", "deno 2.9.5"), `${release}/runtime`);
    const recorded = await box.call(["offload", "x"], { shim });
    assert.is(recorded.stdout, `far/away:\n${DENO_OPTIONS}\n${mod}\nx\n`);
    symlinkSync(`${release}/offload`, `${box.directory}/offload`);
    const command = `${box.directory}/offload`;
    const called = await box.call(["x"], { shim: command });
    assert.is(called.stdout, recorded.stdout);
    // It is gone, or too old by now.
    box.runtime("far/away", "deno 2.0.0");
    assert.is(
      (await box.call(["offload", "x"], { shim })).stdout,
      found.stdout,
    );
  });
});

test("guix offload needs nothing in PATH", async () => {
  await sandbox(async (box) => {
    const env = { OFFLOAD_RUNTIME: box.runtime("my node", "v24.1.0") };
    const { stdout, stderr } = await box.call(["offload"], {
      env,
      bin: "none",
    });
    assert.match(stdout, "my node:", stderr);
    const { code } = await run(box.shim, ["offload"], {
      env: { ...env, PATH: "/nonexistent" },
    });
    assert.is(code, 0);
  });
});

test("guix offload refuses runtimes that are old or strange", async () => {
  const versions = {
    node: ["v22.13.9", "v21.99.0", "v9.0.0", "v", "x", "", "22.14.0"],
    deno: ["deno 2.7.13", "deno 2.6.99", "deno 1.46.3", "deno ", "deno x.y.z"],
  };
  await sandbox(async (box) => {
    const check = async (OFFLOAD_RUNTIME: string) => {
      const env = { OFFLOAD_RUNTIME };
      const { code, stdout, stderr } = await box.call(["offload"], { env });
      assert.match(
        stderr,
        /^offload: error: .*Node 22\.14 .*Deno 2\.7\.14.*\nhint: .+\n$/,
      );
      assert.is(stdout, "");
      assert.is(code, 1);
    };
    for (const kind of ["node", "deno"] as const) {
      for (const version of versions[kind]) {
        await check(box.runtime("my runtime", version));
      }
    }
    await check(box.program("my runtime", "exit 1"));
    await check(`${box.directory}/none`);
    box.runtime("bin/node", "v22.13.9");
    box.runtime("bin/deno", "deno 2.7.13");
    for (const name of ["", "node", "deno"]) await check(name);
  });
});

test("guix offload accepts the oldest runtimes and previews", async () => {
  const versions = [
    "v22.14.0",
    "v22.18.1",
    "v22.20.0-nightly20250801",
    "v23.0.0",
  ]
    .concat([
      "deno 2.7.14",
      "deno 2.8.0",
      "deno 3.0.0-rc.1+abc",
      "deno 10.0.0",
    ]);
  await sandbox(async (box) => {
    for (const version of versions) {
      const env = { OFFLOAD_RUNTIME: box.runtime("my runtime", version) };
      const { stdout, stderr } = await box.call(["offload"], { env });
      assert.match(stdout, "my runtime:", `${version}: ${stderr}`);
    }
  });
});

/** Demands that the hook's requests go to the real guix, and commands fail. */
async function assertHandedOver(
  box: Sandbox,
  why: RegExp,
  env: Record<string, string>,
  shells = SHELLS,
): Promise<void> {
  box.program("bin/guix", 'printf "%s\\n" "$*"; cat; exit 42');
  const input = "1 x86_64-linux /gnu/store/x.drv \n0 y\n";
  for (const shell of shells) {
    const shim = box.program(
      "call",
      `exec ${findTool(shell)} ${box.shim} "$@"`,
    );
    const result = await box.call(HOOK, { env, input, shim });
    assert.is(result.stdout, `${HOOK.join(" ")}\n${input}`, result.stderr);
    assert.match(result.stderr, why);
    assert.is(result.stderr.split("offload: warning: ").length, 2);
    assert.match(
      result.stderr,
      /^offload: warning: .*: 'guix offload' takes over\nhint: .+\n$/m,
    );
    assert.is(result.code, 42);
    const failed = await box.call(["offload", "test"], { env, shim });
    assert.ok(![0, 42].includes(failed.code), failed.stderr);
    assert.is(failed.stdout, "");
  }
}

const NO_RUNTIME = /neither Node 22\.14 nor Deno 2\.7\.14/;

test("guix offload hands over where no runtime runs", () =>
  sandbox(async (box) => {
    const check = (why: RegExp, OFFLOAD_RUNTIME: string) =>
      assertHandedOver(box, why, { OFFLOAD_RUNTIME });
    await check(NO_RUNTIME, `${box.directory}/none`);
    await check(NO_RUNTIME, box.runtime("old", "v22.13.9"));
    await check(NO_RUNTIME, box.program("failing", "exit 1"));
    await check(NO_RUNTIME, box.program("dying", "kill -SEGV $$"));
    const damaged = box.program("damaged", "");
    writeFileSync(damaged, "\x7fELF\x02\x01\x01\0\0".padEnd(200, "\0"));
    await check(NO_RUNTIME, damaged);
    writeFileSync(damaged, "#!/no/such/loader\n");
    await check(NO_RUNTIME, damaged);
    chmodSync(damaged, 0o644);
    await check(NO_RUNTIME, damaged);
    const ends = (script: string) => box.pretend("ending", "v24.1.0", script);
    await check(/ending' ended with exit code 1 /, ends("exit 1"));
    await check(/ending' ended with exit code 1\d\d /, ends("kill -SEGV $$"));
    await check(/ending' ended with exit code 137 /, ends("kill -KILL $$"));
  }));

for (const kind of ["node", "deno"] as const) {
  test(`guix offload hands over what ${kind} does not start`, () =>
    sandbox(async (box) => {
      const { directory, mod } = box;
      const check = (why: RegExp) =>
        assertHandedOver(
          ...[box, why, { OFFLOAD_RUNTIME: runtimes[kind][0] }] as const,
          ["sh"],
        );
      const ended = /' ended with exit code 1 before it read a request/;
      rmSync(mod);
      await check(/cannot read '.*\/mod\.ts'/);
      mkdirSync(mod);
      await check(ended);
      rmSync(mod, { recursive: true });
      writeFileSync(mod, "const = 1;\n");
      await check(ended);
      writeFileSync(mod, 'import "./deps.ts";\n');
      await check(ended);
      writeFileSync(mod, 'import "no-such-package";\n');
      await check(ended);
      writeFileSync(mod, 'throw new Error("too old");\n');
      await check(ended);
      rmSync(`${directory}/checkout/node_modules`, { recursive: true });
      await check(/there is no '.*\/node_modules'/);
      writeFileSync(`${dirname(box.shim)}/offload.mjs`, "import {");
      await check(ended);
      rmSync(`${dirname(box.shim)}/runtime.sh`);
      await check(/cannot read '.*\/runtime\.sh'/);
      // What is the real guix's needs none of it.
      const other = await box.call(["authenticate"]);
      assert.match(other.stdout, /authenticate\n$/);
    }));
}

test("guix offload hands over where it is switched off, and says so", () =>
  sandbox(async (box) => {
    box.pretend("bin/node", "v24.1.0", `${STARTED}; cat`);
    box.program("bin/guix", 'printf "%s\\n" "$*"; cat; exit 42');
    const input = "1 x86_64-linux /gnu/store/x.drv \n";
    const places = {
      GUIX_CONFIGURATION_DIRECTORY: [box.directory, "offload"],
      OFFLOAD_PLUGINS: [`${box.directory}/plugins`, ""],
    };
    for (const [name, [value, below]] of Object.entries(places)) {
      const env = { [name]: value! };
      const on = await box.call(HOOK, { env, input });
      assert.is(on.stdout, input, on.stderr);
      const off = `${value}/${below ? `${below}/` : ""}off`;
      box.program(off.slice(box.directory.length + 1), "");
      for (const shell of SHELLS) {
        const script = `exec ${findTool(shell)} ${box.shim} "$@"`;
        const shim = box.program("call", script);
        const { code, stdout, stderr } = await box.call(
          ...[HOOK, { env, input, shim }] as const,
        );
        assert.is(stdout, `${HOOK.join(" ")}\n${input}`);
        const why = `'${off}' is there: 'guix offload' takes over`;
        assert.match(stderr, `offload: warning: ${why}\nhint: remove it `);
        assert.is(code, 42);
      }
      // Commands are still there.
      const OFFLOAD_RUNTIME = box.runtime("other", "v24.1.0");
      const command = await box.call(["offload", "test"], {
        env: { ...env, OFFLOAD_RUNTIME },
      });
      assert.match(command.stdout, "mod.ts\ntest\n");
      rmSync(off);
    }
  }));

test("guix offload says where there is nobody to hand over to", () =>
  sandbox(async (box) => {
    const env = { OFFLOAD_RUNTIME: `${box.directory}/none` };
    const { code, stdout, stderr } = await box.call(HOOK, { env });
    assert.match(stderr, NO_RUNTIME);
    assert.match(stderr, /^offload: error: cannot find guix\nhint: .+\n$/m);
    assert.is(stdout, "");
    assert.is(code, 1);
    // Another one, through which it comes back.
    const guix = { ...env, OFFLOAD_GUIX: box.shim };
    const shim = box.program("limited", `ulimit -t 2; '${box.shim}' "$@"`);
    const back = await box.call(HOOK, { env: guix, shim });
    assert.match(back.stderr, /^offload: error: .*leads back to/m);
    assert.is(back.code, 1);
  }));

test("guix offload hands nothing over once it has started", () =>
  sandbox(async (box) => {
    box.guix("bin/guix");
    for (const code of [0, 1, 2, 100, 101, 127]) {
      const script = `${STARTED}; cat; echo wrong >&2; exit ${code}`;
      box.pretend("bin/node", "v24.1.0", script);
      for (const shell of SHELLS) {
        const shim = box.program(
          ...["call", `exec ${findTool(shell)} ${box.shim} "$@"`] as const,
        );
        const result = await box.call(HOOK, { shim, input: "a\nb" });
        assert.is(result.stdout, "a\nb");
        assert.is(result.stderr, "wrong\n");
        assert.is(result.code, code);
      }
    }
    box.pretend("bin/node", "v24.1.0", `${STARTED}; kill -KILL $$`);
    const killed = await box.call(HOOK);
    assert.is(killed.stdout + killed.stderr, "");
    assert.is(killed.code, 137);
  }));

/** Starts the hook; it says a word once it has started, or before. */
async function startHook(box: Sandbox, shell: string, env = {}) {
  const stdio = ["pipe", "pipe", "pipe", "ignore", "pipe"] as const;
  const child = spawn(findTool(shell), [box.shim, ...HOOK], {
    env: { PATH: `${box.directory}/bin:${box.directory}/tools`, ...env },
    stdio: [...stdio],
  });
  const ended = new Promise<number | null>((resolve) =>
    child.on("close", resolve)
  );
  const [first] = await once(child.stdout!, "data");
  return { child, ended, first: String(first) };
}

test("guix offload passes signals on, and keeps nothing open", () =>
  sandbox(async (box) => {
    box.guix("bin/guix");
    const wait = "echo $$; while :; do sleep 0.05; done";
    symlinkSync(findTool("sleep"), `${box.directory}/tools/sleep`);
    for (const shell of SHELLS) {
      for (const [signal, code] of [["TERM", 7], ["HUP", 8]] as const) {
        for (const started of [STARTED, ":"]) {
          const script = `trap 'exit ${code}' ${signal}; ${started}; ${wait}`;
          box.pretend("bin/node", "v24.1.0", script);
          const { child, ended } = await settled(startHook(box, shell));
          const open = () =>
            ["0", "1", "2", "4", "8"].filter((fd) => {
              const file = `/proc/${child.pid}/fd/${fd}`;
              return existsSync(file) && readlinkSync(file) !== "/dev/null";
            });
          while (started === STARTED && open().length > 0) await delay(5);
          // Deno knows no exit code of a child that was sent one by `kill`.
          process.kill(child.pid!, `SIG${signal}`);
          assert.is(await settled(ended), code);
        }
      }
    }
  }));

for (const kind of ["node", "deno"] as const) {
  test(`guix offload ends with its shim, under ${kind}`, async () => {
    const env = { ...process.env, OFFLOAD_RUNTIME: runtimes[kind][0] };
    const child = spawn(`${ROOT}/scripts/guix`, HOOK, { env });
    child.stdin.write("0 riscv64-none /x.drv \n");
    const [answer] = await settled(once(child.stdout, "data"));
    assert.is(String(answer), "# decline\n");
    // The shim keeps no pipe: they end with the hook.
    const ended = once(child.stdout, "end");
    child.kill("SIGKILL");
    await settled(ended);
  });

  test(`guix offload works with the real ${kind}`, async () => {
    const env = { ...process.env, OFFLOAD_RUNTIME: runtimes[kind][0] };
    const args = ["offload", "x86_64-linux", "3600", "true", "86400"];
    const { code, stderr } = await run(`${ROOT}/scripts/guix`, args, { env });
    assert.is(stderr, "");
    assert.is(code, 0);
  });
}

test.run();

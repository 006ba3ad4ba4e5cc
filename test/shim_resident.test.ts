/** What the shim does beside a process that stays. */

import { execFileSync, spawn } from "node:child_process";
import {
  chmodSync,
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { settled, until } from "./helpers.ts";
import { findTool, HOOK, sandbox, SHELLS, STARTED } from "./sandbox.ts";
import type { Sandbox } from "./sandbox.ts";

const test = suite("shim beside a resident process");

const REQUESTS = [
  "1 x86_64-linux /gnu/store/a.drv ",
  "1 x86_64-linux /b.drv a",
];

/** Stands for the process that stays. */
class Peer {
  readonly directory: string;
  readonly #files: number[];
  #text = "";

  /** Makes what a shim finds, with so many reply FIFOs. */
  constructor(box: Sandbox, replies = 2) {
    this.directory = `${box.directory}/state/offload/resident`;
    mkdirSync(this.directory, { recursive: true, mode: 0o700 });
    const names = Array.from({ length: replies }, (_, it) => `reply-${it}`);
    const files = [...names, "inbox"].map((it) => `${this.directory}/${it}`);
    execFileSync("mkfifo", ["-m", "600", ...files]);
    const flags = constants.O_RDWR | constants.O_NONBLOCK;
    this.#files = files.map((file) => openSync(file, flags));
  }

  /** What shims have written. */
  get messages(): string[] {
    const bytes = new Uint8Array(4096);
    try {
      const size = readSync(this.#files.at(-1)!, bytes);
      this.#text += new TextDecoder().decode(bytes.subarray(0, size));
    } catch {
      // Nothing is there.
    }
    return this.#text.split("\n").slice(0, -1);
  }

  /** Answers. */
  say(word: string, reply = 0): void {
    writeSync(this.#files[reply]!, `${word}\n`);
  }

  /** Ends, as by a signal. */
  die(): void {
    this.#files.splice(0).forEach((file) => closeSync(file));
  }
}

/** Calls the shim as a hook that is asked something. */
function call(box: Sandbox, shell: string, env = {}, requests = REQUESTS) {
  const { directory } = box;
  // Real pipes: what a runtime makes instead can't be opened anew.
  const script = `cat requests - | { "$@" 2>&1; echo "exit $?"; } | cat >said`;
  writeFileSync(`${directory}/requests`, `${requests.join("\n")}\n`);
  const shim = [findTool(shell), box.shim, ...HOOK];
  const child = spawn(findTool("sh"), ["-c", script, "sh", ...shim], {
    cwd: directory,
    env: {
      PATH: `${directory}/bin:${directory}/tools`,
      GUIX_STATE_DIRECTORY: `${directory}/state`,
      ...env,
    },
    stdio: ["pipe", "ignore", "inherit"],
  });
  const ended = new Promise<string>((resolve) =>
    child.on("close", () => resolve(readFileSync(`${directory}/said`, "utf8")))
  );
  return { ended: () => settled(ended), close: () => child.stdin!.end() };
}

/** Does work in a sandbox with a runtime that says what it was to do. */
function withRuntime(work: (box: Sandbox) => Promise<void>): Promise<void> {
  return sandbox(async (box) => {
    box.guix("bin/guix");
    symlinkSync(findTool("sh"), `${box.directory}/tools/sh`);
    const script = `${STARTED}; echo "alone: $OFFLOAD_REQUEST"; cat`;
    box.pretend("bin/node", "v24.1.0", script);
    await work(box);
  });
}

for (const shell of SHELLS) {
  test(`requests are passed on until one is accepted, by ${shell}`, () =>
    withRuntime(async (box) => {
      const peer = new Peer(box);
      const { ended, close } = call(box, shell);
      for (const [index, request] of REQUESTS.entries()) {
        await until("a request", () => peer.messages.length > index);
        const [pid, reply, ...words] = peer.messages[index]!.split(" ");
        assert.equal(words.join(" "), `${HOOK.slice(1).join(" ")} ${request}`);
        assert.ok(existsSync(`/proc/${pid}/fd/8`));
        assert.is(reply, "0");
        peer.say(["postpone", "accept"][index]!);
      }
      peer.say("42");
      close();
      assert.is(await ended(), "# postpone\n# accept\nexit 42\n");
    }));

  test(`what is not answered is done alone, by ${shell}`, () =>
    withRuntime(async (box) => {
      for (const answered of [0, 1]) {
        const peer = new Peer(box);
        const { ended, close } = call(box, shell);
        if (answered) {
          await until("a request", () => peer.messages.length === 1);
          peer.say("decline");
        }
        await until("a request", () => peer.messages.length > answered);
        peer.die();
        close();
        const [first, second] = REQUESTS;
        assert.is(
          await ended(),
          answered
            ? `# decline\nalone: ${second}\nexit 0\n`
            : `alone: ${first}\n${second}\nexit 0\n`,
        );
        rmSync(peer.directory, { recursive: true });
      }
    }));

  test(`a build whose process is killed fails, by ${shell}`, () =>
    withRuntime(async (box) => {
      const peer = new Peer(box);
      const { ended, close } = call(box, shell);
      await until("a request", () => peer.messages.length === 1);
      peer.say("accept");
      peer.die();
      close();
      assert.is(await ended(), "# accept\nexit 1\n");
    }));

  test(`what can't be passed on is done alone, by ${shell}`, () =>
    withRuntime(async (box) => {
      const [first, second] = REQUESTS;
      const alone = `alone: \n${first}\n${second}\nexit 0\n`;
      const check = async (expected = alone, env = {}, requests = REQUESTS) => {
        const { ended, close } = call(box, shell, env, requests);
        close();
        assert.is(await ended(), expected);
      };
      await check(); // nobody is there
      const peer = new Peer(box, 1);
      await check(alone, { OFFLOAD_RESIDENT: "false" });
      const long = `1 x86_64-linux /${"x".repeat(3000)}.drv `;
      await check(`alone: ${long}\nexit 0\n`, {}, [long]);
      await check(); // no reply is left
      peer.die();
      writeFileSync(`${peer.directory}/reply-1`, "");
      await check(); // what was another's
      rmSync(peer.directory, { recursive: true });
      symlinkSync("/tmp", peer.directory);
      await check();
    }));

  test(`what the daemon has no more of ends the shim, by ${shell}`, () =>
    withRuntime(async (box) => {
      const peer = new Peer(box);
      const { ended, close } = call(box, shell);
      for (const [index] of REQUESTS.entries()) {
        await until("a request", () => peer.messages.length > index);
        peer.say("decline");
      }
      close();
      assert.is(await ended(), "# decline\n# decline\nexit 0\n");
      peer.die();
    }));

  test(`the real guix gets what was read, by ${shell}`, () =>
    withRuntime(async (box) => {
      box.pretend("bin/node", "v24.1.0", "exit 3");
      box.program("bin/guix", 'echo "guix $*"; cat; exit 7');
      const peer = new Peer(box);
      const { ended, close } = call(box, shell);
      await until("a request", () => peer.messages.length === 1);
      peer.die();
      close();
      const said = await ended();
      assert.match(said, "'guix offload' takes over\n");
      const requests = `${REQUESTS.join("\n")}\n`;
      assert.ok(
        said.endsWith(`guix ${HOOK.join(" ")}\n${requests}exit 7\n`),
        said,
      );
    }));
}

test("where it is switched off, it is not asked", () =>
  withRuntime(async (box) => {
    box.program("bin/guix", 'echo "guix $*"; cat');
    const peer = new Peer(box);
    box.program("plugins/off", "");
    const env = { OFFLOAD_PLUGINS: `${box.directory}/plugins` };
    const { ended, close } = call(box, "dash", env);
    close();
    const requests = `${REQUESTS.join("\n")}\n`;
    const said = `guix ${HOOK.join(" ")}\n${requests}exit 0\n`;
    assert.ok((await ended()).endsWith(`serve again\n${said}`));
    assert.equal(peer.messages, []);
    peer.die();
  }));

test("another account's directory is not used", () =>
  withRuntime(async (box) => {
    const peer = new Peer(box);
    chmodSync(peer.directory, 0o777);
    execFileSync("chown", ["65534", peer.directory]);
    const { ended, close } = call(box, "dash");
    close();
    assert.match(await ended(), /^alone: \n/);
    assert.equal(peer.messages, []);
    peer.die();
  }));

test.run();

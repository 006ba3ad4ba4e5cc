/**
 * The shim of a hook that is served in a process that stays: its files are
 * opened by what /proc has of it.
 *
 * @module
 */

import { AsyncLocalStorage } from "node:async_hooks";
import {
  closeSync,
  constants,
  openSync,
  readFileSync,
  readSync,
  realpathSync,
  statSync,
  writeSync,
} from "node:fs";
import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import { reopen } from "../deps.ts";
import {
  makeLog,
  OffloadError,
  Outlet,
  parentOf,
  tellOnce,
  whileReading,
} from "../mod.ts";
import type { HookArguments, Log, Variables } from "../mod.ts";
import {
  differentVariable,
  parseEnvironment,
  withoutRuntime,
} from "./_ground.ts";

/** Descriptors of the shim's. */
const SHIM = { buildLog: 4, reply: 7, input: 8, messages: 9 } as const;

/** Our environment, which stays as it is. */
const OURS = withoutRuntime(process.env);

/** A FIFO in which a shim is answered. */
export interface Reply {
  /** Its descriptor, open both ways. */
  readonly file: number;
  /** By which the shim is known to have it open. */
  readonly inode: number;
}

/** What is read at once, which is copied: most looks find nothing. */
const SCRATCH = Buffer.alloc(65536);

/** A process that can be seen to end, whoever gets its number after it. */
export class Watched {
  readonly #stat: number;

  /** Watches a process, which is there. */
  constructor(pid: number) {
    this.#stat = openSync(`/proc/${pid}/stat`, "r");
  }

  /** Whether it has not ended. */
  get isAlive(): boolean {
    const bytes = Buffer.alloc(512);
    try {
      const size = readSync(this.#stat, bytes, 0, bytes.length, 0);
      const text = bytes.toString("latin1", 0, size);
      return !/^[ZX]/.test(text.slice(text.lastIndexOf(")") + 2));
    } catch {
      return false; // "no such process"
    }
  }

  /** Watches it no more. */
  close(): void {
    closeSync(this.#stat);
  }
}

/** Reads the lines of a pipe that others read from as well. */
class Lines {
  readonly #file: number;
  readonly #signal: AbortSignal;
  #parts: Buffer[] = [];

  constructor(file: number, signal: AbortSignal) {
    this.#file = file;
    this.#signal = signal;
  }

  /** Reads what is there; `undefined` where nothing is yet. */
  #read(): Buffer | undefined {
    try {
      const size = readSync(this.#file, SCRATCH);
      return Buffer.from(SCRATCH.subarray(0, size));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EAGAIN") throw error;
      return undefined;
    }
  }

  /** The next line, or `undefined` at the end. */
  async next(): Promise<string | undefined> {
    for (let pause = 0;;) {
      const last = this.#parts.at(-1);
      const end = last?.indexOf("\n") ?? -1;
      if (end >= 0) {
        const line = [...this.#parts.slice(0, -1), last!.subarray(0, end)];
        this.#parts = [last!.subarray(end + 1)];
        return Buffer.concat(line).toString();
      }
      const bytes = this.#read();
      if (bytes?.length === 0) return undefined;
      if (bytes !== undefined) this.#parts.push(bytes);
      else await delay(pause = Math.min(pause + 0.1, 20));
      this.#signal.throwIfAborted();
    }
  }
}

/** A hook that is served here in place of its shim. */
export class Hook {
  /** The process of the shim. */
  readonly pid: number;
  /** Where it is answered. */
  readonly reply: Reply;
  /** What the daemon told it. */
  readonly args: HookArguments;
  /** The environment that it was started in. */
  readonly environment: Variables;
  /** Where its messages go. */
  readonly log: Log;
  /** What the daemon says. */
  readonly lines: Lines;
  /** Where the log of the build goes. */
  readonly buildLog: Outlet;
  /** The process of guix-daemon that has started it. */
  readonly daemon: number;
  /** Whether a build was accepted. */
  isAccepted = false;
  /** Whether a request is served. */
  isBusy = false;
  /** Whether nobody is told any more. */
  isClosed = false;
  readonly #abort = new AbortController();
  readonly #files: number[] = [];
  readonly #messages: Outlet;
  readonly #shim: Watched;

  /**
   * Opens the files of the shim.
   *
   * @throws where that can't be, or it is not what it seems to be.
   */
  constructor(pid: number, args: HookArguments, reply: Reply, self: string) {
    this.pid = pid;
    this.args = args;
    this.reply = reply;
    this.#shim = new Watched(pid);
    try {
      const text = readFileSync(`/proc/${pid}/environ`, "utf8");
      this.environment = parseEnvironment(text);
      this.#check(pid, self);
      this.daemon = parentOf(pid);
      const { O_NONBLOCK, O_RDONLY } = constants;
      const flags = O_NONBLOCK | O_RDONLY;
      const input = openSync(`/proc/${pid}/fd/${SHIM.input}`, flags);
      this.#files.push(input);
      this.lines = new Lines(input, this.signal);
      this.#messages = this.#outlet(SHIM.messages, pid);
      this.buildLog = this.#outlet(SHIM.buildLog, pid);
      // Else these may be another's, who has its number now.
      if (!this.#shim.isAlive) throw new Error(`process ${pid} is gone`);
    } catch (error) {
      this.close();
      throw error;
    }
    const everything = makeLog(this.environment, (line) => {
      if (!this.#messages.isFull) this.#messages.write(Buffer.from(line));
    });
    this.log = tellOnce(everything, () => this.isAccepted);
  }

  /** Ends the work for it. */
  get signal(): AbortSignal {
    return this.#abort.signal;
  }

  #check(pid: number, self: string): void {
    const { uid } = statSync(`/proc/${pid}`);
    if (uid !== process.geteuid!()) {
      throw new Error(`process ${pid} is another account's`);
    }
    const { ino } = statSync(`/proc/${pid}/fd/${SHIM.reply}`);
    if (ino !== this.reply.inode) {
      throw new Error(`process ${pid} does not read the reply`);
    }
    const [, script = ""] = readFileSync(`/proc/${pid}/cmdline`, "utf8")
      .split("\0");
    if (realpathSync(script) !== self) {
      throw new Error(`'${script}' is not '${self}'`);
    }
    const name = differentVariable(OURS, this.environment);
    if (name !== undefined) {
      throw new Error(`it has another environment variable ${name}`);
    }
  }

  #outlet(descriptor: number, pid: number): Outlet {
    const file = reopen(descriptor, pid);
    this.#files.push(file);
    return new Outlet(file);
  }

  /** Whether the shim lives; else the work for it ends. */
  get isAlive(): boolean {
    if (this.#shim.isAlive) return true;
    this.interrupt(new OffloadError("interrupted: the hook's process is gone"));
    return false;
  }

  /** Ends the work for it. */
  interrupt(why: Error): void {
    this.#abort.abort(why);
  }

  /** Tells the shim a word, after all that comes before was written. */
  async tell(word: string): Promise<void> {
    await this.#drain();
    if (!this.isClosed && this.isAlive) this.#write(word);
  }

  /** Tells it what to exit with: after its end, the daemon may read no more. */
  async finish(code: number): Promise<void> {
    await this.#drain();
    await this.#settle();
    if (!this.isClosed && this.isAlive) this.#write(`${code}`);
  }

  #write(word: string): void {
    writeSync(this.reply.file, `${word}\n`);
  }

  async #drain(): Promise<void> {
    for (const outlet of [this.#messages, this.buildLog]) {
      while (!outlet.isEmpty) {
        await delay(2);
        if (this.isClosed || !this.isAlive) return;
      }
    }
  }

  /** Waits until the daemon has read all. */
  async #settle(): Promise<void> {
    const isFull = this.#messages.wasFull || this.buildLog.wasFull;
    if (!isFull) return;
    for (const _ of whileReading(() => this.daemon)) {
      await delay(5);
      if (this.isClosed || !this.isAlive) return;
    }
  }

  /** Ends what goes on for it, and closes what was opened of it. */
  close(): void {
    this.isClosed = true;
    this.interrupt(new Error("its hook has ended"));
    this.#messages?.close();
    this.buildLog?.close();
    this.#files.splice(0).forEach((file) => closeSync(file));
    this.#shim.close();
  }
}

const serving = new AsyncLocalStorage<Hook | undefined>();

/**
 * Does something for a hook, whose client is told what there is to tell; or for
 * none, as what stays for others, whose events come to who began it.
 */
export function doFor<T>(hook: Hook | undefined, work: () => T): T {
  return serving.run(hook, work);
}

/** A log that is another one each time. */
export function forward(log: () => Log): Log {
  return {
    info: (...parts) => log().info(...parts),
    trace: (...parts) => log().trace(...parts),
    warn: (problem) => log().warn(problem),
    error: (problem) => log().error(problem),
    debug: (text) => log().debug(text),
  };
}

/** A log that tells a client what is done for its hook, and `own` the rest. */
export function logOfServed(own: Log): Log {
  return forward(() => {
    const hook = serving.getStore();
    return hook === undefined || hook.isClosed ? own : hook.log;
  });
}

/**
 * A process that stays and serves hooks: the shim passes their requests on by a
 * FIFO, and their files are opened by what /proc has of it. In a directory that
 * is the daemon's account's alone there are
 *
 * - `inbox`: shims write `PID NUMBER SYSTEM … REQUEST` there, in one piece;
 * - `reply-NUMBER`: for the one that makes `claim-NUMBER`. It reads there what
 *   to answer the daemon, and after an "accept" what to exit with. Where it
 *   meets an end, as when this process dies, it goes on by itself;
 * - `lock`, which this process holds, and `status.json`, what it says of itself.
 *
 * @module
 */

import { execFile, spawn } from "node:child_process";
import {
  closeSync,
  constants,
  existsSync,
  fstatSync,
  lstatSync,
  openSync,
  read,
  readdirSync,
  realpathSync,
  renameSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import process from "node:process";
import { promisify } from "node:util";
import { sleep } from "../deps.ts";
import {
  asOwner,
  buildLogTo,
  cleanUp,
  exitCodeOf,
  lockFile,
  makeReport,
  makeStateDirectory,
  OffloadError,
  parseHookArguments,
  pluginDirectory,
  reason,
  serveRequest,
  tellEnded,
} from "../mod.ts";
import type { Context, Conversation, JournalEntry, Slot } from "../mod.ts";
import { carry } from "./_carry.ts";
import { Ground, isReadOnly } from "./_ground.ts";
import { GUARD, toolPath } from "./_guard.ts";
import { Keeper } from "./_keeper.ts";
import { Queue } from "./_queue.ts";
import { daemonOf } from "./_resident_start.ts";
import type { ResidentStatus } from "./_resident_start.ts";
import { doFor, Hook, Watched } from "./_shim.ts";
import type { Reply } from "./_shim.ts";

/** How many reply FIFOs there are at first, and when more are made. */
const REPLIES = { most: 256, least: 128 } as const;

/** For how long a claim may be there before its request, in milliseconds. */
const CLAIM_LIFETIME = 60_000;

/** How often it is seen whether shims live, and what else changed, in ms. */
const LOOKS = { shims: 200, ground: 2000, facts: 500 } as const;

/** What the shim writes: its process, a reply's number, arguments, a request. */
const MESSAGE = /^(\d+) (\d+) (\S+ \d+ \S+ \d+) (.+)$/;

/** Locks a file; who only looks whether it is locked may be in the way. */
function lockPatiently(file: string): Slot | undefined {
  for (let tries = 0; tries < 10; tries++) {
    const lock = lockFile(file);
    if (lock !== undefined) return lock;
    sleep(10);
  }
  return undefined;
}

/** When it is to end, beside that its own ground changes. */
export interface End {
  /** After so many seconds without a build. */
  readonly idle: number;
  /** When this process has, which is guix-daemon's. */
  readonly daemon?: number | undefined;
}

/** Serves hooks until there is a reason to end. */
export class Resident {
  readonly #context: Context;
  readonly #directory: string;
  readonly #self: string;
  readonly #idle: number;
  readonly #ground: Ground;
  readonly #keeper: Keeper;
  readonly #queue = new Queue();
  readonly #lock: Slot;
  readonly #replies = new Map<string, Reply>();
  readonly #hooks = new Map<string, Hook>();
  readonly #since = Date.now();
  readonly #ended = Promise.withResolvers<void>();
  #count = 0;
  #making: Promise<void> | undefined;
  #asking: Promise<void> | undefined;
  #served = 0;
  #used = performance.now();
  #isOpen = true;
  #daemon: Watched | undefined;
  #status = "";
  #beats = 0;
  #inbox: number | undefined;
  readonly #told = new Set<string>();
  readonly #telling = new Set<Promise<void>>();

  /**
   * Has the directory for itself.
   *
   * @throws {OffloadError} where another process has, or another account.
   */
  constructor(
    context: Context,
    directory: string,
    self: string,
    { idle, daemon }: End,
  ) {
    // To ask the runtime for each variable takes its time.
    this.#context = { ...context, environment: { ...context.environment } };
    this.#directory = directory;
    this.#self = realpathSync(self);
    this.#idle = idle;
    this.#ground = new Ground(pluginDirectory(context.environment));
    this.#keeper = new Keeper(context);
    asOwner(directory, () => makeStateDirectory(directory));
    const lock = lockPatiently(`${directory}/lock`);
    if (lock === undefined) {
      throw new OffloadError("another process serves already", {
        hint: "to end that, run 'offload serve --stop'",
      });
    }
    this.#lock = lock;
    this.#watchDaemon(daemon);
  }

  /** Serves until its end. */
  async run(): Promise<void> {
    const { signal, log } = this.#context;
    const timers = [
      setInterval(() => this.#lookAtShims(), LOOKS.shims),
      setInterval(() => this.#look(), LOOKS.ground),
      setInterval(() => this.#refresh(), LOOKS.facts),
    ];
    const abort = () => {
      this.#vacate(reason(signal.reason));
      this.#hooks.forEach((hook) => hook.interrupt(signal.reason));
    };
    signal.addEventListener("abort", abort);
    this.#clear();
    const guard = this.#startGuard();
    try {
      await this.#makeReplies();
      const inbox = `${this.#directory}/new-inbox`;
      await this.#make([inbox]);
      this.#inbox = openSync(inbox, "r+");
      renameSync(inbox, `${this.#directory}/inbox`);
      if (signal.aborted) abort();
      this.#tellStatus();
      log.info("serving...");
      this.#listen(this.#inbox).catch((error) => {
        log.error(error);
        this.#vacate(reason(error));
      });
      await this.#ended.promise;
    } finally {
      timers.forEach(clearInterval);
      this.#vacate("it ends");
      this.#keeper.end();
      guard.kill("SIGKILL");
      await Promise.all(this.#telling);
      rmSync(this.#beatFile, { force: true });
    }
  }

  /** Removes what shims find, but not what others watch. */
  #clear(): void {
    for (const name of readdirSync(this.#directory)) {
      const [, pid] = /^beat-(\d+)/.exec(name) ?? [];
      const isOthers = pid !== undefined && existsSync(`/proc/${pid}`);
      if (name === "lock" || isOthers) continue;
      rmSync(`${this.#directory}/${name}`, { force: true });
    }
  }

  get #beatFile(): string {
    return `${this.#directory}/beat-${process.pid}`;
  }

  /** Has a program see that this process goes on. */
  #startGuard(): ReturnType<typeof spawn> {
    this.#beat();
    const args = ["-c", GUARD, "sh", `${process.pid}`, this.#beatFile];
    const guard = spawn("/bin/sh", args, { env: toolPath(), stdio: "ignore" });
    return guard.on("error", (error) => this.#context.log.warn(error));
  }

  #beat(): void {
    this.#replace(this.#beatFile, `${++this.#beats}\n`);
  }

  /** Writes a file so that who reads it sees all or nothing of that. */
  #replace(file: string, text: string): void {
    cleanUp(this.#context.log, () => {
      writeFileSync(`${file}.new`, text);
      renameSync(`${file}.new`, file);
    });
  }

  /** Makes FIFOs; a runtime has no call for it. */
  async #make(files: readonly string[]): Promise<void> {
    const options = { env: toolPath() };
    await promisify(execFile)("mkfifo", ["-m", "600", ...files], options);
  }

  async #makeReplies(): Promise<void> {
    const numbers = Array.from(
      { length: REPLIES.most - this.#replies.size },
      () => `${++this.#count}`,
    );
    // By a name that no shim takes it by before it is open here.
    const place = (number: string) => `${this.#directory}/new-${number}`;
    await this.#make(numbers.map(place));
    const { O_NONBLOCK, O_RDWR } = constants;
    for (const number of numbers) {
      if (!this.#isOpen) {
        rmSync(place(number), { force: true });
        continue;
      }
      const file = openSync(place(number), O_NONBLOCK | O_RDWR);
      this.#replies.set(number, { file, inode: fstatSync(file).ino });
      renameSync(place(number), `${this.#directory}/reply-${number}`);
    }
  }

  /** Reads what shims write, line by line. */
  async #listen(inbox: number): Promise<void> {
    const bytes = Buffer.alloc(65536);
    // A stream would read ahead, which nothing would ever end.
    for (let rest = ""; this.#isOpen;) {
      const { bytesRead } = await promisify(read)(inbox, bytes, 0, 65536, null);
      const lines = (rest + bytes.toString("utf8", 0, bytesRead)).split("\n");
      rest = lines.pop()!;
      lines.forEach((line) => this.#take(line));
    }
    closeSync(inbox);
  }

  /** Takes a message. */
  #take(line: string): void {
    if (line === "stop") return this.#vacate("it was told to end");
    const match = MESSAGE.exec(line);
    if (match === null) return;
    const [, pid, number, args, request] = match;
    const hook = this.#hooks.get(number!) ?? this.#meet(pid!, number!, args!);
    // Who claimed what was another's meets an end.
    if (hook?.pid !== Number(pid) || hook.isBusy) return;
    this.#lookAtGround();
    if (!this.#isOpen) return this.#leave(number!);
    doFor(hook, () => this.#serve(hook, number!, request!))
      .catch((error) => this.#context.log.error(error));
  }

  /** Begins to serve a shim, or leaves it to itself. */
  #meet(pid: string, number: string, args: string): Hook | undefined {
    const reply = this.#replies.get(number);
    if (reply === undefined) return undefined;
    this.#replies.delete(number);
    this.#remove(number);
    if (this.#replies.size < REPLIES.least) this.#refill();
    const parsed = parseHookArguments(args.split(" "));
    try {
      if (parsed === undefined) throw new Error(`invalid arguments: ${args}`);
      const hook = new Hook(Number(pid), parsed, reply, this.#self);
      this.#hooks.set(number, hook);
      cleanUp(
        this.#context.log,
        () => this.#watchDaemon(daemonOf(hook.daemon)),
      );
      return hook;
    } catch (error) {
      closeSync(reply.file); // the shim meets an end
      this.#tellOnce(`a hook serves itself: ${reason(error)}`);
      return undefined;
    }
  }

  /** Is to end when a guix-daemon has. */
  #watchDaemon(daemon: number | undefined): void {
    if (daemon === undefined) return;
    const watched = new Watched(daemon);
    this.#daemon?.close();
    this.#daemon = watched;
  }

  #tellOnce(text: string): void {
    if (!this.#told.has(text)) this.#context.log.info(text);
    this.#told.add(text);
  }

  /** Removes what a shim knows a reply by. */
  #remove(number: string): void {
    for (const name of ["reply", "claim"]) {
      rmSync(`${this.#directory}/${name}-${number}`, { force: true });
    }
  }

  #refill(): void {
    this.#making ??= this.#makeReplies()
      .catch((error) => this.#context.log.warn(error))
      .finally(() => this.#making = undefined);
  }

  /** What a request is served with. */
  #contextOf(hook: Hook): Context {
    const { args, log, signal, environment, buildLog } = hook;
    return {
      ...this.#context,
      ...args,
      ...makeReport(log),
      log,
      signal,
      environment: { ...this.#context.environment, ...environment },
      buildLog: buildLogTo(buildLog),
      connect: this.#keeper.connect,
      localDaemons: this.#keeper.localDaemons,
      queue: this.#queue,
      carry: (load, own) => carry(this.#self, load, own),
    };
  }

  /** Serves a request. */
  async #serve(hook: Hook, number: string, request: string): Promise<void> {
    hook.isBusy = true;
    this.#note();
    let isAnswered = false;
    const conversation: Conversation = {
      readLine: () => hook.lines.next(),
      answer: async (word) => {
        isAnswered = true;
        hook.isAccepted = word === "accept";
        await hook.tell(word);
        if (!hook.isAccepted) hook.isBusy = false;
        hook.signal.throwIfAborted();
      },
    };
    const ended: JournalEntry[] = [];
    const tellLater = (build: JournalEntry) => void ended.push(build);
    const start = () =>
      Promise.resolve({ ...this.#contextOf(hook), tellLater });
    let code = 0;
    try {
      const { args: { system }, log, signal } = hook;
      const own = { system, log, signal };
      await serveRequest(request, conversation, start, own);
    } catch (error) {
      // Before an answer, the shim does it all over again.
      if (isAnswered) hook.log.error(error);
      code = exitCodeOf(error);
    }
    this.#note();
    if (!isAnswered) return this.#leave(number);
    if (!hook.isAccepted) return;
    this.#served++;
    await hook.finish(code).finally(() => {
      ended.forEach((build) => this.#tellEnded(build));
      this.#leave(number);
    });
  }

  /** Tells plugins of a build that is over, as the client knows by now. */
  #tellEnded(build: JournalEntry): void {
    const { log } = this.#context;
    const telling = doFor(undefined, () => tellEnded(build, this.#context))
      .catch((error) => log.warn(error))
      .finally(() => this.#telling.delete(telling));
    this.#telling.add(telling);
  }

  /** Notes that there is something to do. */
  #note(): void {
    this.#used = performance.now();
    this.#keeper.noteUse();
  }

  /** Ends to serve a shim, which meets an end now. */
  #leave(number: string): void {
    const hook = this.#hooks.get(number);
    this.#hooks.delete(number);
    if (hook !== undefined) {
      cleanUp(
        this.#context.log,
        () => hook.close(),
        () => closeSync(hook.reply.file),
      );
    }
    if (!this.#isOpen && this.#hooks.size === 0) this.#ended.resolve();
  }

  #lookAtShims(): void {
    for (const [number, hook] of this.#hooks) {
      // One that is busy leaves by itself.
      if (!hook.isAlive && !hook.isBusy) this.#leave(number);
    }
    if (this.#isOpen) this.#tellStatus();
  }

  #look(): void {
    this.#beat();
    this.#keeper.prune();
    this.#lookAtGround();
    if (!this.#isOpen) return;
    if (this.#daemon?.isAlive === false) {
      return this.#vacate("its guix-daemon is gone");
    }
    if (!this.#isOurs()) return this.#vacate(`'${this.#directory}' is lost`);
    const idle = (performance.now() - this.#used) / 1000;
    const isUsed = [...this.#hooks.values()].some((it) => it.isBusy);
    if (!isUsed && idle > this.#idle) return this.#vacate("it was idle");
    this.#dropClaims();
    if (this.#replies.size < REPLIES.least) this.#refill();
  }

  /** Ends where another process is to serve. */
  #lookAtGround(): void {
    const { storeDirectory: store } = this.#context;
    const changed = this.#ground.changed();
    if (changed !== undefined) this.#vacate(`'${changed}' has changed`);
    // It can come to be so for all but guix-daemon's unit.
    else if (isReadOnly(store)) this.#vacate(`'${store}' is read-only here`);
  }

  /** Whether the directory is still the one that this process serves from. */
  #isOurs(): boolean {
    const look = (name: string) =>
      lstatSync(`${this.#directory}/${name}`, { throwIfNoEntry: false });
    const [directory, inbox] = [look("."), look("inbox")];
    return directory?.uid === process.geteuid!() &&
      (directory.mode & 0o077) === 0 &&
      // It may not be there yet.
      (this.#inbox === undefined || inbox?.ino === fstatSync(this.#inbox).ino);
  }

  /** Drops what shims have claimed that died before they wrote. */
  #dropClaims(): void {
    for (const number of [...this.#replies.keys()]) {
      const claim = `${this.#directory}/claim-${number}`;
      const stat = lstatSync(claim, { throwIfNoEntry: false });
      if (!stat || Date.now() - stat.mtimeMs < CLAIM_LIFETIME) continue;
      closeSync(this.#replies.get(number)!.file);
      this.#replies.delete(number);
      this.#remove(number);
    }
    // Of those who came too late, what they claimed is gone.
    for (const name of readdirSync(this.#directory)) {
      const [, number] = /^claim-(\d+)$/.exec(name) ?? [];
      if (number && !this.#replies.has(number)) this.#remove(number);
    }
  }

  #refresh(): void {
    if (!this.#isOpen) return;
    const { log } = this.#context;
    this.#asking ??= this.#keeper.refresh(this.#context)
      .catch((error) => log.warn(error))
      .finally(() => this.#asking = undefined);
  }

  /** Says of itself what is new. */
  #tellStatus(): void {
    const status: ResidentStatus = {
      pid: process.pid,
      since: this.#since,
      builds: [...this.#hooks.values()].filter((it) => it.isBusy).length,
      served: this.#served,
      connections: this.#keeper.size,
    };
    const text = JSON.stringify(status);
    if (text === this.#status) return;
    this.#status = text;
    this.#replace(`${this.#directory}/status.json`, text);
  }

  /** Takes no more requests, and ends after its builds. */
  #vacate(why: string): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    const { log } = this.#context;
    log.info(`ending: ${why}`);
    cleanUp(
      log,
      // What reads it in the background, and else keeps us, ends with this.
      () => this.#inbox && writeSync(this.#inbox, "\n"),
      () => this.#isOurs() && this.#clear(), // it may be another process's
      () => this.#replies.forEach(({ file }) => closeSync(file)),
      () => this.#lock.release(),
    );
    this.#replies.clear();
    for (const [number, hook] of this.#hooks) {
      if (!hook.isBusy) this.#leave(number);
    }
    if (this.#hooks.size === 0) this.#ended.resolve();
  }
}

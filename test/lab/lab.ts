/**
 * What the suites of this folder share: they run Offload on real Guix hosts,
 * those that scripts/lab/lab brings up. The hosts stay up between suites.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { spawn, spawnSync } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { machine } from "node:os";
import { basename } from "node:path";
import process from "node:process";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { gunzipSync } from "node:zlib";
import * as assert from "uvu/assert";
import { askForWork } from "./work.ts";

/** What can run Offload: values of OFFLOAD_RUNTIME. */
export const RUNTIMES = ["node", "deno"] as const;

/** A value of OFFLOAD_RUNTIME. */
export type Runtime = typeof RUNTIMES[number];

/** The system type that the hosts build for. */
export const SYSTEM: string = `${machine()}-linux`;

/** The checkout. */
export const ROOT: string = fileURLToPath(new URL("../..", import.meta.url));

/** The lab's program. */
export const LAB: string = `${ROOT}scripts/lab/lab`;
/** A server's key and certificate, for 127.0.0.1. */
export const CERTIFICATE: string = `${ROOT}test/data/server.pem`;

/** What hooks share, on a master. */
export const STATE = "/var/guix/offload";

/** What they note there of machines and builds. */
export const OBSERVATIONS: string = `${STATE}/observations.sqlite`;

/** Where a master has its plugins and their settings. */
export const PLUGINS = "/etc/guix/offload";

const STORE = "/gnu/store";

/** In milliseconds: what takes longer hangs. The first `up` makes roots. */
const TIMEOUTS = { command: 120_000, up: 900_000, wait: 120_000 } as const;

// ---------------------------------------------------------------------------
// Commands
// ---------------------------------------------------------------------------

/** What a program left. */
export interface Result {
  /** Its exit code, `null` where a signal ended it. */
  readonly status: number | null;
  /** What it wrote to standard output. */
  readonly stdout: string;
  /** What it wrote to standard error: for `guix build`, the log. */
  readonly stderr: string;
}

function runLab(args: readonly string[], input = ""): Result {
  const mayInstall = args[0] === "up" || args[0] === "browser";
  const timeout = mayInstall ? TIMEOUTS.up : TIMEOUTS.command;
  const result = spawnSync(LAB, args, {
    input,
    timeout,
    encoding: "utf8",
    maxBuffer: 64 << 20,
  });
  if (result.error !== undefined) throw result.error;
  return result;
}

/** Runs a lab command that must succeed; returns what it printed. */
export function lab(...args: readonly string[]): string {
  const { status, stdout, stderr } = runLab(args);
  if (status === 0) return stdout;
  throw new Error(`lab ${args.join(" ")}: exit ${status}\n${stderr}`);
}

/** Runs a command in a host, whatever comes of it. */
export function run(host: string, ...command: readonly string[]): Result {
  return runLab(["in", host, ...command]);
}

/** Runs a command in a host that must succeed; returns what it printed. */
export function inHost(host: string, ...command: readonly string[]): string {
  return lab("in", host, ...command);
}

/** Starts a command in a host; fd 0 to 2 are pipes. */
export function start(
  host: string,
  ...command: readonly string[]
): ChildProcess {
  return spawn(LAB, ["in", host, ...command], { stdio: "pipe" });
}

/** A command that runs: what it wrote so far, and what comes of it. */
export interface Running {
  /** Its process, out here. */
  readonly child: ChildProcess;
  /** What it wrote so far to either output. */
  text(): string;
  /** Settles when it has ended. */
  readonly ended: Promise<Result>;
}

const watched = new Set<Running>();

/** An error that shows what the commands wrote that still run. */
function inVain(what: string): Error {
  const texts = [...watched].map(({ child, text }) =>
    `${child.spawnargs.slice(1).join(" ")}:\n${text().slice(-2000)}`
  );
  return new Error([`waited in vain: ${what}`, ...texts].join("\n"));
}

/** Collects what a child process writes until its end. */
export function watch(child: ChildProcess): Running {
  const texts = { stdout: "", stderr: "" };
  let text = "";
  for (const name of ["stdout", "stderr"] as const) {
    child[name]!.setEncoding("utf8").on("data", (chunk: string) => {
      texts[name] += chunk;
      text += chunk;
    });
  }
  const ended = new Promise<Result>((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (status) => {
      watched.delete(running);
      resolve({ status, ...texts });
    });
  });
  const running = { child, text: () => text, ended };
  watched.add(running);
  return running;
}

/** Starts a command in a host on a terminal; what is written there is typed. */
export function onTerminal(
  host: string,
  command: readonly string[],
  columns = 100,
): Running {
  const words = ["env", "TERM=xterm", ...command];
  const line = words.map((word) => `'${word}'`).join(" ");
  const script = `stty cols ${columns} rows 30; exec ${line}`;
  const program = ["env", "SHELL=/bin/sh", "script", "-qefc", script];
  return watch(start(host, ...program, "/dev/null"));
}

/** Waits until `condition` holds, asking again every few milliseconds. */
export async function until(
  what: string,
  condition: () => boolean,
): Promise<void> {
  const end = Date.now() + TIMEOUTS.wait;
  while (!condition()) {
    if (Date.now() > end) throw inVain(what);
    await delay(5);
  }
}

/** Settles as `promise` does, or fails after `limit` milliseconds. */
export async function within<T>(
  what: string,
  promise: Promise<T>,
  limit: number = TIMEOUTS.wait,
): Promise<T> {
  const controller = new AbortController();
  const late = delay(limit, undefined, { signal: controller.signal })
    .then(() => Promise.reject(inVain(what)));
  late.catch(() => {});
  try {
    return await Promise.race([promise, late]);
  } finally {
    controller.abort();
  }
}

// ---------------------------------------------------------------------------
// Hosts
// ---------------------------------------------------------------------------

/**
 * Brings hosts up, each a NAME or NAME:FLAVOUR…, and makes all masters trust
 * all build machines, whatever another suite did. Which machines a master
 * uses is for {@linkcode useMachines} to say.
 */
export function up(...hosts: readonly string[]): void {
  lab("up", ...hosts);
  roots.clear();
}

/** Takes hosts down, those of a suite's own. */
export function down(...hosts: readonly string[]): void {
  lab("down", ...hosts);
  roots.clear();
}

const roots = new Map<string, string>();

/** The root directory of a host, seen from here. */
export function root(host: string): string {
  if (!roots.has(host)) {
    for (const line of lab("list").trim().split("\n")) {
      const [name, , pid] = line.split(" ");
      roots.set(name!, `/proc/${pid}/root`);
    }
  }
  const directory = roots.get(host);
  if (directory === undefined) throw new Error(`host '${host}' is not up`);
  return directory;
}

/**
 * Writes a master's machine file, for these machines, changed by `edit`, and
 * makes it forget what it saw of machines.
 */
export function useMachines(
  master: string,
  machines: readonly string[],
  edit: (text: string) => string = (text) => text,
): void {
  const text = edit(lab("machines", master, ...machines));
  writeFileSync(`${root(master)}/etc/guix/machines.scm`, text);
  forget(master);
}

/** The public key with which a host signs store items. */
export function signingKey(host: string): string {
  return readFileSync(`${root(host)}/etc/guix/signing-key.pub`, "latin1");
}

/** Lets a host trust the signatures of these others and of no more. */
export function trustOnly(host: string, others: readonly string[]): void {
  const entries = others.map((other) =>
    `(entry ${signingKey(other)} (tag (guix import)))`
  );
  const acl = `(acl ${entries.join("\n")})\n`;
  writeFileSync(`${root(host)}/etc/guix/acl`, acl);
}

/** Makes a master forget what it saw of machines. */
export function forget(master: string): void {
  for (const suffix of ["", "-shm", "-wal"]) {
    rmSync(root(master) + OBSERVATIONS + suffix, { force: true });
  }
}

/** Has machines waited for long enough, however busy this one is. */
export const PATIENT = "OFFLOAD_DECISION_TIMEOUT=10";

/** Has what machines said of themselves believed for as long as a test takes. */
export const ACQUAINTED = "OFFLOAD_FACTS_LIFETIME=600";

/**
 * Has head know its machines: who takes a build is then no matter of who answers
 * first, however busy this machine is.
 */
export async function meetMachines(runtime: Runtime): Promise<void> {
  const [derivation] = makeWork("head");
  const explain = offloadCommand(runtime, "explain", "--json", derivation!);
  await until("all machines have answered", () => {
    const { stdout } = run("head", ...explain);
    return /"machine"/.test(stdout) &&
      !/not (answered|asked)|no answer/.test(stdout);
  });
}

/** The command line of Offload on a master, under a runtime. */
export function offloadCommand(
  runtime: Runtime,
  ...args: readonly string[]
): string[] {
  const environment = [`OFFLOAD_RUNTIME=${runtime}`, PATIENT];
  return ["env", ...environment, "/offload/scripts/guix", "offload", ...args];
}

/** Edits a machine file so that 'w1' has one digit of its key wrong. */
export function wrongKey(text: string): string {
  const edited = text.replace(
    /(name "w1"[^]*?ssh-ed25519 \S+)(\S)"/,
    (_, before, last) => `${before}${last === "A" ? "Q" : "A"}"`,
  );
  assert.is.not(edited, text);
  return edited;
}

/**
 * Restarts a master's daemon so that it offloads with this checkout. Under Node,
 * a process that stays serves hooks; under Deno, each has its own. The variable
 * OFFLOAD_TEST_RESIDENT, `true` or `false`, says so for both.
 */
export function useOffload(
  master: string,
  runtime: Runtime,
  ...variables: readonly string[]
): void {
  const { OFFLOAD_TEST_RESIDENT: stays = runtime === "node" } = process.env;
  const usual = [`OFFLOAD_RUNTIME=${runtime}`, `OFFLOAD_RESIDENT=${stays}`];
  const guix = "GUIX=/offload/scripts/guix";
  lab("daemon", master, guix, ...usual, ...variables);
}

/** Restarts a master's daemon with these settings of plugins. */
export function usePlugins(
  master: string,
  runtime: Runtime,
  plugins: Readonly<Record<string, object>>,
  ...variables: readonly string[]
): void {
  const text = `OFFLOAD_USE=${JSON.stringify(plugins)}`;
  useOffload(master, runtime, text, ...variables);
}

/** Writes a file of head's directory of plugins and settings. */
export function writePlugin(name: string, text: string): void {
  mkdirSync(root("head") + PLUGINS, { recursive: true });
  writeFileSync(`${root("head")}${PLUGINS}/${name}`, text);
}

/** Restarts a master's daemon so that it offloads with `guix offload`. */
export function useReference(master: string): void {
  lab("daemon", master);
}

/** The names in a host's store, sorted. */
export function storeNames(host: string): string[] {
  return readdirSync(root(host) + STORE)
    .filter((name) => !name.startsWith(".")) // .links
    .sort();
}

/** The log of a derivation that was built on a host itself. */
export function buildLog(host: string, derivation: string): string | undefined {
  const name = basename(derivation);
  const stem = `${root(host)}/var/log/guix/drvs/${name.slice(0, 2)}/` +
    name.slice(2);
  if (existsSync(`${stem}.gz`)) {
    return gunzipSync(readFileSync(`${stem}.gz`)).toString();
  }
  if (!existsSync(`${stem}.bz2`)) return undefined; // Guix 1.2
  const path = `${stem}.bz2`.slice(root(host).length);
  return inHost(host, "busybox", "bzcat", path);
}

/** Executes SQL on a database of head, in there; returns the rows. */
export function onDatabase(
  file: string,
  sql: string,
): Record<string, string>[] {
  const script = `const { DatabaseSync } = require("node:sqlite");
    const database = new DatabaseSync("${file}", { timeout: 10000 });
    const rows = database.prepare(process.argv[1]).all();
    console.log(JSON.stringify(rows));`;
  const node = "/offload/node_modules/node/bin/node";
  return JSON.parse(inHost("head", node, "-e", script, sql));
}

// ---------------------------------------------------------------------------
// Work
// ---------------------------------------------------------------------------

/** Makes new derivations on a master: the options are work.scm's. */
export function makeWork(
  master: string,
  ...options: readonly string[]
): string[] {
  const start = (...command: readonly string[]) =>
    spawn(LAB, ["in", master, ...command], { stdio: "ignore", detached: true })
      .unref();
  return askForWork(root(master), start, options);
}

/** The outputs of a derivation, names and paths. */
export function outputsOf(
  master: string,
  derivation: string,
): Record<string, string> {
  const text = readFileSync(root(master) + derivation, "utf8");
  const output = /\("([^"]+)","(\/[^"]+)","[^"]*","[^"]*"\)/g;
  return Object.fromEntries(
    [...text.matchAll(output)].map(([, name, path]) => [name!, path!]),
  );
}

/** The command that builds on a master without a local slot. */
export function buildCommand(derivations: readonly string[]): string[] {
  return ["guix", "build", "--max-jobs=0", ...derivations];
}

/** Builds on a master that has no local slot, whatever comes of it. */
export function build(
  master: string,
  ...derivations: readonly string[]
): Result {
  return run(master, ...buildCommand(derivations));
}

/** Makes work for head, and builds it on others, whatever comes of it. */
export function buildWork(
  ...options: readonly string[]
): [derivation: string, Result] {
  const [derivation] = makeWork("head", ...options);
  return [derivation!, build("head", derivation!)];
}

/**
 * How many builds a host runs, each of which has a build user of its own: with
 * its group, for by that user alone guix-daemon first kills what it had. It
 * starts no process, for it is asked again and again.
 */
export function builds(host: string): number {
  const users = readFileSync(`${root(host)}/etc/passwd`, "utf8")
    .matchAll(/^guixbuilder\d+:[^:]*:(\d+:\d+):/gm);
  const owners = new Set(
    readdirSync(`${root(host)}/proc`).map((name) => {
      const file = `${root(host)}/proc/${name}`;
      const { uid, gid } = statSync(file, { throwIfNoEntry: false }) ?? {};
      return `${uid}:${gid}`;
    }),
  );
  return [...users].filter(([, ids]) => owners.has(ids!)).length;
}

/** Builds on a master itself. */
export function buildLocally(master: string, derivation: string): void {
  inHost(master, "guix", "build", "--no-offload", "--max-jobs=1", derivation);
}

/** Holds the lock in its argument until its input ends. */
const HOLD_SCRIPT = `
(use-modules (guix build syscalls) (guix build utils) (ice-9 rdelim))
(define file (cadr (command-line)))
(mkdir-p (dirname file))
(define port (open-file file "a+"))
(fcntl-flock port 'write-lock)
(display "held\\n")
(force-output)
(read-line)
`;

/** Keeps a master from sending to a machine, until what is returned is called. */
export async function holdUploads(
  master: string,
  machine: string,
): Promise<() => Promise<void>> {
  writeFileSync(`${root(master)}/tmp/hold.scm`, HOLD_SCRIPT);
  const file = `${STATE}/${machine}:22/upload`;
  const command = ["guix", "repl", "--", "/tmp/hold.scm", file];
  const holder = watch(start(master, ...command));
  await until("the lock", () => holder.text().includes("held"));
  return async () => {
    holder.child.stdin!.end();
    await holder.ended;
  };
}

/** What a store says of a valid item. */
export interface PathInfo {
  /** Hash of its nar. */
  readonly hash: string;
  /** The derivation that made it. */
  readonly deriver: string;
  /** Size of its nar. */
  readonly narSize: string;
  /** The items that it refers to, sorted. */
  readonly references: readonly string[];
}

const PATH_INFO_SCRIPT = `
(use-modules (guix store) (guix base16))
(with-store store
  (for-each
   (lambda (path)
     (when (valid-path? store path)
       (let ((info (query-path-info store path)))
         (format #t "~a\\t~a\\t~a\\t~a\\t~a~%" path
                 (bytevector->base16-string (path-info-hash info))
                 (path-info-deriver info)
                 (path-info-nar-size info)
                 (string-join (sort (path-info-references info) string<?))))))
   (cdr (command-line))))
`;

/** What a host's store says of those of `paths` that are valid there. */
export function pathInfo(
  host: string,
  paths: readonly string[],
): Record<string, PathInfo> {
  writeFileSync(`${root(host)}/tmp/path-info.scm`, PATH_INFO_SCRIPT);
  const text = inHost(
    host,
    ...["guix", "repl", "--", "/tmp/path-info.scm", ...paths],
  );
  const lines = text.split("\n").filter((line) => line !== "");
  return Object.fromEntries(lines.map((line) => {
    const [path, hash, deriver, narSize, references] = line.split("\t");
    return [path!, {
      hash: hash!,
      deriver: deriver!,
      narSize: narSize!,
      references: references!.split(" ").filter((name) => name !== ""),
    }];
  }));
}

/** Demands that the daemon finds its store as its database says. */
export function assertStoreIsSound(host: string): void {
  const result = run(host, "guix", "gc", "--verify=contents");
  const text = result.stdout + result.stderr;
  assert.is(result.status, 0, text);
  assert.match(text, "checking hashes");
  assert.not.match(text, /modified|missing|disappeared/);
}

/** Demands that `derivation` was built through one of `machines`, by name. */
export function assertOffloaded(
  derivation: string,
  { status, stderr }: Result,
  machines: readonly string[],
): string {
  assert.is(status, 0, stderr);
  const trace = new RegExp(`offloading build of ${derivation} to '(.*)'`);
  const machine = trace.exec(stderr)?.[1] ?? "none";
  assert.ok(machines.includes(machine), `built on ${machine}: ${stderr}`);
  assert.match(buildLog(machine, derivation) ?? "no log", "built ");
  return machine;
}

/**
 * Demands that the outputs of `derivation`, which `machine` has built, are on
 * `master` what they are there, and what a local build makes: bytes,
 * references and deriver.
 */
export function assertLikeLocal(
  master: string,
  derivation: string,
  machine: string,
): void {
  const outputs = Object.values(outputsOf(master, derivation));
  const offloaded = pathInfo(master, outputs);
  assert.equal(Object.keys(offloaded).sort(), outputs.toSorted());
  assert.equal(offloaded, pathInfo(machine, outputs));
  inHost(master, "guix", "gc", "--delete", ...outputs);
  assert.equal(pathInfo(master, outputs), {});
  buildLocally(master, derivation);
  assert.equal(offloaded, pathInfo(master, outputs));
}

/** A file name that is no UTF-8. */
export function bytesPath(directory: string, latin1: string): Buffer {
  return Buffer.concat([
    Buffer.from(`${directory}/`),
    Buffer.from(latin1, "latin1"),
  ]);
}

/** Has machines do so many builds at a time each. */
export function withSlots(slots: number): (text: string) => string {
  return (text) =>
    text.replaceAll(/\(parallel-builds \d+\)/g, `(parallel-builds ${slots})`);
}

/** Edits a machine file so that machines have one slot each. */
export const oneSlot = withSlots(1);

/** Builds so many, of which never two may run on 'w1' at once. */
export async function buildOneByOne(many: number): Promise<void> {
  const work = makeWork("head", `--count=${many}`, "--seconds=1");
  const building = watch(start("head", ...buildCommand(work)));
  let isOver = false;
  building.ended.finally(() => isOver = true);
  let most = 0;
  await until("the builds", () => {
    most = Math.max(most, builds("w1"));
    return isOver;
  });
  const result = await building.ended;
  for (const derivation of work) assertOffloaded(derivation, result, ["w1"]);
  assert.is(most, 1);
}

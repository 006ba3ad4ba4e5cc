/**
 * Tests a machine, step by step: `offload test` does, and `offload trust`.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { existsSync, mkdtempSync } from "node:fs";
import { hostname, tmpdir } from "node:os";
import {
  ByteReader,
  checkItem,
  codeOf,
  exportBundle,
  importPaths,
  machineId,
  OffloadError,
  openLocalDaemon,
  openSession,
  parseHostKey,
  printable,
  queryValidPaths,
  readAcl,
  reason,
  removeFile,
  restoreItem,
  takeUpTo,
  THIS_MACHINE,
  within,
} from "../mod.ts";
import type {
  Context,
  ErrorCode,
  Facts,
  ItemMetadata,
  Machine,
  Screen,
  Session,
  StoreConnection,
  Style,
} from "../mod.ts";
import { AS_ACCOUNT, isUnreadable } from "./_first_steps.ts";
import { withTimeout } from "./_machines.ts";
import { formatTable, inOneLine, unlessAborted } from "./_screen.ts";
import { probe } from "./_remote.ts";
import { fingerprint, sshCommand } from "./_ssh_errors.ts";
import { addTextToStore, isOurStore } from "./_own_machine.ts";

/** A step of a test, and what came of it. */
export interface Step {
  /** What is done: `connect`, `host key` and so on. */
  readonly name: string;
  /** Only what failed makes a machine unfit. */
  readonly outcome: "ok" | "warning" | "failed" | "skipped";
  /** What was found, or what is wrong. */
  readonly detail: string;
  /** What to do about it. */
  readonly hint?: string | undefined;
  /** What is wrong, for programs. */
  readonly code?: ErrorCode | undefined;
  /** How long it took. */
  readonly seconds: number;
}

/** How a machine passed its test. */
export interface TestReport {
  /** Its NAME:PORT. */
  readonly machine: string;
  /** The worst of its steps. */
  readonly outcome: Step["outcome"];
  /** How long all of it took. */
  readonly seconds: number;
  /** What was done, in this order. */
  readonly steps: readonly Step[];
}

/** The steps, in their order. */
const STEPS = {
  session: ["connect", "host key", "authentication"],
  others: ["daemon", "guix", "import", "export", "clock"],
} as const;

/** The step at which something went wrong, whatever was done before. */
const STEP_OF: Partial<Record<ErrorCode, typeof STEPS.session[number]>> = {
  "host-key": "host key",
  "private-key": "authentication",
  authentication: "authentication",
};

const OUTCOME_STYLES: Readonly<Record<Step["outcome"], Style>> = {
  ok: "good",
  warning: "doubtful",
  failed: "bad",
  skipped: "doubtful",
};

/** A store item that only this test has, in the archive that is to be sent. */
export interface Sample {
  readonly path: string;
  readonly bundle: Buffer;
}

async function collect(chunks: AsyncIterable<Uint8Array>): Promise<Buffer> {
  const parts = [];
  for await (const chunk of chunks) parts.push(chunk);
  return Buffer.concat(parts);
}

/** A text that no store holds yet: `HOST-NUMBER`. */
function nonce(host: string): Buffer {
  return Buffer.from(`${host}-${Math.floor(Math.random() * 1e9)}`);
}

/** Makes the item that is sent, as the reference makes it; for all machines. */
export async function makeSample(context: Context): Promise<Sample> {
  const key = `${context.configDirectory}/signing-key.sec`;
  if (!existsSync(key)) {
    const message = `there is no signing key, '${key}'`;
    throw new OffloadError(message, { code: "private-key" });
  }
  const store = await openLocalDaemon(context);
  try {
    const text = nonce(hostname());
    const path = await addTextToStore(store, "export-test", text, []);
    return { path, bundle: await collect(exportBundle(store, [path])) };
  } finally {
    store.stream.destroy();
  }
}

/** A machine under test. */
class Trial {
  readonly machine: Machine;
  readonly signal: AbortSignal;
  readonly steps: Step[] = [];
  readonly #tell: (step: Step) => void;
  readonly #start = performance.now();
  #last = this.#start;

  /** Begins; each step is told as it ends. */
  constructor(
    machine: Machine,
    signal: AbortSignal,
    tell: (step: Step) => void,
  ) {
    this.machine = machine;
    this.signal = signal;
    this.#tell = tell;
  }

  /** Ends a step. */
  end(
    name: string,
    outcome: Step["outcome"],
    detail: string,
    hint?: string,
    code?: ErrorCode,
  ): void {
    const now = performance.now();
    const seconds = (now - this.#last) / 1000;
    this.#last = now;
    const step = { name, outcome, detail, hint, code, seconds };
    this.steps.push(step);
    this.#tell(step);
  }

  /** Ends a step that failed. */
  fail(name: string, error: unknown): void {
    const hint = remedy(name, this.machine, error);
    const detail = inOneLine(reason(error));
    this.end(name, "failed", detail, hint, codeOf(error));
  }

  /**
   * Does a step, if there is time left; its result, of which `describe` tells,
   * unless it fails.
   */
  async run<T>(
    name: string,
    work: () => Promise<T>,
    describe: (result: T) => string,
  ): Promise<T | undefined> {
    if (this.signal.aborted) return undefined;
    try {
      const result = await unlessAborted(this.signal, work());
      this.end(name, "ok", describe(result));
      return result;
    } catch (error) {
      this.fail(name, error);
      return undefined;
    }
  }

  /** Sums it up; the steps that were not taken are skipped. */
  report(): TestReport {
    for (const name of [...STEPS.session, ...STEPS.others]) {
      if (this.steps.some((step) => step.name === name)) continue;
      this.end(name, "skipped", "");
    }
    const worst = (["failed", "warning"] as const).find((outcome) =>
      this.steps.some((step) => step.outcome === outcome)
    );
    return {
      machine: machineId(this.machine),
      outcome: worst ?? "ok",
      seconds: (performance.now() - this.#start) / 1000,
      steps: this.steps,
    };
  }
}

/** The option by which nobody is asked about a host key that is known. */
function fingerprintOption(machine: Machine): string {
  try {
    return ` --fingerprint ${fingerprint(parseHostKey(machine).key)}`;
  } catch {
    return ""; // that is wrong as well
  }
}

/** The line to type to trust a machine anew, which makes what is missing. */
function trustCommand(machine: Machine): string {
  const { user, name, port, privateKey } = machine;
  return `offload trust ${user}@${name}:${port}${fingerprintOption(machine)} ` +
    `--identity ${privateKey}`;
}

/** What `offload trust` mends, by the step that fails without. */
const MENDED: Readonly<Record<string, readonly ErrorCode[]>> = {
  authentication: ["private-key", "authentication"],
  import: ["private-key", "unauthorized"],
  export: ["unauthorized", "local"],
};

/** Says what to do about a step that failed: the command, where one helps. */
function remedy(
  step: string,
  machine: Machine,
  error: unknown,
): string | undefined {
  const hint = error instanceof OffloadError ? error.hint : undefined;
  if (isUnreadable(machine.privateKey)) return AS_ACCOUNT;
  if (step === "authentication" && hint !== undefined) return hint;
  if (MENDED[step]?.includes(codeOf(error))) {
    return `run '${trustCommand(machine)}'`;
  }
  if (hint !== undefined) return hint;
  const ssh = sshCommand(machine);
  return (STEPS.session as readonly string[]).includes(step)
    ? `see how far '${ssh.replace("ssh", "ssh -v")}' gets`
    : "where guix-daemon hangs, there or here, run 'systemctl restart " +
      "guix-daemon' ('herd restart guix-daemon' on Guix System)";
}

/** The steps until it is logged in. */
async function testSession(
  trial: Trial,
  context: Context,
): Promise<Session | undefined> {
  const { machine } = trial;
  const reached = (name: string) => {
    if (name === "greeting") return;
    // A server that is crowded is tried again.
    if (trial.steps.some((step) => step.name === name)) return;
    const key = () => fingerprint(parseHostKey(machine).key);
    trial.end(name, "ok", name === "connect" ? "" : key());
  };
  try {
    const session = await openSession(machine, context, reached);
    trial.end("authentication", "ok", `as '${machine.user}'`);
    return session;
  } catch (error) {
    const step = STEP_OF[codeOf(error)] ?? STEPS.session[trial.steps.length]!;
    // What is wrong here is known before anybody is asked.
    const before = STEPS.session.slice(0, STEPS.session.indexOf(step));
    for (const name of before.slice(trial.steps.length)) {
      trial.end(name, "skipped", "");
    }
    trial.fail(step, error);
    return undefined;
  }
}

/** Runs a command there and returns what it printed. */
export async function outputOf(
  session: Session,
  command: string,
  input: Uint8Array | string = "",
): Promise<string> {
  const { channel, ended } = await session.exec(command);
  channel.end(input);
  const output = await collect(channel);
  const { code, errors } = await ended;
  if (code === 0) return output.toString();
  const [complaint = ""] = errors.trim().split("\n").slice(-1);
  throw new OffloadError(
    `failed to run '${command}' on '${session.machine.name}': ` +
      (complaint || `exit code ${code}`),
    { code: "command" },
  );
}

/** Whether programs can be run there: only bulk and facts need that. */
async function testPrograms(trial: Trial, session: Session): Promise<void> {
  const { signal, machine } = trial;
  if (signal.aborted) return;
  const command = "guix archive --version";
  try {
    const output = await unlessAborted(signal, outputOf(session, command));
    trial.end("guix", "ok", inOneLine(output.split("\n")[0]!));
  } catch (error) {
    const code = codeOf(error);
    const hint = "builds work without, but the load is not known and large " +
      `transfers take longer: see '${sshCommand(machine)} ${command}'`;
    trial.end("guix", "warning", inOneLine(reason(error)), hint, code);
  }
}

/** Whether its clock is not behind, which confuses those who look at dates. */
function testClock(trial: Trial, { clock }: Partial<Facts>): void {
  if (clock === undefined) return;
  const ahead = Math.round(clock);
  if (ahead >= 0) return trial.end("clock", "ok", `${ahead} s ahead`);
  const hint = "what is built there seems to be from the past: set its " +
    "clock, for example by 'timedatectl set-ntp true' there";
  trial.end("clock", "warning", `${-ahead} s behind`, hint);
}

/** Has the machine import what we signed. */
export async function testImport(
  remote: StoreConnection,
  { path, bundle }: Sample,
): Promise<string> {
  async function* chunks() {
    yield bundle;
  }
  await importPaths(remote, chunks());
  const [valid] = await queryValidPaths(remote, [path]);
  if (valid === path) return path;
  throw remote.reader.error(`'${path}' was not properly imported`);
}

/** Has the machine make and sign an item; the file it restores is removed. */
export async function exportSample(
  remote: StoreConnection,
  { name }: Machine,
): Promise<{ item: ItemMetadata; path: string; reader: ByteReader }> {
  const path = await addTextToStore(remote, "import-test", nonce(name), []);
  const bundle = exportBundle(remote, [path]);
  const reader = new ByteReader(bundle, `archive from '${name}'`);
  const directory = mkdtempSync(`${tmpdir()}/offload-`);
  try {
    await reader.number(1);
    const item = await restoreItem(
      ...[reader, `${directory}/item`, takeUpTo(2 ** 20)] as const,
    );
    return { item, path, reader };
  } finally {
    removeFile(directory);
  }
}

/** Has the machine sign an item, which is checked as an output would be. */
async function testExport(
  remote: StoreConnection,
  machine: Machine,
  context: Context,
): Promise<string> {
  const acl = readAcl(context.configDirectory);
  const { item, path, reader } = await exportSample(remote, machine);
  checkItem(item, [path], acl, reader);
  return path;
}

/** Sends an item there and brings one back, unless it is this machine. */
async function testTransfers(
  trial: Trial,
  remote: StoreConnection,
  prepare: () => Promise<Sample>,
  context: Context,
): Promise<void> {
  const isThis = await unlessAborted(
    context.signal,
    prepare().then(({ path }) => isOurStore(remote, path, context)),
  ).catch(() => false); // the import tells what is wrong
  if (isThis) {
    const hint = "one machine file for a whole farm is fine; else remove it";
    return trial.end("import", "warning", THIS_MACHINE.why, hint);
  }
  const itself = (path: string) => path;
  const send = async () => testImport(remote, await prepare());
  await trial.run("import", send, itself);
  const bring = () => testExport(remote, trial.machine, context);
  await trial.run("export", bring, itself);
}

/** Tests a machine. */
export async function testMachine(
  machine: Machine,
  prepare: () => Promise<Sample>,
  seconds: number,
  context: Context,
  tell: (step: Step) => void,
): Promise<TestReport> {
  return await withTimeout(seconds, context, async ({ signal, settings }) => {
    const trial = new Trial(machine, signal, tell);
    const session = await testSession(trial, { ...context, signal, settings });
    if (session === undefined) return trial.report();
    try {
      const facts = within(seconds / 4, probe(session, context), "no answer")
        .catch((): Partial<Facts> => ({}));
      const openDaemon = async () => {
        session.useSocket((await facts).socket);
        return session.openDaemon();
      };
      const remote = await trial.run(
        ...["daemon", openDaemon] as const,
        ({ minor }) => `protocol 1.${minor}`,
      );
      await testPrograms(trial, session);
      if (remote !== undefined) {
        await testTransfers(trial, remote, prepare, { ...context, signal });
      }
      testClock(trial, await facts);
      return trial.report();
    } finally {
      session.close();
    }
  });
}

/** Tells of a step when it ends. */
export function tellStep(
  machine: Machine,
  { name, outcome, detail }: Step,
  { log }: Context,
): void {
  if (outcome === "skipped") return;
  const what = detail === "" ? "" : `: ${detail}`;
  const styled = { style: OUTCOME_STYLES[outcome], text: outcome };
  log.info(`${machineId(machine)}: ${name}: `, styled, what);
}

/** Lays out the reports: a table, and what to do where it is needed. */
export function formatReports(
  reports: readonly TestReport[],
  screen: Screen,
): string {
  const rows = reports.map(({ machine, outcome, seconds, steps }) => [
    machine,
    { style: OUTCOME_STYLES[outcome], text: outcome },
    `${steps.filter((step) => step.outcome === "ok").length}/${steps.length}`,
    `${seconds.toFixed(2)} s`,
    steps.filter((step) => step.outcome === outcome && outcome !== "ok")
      .map(({ name }) => name).join(", "),
  ]);
  const header = ["machine", "result", "steps", "time", "where"];
  const remedies = reports.flatMap(({ machine, steps }) =>
    steps.filter(({ outcome }) => outcome === "failed" || outcome === "warning")
      .map(({ name, outcome, detail, hint }) =>
        `\n${inOneLine(machine)}: ${inOneLine(name)}: ` +
        screen.paint(OUTCOME_STYLES[outcome], outcome) +
        printable(`: ${detail}`) +
        (hint === undefined ? "" : `\n  hint: ${inOneLine(hint)}`)
      )
  );
  return [formatTable([header, ...rows], screen), ...remedies].join("\n");
}

/**
 * `offload status`: shows how machines are and what they do.
 *
 * @module
 */

import { existsSync, opendirSync } from "node:fs";
import { setTimeout as delay } from "node:timers/promises";
import {
  codeOf,
  DOUBTS,
  isThisMachine,
  leftAloneUntil,
  machineId,
  normalizedLoad,
  OffloadError,
  openSession,
  pluginDirectory,
  reason,
  THIS_MACHINE,
  within,
} from "../mod.ts";
import type {
  CommandOptions,
  CommandResult,
  Context,
  ErrorCode,
  Facts,
  Machine,
  Plugin,
  Screen,
  Session,
  Styled,
  WaitingBuild,
} from "../mod.ts";
import {
  describeBuild,
  describeWaiting,
  findWaiting,
  findWork,
  formatWork,
} from "./_at_work.ts";
import type { Work } from "./_at_work.ts";
import {
  hasErrors,
  JSON_OPTION,
  selectMachines,
  TIMEOUT_OPTION,
  timeoutOf,
  WHICH_MACHINES,
  withTimeout,
} from "./_machines.ts";
import {
  awaitAll,
  formatJson,
  formatSize,
  formatTable,
  inOneLine,
  redraw,
  unlessAborted,
} from "./_screen.ts";
import { warnOfGaps } from "./_first_steps.ts";
import { probe } from "./_remote.ts";
import { residentStatus } from "./_resident_start.ts";

/** How a machine is, as `offload status` shows it. */
interface MachineStatus {
  /** NAME:PORT. */
  readonly machine: string;
  /** Whether it could be logged in to; not there before it was tried. */
  readonly reachable?: boolean;
  /** Why not. */
  readonly problem?: string | undefined;
  /** The same, for programs. */
  readonly code?: ErrorCode | undefined;
  readonly kernel?: string | undefined;
  readonly architecture?: string | undefined;
  readonly hostName?: string | undefined;
  readonly normalizedLoad?: number | undefined;
  /** In bytes. */
  readonly freeDiskSpace?: number | undefined;
  /** Seconds that its clock is ahead of ours. */
  readonly timeDifference?: number | undefined;
  /** In milliseconds. */
  readonly latency?: number | undefined;
  readonly slots: number;
  /** What the slots that are taken are used for, if it is us who took them. */
  readonly builds: readonly Work[];
  /** How often it failed since a build last succeeded there. */
  readonly failures: number;
  /** Seconds for which it is left alone, and why. */
  readonly leftAlone: number;
  readonly lastProblem?: string | undefined;
  /** How many builds failed there that did well on other machines. */
  readonly doubts: number;
}

/** What a machine said of itself, by the reference's names. */
function describeFacts(facts: Facts): Partial<MachineStatus> {
  const [system, hostName, release, architecture] = facts.uname?.split(" ") ??
    [];
  return {
    kernel: system && `${system} ${release}`,
    architecture,
    hostName,
    normalizedLoad: normalizedLoad(facts),
    freeDiskSpace: facts.store?.bytes,
    timeDifference: facts.clock && Math.round(facts.clock),
    latency: facts.roundTrip,
  };
}

/** What is known here of a machine, without asking it. */
function describeUse(
  machine: Machine,
  context: Context,
): MachineStatus {
  const { observations, settings } = context;
  const id = machineId(machine);
  const record = observations.machines(id).get(id);
  const until = leftAloneUntil(machine, record, settings);
  const left = (until - Date.now()) / 1000;
  return {
    machine: id,
    slots: machine.parallelBuilds,
    builds: findWork(machine, context),
    failures: record?.failures ?? 0,
    leftAlone: Math.max(0, Math.ceil(left)),
    lastProblem: record?.failures ? inOneLine(record.problem) : undefined,
    doubts: record?.doubts ?? 0,
  };
}

/** A derivation of ours, if there is any, without a look at all items. */
function someItem({ storeDirectory }: Context): string | undefined {
  const directory = opendirSync(storeDirectory);
  try {
    for (let entry; (entry = directory.readSync()) !== null;) {
      if (entry.name.endsWith(".drv")) return `${storeDirectory}/${entry.name}`;
    }
    return undefined;
  } finally {
    directory.closeSync();
  }
}

/** Whether a machine is this one, as far as that is found out quickly. */
async function isKnownAsThis(
  session: Session,
  context: Context,
): Promise<boolean> {
  const known = context.observations.identity(session.machine);
  if (known !== undefined) return known;
  const opening = session.openDaemon();
  const asking = opening.then(async (remote) => {
    const path = someItem(context);
    return path !== undefined &&
      await isThisMachine(session.machine, remote, path, context);
  });
  try {
    return await within(WATCH_INTERVAL, asking, "no answer");
  } catch {
    return false;
  } finally {
    opening.then(({ stream }) => stream.destroy(), () => {});
  }
}

/** Asks a machine how it is; `sessions` keeps the connection. */
async function inspect(
  machine: Machine,
  seconds: number,
  sessions: Map<string, Session>,
  context: Context,
): Promise<MachineStatus> {
  const id = machineId(machine);
  const ask = async (bounds: Pick<Context, "signal" | "settings">) => {
    const session = sessions.get(id) ??
      await openSession(machine, { ...context, ...bounds });
    sessions.set(id, session);
    const asked = unlessAborted(bounds.signal, probe(session, context));
    const facts = await asked.catch((error): Facts => {
      // An account may be unable to run commands and still be of use.
      if (!bounds.signal.aborted && !session.failure()) return { time: 0 };
      sessions.delete(id);
      session.close();
      throw error;
    });
    session.useSocket(facts.socket);
    return { facts, isThis: await isKnownAsThis(session, context) };
  };
  try {
    const { facts, isThis } = await withTimeout(seconds, context, ask);
    const use = describeUse(machine, context);
    const problem = isThis ? THIS_MACHINE.why : undefined;
    return { ...use, reachable: true, problem, ...describeFacts(facts) };
  } catch (error) {
    context.signal.throwIfAborted();
    const [problem, code] = [inOneLine(reason(error)), codeOf(error)];
    const use = describeUse(machine, context);
    return { ...use, reachable: false, problem, code };
  }
}

/** What is known of a machine beside numbers: builds, failures. */
function describeWork(
  { builds, doubts, failures, leftAlone, problem, lastProblem }: MachineStatus,
): string[] {
  const notes = builds.map(describeBuild);
  if (problem !== undefined) notes.unshift(problem);
  if (failures > 0) {
    const times = failures === 1 ? "once" : `${failures} times`;
    const alone = leftAlone > 0 ? `left alone for ${leftAlone} s, ` : "";
    notes.push(`${alone}failed ${times}: ${lastProblem}`);
  }
  if (doubts >= DOUBTS) {
    notes.push(`comes last: ${doubts} builds failed that did well elsewhere`);
  }
  return notes;
}

/** The numbers among what is known of a machine, to be read. */
function formatNumbers(status: MachineStatus) {
  const { freeDiskSpace } = status;
  return {
    load: status.normalizedLoad?.toFixed(2),
    disk: freeDiskSpace === undefined ? undefined : formatSize(freeDiskSpace),
    clock: status.timeDifference?.toFixed().concat(" s"),
    latency: status.latency?.toFixed(1).concat(" ms"),
    slots: `${status.builds.length} of ${status.slots} taken`,
  };
}

/** Shows machines as the reference does, with what it does not know. */
function formatStatus(statuses: readonly MachineStatus[]): string {
  const lines = statuses.flatMap((status) => {
    const { load, disk, clock, latency, slots } = formatNumbers(status);
    const fields = Object.entries({
      [status.reachable ? "left out" : "unreachable"]: status.problem,
      "kernel": status.kernel,
      "architecture": status.architecture,
      "host name": status.hostName,
      "normalized load": load,
      "free disk space": disk,
      "time difference": clock,
      latency,
      slots,
    }).filter(([, value]) => value !== undefined)
      .map(([name, value]) => `${name}: ${inOneLine(String(value))}`);
    const work = describeWork({ ...status, problem: undefined });
    const name = inOneLine(status.machine).replace(/:22$/, "");
    return [name, ...[...fields, ...work].map((line) => `  ${line}`)];
  });
  return lines.join("\n");
}

/** Shows machines in a table. */
function formatStatusTable(
  statuses: readonly MachineStatus[],
  screen: Screen,
  describe = describeWork,
): string {
  const rows = statuses.map((status) => {
    const { load, disk, clock, latency } = formatNumbers(status);
    const { machine, reachable, builds, slots } = status;
    const state: Styled = reachable
      ? { style: "good", text: "up" }
      : { style: "bad", text: reachable === false ? "down" : "?" };
    const numbers = [`${builds.length}/${slots}`, load, disk, clock, latency];
    const names = [status.hostName, status.architecture, status.kernel];
    const cells = [...numbers, ...names].map((cell) => cell ?? "-");
    return [machine, state, ...cells, describe(status).join("; ")];
  });
  const header = "machine,,slots,load,disk,clock,latency,host,arch,kernel,";
  return formatTable([header.split(","), ...rows], screen);
}

/** Shows builds above machines, which get the rest of the screen. */
function formatWatch(
  statuses: readonly MachineStatus[],
  waiting: readonly WaitingBuild[],
  screen: Screen,
): string {
  const describe = (status: MachineStatus) =>
    describeWork({ ...status, builds: [] }); // they have lines of their own
  const machines = formatStatusTable(statuses, screen, describe);
  const work = new Map(statuses.map((it) => [it.machine, it.builds]));
  const [, lines] = screen.size();
  const builds = formatWork(work, waiting, Math.floor(lines / 2), screen);
  return builds === "" ? machines : `${builds}\n\n${machines}`;
}

/** Shows all in the form that is wanted. */
function formatAll(
  statuses: readonly MachineStatus[],
  { json, watch }: CommandOptions,
  context: Context,
  screen: Screen,
): string {
  const work = statuses.flatMap(({ builds }) => builds);
  const waiting = findWaiting(work, context);
  if (json && watch) return formatJson({ machines: statuses, waiting });
  if (json) return formatJson(statuses, 2);
  if (watch && screen.isTerminal) return formatWatch(statuses, waiting, screen);
  const machines = screen.isTerminal
    ? formatStatusTable(statuses, screen)
    : formatStatus(statuses);
  return [machines, ...describeWaiting(waiting)].join("\n");
}

/** Says what the process does that stays, where there is one. */
function tellResident({ log, stateDirectory }: Context): void {
  const status = residentStatus(stateDirectory);
  if (status === undefined) return;
  const { pid, since, builds, served, connections } = status;
  const start = new Date(since).toLocaleString("sv");
  log.info(
    `process ${pid} serves builds since ${start}: ${builds} under way, ` +
      `${served} done, ${connections} connections to machines`,
  );
}

/** Warns where `scripts/guix` passes all requests on. */
function warnWhereOff({ environment, log }: Context): void {
  const file = `${pluginDirectory(environment)}/off`;
  if (!existsSync(file)) return;
  log.warn(
    new OffloadError(`'${file}' is there: 'guix offload' serves guix-daemon`, {
      hint: "remove it to have Offload serve again",
    }),
  );
}

/** Seconds between two looks at a machine. */
const WATCH_INTERVAL = 2;

/** Shows machines until interrupted; none waits for another one. */
async function watchMachines(
  machines: readonly Machine[],
  look: (machine: Machine) => Promise<MachineStatus>,
  show: (statuses: readonly MachineStatus[]) => void,
  context: Context,
): Promise<void> {
  const latest = machines.map((machine) => describeUse(machine, context));
  const pause = () =>
    delay(WATCH_INTERVAL * 1000, undefined, { signal: context.signal });
  const first = machines.map(async (machine, index) => {
    latest[index] = await look(machine);
  });
  const follow = async (index: number) => {
    for (await first[index];;) {
      await pause();
      latest[index] = await look(machines[index]!);
    }
  };
  const ended = Promise.all(machines.map((_, index) => follow(index)));
  ended.catch(() => {}); // the interruption, seen below
  try {
    await Promise.race([Promise.all(first), pause()]);
    for (;; await pause()) {
      // What is known here does not wait for a machine that is slow to answer.
      show(latest.map((status, index) => {
        const builds = findWork(machines[index]!, context);
        return { ...status, builds };
      }));
    }
  } catch (error) {
    if (!context.signal.aborted) throw error;
  }
}

/** Warns of clocks that are behind, as the reference does. */
function warnOfClocks(
  statuses: readonly MachineStatus[],
  { log }: Context,
): void {
  for (const { machine, timeDifference = 0 } of statuses) {
    if (timeDifference >= 0) continue;
    const name = machine.replace(/:22$/, "");
    log.warn(`machine '${name}' is ${-timeDifference} seconds behind`);
  }
}

/** Says what to type next where machines can't be reached. */
function warnOfUnreachable(
  statuses: readonly MachineStatus[],
  { log }: Context,
): void {
  const down = statuses.filter(({ reachable }) => !reachable).length;
  if (down === 0) return;
  const message = `can't reach ${down} of ${statuses.length} machines`;
  const hint = "'offload test' says what to do about each";
  log.warn(new OffloadError(message, { hint }));
}

/** `offload status [FILE [REGEXP]]`. */
async function statusCommand(
  args: readonly string[],
  options: CommandOptions,
  context: Context,
  screen: Screen,
): Promise<CommandResult> {
  const seconds = timeoutOf(options, context);
  const machines = await selectMachines(args, context);
  await warnOfGaps(machines, context);
  warnWhereOff(context);
  context.log.info(`getting status of ${machines.length} build machines...`);
  tellResident(context);
  const sessions = new Map<string, Session>();
  const look = (machine: Machine) =>
    inspect(machine, seconds, sessions, context);
  const describe = (statuses: readonly MachineStatus[]) =>
    formatAll(statuses, options, context, screen);
  try {
    if (options.watch) {
      await watchMachines(machines, look, (statuses) => {
        if (screen.isTerminal) redraw(describe(statuses), screen);
        else screen.print(`${describe(statuses)}\n`);
      }, context);
      return { output: "", exitCode: 0 };
    }
    const looks = machines.map(look);
    const statuses = await awaitAll("asking machines", looks, screen);
    warnOfClocks(statuses, context);
    warnOfUnreachable(statuses, context);
    const failed = statuses.some(({ reachable }) => !reachable) ||
      hasErrors(context);
    return { output: describe(statuses), exitCode: failed ? 1 : 0 };
  } finally {
    for (const session of sessions.values()) session.close();
  }
}

const plugin = {
  name: "status",
  command: {
    order: 2,
    usage: "[FILE [REGEXP]]",
    summary: "Show how machines are and what they do",
    description: [
      WHICH_MACHINES,
      "Where the output is no terminal, it is in the format of 'guix offload " +
      "status', with more lines. The exit code is 1 when a machine can't be " +
      "reached.",
      "With --watch, builds come first: what each is at, how much has moved or " +
      "is left, by how long it took before, and which ones wait. JSON then has " +
      "a line each time, with 'machines' and those that are 'waiting'.",
    ],
    options: [
      JSON_OPTION,
      TIMEOUT_OPTION,
      ["--watch", "Show it anew every 2 s until interrupted, builds first"],
    ],
    examples: [
      ["offload status", "shows all machines"],
      ["offload status --watch", "shows them until interrupted"],
    ],
    run: async (args, options, makeContext, screen) =>
      statusCommand(args, options, await makeContext(args[0]), screen),
  },
} satisfies Plugin;

export default plugin as Plugin;

/**
 * `offload test`: tests that machines can be used.
 *
 * @module
 */

import { existsSync, statSync, writeFileSync } from "node:fs";
import type { Stats } from "node:fs";
import { dirname } from "node:path";
import { codeOf, EXIT, OffloadError, pluginDirectory, reason } from "../mod.ts";
import type {
  CommandOptions,
  CommandResult,
  Context,
  Machine,
  Plugin,
  PluginContext,
  Problem,
  Screen,
} from "../mod.ts";
import { lackOfMachines } from "./_first_steps.ts";
import {
  JSON_OPTION,
  selectMachines,
  TIMEOUT_OPTION,
  timeoutOf,
  WHICH_MACHINES,
} from "./_machines.ts";
import { awaitAll, formatJson } from "./_screen.ts";
import {
  formatReports,
  makeSample,
  tellStep,
  testMachine,
} from "./_testing.ts";
import type { Sample, Step, TestReport } from "./_testing.ts";

/** The bits of a mode, as of others. */
const MODE = { read: 4, write: 2, enter: 1 } as const;

/** Whether an account may do what the mode's bits say, with a file that is. */
function mayUse(file: string, bits: number, account: Stats): boolean {
  const stat = statSync(file, { throwIfNoEntry: false });
  if (stat === undefined || account.uid === 0) return true;
  const { uid, gid, mode } = stat;
  const shift = uid === account.uid ? 6 : gid === account.gid ? 3 : 0;
  const above = dirname(file);
  return (mode >> shift & bits) === bits &&
    (above === file || mayUse(above, MODE.enter, account));
}

/**
 * Checks that guix-daemon's user, who owns the store, gets at what the
 * hook needs there: root, who runs a command, would not notice.
 */
function checkInstallation(
  machines: readonly Machine[],
  context: PluginContext & Pick<Context, "storeDirectory">,
): Problem[] {
  const { configDirectory, stateDirectory, storeDirectory } = context;
  const account = statSync(storeDirectory, { throwIfNoEntry: false });
  if (account === undefined) return [];
  const keys = [...new Set(machines.map(({ privateKey }) => privateKey))];
  const needs: [file: string, bits: number, verb: string][] = [
    ...["machines.scm", "acl"].map((name) => `${configDirectory}/${name}`),
    ...keys,
  ].map((file) => [file, MODE.read, "read"]);
  const plugins = pluginDirectory(context.environment);
  needs.push([plugins, MODE.read | MODE.enter, "read"]);
  const state = `${stateDirectory}/offload`;
  needs.push([state, MODE.write | MODE.enter, "write to"]);
  const problems = needs
    .filter(([file, bits]) => !mayUse(file, bits, account))
    .map(([file, , verb]): Problem => ({
      severity: "error",
      message: `guix-daemon's user, who owns '${storeDirectory}', ` +
        `can't ${verb} '${file}'`,
      hint: `run 'chown -R --reference=${storeDirectory} ${file}', and have ` +
        "it where that user may enter: not in /root",
    }));
  const open = keys.filter((file) =>
    existsSync(file) && statSync(file).mode & 0o77
  );
  return problems.concat(open.map((file) => ({
    severity: "warning",
    message: `others than its owner may use the SSH private key '${file}'`,
    hint: `run 'chmod go= ${file}'`,
  })));
}

/** What is wrong here, as if it were a machine. */
function testOf(machine: string, problems: readonly Problem[]): TestReport[] {
  const steps = problems.map(({ severity, message, hint, code }): Step => ({
    name: machine,
    outcome: severity === "error" ? "failed" : "warning",
    detail: message,
    hint,
    code: code ?? "configuration",
    seconds: 0,
  }));
  const failed = steps.some(({ outcome }) => outcome === "failed");
  const outcome = failed ? "failed" : "warning";
  return steps.length === 0 ? [] : [{ machine, outcome, seconds: 0, steps }];
}

/** Whether a plugin has a problem. */
function isPlugins({ code }: Problem): boolean {
  return code === "plugin";
}

/** That no machine was tested, as a failure of none, where that is so. */
async function lackOf(
  machines: readonly Machine[],
  context: Context,
): Promise<Problem[]> {
  const lack = await lackOfMachines(machines, context);
  if (lack === undefined) return [];
  const message = `${lack.message}, and so none was tested`;
  return [{ severity: "error", message, hint: lack.hint }];
}

/** Writes text for XML. */
function xml(text: string): string {
  const entities = { "&": "amp", "<": "lt", ">": "gt", '"': "quot" };
  return text
    .replace(/[&<>"]/g, (it) => `&${entities[it as keyof typeof entities]};`)
    // XML knows no other control characters, not even escaped.
    .replace(/(?![\t\n])\p{Cc}|\p{Cs}/gu, "\ufffd");
}

/** A report as JUnit has it, with these suites. */
function junitDocument(suites: string): string {
  return '<?xml version="1.0" encoding="UTF-8"?>\n' +
    `<testsuites name="offload test">\n${suites}</testsuites>\n`;
}

/** Writes the reports as JUnit does: a suite for each machine. */
export function formatJunit(reports: readonly TestReport[]): string {
  const bodies = {
    ok: () => "",
    warning: ({ detail, hint }: Step) =>
      `<system-out>warning: ${xml(`${detail}\n${hint ?? ""}`)}</system-out>`,
    failed: ({ detail, hint, code = "failed" }: Step) =>
      `<failure message="${xml(detail)}" type="${code}">` +
      `${xml(hint ?? "")}</failure>`,
    skipped: () => "<skipped/>",
  };
  const number = (steps: readonly Step[], outcome: Step["outcome"]) =>
    steps.filter((step) => step.outcome === outcome).length;
  const suites = reports.map(({ machine, seconds, steps }) =>
    `<testsuite name="${xml(machine)}" tests="${steps.length}" ` +
    `failures="${number(steps, "failed")}" ` +
    `skipped="${number(steps, "skipped")}" time="${seconds.toFixed(3)}">\n` +
    steps.map((step) =>
      `<testcase classname="${xml(machine)}" name="${xml(step.name)}" ` +
      `time="${step.seconds.toFixed(3)}">${bodies[step.outcome](step)}` +
      "</testcase>\n"
    ).join("") + "</testsuite>\n"
  );
  return junitDocument(suites.join(""));
}

/** Writes, as JUnit does, that there was no test at all, and why. */
function formatJunitError(error: unknown): string {
  const { hint = "" } = (error ?? {}) as Partial<OffloadError>;
  return junitDocument(
    '<testsuite name="offload test" tests="1" failures="0" errors="1" ' +
      'skipped="0" time="0.000">\n' +
      '<testcase classname="offload test" name="offload test" time="0.000">' +
      `<error message="${xml(reason(error))}" type="${codeOf(error)}">` +
      `${xml(hint)}</error></testcase>\n</testsuite>\n`,
  );
}

/** Whether a file is a plain one, or can become that. */
function mayBeReplaced(file: string): boolean {
  try {
    return statSync(file, { throwIfNoEntry: false })?.isFile() ?? true;
  } catch { // who writes it says why
    return false;
  }
}

/** Writes a file that was asked for; returns what is wrong, if that fails. */
function writeReport(file: string, text: string): OffloadError | undefined {
  try {
    writeFileSync(file, text);
    return undefined;
  } catch (cause) {
    const message = `failed to write '${file}': ${reason(cause)}`;
    return new OffloadError(message, { cause });
  }
}

/**
 * Runs a command that may write a report; whatever becomes of it, none of the
 * run before is left.
 */
async function withReport(
  { junit }: CommandOptions,
  run: () => Promise<CommandResult>,
): Promise<CommandResult> {
  // No file was named where there is no value, or more than one.
  const isNamed = typeof junit === "string" || typeof junit === "number";
  if (!isNamed) return await run();
  const file = String(junit);
  const write = (error: unknown) => writeReport(file, formatJunitError(error));
  // A pipe is to get one report.
  if (mayBeReplaced(file)) write("it did not come to its end");
  try {
    return await run();
  } catch (error) {
    write(error);
    throw error;
  }
}

/** `offload test [FILE [REGEXP]]`. */
async function testCommand(
  args: readonly string[],
  options: CommandOptions,
  context: Context,
  screen: Screen,
): Promise<CommandResult> {
  const seconds = timeoutOf(options, context);
  const machines = await selectMachines(args, context);
  context.log.info(`testing ${machines.length} build machines...`);
  let sample: Promise<Sample> | undefined;
  const prepare = () => sample ??= makeSample(context);
  const tests = machines.map((machine) => {
    const tell = (step: Step) =>
      options.json || tellStep(machine, step, context);
    return testMachine(machine, prepare, seconds, context, tell);
  });
  const results = await awaitAll("testing machines", tests, screen);
  context.signal.throwIfAborted();
  const isNothing = machines.length + context.problems.length === 0;
  const reports = [
    ...testOf("installation", checkInstallation(machines, context)),
    ...testOf("machine file", context.problems.filter((it) => !isPlugins(it))),
    ...testOf("plugins", context.problems.filter(isPlugins)),
    ...testOf("machines", await lackOf(machines, context)),
    ...results,
  ];
  const problem = options.junit === undefined
    ? undefined
    : writeReport(String(options.junit), formatJunit(reports));
  const failed = reports.some(({ outcome }) => outcome === "failed");
  const failure = isNothing ? EXIT.usage : 1;
  const output = options.json
    ? formatJson(reports, 2)
    : formatReports(reports, screen);
  return { output, exitCode: failed || problem ? failure : 0, problem };
}

const plugin = {
  name: "test",
  command: {
    order: 1,
    usage: "[FILE [REGEXP]]",
    summary: "Test that machines can be used, step by step",
    description: [
      WHICH_MACHINES,
      "Each goes through these steps: connect, host key, authentication, " +
      "daemon, guix, import of a signed store item there, export of a signed " +
      "one back, clock. For each that fails, the cause is told, and what to " +
      "do. A warning is no failure.",
    ],
    options: [
      JSON_OPTION,
      ["--junit FILE", "Write the results to FILE, too, as JUnit's XML"],
      TIMEOUT_OPTION,
    ],
    examples: [
      ["offload test", "tests all machines"],
      ["offload test /etc/guix/machines.scm '^arm'", "tests some of them"],
      ["offload test --junit offload.xml", "tests them in a pipeline"],
    ],
    around: withReport,
    run: async (args, options, makeContext, screen) =>
      testCommand(args, options, await makeContext(args[0]), screen),
  },
} satisfies Plugin;

export default plugin as Plugin;

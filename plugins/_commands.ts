/**
 * What every command passes through: finds it, reads its command line, makes
 * its log and its screen, and helps.
 *
 * @module
 */

import { writeFileSync } from "node:fs";
import { isatty } from "node:tty";
import manifest from "../package.json" with { type: "json" };
import { cac } from "../deps.ts";
import {
  abortOnSignals,
  builtinNames,
  checkRuntime,
  codeOf,
  EXIT,
  exitCodeOf,
  loadBuiltin,
  loadSite,
  makeContext,
  makeLog,
  OffloadError,
  pluginDirectory,
  readSettings,
  reason,
  SETTINGS,
  STANDARD_ERROR,
  STANDARD_OUTPUT,
  writeText,
} from "../mod.ts";
import type {
  Command,
  CommandOptions,
  CommandResult,
  Context,
  HookArguments,
  Plugin,
  Screen,
  Style,
  Variables,
} from "../mod.ts";
import { drawBar, Foot, progressBar } from "./_screen.ts";

/** The version, which stands in package.json alone. */
export const VERSION: string = manifest.version;

/** The option that every command has. */
export const HELP_OPTION = ["--help", "Show this help"] as const;

/** A command, and the name of its plugin, by which it is called. */
export interface NamedCommand extends Command {
  /** What it is called by. */
  readonly name: string;
}

/** What the exit codes of commands mean. */
export const EXIT_CODES: readonly (readonly [code: string, meaning: string])[] =
  [
    ["0", "All is well"],
    [
      "1",
      "Something failed: a machine, a list of machines, or the command; " +
      "or no machine would build it",
    ],
    ["2", "It was used wrongly, or its settings can't be read"],
  ];

/** An error in how a command is called. */
export function usageError(message: string, command?: string): OffloadError {
  const hint = `run 'offload ${command ? `${command} ` : ""}--help'`;
  const code = "usage";
  return new OffloadError(message, { hint, code, exitCode: EXIT.usage });
}

/** Breaks a paragraph into lines. */
function fillParagraph(text: string): string {
  return text.replace(/(.{1,76})(?: |$)/g, "$1\n");
}

/** Lays out names and what they mean. */
function formatPairs(pairs: Command["options"]): string {
  const width = Math.max(...pairs.map(([name]) => name.length));
  const lines = pairs.map(([name, it]) => `  ${name.padEnd(width)}  ${it}\n`);
  return lines.join("");
}

/** The help on the program. */
function generalHelp(commands: readonly NamedCommand[]): string {
  return `Usage: offload COMMAND ARGUMENT...

${formatPairs(commands.map(({ name, summary }) => [name, summary]))}
${formatPairs([HELP_OPTION, ["--version", "Print the version"]])}
'offload COMMAND --help' says more.

As a hook: offload SYSTEM MAX-SILENT-TIME PRINT-BUILD-TRACE? BUILD-TIMEOUT
This is how guix-daemon calls it: requests come in on the standard input.`;
}

/** The help on a command. */
function commandHelp(command: NamedCommand): string {
  const { name, usage, summary, description, options, examples } = command;
  const lines = examples.map(([line, does]) => [line, `# ${does}`] as const);
  return [
    `Usage: offload ${name} [OPTION]... ${usage}\n${summary}.\n`,
    ...description.map(fillParagraph),
    formatPairs([...options, HELP_OPTION]),
    `Exit codes:\n${formatPairs(EXIT_CODES)}`,
    `Examples:\n${formatPairs(lines)}`,
  ].join("\n").trimEnd();
}

/** The name of an option, and that of its value. */
export function splitOption([usage]: Command["options"][number]): string[] {
  return usage.split(" ");
}

/** Makes cac's commands of the table. */
function makeCli(
  commands: readonly NamedCommand[],
  run: (command: NamedCommand) => Promise<CommandResult>,
) {
  const cli = cac("offload");
  for (const command of commands) {
    const words = command.usage.split(" ").filter((word) => word !== "")
      .map((word) => word.startsWith("[") ? "[argument]" : "<argument>");
    const made = cli.command([command.name, ...words].join(" "))
      .action(() => run(command));
    for (const option of command.options) {
      const [name, value] = splitOption(option);
      made.option(value === undefined ? name! : `${name} <${value}>`, "");
    }
  }
  cli.option("-h, --help", "").option("-V, --version", "");
  return cli;
}

/** Says in the reference's words what is wrong with a command line. */
function wrongArguments(
  error: Error,
  { name, usage }: NamedCommand,
): OffloadError {
  const [, option] = /option \`(.*?)[\` ]/i.exec(error.message) ?? [];
  const missing = /missing$/.test(error.message);
  const message = option === undefined
    ? `wrong number of arguments: expected 'offload ${name} ${usage}'`
    : `${option}: ${missing ? "its value is missing" : "unrecognized option"}`;
  return usageError(message, name);
}

/** How many letters are to be changed, put in or left out between words. */
function distance(from: string, to: string): number {
  let row = Array.from({ length: to.length + 1 }, (_, index) => index);
  for (const [index, letter] of Array.from(from).entries()) {
    const next = [index + 1];
    for (let at = 0; at < to.length; at++) {
      const changed = row[at]! + (letter === to[at] ? 0 : 1);
      next.push(Math.min(changed, row[at + 1]! + 1, next[at]! + 1));
    }
    row = next;
  }
  return row.at(-1)!;
}

/** The error where there is no such command, with what may have been meant. */
function unknownCommand(
  word: string,
  commands: readonly NamedCommand[],
): OffloadError {
  if (word.startsWith("-")) return usageError(`${word}: unrecognized option`);
  const [nearest] = commands.map(({ name }) => name)
    .filter((name) => name.startsWith(word) || distance(word, name) <= 2)
    .sort((a, b) => distance(word, a) - distance(word, b));
  const meant = nearest === undefined ? "" : `: did you mean '${nearest}'?`;
  return usageError(`unknown command '${word}'${meant}`);
}

/** Refuses what cac lets pass: `--no-json`, `--json=x`, `--file a --file b`. */
function checkOptions(
  { options }: Command,
  given: CommandOptions,
  args: readonly string[],
): void {
  for (const option of [...options, HELP_OPTION]) {
    const [name, takesValue] = splitOption(option);
    const value: unknown = given[name!.slice(2)];
    const no = name!.replace("--", "--no-");
    if (value === false) throw usageError(`${no}: unrecognized option`);
    if (Array.isArray(value)) throw usageError(`${name}: more than one value`);
    if (takesValue || !args.some((it) => it.startsWith(`${name}=`))) continue;
    throw usageError(`${name}: it takes no value`);
  }
}

/** Runs a command that is called as cac understands it. */
async function runMatched(
  command: NamedCommand,
  cli: ReturnType<typeof makeCli>,
): Promise<CommandResult> {
  try {
    checkOptions(command, cli.options, cli.rawArgs);
    return await cli.runMatchedCommand();
  } catch (error) {
    if (error instanceof Error && error.name === "CACError") {
      throw wrongArguments(error, command);
    }
    // Who did not know of which command it is can't say more.
    const { hint, code } = usageError("");
    const isVague = error instanceof OffloadError && error.hint === hint;
    if (!isVague || codeOf(error) !== code) throw error;
    throw usageError(reason(error), command.name);
  }
}

/** A plugin's command, by its plugin's name; `undefined`: it has none. */
function commandOf({ name, command }: Plugin): NamedCommand | undefined {
  return command && Object.assign(Object.create(command), { name });
}

/** Loads all commands, in the order in which help lists them. */
export async function loadCommands(
  site: readonly Plugin[] = [],
): Promise<NamedCommand[]> {
  const builtins = await Promise.all(builtinNames().map(loadBuiltin));
  const order = ({ order = Infinity }: NamedCommand) => order;
  return [...new Set([...site, ...builtins])]
    .map((plugin) => plugin && commandOf(plugin))
    .filter((command) => command !== undefined)
    .sort((a, b) =>
      order(a) === order(b) ? a.name.localeCompare(b.name) : order(a) - order(b)
    );
}

/** Loads the commands that may be meant: one, where that is sure. */
async function loadMeant(
  word: string | undefined,
  findSite: () => Promise<readonly Plugin[]>,
): Promise<NamedCommand[]> {
  const plugin = word === undefined ? undefined : await loadBuiltin(word);
  const command = plugin && commandOf(plugin);
  return command ? [command] : await loadCommands(await findSite());
}

/** The error where no command is named, with the one that comes next. */
async function missingCommand(
  makeContext: Parameters<Command["run"]>[2],
): Promise<OffloadError> {
  const { nextStep } = await import("./_first_steps.ts");
  const hint = `${await nextStep(makeContext)}; 'offload --help' lists all`;
  const options = { hint, exitCode: EXIT.usage };
  return new OffloadError("missing command name", {
    ...options,
    code: "usage",
  });
}

/** Runs the command that `args` name. */
async function runCommand(
  args: readonly string[],
  makeContext: Parameters<Command["run"]>[2],
  findSite: () => Promise<readonly Plugin[]>,
  screen: Screen,
): Promise<CommandResult> {
  const isHelp = args[0] === "help";
  const words = args.slice(isHelp ? 1 : 0);
  const commands = await loadMeant(words[0], findSite);
  const cli = makeCli(commands, (command) => {
    const { args, options } = cli;
    return command.run(args.map(String), options, makeContext, screen);
  });
  cli.parse(["", "offload", ...words], { run: false });
  const { args: [word = args[0]], matchedCommandName, options } = cli;
  const command = commands.find(({ name }) => name === matchedCommandName);
  const say = (output: string) => ({ output, exitCode: 0 });
  if (command !== undefined && (isHelp || options.help === true)) {
    return say(commandHelp(command));
  }
  if (isHelp && cli.args.length === 0 || /^(--help|-h)$/.test(word ?? "")) {
    return say(generalHelp(commands));
  }
  if (options.version === true) return say(`offload ${VERSION}`);
  if (!word) throw await missingCommand(makeContext);
  if (command === undefined) throw unknownCommand(word, commands);
  const run = () => runMatched(command, cli);
  return await (command.around?.(options, run) ?? run());
}

const STYLES: Readonly<Record<Style, number>> = {
  good: 32, // green
  bad: 31, // red
  doubtful: 33, // yellow
  heading: 1, // bold
};

/** Makes what colours text for a file, where that shows colours. */
function makePaint(
  file: number,
  { NO_COLOR, TERM }: Variables,
): (style: Style, text: string) => string {
  if (!isatty(file) || NO_COLOR || TERM === "dumb") return (_, text) => text;
  return (style, text) => `\x1b[${STYLES[style]}m${text}\x1b[0m`;
}

/** Makes the foot of the terminal that standard error is; `undefined`: none. */
function makeFoot({ TERM = "dumb" }: Variables): Foot | undefined {
  if (TERM === "dumb" || !isatty(STANDARD_ERROR)) return undefined;
  return new Foot((text) => writeText(STANDARD_ERROR, text));
}

/** Makes the screen of a command. */
function makeScreen(environment: Variables, foot?: Foot): Screen {
  const isTerminal = isatty(STANDARD_OUTPUT);
  const paint = makePaint(STANDARD_OUTPUT, environment);
  const { LC_ALL, LC_CTYPE, LANG } = environment;
  const isUnicode = /utf-?8/i.test(LC_ALL || LC_CTYPE || LANG || "");
  return {
    isTerminal,
    paint,
    size: () => [process.stdout.columns ?? 80, process.stdout.rows ?? 24],
    // A table makes of several spaces one.
    bar: (share, columns) =>
      drawBar(share, columns - 2, isUnicode, isUnicode ? "░" : "-"),
    print: (text) => writeFileSync(STANDARD_OUTPUT, text),
    progress: (what, total) =>
      foot?.progress(total, (done) => {
        const columns = process.stderr.columns ?? 80;
        return progressBar(what, done, total, columns, isUnicode);
      }) ?? { step: () => {}, end: () => {} },
  };
}

/** What stands in for it where a command runs, which builds nothing. */
const NO_HOOK: HookArguments = {
  system: "",
  buildOptions: { maxSilentTime: 0, buildTimeout: 0 },
};

/** Makes what commands need; without it, none can do anything. */
async function makeCommandContext(
  ...args: Parameters<typeof makeContext>
): Promise<Context> {
  try {
    return await makeContext(...args);
  } catch (cause) {
    if (!(cause instanceof OffloadError)) throw cause;
    const { hint, message } = cause;
    const options = { cause, hint, exitCode: EXIT.usage };
    throw new OffloadError(message, { ...options, code: "configuration" });
  }
}

/** The seconds that loading a plugin may take, even if no setting can be read. */
function loadingTime(directory: string, environment: Variables): number {
  try {
    return readSettings(directory, environment).hookTimeout;
  } catch {
    return SETTINGS.hookTimeout[0];
  }
}

/** Serves who calls a command; returns its exit code. */
export async function serve(
  args: readonly string[],
  environment: Variables,
): Promise<number> {
  const foot = makeFoot(environment);
  const write = (text: string) => writeText(STANDARD_ERROR, text);
  const log = makeLog(
    environment,
    foot ? (text) => foot.above(() => write(text)) : write,
    makePaint(STANDARD_ERROR, environment),
  );
  try {
    checkRuntime();
    const signal = abortOnSignals();
    const { output, exitCode, problem } = await runCommand(
      args,
      (file, own = log) =>
        makeCommandContext(NO_HOOK, environment, own, signal, file),
      async () => {
        const directory = pluginDirectory(environment);
        const seconds = loadingTime(directory, environment);
        return (await loadSite(directory, seconds, log)).plugins;
      },
      makeScreen(environment, foot),
    );
    if (output !== "") writeText(STANDARD_OUTPUT, `${output}\n`);
    if (problem !== undefined) log.error(problem);
    return exitCode;
  } catch (error) {
    log.error(error);
    return exitCodeOf(error);
  }
}

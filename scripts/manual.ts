/**
 * Makes the manual page offload(1), in mdoc, of what `--help` is made of: the
 * table of commands, and that of the settings.
 *
 * @module
 */

import { describeSettings } from "../mod.ts";
import { EXIT_CODES, loadCommands, VERSION } from "../plugins/_commands.ts";
import type { NamedCommand } from "../plugins/_commands.ts";

const COMMANDS = await loadCommands();

const DESCRIPTION =
  `Offload is a drop-in replacement for 'guix offload', the build hook with which guix-daemon sends builds to other machines over SSH. It reads the machine file of Guix, uses the same keys and the same slots, and needs nothing on the build machines but sshd and guix-daemon. The section "Using the Offload Facility" of the manual of Guix says how to set up build machines.

The daemon calls the program that the variable GUIX in its environment names. That is to be the program 'guix' of Offload, which runs Offload for 'guix offload' and hands all other commands to the real guix. The daemon passes SYSTEM, MAX-SILENT-TIME, PRINT-BUILD-TRACE? and BUILD-TIMEOUT; requests come in on the standard input.

These commands are for people.`;

/** What each variable of the environment means. */
const VARIABLES: Readonly<Record<string, string>> = {
  OFFLOAD_RUNTIME: "The JavaScript runtime: 'node', 'deno', or the file name " +
    "of either. Else it is whichever is there and new enough, Node first.",
  OFFLOAD_GUIX: "The file name of the real guix. Else it is the first other " +
    "one in PATH or in the usual places.",
  OFFLOAD_DEBUG: "Where it is set, more is said, with stack traces.",
  OFFLOAD_PLUGINS: "The directory of plugins and settings. Else it is " +
    "/etc/guix/offload.",
};

const FILES: Readonly<Record<string, string>> = {
  "/etc/guix/machines.scm": "The machine file.",
  "/etc/guix/acl": "The keys that may sign what build machines send.",
  "/etc/guix/offload": "Plugins, and the settings in settings.json.",
  "/etc/guix/offload/off":
    "Where it is there, the real 'guix offload' serves " +
    "guix-daemon.",
  "/var/guix/offload": "Slots, what was seen of the machines, and caches.",
};

/** Escapes text; fills it, a sentence a line, as mdoc has it. */
function fill(text: string): string {
  return text.split(/(?<=\.) (?=[A-Z])/)
    .map((sentence) => sentence.replace(/(.{1,76})(?: |$)/g, "$1\n"))
    .join("").trimEnd()
    .replaceAll("\\", "\\e")
    .replace(/^(?=[.'])/gm, "\\&");
}

function paragraphs(texts: readonly string[]): string {
  return texts.map(fill).join("\n.Pp\n");
}

/** The macros for a command and what may follow it. */
function usage({ name, usage, options }: NamedCommand): string {
  const brackets: Record<string, string> = { "[": "Oo", "]": "Oc" };
  const words = (usage.match(/[^\s[\]]+(\[[^\s\]]+\])?|[[\]]/g) ?? [])
    .map((word) => brackets[word] ?? `Ar ${word}`);
  const more = options.length > 0 ? ["Oo Ar OPTION Oc Ns ..."] : [];
  return [`.Cm ${name}`, ...more, ...words].join(" ");
}

function optionItem([usage, meaning]: NamedCommand["options"][number]): string {
  const [name, value] = usage.split(" ");
  const argument = value === undefined ? "" : ` Ar ${value}`;
  return `.It Fl ${name!.slice(1)}${argument}\n${fill(meaning)}.`;
}

function list(items: readonly string[]): string {
  return [".Bl -tag -width Ds", ...items, ".El"].join("\n");
}

function section(title: string, ...parts: readonly string[]): string {
  return [`.Sh ${title}`, ...parts].join("\n");
}

function commandSection(command: NamedCommand): string {
  const { name, summary, description, options } = command;
  const parts = [fill(`${summary}.`), ...description.map(fill)];
  if (options.length > 0) parts.push(list(options.map(optionItem)));
  return [
    `.Ss offload ${name}`,
    `.Nm\n${usage(command)}`,
    ...parts.map((part) => `.Pp\n${part}`),
  ].join("\n").replaceAll(".Pp\n.Bl", ".Bl");
}

function examples(): string {
  const items = COMMANDS.flatMap(({ examples }) => examples);
  return items.map(([line, meaning]) =>
    `This ${meaning}:\n.Bd -literal -offset indent\n${
      line.replaceAll("\\", "\\e")
    }\n.Ed`
  ).join("\n.Pp\n");
}

function settings(): string {
  const items = Object.entries(describeSettings())
    .map(([name, { description, default: usual }]) => {
      const text = typeof usual === "string" ? usual : JSON.stringify(usual);
      return `.It Va ${name}\n${fill(`${description}: ${text} unless told`)}.`;
    });
  return list(items);
}

/** Makes the manual page of what came out at a date (ISO 8601). */
export function manual(date: string): string {
  const day = new Date(date).toLocaleDateString("en-US", {
    ...{ year: "numeric", month: "long", day: "numeric", timeZone: "UTC" },
  });
  const synopsis = COMMANDS.map((command) => `.Nm\n${usage(command)}`);
  const variables = Object.entries(VARIABLES).map(([name, meaning]) =>
    `.It Ev ${name}\n${fill(meaning)}`
  );
  const files = Object.entries(FILES).map(([name, meaning]) =>
    `.It Pa ${name}\n${fill(meaning)}`
  );
  return [
    `.\\" Offload ${VERSION}`,
    `.Dd ${day}\n.Dt OFFLOAD 1\n.Os`,
    section("NAME", ".Nm offload", ".Nd send builds of guix-daemon elsewhere"),
    section("SYNOPSIS", ...synopsis),
    section("DESCRIPTION", paragraphs(DESCRIPTION.split("\n\n"))),
    ...COMMANDS.map(commandSection),
    section(
      "ENVIRONMENT",
      list(variables),
      ".Pp\nEach setting can be overridden as well:",
      ".Va backoffLimit\nby\n.Ev OFFLOAD_BACKOFF_LIMIT .",
    ),
    section("FILES", list(files), ".Pp\nThe settings are:", settings()),
    section(
      "EXIT STATUS",
      list(EXIT_CODES.map(([code, it]) => `.It Li ${code}\n${fill(`${it}.`)}`)),
    ),
    section("EXAMPLES", examples()),
    section("SEE ALSO", ".Xr guix-daemon 1 ,\n.Xr sshd 8"),
    "",
  ].join("\n");
}

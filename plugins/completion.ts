/**
 * `offload completion`: prints the completion for a shell.
 *
 * @module
 */

import type { Plugin } from "../mod.ts";
import {
  HELP_OPTION,
  loadCommands,
  splitOption,
  usageError,
} from "./_commands.ts";
import type { NamedCommand } from "./_commands.ts";
import { quoteWord } from "./_remote.ts";

/** The completion for bash; where nothing is listed, it completes files. */
function bashCompletion(commands: readonly NamedCommand[]): string {
  const cases = commands.map(({ name, options }) => {
    const names = [...options, HELP_OPTION].map((it) => splitOption(it)[0]);
    return `    ${name}:-*) words='${names.join(" ")}' ;;\n`;
  });
  const names = commands.map(({ name }) => name).join(" ");
  return `_offload() {
  local word=\${COMP_WORDS[COMP_CWORD]} words=
  if [ "$COMP_CWORD" = 1 ]; then words='${names} --help --version'; fi
  case \${COMP_WORDS[1]}:$word in
${cases.join("")}    completion:*) words='bash zsh fish' ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _offload offload`;
}

/**
 * The completion for zsh, which can do it as bash does: sourced or, as a file
 * `_offload` in its fpath, loaded when it is called, which is for an answer.
 */
function zshCompletion(commands: readonly NamedCommand[]): string {
  return `#compdef offload
(( $+functions[compdef] )) || { autoload -Uz compinit; compinit; }
autoload -Uz bashcompinit
bashcompinit
${bashCompletion(commands)}
[[ $funcstack[1] != _offload ]] || _bash_complete -o default -F _offload`;
}

/** The completion for fish. */
function fishCompletion(commands: readonly NamedCommand[]): string {
  const lines = commands.flatMap(({ name, usage, summary, options }) => {
    const of = `complete -c offload -n '__fish_seen_subcommand_from ${name}'`;
    const described = [...options, HELP_OPTION].map((option) => {
      const [name, value] = splitOption(option);
      const follows = value === "FILE" ? "-r -F" : value ? "-x" : "";
      const meaning = quoteWord(option[1]);
      return `${of} -l ${name!.slice(2)} ${follows} -d ${meaning}`;
    });
    return [
      `complete -c offload -n __fish_use_subcommand -a ${name} ` +
      `-d ${quoteWord(summary)}`,
      ...described,
      ...(/FILE|DERIVATION/.test(usage) ? [`${of} -F`] : []),
    ];
  });
  const shells = "complete -c offload -n " +
    "'__fish_seen_subcommand_from completion' -a 'bash zsh fish'";
  return ["complete -c offload -f", ...lines, shells].join("\n");
}

/** The completion for a shell, made of the table of commands. */
export function completion(
  shell: string,
  commands: readonly NamedCommand[],
): string {
  if (shell === "bash") return bashCompletion(commands);
  if (shell === "zsh") return zshCompletion(commands);
  if (shell === "fish") return fishCompletion(commands);
  const message = `${shell}: unknown shell: expected bash, zsh or fish`;
  throw usageError(message, "completion");
}

const plugin = {
  name: "completion",
  command: {
    order: 6,
    usage: "SHELL",
    summary: "Print the completion for bash, zsh or fish",
    description: [],
    options: [],
    examples: [
      ["source <(offload completion bash)", "completes in this bash"],
    ],
    async run([shell], _options, makeContext) {
      // A site's, too, where its settings can be read.
      const context = await makeContext().catch(() => undefined);
      const commands = await loadCommands(context?.plugins);
      return { output: completion(shell!, commands), exitCode: 0 };
    },
  },
} satisfies Plugin;

export default plugin as Plugin;

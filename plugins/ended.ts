/**
 * The command `offload ended`: tells plugins of a build that is over.
 *
 * @module
 */

import process from "node:process";
import { OffloadError, tellEnded } from "../mod.ts";
import type { CommandResult, Context, JournalEntry, Plugin } from "../mod.ts";
import { ENDED } from "./_ended.ts";
import { AS_ACCOUNT } from "./_first_steps.ts";
import { readJournal } from "./_journal.ts";

/** The last build of a derivation, or of all. */
function findBuild(
  derivation: string | undefined,
  context: Context,
): JournalEntry {
  const text = process.env[ENDED];
  if (text !== undefined) return JSON.parse(text);
  const { entries } = readJournal(context, 0);
  const found = entries.findLast((it) =>
    derivation === undefined || it.derivation === derivation
  );
  if (found !== undefined) return found;
  const what = derivation === undefined ? "no build" : `no '${derivation}'`;
  throw new OffloadError(`the journal has ${what}`, {
    hint: `it has what was offloaded; ${AS_ACCOUNT}`,
  });
}

/** `offload ended [DERIVATION]`. */
async function endedCommand(
  derivation: string | undefined,
  context: Context,
): Promise<CommandResult> {
  const build = findBuild(derivation, context);
  let exitCode = 0;
  const warn = (problem: unknown) => {
    context.log.warn(problem);
    exitCode = 1;
  };
  await tellEnded(build, { ...context, log: { ...context.log, warn } });
  return { output: "", exitCode };
}

const plugin = {
  name: "ended",
  command: {
    usage: "[DERIVATION]",
    summary: "Tell plugins once more of a build that is over",
    description: [
      "It is the last build that was offloaded, or the last of DERIVATION: so " +
      "a plugin with the hook 'ended' is tried out. The exit code is 1 when " +
      "one fails.",
    ],
    options: [],
    examples: [["offload ended", "tells them of the last build"]],
    run: async ([derivation], _options, makeContext) =>
      endedCommand(derivation, await makeContext()),
  },
} satisfies Plugin;

export default plugin as Plugin;

/**
 * Moves archives by the command `guix archive` on the build machine alone, for
 * accounts that may run it but not talk to the daemon at length.
 *
 * @module
 */

import { pipeline } from "node:stream/promises";
import type { Plugin, TransportContext } from "../mod.ts";
import { quoteWord } from "./_remote.ts";

/** Runs `guix archive` there on `input`; returns what it prints. */
async function* runArchive(
  { exec, machine }: TransportContext,
  options: readonly string[],
  input: Iterable<string> | AsyncIterable<Uint8Array> = [],
): AsyncGenerator<Uint8Array, void> {
  const command = `exec guix archive ${options.map(quoteWord).join(" ")}`;
  const { channel, ended } = await exec(command);
  let problem: { code?: unknown } | undefined;
  pipeline(input, channel).catch((error) => {
    problem = error;
    channel.destroy(); // else it would wait for more
  });
  yield* channel;
  const { code, errors } = await ended;
  // What ended well has had all it wanted, whatever became of the rest.
  if (code === 0) return;
  if (problem?.code === "local") throw problem;
  throw new Error(
    `'guix archive' failed on '${machine.name}': ${errors.trim()}`,
  );
}

const plugin = {
  name: "archive-command",
  transport: (_machine, context) => ({
    async missing(paths) {
      let text = "";
      const lines = paths.map((path) => `${path}\n`);
      const most = lines.join("").length;
      for await (const chunk of runArchive(context, ["--missing"], lines)) {
        text += chunk;
        if (text.length > most) {
          const { name } = context.machine;
          throw new Error(`'${name}' lacks more than it was asked about`);
        }
      }
      return text.split("\n").filter((path) => path !== "");
    },
    async send(items) {
      const bundle = context.exportBundle([...items.keys()]);
      for await (const _ of runArchive(context, ["--import"], bundle));
    },
    retrieve: (paths) => runArchive(context, ["--export", ...paths]),
  }),
} satisfies Plugin;

export default plugin as Plugin;

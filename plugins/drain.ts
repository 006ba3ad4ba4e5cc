/**
 * Leaves alone the machines that a file lists, for their maintenance: they get
 * no further builds, and are not even asked. `offload drain` adds to the list.
 *
 * @module
 */

import { existsSync, readFileSync } from "node:fs";
import type { Plugin } from "../mod.ts";

const plugin = {
  name: "drain",
  options: {
    file: {
      default: "/etc/guix/offload/drain",
      description: "file of machines to leave alone: NAME or NAME:PORT, and " +
        "behind it why, a line each",
    },
  },
  command: {
    usage: "NAME [REASON]",
    summary: "Give a machine no further builds",
    description: [
      "NAME is that of a machine, or NAME:PORT; REASON, a word or in quotes, " +
      "is what 'offload explain' says of it. Builds that run there go on. The " +
      "plugin 'drain' must be in use, and has the list.",
    ],
    options: [],
    examples: [["offload drain w1 'new disk'", "leaves 'w1' alone"]],
    run: async ([name, why], _options, makeContext) => {
      // No build needs it.
      const { drain } = await import("./_drain.ts");
      return drain(name!, why, await makeContext());
    },
  },
  exclude({ name, port }, { options }) {
    const file = String(options.file);
    // Read each time: what is written there takes effect at once.
    if (!existsSync(file)) return undefined;
    for (const line of readFileSync(file, "utf8").split("\n")) {
      const [, listed, why] = /^\s*([^\s#]+)\s*#?\s*(.*)$/.exec(line) ?? [];
      if (listed !== name && listed !== `${name}:${port}`) continue;
      return {
        why: `drained by '${file}'${why && `: ${why}`}`,
        isBusy: false,
      };
    }
    return undefined;
  },
} satisfies Plugin;

export default plugin as Plugin;

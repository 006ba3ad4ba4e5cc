/**
 * Leaves alone the machines that a file lists, for their maintenance: they get
 * no further builds, and are not even asked.
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

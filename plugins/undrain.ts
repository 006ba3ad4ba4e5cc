/**
 * `offload undrain`: gives machines builds again that `offload drain` has left
 * alone.
 *
 * @module
 */

import type { Plugin } from "../mod.ts";

const plugin = {
  name: "undrain",
  command: {
    usage: "NAME",
    summary: "Give a machine builds again that was drained",
    description: [
      "NAME is that of the list of the plugin 'drain', NAME or NAME:PORT.",
    ],
    options: [],
    examples: [["offload undrain w1", "takes 'w1' off the list"]],
    run: async ([name], _options, makeContext) => {
      const { undrain } = await import("./_drain.ts");
      return undrain(name!, await makeContext());
    },
  },
} satisfies Plugin;

export default plugin as Plugin;

/**
 * Prefers the machine that got no build for the longest time.
 *
 * @module
 */

import type { Plugin } from "../mod.ts";

/** How long ago a machine that was never used counts as used, in ms. */
const DAY = 86_400_000;

const plugin = {
  name: "round-robin",
  // In seconds, from whenever: the largest one counts.
  score: ({ lastUsed = -DAY }) => {
    const now = Date.now();
    // A time in the future is of before the clock was set back.
    return (now - (lastUsed > now ? -DAY : lastUsed)) / 1000;
  },
} satisfies Plugin;

export default plugin as Plugin;

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
  score: ({ lastUsed = -DAY }) => (Date.now() - lastUsed) / 1000,
} satisfies Plugin;

export default plugin as Plugin;

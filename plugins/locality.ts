/**
 * Scores machines by the expected time to completion: what they lack of the
 * inputs over their bandwidth, and how long the build took before.
 *
 * @module
 */

import type { Plugin } from "../mod.ts";

/** What is assumed of a machine that was sent nothing yet, in bytes/second. */
const USUAL_BANDWIDTH = 50 * 2 ** 20;

/** What is assumed of a build that was never done, in seconds. */
const USUAL_DURATION = 60;

const plugin = {
  name: "locality",
  async score(candidate, request, _context) {
    const { machine, facts } = candidate;
    const inputs = await request.inputs();
    const held = new Set(candidate.holds(inputs.map(({ path }) => path)));
    const missing = inputs
      .filter(({ path }) => !held.has(path))
      .reduce((sum, { size }) => sum + size, 0);
    const transfer = missing / (candidate.bandwidth ?? USUAL_BANDWIDTH);
    const past = request.history();
    const here = past.find((build) => build.machine === candidate.id);
    const build = here?.seconds ??
      (past[0]?.seconds ?? USUAL_DURATION) / Math.max(machine.speed, 1e-9);
    // Builds share the processors.
    const busy = machine.parallelBuilds - candidate.freeSlots();
    const queue = build * busy / (facts?.cores ?? machine.parallelBuilds);
    return -(transfer + build + queue);
  },
} satisfies Plugin;

export default plugin as Plugin;

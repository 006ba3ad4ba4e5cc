/**
 * Prefers machines where little waits for processors, disks and memory, as the
 * kernel's pressure stall information says, rather than by their load average,
 * which counts what runs just as what waits.
 *
 * @module
 */

import type { Facts, Plugin } from "../mod.ts";

/** The share of time (0 to 100) in which something waited, or a guess. */
function pressureOf({ pressure, load, cores }: Facts): number {
  if (pressure !== undefined) {
    return Math.max(pressure.cpu, pressure.io, pressure.memory);
  }
  // Without that of the kernel: by how much more there is to run than can.
  const waiting = Math.max(0, (load ?? 0) - (cores ?? 1));
  return 100 * waiting / (waiting + (cores ?? 1));
}

const plugin = {
  name: "pressure",
  options: {
    memory: {
      ...{ default: 2 ** 28, minimum: 0, maximum: 2 ** 50 },
      description: "bytes of memory that must be available",
    },
    limit: {
      ...{ default: 20, minimum: 0, maximum: 100 },
      description: "percentage of time for which tasks may wait for memory",
    },
    weight: {
      ...{ default: 1, minimum: 0, maximum: 1e6 },
      description: "what a machine loses of its score where something waits " +
        "all the time",
    },
  },
  score({ facts }, _request, { options }) {
    if (facts === undefined) return undefined;
    const stalls = facts.pressure?.memory ?? 0;
    const lacks = (facts.memory ?? Infinity) < Number(options.memory);
    if (lacks || stalls > Number(options.limit)) return -Infinity;
    return -Number(options.weight) * pressureOf(facts) / 100;
  },
} satisfies Plugin;

export default plugin as Plugin;

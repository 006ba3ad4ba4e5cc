/**
 * Finds machines in the local network by DNS-SD, as Avahi publishes them:
 *
 *     avahi-publish -s NAME _guix-build._tcp 22 systems=x86_64-linux slots=4
 *
 * The text records are systems and features, each separated by commas, speed
 * and slots. What is found is only used where the site has pinned its host key.
 *
 * @module
 */

import type { Machine, Plugin, PluginContext } from "../mod.ts";
import { parseMachines } from "./_machine_list.ts";
import { cachedOutput, readText } from "./_programs.ts";

const BROWSE = "avahi-browse --parsable --resolve --terminate --no-db-lookup " +
  "_guix-build._tcp";

/** The pinned host keys, by the name of the machine as ssh writes it. */
function readPins(file: string): Map<string, string> {
  const pins = new Map<string, string>();
  for (const line of readText(file).split("\n")) {
    const [names = "", type, key] = line.trim().split(/\s+/);
    // Hashed names tell nothing, nor do marks and comments name a machine.
    if (key === undefined || /^[#@|]/.test(names)) continue;
    for (const name of names.split(",")) {
      const better = type === "ssh-ed25519" || !pins.has(name);
      if (better) pins.set(name, `${type} ${key}`);
    }
  }
  return pins;
}

/** Reads the text records: `"systems=x86_64-linux" "speed=2"`. */
function readRecords(text: string): Record<string, string> {
  const records: Record<string, string> = Object.create(null);
  for (const [, name, value] of text.matchAll(/"(\w+)=([^"]*)"/g)) {
    records[name!.toLowerCase()] ??= value!;
  }
  return records;
}

/** Makes fields of what a machine says of itself. */
function fieldsFrom(records: Record<string, string>) {
  const words = (text = "") => text.split(",").filter((word) => word !== "");
  return {
    systems: words(records.systems),
    features: words(records.features),
    speed: Number(records.speed ?? 1),
    "parallel-builds": Number(records.slots ?? 1),
  };
}

/** Makes machines of those that were found and whose host key is pinned. */
function machinesFound(text: string, context: PluginContext): Machine[] {
  const file = String(context.options.knownHosts);
  const pins = readPins(file);
  const found = new Map<string, Record<string, unknown>>();
  for (const line of text.split("\n")) {
    const [event, , , , , , host = "", , port, ...rest] = line.split(";");
    if (event !== "=") continue;
    const name = port === "22" ? host : `[${host}]:${port}`;
    const hostKey = pins.get(name);
    if (hostKey === undefined) {
      context.log.debug(`'${name}' would build, but is not in '${file}'`);
      continue;
    }
    // Once for each network interface and protocol.
    found.set(name, {
      ...fieldsFrom(readRecords(rest.join(";"))),
      ...{ name: host, port: Number(port), "host-key": hostKey },
      user: context.options.user,
      "private-key": context.options.privateKey,
      "overload-threshold": context.options.overloadThreshold || false,
    });
  }
  const list = JSON.stringify([...found.values()]);
  return parseMachines(list, "found by DNS-SD", context, new Map());
}

const plugin = {
  name: "dns-sd",
  options: {
    knownHosts: {
      default: "/etc/guix/offload/known_hosts",
      description: "file of the host keys that are pinned, as ssh-keyscan " +
        "prints them",
    },
    lifetime: {
      ...{ default: 60, minimum: 1, maximum: 86400 },
      description:
        "seconds after which the network is searched again, in the " +
        "background",
    },
    overloadThreshold: {
      ...{ default: 0.8, minimum: 0, maximum: 1 },
      description: "normalized load from which on they get no build; 0: any",
    },
    privateKey: {
      default: "/root/.ssh/id_ed25519",
      description: "file name of the SSH private key to log in with",
    },
    timeout: {
      ...{ default: 5, minimum: 1, maximum: 50 },
      description: "seconds that searching may take",
    },
    user: { default: "root", description: "account to log in to" },
  },
  async machines(context) {
    return machinesFound(await cachedOutput(BROWSE, context), context);
  },
} satisfies Plugin;

export default plugin as Plugin;

/**
 * A site's plugins: how they are loaded, and what they may come back with.
 * mod.ts loads it where there are any.
 *
 * @module
 */

import { dirname } from "node:path";
import { pathToFileURL } from "node:url";
import {
  checkOwner,
  cleanUp,
  hookError,
  HOOKS,
  machineToJson,
  OffloadError,
  within,
} from "../mod.ts";
import type {
  Command,
  Connection,
  Deferral,
  Exclusion,
  Hooks,
  Log,
  Machine,
  Plugin,
  PluginContext,
  Transport,
} from "../mod.ts";

/** What a command has to have, each of the type of these. */
const COMMAND: Readonly<Required<Omit<Command, "order" | "around">>> = {
  usage: "",
  summary: "",
  description: [],
  options: [],
  examples: [],
  run: () => Promise.reject(),
};

/** Says what a command lacks, if it lacks anything. */
function lackOf(command: unknown): string | undefined {
  const its = Object(command) as Partial<Record<string, unknown>>;
  return Object.entries(COMMAND).find(([name, example]) =>
    typeof its[name] !== typeof example ||
    Array.isArray(its[name]) !== Array.isArray(example)
  )?.[0];
}

/** Says what is wrong with a plugin, if anything is. */
export function pluginProblem(plugin: unknown): string | undefined {
  if (typeof plugin !== "object" || plugin === null) {
    return "its default export is no plugin";
  }
  const { name, options = {}, command, ...hooks } = plugin as Record<
    string,
    unknown
  >;
  if (typeof name !== "string" || name === "") return "it has no 'name'";
  const keys = Object.keys(hooks);
  const unknown = keys.find((key) => !Object.hasOwn(HOOKS, key));
  if (unknown !== undefined) return `unknown key '${unknown}'`;
  if (keys.length === 0 && command === undefined) return "it has no hook";
  const lacking = command === undefined ? undefined : lackOf(command);
  if (lacking !== undefined) return `'command' lacks '${lacking}'`;
  if (options?.constructor !== Object) return "'options' is no object";
  const odd = keys.find((key) => typeof hooks[key] !== "function");
  return odd && `'${odd}' is no function`;
}

/** Names a plugin in what goes wrong later, where it is not told already. */
function laterError(plugin: Plugin, hook: keyof Hooks, cause: unknown) {
  return cause instanceof OffloadError ? cause : hookError(plugin, hook, cause);
}

/** Uses what a hook came back with, and names that in what goes wrong. */
function useAnswer<T>(plugin: Plugin, hook: keyof Hooks, use: () => T): T {
  const fail = (cause: unknown) => {
    throw laterError(plugin, hook, cause);
  };
  try {
    const result = use();
    return result instanceof Promise ? result.catch(fail) as T : result;
  } catch (cause) {
    return fail(cause);
  }
}

/** Checks that what a hook came back with has these methods. */
function checkMethods<T extends object, K extends keyof T & string>(
  answer: T,
  methods: readonly K[],
): T {
  const odd = methods.find((it) => typeof answer?.[it] !== "function");
  if (odd === undefined) return answer;
  throw new Error(`'${odd}' is no function`);
}

/** Checks what a `machines` hook came back with. */
function checkMachines(list: unknown, context: PluginContext): Machine[] {
  if (!Array.isArray(list)) throw new Error("expected a list of machines");
  const machines: Machine[] = [];
  for (const [index, machine] of list.entries()) {
    const fields = machineToJson(machine);
    const checked = context.machineFromFields(fields, `machine ${index + 1}`);
    if ("severity" in checked) {
      context.report({ ...checked, toldAs: "warning" });
    } else machines.push(checked);
  }
  return machines;
}

/** Checks what a `score` hook came back with. */
function checkScore(score: unknown): number | undefined {
  if (score === undefined || score === -Infinity) return score;
  if (typeof score === "number" && Number.isFinite(score)) return score;
  throw new Error(`expected a number, got ${String(score)}`);
}

/** Checks what a `defer` hook came back with. */
function checkDeferral(answer: Deferral | undefined): Deferral | undefined {
  const { why, rank, isHeld } = answer ?? {};
  const isOne = typeof why === "string" && Number.isFinite(rank) &&
    typeof isHeld === "boolean";
  if (answer === undefined || isOne) return answer;
  const got = JSON.stringify({ why, rank, isHeld });
  throw new Error(`expected { why, rank, isHeld }, got ${got}`);
}

/** Checks what an `exclude` hook came back with. */
function checkExclusion(
  plugin: Plugin,
  answer: Exclusion | undefined,
): Exclusion | undefined {
  if (answer !== undefined && typeof answer?.why !== "string") {
    throw new Error(`expected { why, isBusy }, got ${JSON.stringify(answer)}`);
  }
  if (answer?.start === undefined) return answer;
  const start = () => useAnswer(plugin, "exclude", () => answer.start?.());
  return { ...answer, start };
}

/** Checks what a plugin moves archives by, and names it in later errors. */
function checkTransport(plugin: Plugin, transport: Transport): Transport {
  checkMethods(transport, ["missing", "send", "retrieve"]);
  const use = <T>(call: () => T) => useAnswer(plugin, "transport", call);
  return {
    missing: (paths) => use(() => transport.missing(paths)),
    reserve: (size) =>
      use(async () => {
        const leave = await transport.reserve?.(size);
        return leave && checkMethods(leave, ["release"]);
      }),
    send: (items) => use(() => transport.send(items)),
    prepare: (derivation) => use(() => transport.prepare?.(derivation)),
    retrieve: async function* (...args) {
      try {
        yield* transport.retrieve(...args);
      } catch (cause) {
        throw laterError(plugin, "transport", cause);
      }
    },
  };
}

/** The methods of a stream that are used. */
const STREAM = ["write", "read", "destroy"] as const;

/** Checks what a plugin connects by, and later what that comes back with. */
function checkConnection(
  plugin: Plugin,
  connection: Connection,
  log: Log,
): Connection {
  try {
    checkMethods(connection, ["failure", "openSocket", "exec", "close"]);
  } catch (error) {
    cleanUp(log, () => connection?.close?.());
    throw error;
  }
  const use = <T>(call: () => T) => useAnswer(plugin, "connect", call);
  const { ended, pieceSize } = connection;
  return {
    ...(ended && { ended: Promise.resolve(ended) }),
    ...(pieceSize && { pieceSize }),
    failure: () => {
      try {
        return connection.failure();
      } catch (error) { // it is of no use any more
        return hookError(plugin, "connect", error);
      }
    },
    openSocket: (file) =>
      use(async () => checkMethods(await connection.openSocket(file), STREAM)),
    exec: (command) =>
      use(async () => {
        const process = await connection.exec(command);
        checkMethods(process?.ended, ["then"]);
        checkMethods(process.channel, STREAM);
        return process;
      }),
    close: (error) => connection.close(error),
  };
}

/** The same plugin, of which all answers are checked. */
export function checkAnswers(plugin: Plugin): Plugin {
  const { machines, exclude, connect, score, defer } = plugin as Hooks & Plugin;
  const { admit, transport, ended } = plugin as Hooks & Plugin;
  const hooks: Hooks = {
    machines: async (context) =>
      checkMachines(await machines.call(plugin, context), context),
    exclude: async (...its) =>
      checkExclusion(plugin, await exclude.apply(plugin, its)),
    connect: async (...its) => {
      const connection = await connect.apply(plugin, its);
      if (connection === undefined) return undefined;
      return checkConnection(plugin, connection, its[1].log);
    },
    score: async (...its) => checkScore(await score.apply(plugin, its)),
    defer: async (...its) => checkDeferral(await defer.apply(plugin, its)),
    admit: (...its) => admit.apply(plugin, its),
    transport: async (...its) => {
      const own = await transport.apply(plugin, its);
      return own === undefined ? undefined : checkTransport(plugin, own);
    },
    ended: (...its) => ended.apply(plugin, its),
  };
  const own = Object.entries(hooks).filter(([hook]) => hook in plugin);
  return { ...plugin, ...Object.fromEntries(own) };
}

/** Loads a site's plugin, in so many seconds; throws what is wrong with it. */
export async function loadPlugin(
  file: string,
  taken: readonly string[],
  seconds: number,
): Promise<Plugin> {
  [dirname(file), file].forEach(checkOwner);
  const { default: plugin } = await within(
    seconds,
    import(pathToFileURL(file).href),
    `${file}: not loaded within ${seconds} s`,
  );
  const problem = pluginProblem(plugin) ??
    (taken.includes(plugin.name)
      ? `the name '${plugin.name}' is taken`
      : undefined);
  if (problem !== undefined) throw new OffloadError(`${file}: ${problem}`);
  return plugin;
}

/**
 * Loads those of these files that can be; `taken` has the names that others
 * have. The others are warned about, and counted.
 */
export async function loadFiles(
  files: readonly string[],
  taken: readonly string[],
  seconds: number,
  log: Log,
): Promise<{ plugins: Plugin[]; failures: number }> {
  const plugins: Plugin[] = [];
  for (const file of files) {
    const names = [...taken, ...plugins.map(({ name }) => name)];
    try {
      plugins.push(checkAnswers(await loadPlugin(file, names, seconds)));
    } catch (error) {
      const known = error instanceof OffloadError;
      log.warn(known ? error : `failed to load plugin '${file}': ${error}`);
    }
  }
  return { plugins, failures: files.length - plugins.length };
}

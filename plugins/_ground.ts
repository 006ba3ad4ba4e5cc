/**
 * What a process that stays stands on: once that has changed, another one is to
 * serve the next builds.
 *
 * @module
 */

import { existsSync, readdirSync, rmdirSync, statSync } from "node:fs";
import type { Dirent, Stats } from "node:fs";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { deno } from "../deps.ts";
import type { Variables } from "../mod.ts";

/** Where this file is: beside what it is a part of. */
const HERE = fileURLToPath(import.meta.url);

/** Files and directories of this program. */
function ownFiles(): string[] {
  const directory = dirname(HERE);
  const beside = ["mod.ts", "deps.ts", "package.json"]
    .map((name) => `${dirname(directory)}/${name}`);
  return HERE.endsWith(".ts") ? [directory, ...beside] : [directory];
}

/** What is in a directory and those below, as far as programs are, and itself. */
function filesIn(place: string): string[] {
  if (!statSync(place, { throwIfNoEntry: false })?.isDirectory()) {
    return [place];
  }
  let entries: Dirent[] = [];
  try {
    entries = readdirSync(place, { withFileTypes: true });
  } catch {
    // It is closed to this account, or gone by now.
  }
  const files = entries
    .filter(({ name }) => !/^(\.|node_modules$)/.test(name))
    .flatMap((entry) => {
      const file = `${place}/${entry.name}`;
      // A link may lead to where it is.
      return entry.isDirectory() ? filesIn(file) : [file];
    });
  return [place, ...files];
}

/** What is asked of a file again and again. */
export type Status = Pick<
  Stats,
  "dev" | "ino" | "mode" | "uid" | "size" | "mtime"
>;

/**
 * Looks at a file, where there is one: by Deno's own call, for which it takes a
 * fifth of the time that it takes for Node's.
 */
export function statusOf(file: string): Status | undefined {
  if (deno === undefined) return statSync(file, { throwIfNoEntry: false });
  try {
    return deno.statSync(file) as Status;
  } catch (error) {
    const { code = "" } = error as NodeJS.ErrnoException;
    if (["ENOENT", "ENOTDIR"].includes(code)) return undefined;
    throw error;
  }
}

/** What says whether a file is still the same. */
function lookOf(file: string): string {
  const stat = statusOf(file);
  if (stat === undefined) return "";
  const { dev, ino, size, mtime, mode, uid } = stat;
  return [dev, ino, size, Number(mtime), mode, uid].join(" ");
}

/** What the program, the settings and the plugins of a site look like now. */
export class Ground {
  readonly #places: readonly string[];
  readonly #looks: ReadonlyMap<string, string>;

  /** Looks at the program, and at the directory of settings and plugins. */
  constructor(plugins: string) {
    this.#places = [...ownFiles(), plugins];
    this.#looks = this.#look();
  }

  #look(): Map<string, string> {
    const files = this.#places.filter((it) => existsSync(it)).flatMap(filesIn);
    return new Map(files.map((file) => [file, lookOf(file)]));
  }

  /** A file that is not as it was, if one is. */
  changed(): string | undefined {
    const now = this.#look();
    return [...new Set([...now.keys(), ...this.#looks.keys()])]
      .find((file) => now.get(file) !== this.#looks.get(file));
  }
}

/** Whether a directory is mounted read-only here, to whomever it belongs. */
export function isReadOnly(directory: string): boolean {
  try {
    // Only this is told on both runtimes.
    rmdirSync(`${directory}/.offload-is-not-there`);
    return false;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EROFS";
  }
}

/** Variables that say what is where, and how builds go. */
const RELEVANT = /^((GUIX|NIX|OFFLOAD)_.*|HOME|PATH)$/;

/** Those that the shim and the hook set. */
const SET = [
  "OFFLOAD_SHIM",
  "OFFLOAD_SELF",
  "OFFLOAD_DEPTH",
  "OFFLOAD_REQUEST",
];

/** Our environment without what Deno puts into its own. */
export function withoutRuntime({ PATH, ...others }: Variables): Variables {
  const places = PATH?.split(":").filter((it) => !/node_compat_bin$/.test(it));
  return places?.length ? { ...others, PATH: places.join(":") } : others;
}

/** A variable that differs between our environment and a shim's, if one does. */
export function differentVariable(
  ours: Variables,
  theirs: Variables,
): string | undefined {
  const names = new Set([...Object.keys(ours), ...Object.keys(theirs)]);
  return [...names].find((name) => {
    if (!RELEVANT.test(name) || SET.includes(name)) return false;
    // Where it is not given, the shim finds it.
    const isFound = name === "OFFLOAD_GUIX" && theirs[name] === undefined;
    return !isFound && ours[name] !== theirs[name];
  });
}

/** Reads the environment that a process was started with. */
export function parseEnvironment(text: string): Variables {
  const pairs = text.split("\0").filter((it) => it.includes("="))
    .map((it): [string, string] => {
      const end = it.indexOf("=");
      return [it.slice(0, end), it.slice(end + 1)];
    });
  return Object.fromEntries(pairs);
}

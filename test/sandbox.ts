/**
 * The shim in a directory with programs that are none.
 *
 * @module
 */

import {
  copyFileSync,
  existsSync,
  mkdirSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname } from "node:path";
import process from "node:process";
import * as assert from "uvu/assert";
import { ROOT, run, settled, withDirectory } from "./helpers.ts";

/** How guix-daemon calls a hook. */
export const HOOK = [
  "offload",
  "x86_64-linux",
  "3600",
  "true",
  "86400",
] as const;

/** What the shim waits for, and notes, before what else a runtime does. */
export const STARTED = 'kill -USR1 "$PPID"; ' +
  "while [ -e /proc/$PPID/fd/8 ]; do :; done";

/** Shells that are there: the daemon's /bin/sh may be any. */
export const SHELLS = ["dash", "bash"];

/** All that the shim needs of the system. */
const TOOLS = ["readlink", "dirname", "cat"];

/** The file of a program. */
export function findTool(name: string): string {
  const directories = (process.env.PATH ?? "").split(":");
  const file = directories.map((directory) => `${directory}/${name}`)
    .find((file) => existsSync(file));
  assert.ok(file, `${name} is missing`);
  return file!;
}

/** A checkout with programs that print how they were called. */
export class Sandbox {
  /** Where all of it is. */
  readonly directory: string;

  /** Copies the shim, so that no runtime is beside it. */
  constructor(directory: string) {
    this.directory = directory;
    mkdirSync(`${directory}/checkout/scripts`, { recursive: true });
    copyFileSync(`${ROOT}/scripts/guix`, this.shim);
    const library = `${dirname(this.shim)}/runtime.sh`;
    copyFileSync(`${ROOT}/scripts/runtime.sh`, library);
    mkdirSync(`${directory}/checkout/node_modules`);
    writeFileSync(this.mod, "");
    // There may be runtimes, or even a guix, where the system's tools are.
    mkdirSync(`${directory}/tools`);
    for (const name of TOOLS) {
      symlinkSync(findTool(name), `${directory}/tools/${name}`);
    }
  }

  /** The shim. */
  get shim(): string {
    return `${this.directory}/checkout/scripts/guix`;
  }

  /** What it runs. */
  get mod(): string {
    return `${this.directory}/checkout/mod.ts`;
  }

  /** Makes a program and returns its file name. */
  program(name: string, script: string): string {
    const file = `${this.directory}/${name}`;
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, `#!/bin/sh\n${script}\n`, { mode: 0o755 });
    return file;
  }

  /** Makes a runtime of that version. */
  runtime(name: string, version: string): string {
    return this.pretend(
      ...[name, version, `echo "${name}:"; printf '%s\\n' "$@"`] as const,
    );
  }

  /** Makes a runtime that does something else; `types`: how it runs TypeScript. */
  pretend(
    name: string,
    version: string,
    script: string,
    types = "strip",
  ): string {
    const say = `if [ "$1" = --version ]; then printf '${version}\\n'; exit; fi
if [ "$2" = -p ]; then echo ${types}; exit; fi`;
    return this.program(name, `${say}\n${script}`);
  }

  /** Makes a guix of that name. */
  guix(name: string): string {
    return this.program(name, `echo "${name}:"; printf '%s\\n' "$@"`);
  }

  /** Calls the shim; `bin` is the directories in PATH. */
  async call(
    args: readonly string[],
    { bin = "bin", env = {}, shim = this.shim, input = "" } = {},
  ) {
    const PATH = `${bin}:tools`.split(":")
      .map((name) => `${this.directory}/${name}`).join(":");
    const result = await settled(run(shim, args, {
      env: { PATH, HOME: this.directory, ...env },
      input,
    }));
    return { ...result, stdout: result.stdout.toString() };
  }
}

/** Does work in one, which is removed then. */
export function sandbox(work: (box: Sandbox) => Promise<void>): Promise<void> {
  return withDirectory((directory) => work(new Sandbox(directory)));
}

/**
 * What plugins that run programs share.
 *
 * @module
 */

import { spawn } from "node:child_process";
import type { ChildProcess, SpawnOptions } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import process from "node:process";
import type { PluginContext } from "../mod.ts";

/**
 * Runs a script that outlives the hook, as another account if need be. What it
 * would inherit is closed: the daemon waits until nobody has the log of the
 * build open.
 */
export function runDetached(
  script: string,
  args: readonly string[],
  account: Pick<SpawnOptions, "uid" | "gid" | "env"> = {},
): ChildProcess {
  const prelude = "exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-\n" +
    "PATH=$PATH:/run/current-system/profile/bin:/usr/bin:/bin\n";
  const child = spawn("/bin/sh", ["-c", prelude + script, "offload", ...args], {
    ...account,
    detached: true,
    stdio: "ignore",
  });
  child.unref();
  return child;
}

/** Reads a file; an error names it. */
export function readText(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch (cause) {
    const { message } = cause as Error;
    const reason = message.replace(/^E[A-Z]+: |, \w+( '.*')?$/g, "");
    throw new Error(`failed to read '${file}': ${reason}`, { cause });
  }
}

/** Where root's own is. */
const ROOTS = "/run/offload";

/** What it takes to find the state. */
type StateContext = Pick<
  PluginContext,
  "stateDirectory" | "asOwner" | "writable"
>;

/**
 * What is in the state that the account can believe, which root can't where it
 * is another's: root's own is in memory then.
 */
export function ownDirectory(
  { stateDirectory, asOwner, writable }: StateContext,
): string {
  const shared = `${stateDirectory}/offload`;
  const owner = asOwner(shared, () => process.geteuid?.());
  if (owner === process.geteuid?.()) return writable(shared);
  mkdirSync(ROOTS, { recursive: true, mode: 0o700 });
  checkPrivate(ROOTS);
  return ROOTS;
}

/** Refuses a directory that others could have filled, closes one of our own. */
function checkPrivate(directory: string): void {
  const stat = lstatSync(directory);
  if (!stat.isDirectory() || stat.uid !== process.geteuid?.()) {
    const error = new Error(`'${directory}' is not this account's directory`);
    throw Object.assign(error, { hint: `run 'rm -r ${directory}'` });
  }
  if ((stat.mode & 0o077) !== 0) chmodSync(directory, 0o700);
}

/** A directory that is the account's alone. */
export function privateDirectory(
  name: string,
  context: StateContext,
): string {
  // Whoever else runs commands, such as root, has another one.
  const uid = process.geteuid?.();
  const directory = `${ownDirectory(context)}/${name}-${uid}`;
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  checkPrivate(directory);
  return directory;
}

/** Writes a file as a whole or not at all, for the eyes of its owner. */
export function writePrivately(file: string, text: string): void {
  const temporary = `${file}.${process.pid}`;
  rmSync(temporary, { force: true });
  try {
    writeFileSync(temporary, text, { mode: 0o600, flag: "wx" });
    renameSync(temporary, file);
  } finally {
    rmSync(temporary, { force: true });
  }
}

/** A short stand-in for a text that may be long or secret. */
export function digest(data: string | Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}

/**
 * Whether a time, in milliseconds since 1970, is of the last so many seconds.
 * One in the future is not: it is of before the clock was set back, or of a
 * server whose clock is ahead.
 */
export function isRecent(time: number, seconds: number): boolean {
  const age = Date.now() - time;
  return age >= 0 && age < seconds * 1000;
}

/** Whether a file was written in the last so many seconds. */
export function isFresh(file: string, seconds: number): boolean {
  const stat = statSync(file, { throwIfNoEntry: false });
  return stat !== undefined && isRecent(stat.mtimeMs, seconds);
}

/** Keeps what a command prints, or its complaint, in the file `$1`. */
const REFRESH = `
file=$1 new=$1.$$
timeout "$3" /bin/sh -c "$2" </dev/null >"$new" 2>"$new.error"
status=$?
if [ $status = 0 ]; then
    mv "$new" "$file"
    rm -f "$file.error" "$new.error"
else
    [ $status != 124 ] || echo "it took more than $3 s" >>"$new.error"
    [ -s "$new.error" ] || echo "exit code $status" >"$new.error"
    rm -f "$new"
    mv "$new.error" "$file.error"
fi
rm -f "$file.asked"
`;

/**
 * What a command prints, kept for `lifetime` seconds. An older answer is given
 * once more while the command runs in the background, so that only the first
 * one is waited for.
 *
 * @throws {Error} with the command's complaint where it never succeeded.
 */
export async function cachedOutput(
  command: string,
  context: PluginContext,
): Promise<string> {
  const [lifetime, timeout] = ["lifetime", "timeout"].map((name) =>
    Number(context.options[name])
  );
  const name = digest(command).slice(0, 16);
  const file = `${privateDirectory("programs", context)}/${name}`;
  const isMissing = !existsSync(file);
  const mustRun = !isFresh(file, lifetime!) &&
    !isFresh(`${file}.error`, lifetime!);
  if (mustRun && (isMissing || !isFresh(`${file}.asked`, timeout!))) {
    writeFileSync(`${file}.asked`, "");
    const child = runDetached(REFRESH, [file, command, String(timeout)]);
    if (isMissing) await new Promise((resolve) => child.on("exit", resolve));
  }
  if (existsSync(file)) return readFileSync(file, "utf8");
  const complaint = readFileSync(`${file}.error`, "utf8").trim();
  throw new Error(`'${command}' failed: ${complaint}`);
}

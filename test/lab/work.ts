/**
 * New derivations, made by a process that stays in a master: scripts/lab/work.scm
 * takes a second to start, and the suites ask it hundreds of times.
 *
 * @module
 */

import { randomUUID } from "node:crypto";
import {
  closeSync,
  constants,
  copyFileSync,
  existsSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  writeSync,
} from "node:fs";
import { sleep } from "../../deps.ts";

const SCRIPT = new URL("../../scripts/lab/work.scm", import.meta.url);

/** In milliseconds: how often to look, and when to give up. */
const TIMES = { look: 2, all: 120_000 } as const;

/** Waits without a turn of the event loop, as those who ask for work do. */
function waitFor<T>(what: string, look: () => T | undefined): T {
  for (let waited = 0; waited < TIMES.all; waited += TIMES.look) {
    const found = look();
    if (found !== undefined) return found;
    sleep(TIMES.look);
  }
  throw new Error(`waited in vain: ${what}`);
}

/** Opens a FIFO for writing if there is somebody who reads it. */
function openFifo(file: string): number | undefined {
  try {
    return openSync(file, constants.O_WRONLY | constants.O_NONBLOCK);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || code === "ENXIO") return undefined;
    throw error;
  }
}

/** Starts a command in a master, without waiting for it. */
type Start = (...command: readonly string[]) => void;

/** A FIFO's descriptor, and where it is in the master; started where need be. */
function openWorkshop(root: string, start: Start): [number, string] {
  // Who is there was started by the same text.
  const { mtimeMs } = statSync(SCRIPT);
  const fifo = `/run/work-${Math.round(mtimeMs)}`;
  let fd = openFifo(root + fifo);
  if (fd === undefined) {
    rmSync(root + fifo, { force: true });
    // A suite may take the checkout away: a copy is what stays open.
    const script = `${fifo}.scm`;
    copyFileSync(SCRIPT, root + script);
    start("env", "-C", "/", "guix", "repl", "--", script, `--serve=${fifo}`);
    fd = waitFor("work.scm", () => openFifo(root + fifo));
  }
  return [fd, fifo];
}

/**
 * Has derivations made in a master, whose root directory out here is `root`;
 * returns their file names.
 */
export function askForWork(
  root: string,
  start: Start,
  options: readonly string[],
): string[] {
  const [fd, fifo] = openWorkshop(root, start);
  const name = randomUUID();
  try {
    const words = [name, ...options].map((it) => JSON.stringify(it));
    writeSync(fd, `(${words.join(" ")})\n`);
  } finally {
    closeSync(fd);
  }
  const file = `${root}${fifo}.${name}`;
  const text = waitFor(
    "work",
    () => existsSync(file) ? readFileSync(file, "utf8") : undefined,
  );
  rmSync(file);
  const [outcome, ...lines] = text.trim().split("\n");
  if (outcome !== "done") throw new Error(lines.join("\n"));
  return lines;
}

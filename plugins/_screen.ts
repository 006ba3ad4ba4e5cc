/**
 * What commands share that is about how they look: tables, progress.
 *
 * @module
 */

import { stripVTControlCharacters } from "node:util";
import type { Progress, Screen, Styled } from "../mod.ts";

/** Lays out rows, the first one being the heading, or separates by tabs. */
export function formatTable(
  rows: readonly (readonly (string | Styled)[])[],
  { isTerminal, paint }: Screen,
): string {
  const texts = rows.map((row) =>
    row.map((it) => inOneLine(typeof it === "string" ? it : it.text))
  );
  if (!isTerminal) return texts.map((row) => row.join("\t")).join("\n");
  const widths: number[] = [];
  for (const row of texts) {
    row.forEach((text, i) => widths[i] = Math.max(widths[i] ?? 0, text.length));
  }
  const lines = texts.map((row, y) =>
    row.map((text, x) => {
      const cell = rows[y]![x]!;
      const painted = typeof cell === "string" ? text : paint(cell.style, text);
      return painted + " ".repeat(widths[x]! - text.length);
    }).join("  ").trimEnd()
  );
  const [heading, ...others] = lines;
  return [paint("heading", heading!), ...others].join("\n");
}

/** Makes of what came from elsewhere a line that no terminal obeys. */
export function inOneLine(text: string): string {
  return text.replace(/[\s\p{Cc}]+/gu, " ").trim();
}

/** JSON that no terminal obeys either. */
export function formatJson(value: unknown, space?: number): string {
  const toHex = (it: string) => it.charCodeAt(0).toString(16).padStart(4, "0");
  return JSON.stringify(value, null, space)
    .replace(/(?!\n)\p{Cc}/gu, (it) => `\\u${toHex(it)}`);
}

/** A number of bytes, as the reference writes it. */
export function formatSize(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  const exponent = units.findLastIndex((_, index) => bytes > 1024 ** index);
  const index = Math.max(0, exponent);
  return `${Math.round(bytes / 1024 ** index)} ${units[index]}`;
}

/** How long something takes, to be read at a glance. */
export function formatDuration(seconds: number): string {
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

/** How long something took, where parts of a second and of an hour count. */
export function formatTook(seconds: number): string {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 6000) return formatDuration(seconds);
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** A share, from 0 to 1, to be read at a glance. */
export function formatShare(share: number): string {
  const percent = Math.round(100 * share);
  return share > 0 && percent === 0 ? "< 1 %" : `${percent} %`;
}

/** Date and time here, of milliseconds since 1970. */
export function formatTime(time: number): string {
  return new Date(time).toLocaleString("sv");
}

/** Waits for what all machines are asked, and shows how many have answered. */
export async function awaitAll<T>(
  what: string,
  answers: readonly Promise<T>[],
  screen: Screen,
): Promise<T[]> {
  const { step, end } = screen.progress(what, answers.length);
  try {
    return await Promise.all(answers.map((answer) => answer.finally(step)));
  } finally {
    end();
  }
}

/** Cuts a line to what fits; a line that is cut loses its colours. */
function cutLine(line: string, columns: number): string {
  const plain = stripVTControlCharacters(line);
  return plain.length <= columns ? line : plain.slice(0, columns);
}

/** Draws over what was drawn before. */
export function redraw(text: string, screen: Screen): void {
  const [columns, lines] = screen.size();
  const shown = text.split("\n").slice(0, lines - 1);
  const frame = shown.map((line) => `${cutLine(line, columns)}\x1b[K\n`);
  screen.print(`\x1b[H${frame.join("")}\x1b[J`);
}

/** Draws how much is done, as Guix does; never as wide as the terminal. */
export function progressBar(
  what: string,
  done: number,
  total: number,
  columns: number,
  isUnicode: boolean,
): string {
  const number = String(done).padStart(String(total).length);
  const text = `${what} ${number}/${total}`;
  const width = Math.min(40, columns - text.length - " [] ".length);
  if (width < 3) return text.slice(0, Math.max(0, columns - 1));
  return `${text} ${drawBar(done / total, width, isUnicode)}`;
}

/**
 * Draws how much is done of it all, in so many columns and two at its ends, with
 * `empty` for what is not.
 */
export function drawBar(
  share: number,
  width: number,
  isUnicode: boolean,
  empty = " ",
): string {
  const [left, steps, right] = isUnicode
    ? ["\u2595", " ▏▎▍▌▋▊▉█", "\u258f"] as const
    : ["[", " #", "]"] as const;
  const parts = steps.length - 1; // that a column is drawn in
  const filled = Math.floor(width * parts * Math.min(1, Math.max(0, share)));
  const bar = steps[parts]!.repeat(Math.floor(filled / parts)) +
    steps[filled % parts];
  const filledIn = bar.trimEnd().padEnd(width, empty);
  return `${left}${filledIn.slice(0, width)}${right}`;
}

/** Seconds of waiting after which it is shown how much is done. */
const PATIENCE = 0.5;

/** The last line of a terminal, which gives way to what else is written. */
export class Foot {
  readonly #write: (text: string) => void;
  #text = "";

  /** Writes to a terminal by `write`. */
  constructor(write: (text: string) => void) {
    this.#write = write;
  }

  /** Shows another text, or none. */
  show(text: string): void {
    if (this.#text + text !== "") this.#write(`\r\x1b[K${text}`);
    this.#text = text;
  }

  /** Has something else written above it. */
  above(write: () => void): void {
    const text = this.#text;
    this.show("");
    write();
    this.show(text);
  }

  /** Shows some work here, once it has taken a while. */
  progress(total: number, draw: (done: number) => string): Progress {
    let done = 0;
    let isShown = false;
    const show = () => this.show(draw(done));
    const timer = setTimeout(() => {
      isShown = true;
      show();
    }, PATIENCE * 1000);
    return {
      step: () => {
        done = Math.min(done + 1, total);
        if (isShown) show();
      },
      end: () => {
        clearTimeout(timer);
        isShown = false;
        this.show("");
      },
    };
  }
}

/** Settles as `work` does, or fails when the signal comes. */
export async function unlessAborted<T>(
  signal: AbortSignal,
  work: Promise<T>,
): Promise<T> {
  const aborted = Promise.withResolvers<never>();
  const abort = () => aborted.reject(signal.reason);
  signal.addEventListener("abort", abort);
  if (signal.aborted) abort();
  try {
    return await Promise.race([work, aborted.promise]);
  } finally {
    signal.removeEventListener("abort", abort);
  }
}

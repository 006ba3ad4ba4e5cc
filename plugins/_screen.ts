/**
 * What commands share that is about how they look: tables, progress.
 *
 * @module
 */

import { stripVTControlCharacters } from "node:util";
import type { Screen, Styled } from "../mod.ts";

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

/**
 * What the benchmark prints: a table in Markdown, and a chart of it in SVG.
 *
 * @module
 */

import { COLUMNS, REFERENCE } from "./_bench_work.ts";
import type { Case } from "./_bench_work.ts";

/** What was measured of a case in a column. */
export interface Measured {
  /** How long it took; `NaN` where what was to be measured did not happen. */
  readonly seconds: number;
  /** How many builds that were. */
  readonly builds: number;
}

/** Values by column, as far as there are. */
export type ByColumn<T> = Record<string, T>;

/** Columns of Offload, which are compared with the reference. */
const COMPARED: readonly string[] = Object.entries(COLUMNS)
  .filter(([, { kind }]) => kind === "cold" || kind === "warm")
  .map(([name]) => name);

/** How many times as fast as the reference a build is, if that is known. */
function speedup(row: ByColumn<Measured>, column: string): number | undefined {
  const [ours, theirs] = [row[column], row[REFERENCE]];
  if (!ours || !theirs || !COMPARED.includes(column)) return undefined;
  const ratio = theirs.seconds / theirs.builds / (ours.seconds / ours.builds);
  return Number.isNaN(ratio) ? undefined : ratio;
}

/** A line of a table in Markdown. */
export function tableLine(...cells: readonly string[]): string {
  return `| ${cells.join(" | ")} |`;
}

/** The head of a table in Markdown. */
export function tableHead(...columns: readonly string[]): string {
  return `${tableLine(...columns)}\n${tableLine(...columns.map(() => "---"))}`;
}

function formatTime(seconds: number): string {
  if (Number.isNaN(seconds)) return "failed";
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
}

/** A row of the table. */
export function formatRow(
  { name, count = 1, ideal }: Case,
  row: ByColumn<Measured>,
): string {
  const cells = Object.keys(COLUMNS).map((column) => {
    const measured = row[column];
    if (measured === undefined) return "";
    const { seconds, builds } = measured;
    const ratio = speedup(row, column);
    const notes = [
      ...builds < count ? [`${builds} of them`] : [],
      ...ratio === undefined ? [] : [`${ratio.toFixed(1)}x`],
    ];
    const note = notes.length > 0 ? ` (${notes.join(", ")})` : "";
    return formatTime(seconds) + note;
  });
  return tableLine(name, ...cells, ideal === undefined ? "" : `${ideal} s`);
}

/** Colours of bars, in the order of the columns. */
const COLOURS = ["#a5d6a2", "#3c873a", "#a9cdfb", "#1f6feb"] as const;

/** Sizes in the chart; a bar that is twice as long as another is its square. */
const SIZES = { left: 240, double: 75, bar: 12, gap: 12, top: 50 } as const;

function text(x: number, y: number, words: string, more = ""): string {
  return `<text x="${x}" y="${y}"${more}>${words}</text>`;
}

function rect(x: number, y: number, length: number, colour: string): string {
  return `<rect x="${x.toFixed(1)}" y="${y}" width="${length.toFixed(1)}" ` +
    `height="${SIZES.bar - 1}" fill="${colour}"/>`;
}

/** Names of the colours, and lines at some ratios. */
function drawLegend(
  place: (ratio: number) => number,
  longest: number,
  height: number,
): string[] {
  const { left, bar, top } = SIZES;
  const ratios = [1, 2, 5, 10, 20, 50, 100, 200, 500];
  return [
    text(10, 18, `Times as fast as ${REFERENCE}`, ' font-weight="bold"'),
    ...COMPARED.flatMap((column, i) => [
      rect(left + i * 110, 8, bar, COLOURS[i]!),
      text(left + i * 110 + bar + 4, 18, column),
    ]),
    ...ratios.filter((ratio) => ratio <= longest).flatMap((ratio) => {
      const x = Math.round(place(ratio));
      const middle = ' text-anchor="middle" fill="#777"';
      const stroke = ratio === 1 ? "#999" : "#ddd";
      return [
        text(x, top - 10, `${ratio}`, middle),
        `<path d="M${x} ${top - 4}V${height - 10}" stroke="${stroke}"/>`,
      ];
    }),
  ];
}

/** The bars of a case. */
function drawBars(
  name: string,
  row: ByColumn<Measured>,
  y: number,
  place: (ratio: number) => number,
): string[] {
  const { left, bar } = SIZES;
  const middle = y + COMPARED.length * bar / 2 + 4;
  const parts = [text(left - 8, middle, name, ' text-anchor="end"')];
  COMPARED.forEach((column, i) => {
    const ratio = speedup(row, column);
    if (ratio === undefined) return;
    const [from, to] = [place(1), place(ratio)].sort((a, b) => a - b);
    parts.push(rect(from!, y + i * bar, to! - from!, COLOURS[i]!));
    parts.push(
      text(Math.round(to! + 4), y + i * bar + 10, ratio.toFixed(1)),
    );
  });
  return parts;
}

/**
 * A bar chart, in SVG, of how many times as fast as the reference each is, on a
 * logarithmic scale.
 */
export function drawChart(
  rows: readonly [name: string, ByColumn<Measured>][],
): string {
  const { left, double, bar, gap, top } = SIZES;
  const ratios = rows.flatMap(([, row]) =>
    COMPARED.map((column) => speedup(row, column) ?? 1)
  );
  const [least, longest] = [Math.min(1, ...ratios), Math.max(10, ...ratios)];
  const place = (ratio: number) => left + Math.log2(ratio / least) * double;
  const rowHeight = COMPARED.length * bar + gap;
  const width = Math.ceil(place(longest) + 60);
  const height = top + rows.length * rowHeight + 10;
  const parts = [
    `<rect width="${width}" height="${height}" fill="#fff"/>`,
    ...drawLegend(place, longest, height),
    ...rows.flatMap(([name, row], index) =>
      drawBars(name, row, top + index * rowHeight, place)
    ),
  ];
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" ` +
    `height="${height}" font-family="sans-serif" font-size="12">\n` +
    `${parts.join("\n")}\n</svg>\n`;
}

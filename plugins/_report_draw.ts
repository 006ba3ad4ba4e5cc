/**
 * Draws the timeline in the page of `offload report`.
 *
 * A browser runs the text of these functions, which is all that it gets of this
 * file and of _report_view.ts: they use each other and nothing else that is not
 * a browser's own.
 *
 * @module
 */

import type { PageBuild, PageData } from "./_report_page.ts";

/** What lies in a lane: a build, an attempt at one, or a machine's absence. */
export interface Bar {
  /** In milliseconds since the report's beginning. */
  readonly from: number;
  /** The same. */
  readonly until: number;
  /** Not there where the machine was left alone. */
  readonly build?: PageBuild;
  /** Of an attempt or an absence, else not there. */
  readonly problem?: string;
}

/** A line: of a machine (its slot is -1), or of a slot. */
export interface Lane {
  /** Place of the machine in the list. */
  readonly machine: number;
  /** From 0. */
  readonly slot: number;
  /** By their beginnings. */
  readonly bars: Bar[];
  /** Where it is, in pixels from the top of all. */
  top: number;
}

/** The page. */
export interface Page {
  /** What it knows. */
  readonly data: PageData;
  /** Where the timeline is drawn. */
  readonly canvas: HTMLCanvasElement;
  /** What draws. */
  readonly pen: CanvasRenderingContext2D;
  /** All lanes. */
  readonly lanes: readonly Lane[];
  /** Those that are shown. */
  shown: readonly Lane[];
  /** The builds that the filter lets pass. */
  matches: ReadonlySet<PageBuild>;
  /** How wide the timeline is, in pixels. */
  width: number;
  /** The time at the left edge. */
  from: number;
  /** The time at the right edge. */
  until: number;
  /** What details are shown of. */
  chosen?: { readonly lane: Lane; readonly bar: Bar } | undefined;
  /** Colours by the names of style sheet's properties. */
  colours: Readonly<Record<string, string>>;
  /** Whether it is to be drawn already. */
  isDue: boolean;
}

/** Sizes, in pixels. */
export function sizes() {
  return { axis: 30, heading: 26, lane: 18, bar: 14, gutter: 22 };
}

/** How high a lane is. */
export function heightOf({ slot }: Lane): number {
  return slot < 0 ? sizes().heading : sizes().lane;
}

/** Where a time is drawn. */
export function placeOf(page: Page, time: number): number {
  const { gutter } = sizes();
  const width = page.width - gutter;
  return gutter + (time - page.from) / (page.until - page.from) * width;
}

/** Which time is drawn there. */
export function timeAt(page: Page, x: number): number {
  const { gutter } = sizes();
  const width = page.width - gutter;
  return page.from + (x - gutter) / width * (page.until - page.from);
}

/** Has it drawn once the browser draws again. */
export function drawSoon(page: Page): void {
  if (page.isDue) return;
  page.isDue = true;
  requestAnimationFrame(() => {
    page.isDue = false;
    draw(page);
  });
}

/** Draws all that can be seen. */
export function draw(page: Page): void {
  const { canvas, pen, shown } = page;
  const scroller = canvas.closest<HTMLElement>("#scroller")!;
  const [width, height] = [canvas.clientWidth, scroller.clientHeight];
  page.width = width;
  const scale = devicePixelRatio;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  pen.scale(scale, scale);
  pen.font = `12px ${getComputedStyle(canvas).fontFamily}`;
  pen.textBaseline = "middle";
  const top = scroller.scrollTop;
  drawGrid(page, height);
  for (const lane of shown) {
    const y = lane.top - top;
    if (y > height) break;
    if (lane.slot < 0) drawHeading(page, lane, y);
    else if (y + heightOf(lane) > 0) drawLane(page, lane, y);
  }
  drawAxis(page);
  drawChosen(page, top);
}

/** Milliseconds between two marks of the axis, so that they have room. */
export function stepOf(span: number, marks: number): number {
  const seconds = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30]
    .concat([1, 2, 5, 10, 15, 30].map((minutes) => minutes * 60))
    .concat([1, 2, 3, 6, 12, 24, 48, 168, 336].map((hours) => hours * 3600));
  const enough = seconds.find((it) => span / (it * 1000) <= marks);
  return (enough ?? seconds.at(-1)!) * 1000;
}

/** What stands at a mark: the day, where one begins, else the time. */
export function markText(time: number, step: number): string {
  const date = new Date(time);
  const isDay = date.getHours() + date.getMinutes() + date.getSeconds() === 0;
  if (isDay && step >= 1000) {
    return date.toLocaleDateString([], { month: "short", day: "numeric" });
  }
  const text = date.toTimeString().slice(0, step < 60_000 ? 8 : 5);
  const part = date.getMilliseconds() / 100;
  return step < 1000 ? `${text}.${Math.floor(part)}` : text;
}

/** The marks of the axis: where each is, and what it says. */
export function marksOf(page: Page): [x: number, text: string][] {
  const { data, from, until, width } = page;
  const marks = Math.max(2, (width - sizes().gutter) / 90);
  const step = stepOf(until - from, marks);
  // They are at round times of the clock on the wall.
  const zone = new Date(data.since).getTimezoneOffset() * 60_000;
  const offset = data.since - zone;
  const first = Math.ceil((from + offset) / step);
  const count = Math.floor((until + offset) / step) - first + 1;
  return Array.from({ length: count }, (_, index) => {
    const time = (first + index) * step;
    return [placeOf(page, time - offset), markText(time + zone, step)];
  });
}

/** Draws a line for each mark, beneath all else. */
export function drawGrid(page: Page, height: number): void {
  page.pen.fillStyle = page.colours.line!;
  for (const [x] of marksOf(page)) page.pen.fillRect(x, 0, 1, height);
}

/** Draws the axis above the lanes. */
export function drawAxis(page: Page): void {
  const { pen, colours, width } = page;
  const { axis, gutter } = sizes();
  pen.fillStyle = colours.back!;
  pen.fillRect(0, 0, width, axis);
  for (const [x, text] of marksOf(page)) {
    pen.fillStyle = colours.line!;
    pen.fillRect(x, axis - 6, 1, 6);
    const half = pen.measureText(text).width / 2;
    if (x < gutter + half || x > width - half) continue;
    pen.fillStyle = colours.muted!;
    pen.fillText(text, x - half, axis / 2 - 2);
  }
}

/** As much of a text as has room. */
export function fit(page: Page, text: string, width: number): string {
  const length = (text: string) => page.pen.measureText(text).width;
  if (length(text) <= width) return text;
  const most = Math.floor(text.length * width / length(text)) - 2;
  return most < 3 ? "" : `${text.slice(0, most).trimEnd()}…`;
}

/** Draws the name of a machine, and when it was left alone. */
export function drawHeading(page: Page, lane: Lane, y: number): void {
  const { pen, colours, data, width } = page;
  const { heading, lane: each, gutter } = sizes();
  const { name, slots, summary } = data.machines[lane.machine]!;
  if (y + heading + slots * each < 0) return;
  for (const bar of lane.bars) {
    const [from, to] = edges(page, bar);
    if (to < gutter || from > width) continue;
    const below = y + heading;
    hatch(pen, colours.absent!, 0.5, [from, below, to - from, slots * each]);
    pen.fillStyle = colours.absent!;
    pen.fillRect(from, below - 4, to - from, 3);
  }
  pen.save();
  pen.font = `bold ${pen.font}`;
  pen.fillStyle = colours.text!;
  const shown = fit(page, name, width / 2);
  pen.fillText(shown, 4, y + heading / 2 + 2);
  const x = 14 + pen.measureText(shown).width;
  pen.restore();
  pen.fillStyle = colours.muted!;
  const rest = fit(page, summary, width - x - 4);
  pen.fillText(rest, x, y + heading / 2 + 2);
}

/** Where a bar begins and ends, in pixels; what is short can be seen, too. */
export function edges(page: Page, { from, until }: Bar): [number, number] {
  const left = Math.max(sizes().gutter, placeOf(page, from));
  const right = Math.min(page.width, placeOf(page, until));
  return [left, Math.max(left + 1.5, right)];
}

/** Fills a rectangle with stripes. */
export function hatch(
  pen: CanvasRenderingContext2D,
  colour: string,
  strength: number,
  [x, y, width, height]: readonly [number, number, number, number],
): void {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, width, height);
  pen.clip();
  pen.globalAlpha = strength;
  pen.strokeStyle = colour;
  pen.lineWidth = 2;
  pen.beginPath();
  // All at the same places, so that what is beside goes on.
  for (let at = x - x % 7 - height; at < x + width; at += 7) {
    pen.moveTo(at, y + height);
    pen.lineTo(at + height, y);
  }
  pen.stroke();
  pen.restore();
}

/** Draws the builds of a slot. */
export function drawLane(page: Page, lane: Lane, y: number): void {
  const { pen, colours, width, matches } = page;
  const { lane: height, gutter } = sizes();
  pen.fillStyle = colours.muted!;
  pen.fillText(String(lane.slot), 8, y + height / 2);
  pen.fillStyle = colours.line!;
  pen.fillRect(gutter, y + height - 1, width, 1);
  for (const isMatch of [false, true]) {
    pen.globalAlpha = isMatch ? 1 : 0.15;
    let drawn = -1; // up to which pixel
    for (const bar of lane.bars) {
      if (matches.has(bar.build!) !== isMatch) continue;
      const [left, right] = edges(page, bar);
      if (placeOf(page, bar.until) < gutter) continue;
      if (left > width) break;
      // What nobody could see needn't be drawn, but for what went wrong.
      const isWell = bar.build!.outcome === "built" &&
        bar.problem === undefined;
      if (isWell && right < drawn + 0.5) continue;
      drawn = right;
      drawBar(page, bar, y + 2, [left, right]);
    }
  }
}

/** Draws an attempt that failed, or a build: its phases, and its outcome. */
export function drawBar(
  page: Page,
  { build, problem }: Bar,
  y: number,
  [left, right]: readonly [number, number],
): void {
  const { pen, colours, data } = page;
  const { bar: height } = sizes();
  const { outcome, times } = build!;
  const fill = (colour: string, from: number, to: number) => {
    pen.fillStyle = colours[colour]!;
    pen.fillRect(from, y, to - from, height);
  };
  const isShort = right - left < 3;
  if (problem !== undefined) {
    if (isShort) return fill("lost", left, right);
    hatch(pen, colours.lost!, pen.globalAlpha, [left, y, right - left, height]);
    pen.strokeStyle = colours.lost!;
    return pen.strokeRect(left + 0.5, y + 0.5, right - left - 1, height - 1);
  }
  if (isShort) {
    return fill(outcome === "built" ? "building" : outcome, left, right);
  }
  data.phases.forEach(([, colour], index) => {
    if (index < 2) return; // that was before it had the slot
    const from = Math.max(left, placeOf(page, times[index]!));
    const to = Math.min(right, placeOf(page, times[index + 1]!));
    if (to > from) fill(colour, from, to);
  });
  if (outcome !== "built") drawOutcome(page, outcome, y, [left, right]);
}

/** Draws what became of a build that was not built. */
export function drawOutcome(
  { pen, colours, data }: Page,
  outcome: string,
  y: number,
  [left, right]: readonly [number, number],
): void {
  const { bar: height } = sizes();
  const cap = Math.max(left, right - 12);
  pen.fillStyle = colours[outcome]!;
  pen.fillRect(left, y + height - 4, right - left, 4);
  pen.fillRect(cap, y, right - cap, height);
  if (right - cap < 12) return;
  pen.save();
  pen.fillStyle = colours.back!;
  pen.font = `bold ${pen.font}`;
  pen.textAlign = "center";
  pen.fillText(data.outcomes[outcome]!, cap + 6, y + height / 2 + 1);
  pen.restore();
}

/** Draws a frame around what details are shown of. */
export function drawChosen(page: Page, top: number): void {
  if (page.chosen === undefined) return;
  const { pen, colours, chosen: { lane, bar } } = page;
  const [left, right] = edges(page, bar);
  const [y, height] = [lane.top - top, heightOf(lane)];
  if (y < sizes().axis - height || right < sizes().gutter) return;
  pen.lineWidth = 2;
  pen.strokeStyle = colours.text!;
  pen.strokeRect(left - 1, y + 1, right - left + 2, height - 2);
  pen.lineWidth = 1;
}

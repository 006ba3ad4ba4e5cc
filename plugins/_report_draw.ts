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
  /** Not there where the machine took nothing. */
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
  /** By the names of the style sheet's properties, and stripes of some. */
  colours: Readonly<Record<string, string | CanvasPattern>>;
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

/** Those bars of which something is to be seen. */
export function inSight(page: Page, bars: readonly Bar[]): Bar[] {
  return bars.filter((it) => it.until >= page.from && it.from <= page.until);
}

/** Where a time is drawn. */
export function placeOf(page: Page, time: number): number {
  const { gutter } = sizes();
  const width = page.width - gutter;
  return gutter + (time - page.from) / (page.until - page.from) * width;
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

/** Draws all that can be seen: the axis, and the lanes that are below it. */
export function draw(page: Page): void {
  const { canvas, pen, shown } = page;
  const { scrollTop, clientHeight } = canvas.closest("#scroller")!;
  page.width = canvas.clientWidth;
  canvas.style.height = `${clientHeight}px`;
  canvas.width = Math.round(page.width * devicePixelRatio);
  canvas.height = Math.round(clientHeight * devicePixelRatio);
  pen.scale(devicePixelRatio, devicePixelRatio);
  pen.textBaseline = "middle";
  pen.textAlign = "center";
  drawAxis(page, clientHeight);
  const { axis } = sizes();
  pen.textAlign = "start";
  pen.beginPath();
  pen.rect(0, axis, page.width, clientHeight);
  pen.clip();
  pen.translate(0, -scrollTop);
  for (const lane of shown) {
    if (lane.top > scrollTop + clientHeight) break;
    if (lane.top + heightOf(lane) < scrollTop + axis) continue;
    if (lane.slot < 0) drawHeading(page, lane);
    else drawLane(page, lane);
  }
  drawChosen(page);
}

/** Writes as much of a text as has room; returns where it ends. */
export function write(
  { pen, canvas, colours }: Page,
  text: string,
  [x, y]: readonly [x: number, y: number],
  colour: string,
  { weight = "normal", room = Infinity } = {},
): number {
  pen.font = `${weight} 12px ${getComputedStyle(canvas).fontFamily}`;
  pen.fillStyle = colours[colour]!;
  const length = pen.measureText(text).width;
  const most = Math.max(0, Math.floor(text.length * room / length) - 2);
  const shown = length <= room ? text : `${text.slice(0, most).trimEnd()}…`;
  pen.fillText(shown, x, y);
  return x + Math.min(length, room);
}

/** Milliseconds between two marks of the axis, so that they have room. */
export function stepOf(span: number, marks: number): number {
  const seconds = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30]
    .concat([1, 2, 5, 10, 15, 30].map((minutes) => minutes * 60))
    .concat([1, 2, 3, 6, 12, 24, 48, 168, 336].map((hours) => hours * 3600));
  const enough = seconds.find((it) => span / (it * 1000) <= marks);
  return 1000 * (enough ?? Math.max(...seconds));
}

/** What stands at a mark: the day, where one begins, else the time. */
export function markText(time: number, step: number): string {
  const date = new Date(time);
  const isDay = date.getHours() + date.getMinutes() + date.getSeconds() === 0;
  if (isDay && step >= 1000) {
    return date.toLocaleDateString([], { month: "short", day: "numeric" });
  }
  const text = date.toTimeString().slice(0, step < 60_000 ? 8 : 5);
  return step < 1000 ? `${text}.${date.getMilliseconds() / 100}` : text;
}

/** Draws the axis: its marks, what these say, and lines down from them. */
export function drawAxis(page: Page, height: number): void {
  const { colours, data, from, pen, until, width } = page;
  const { axis, gutter } = sizes();
  const step = stepOf(until - from, Math.max(2, (width - gutter) / 90));
  // They are at round times of the clock on the wall.
  const zone = new Date(data.since).getTimezoneOffset() * 60_000;
  const offset = data.since - zone;
  const first = Math.ceil((from + offset) / step) * step;
  for (let time = first; time <= until + offset; time += step) {
    const x = placeOf(page, time - offset);
    pen.fillStyle = colours.line!;
    pen.fillRect(x, axis - 6, 1, height);
    if (x < gutter + 30 || x > width - 30) continue;
    write(page, markText(time + zone, step), [x, axis / 2 - 2], "muted");
  }
}

/** Where a bar begins and ends, in pixels; what is short can be seen, too. */
export function edges(page: Page, { from, until }: Bar): [number, number] {
  const left = Math.max(sizes().gutter, placeOf(page, from));
  const right = Math.min(page.width, placeOf(page, until));
  return [left, Math.max(left + 1.5, right)];
}

/** Draws when a machine took nothing. */
export function drawAbsences(
  page: Page,
  { machine }: Lane,
  [top, height]: readonly [top: number, height: number],
  colour: string,
): void {
  page.pen.fillStyle = page.colours[colour]!;
  for (const it of inSight(page, page.data.machines[machine]!.absences)) {
    const [left, right] = edges(page, it);
    page.pen.fillRect(left, top, right - left, height);
  }
}

/** Draws the name of a machine, what it did, and when it took nothing. */
export function drawHeading(page: Page, lane: Lane): void {
  const { name, summary } = page.data.machines[lane.machine]!;
  const { heading } = sizes();
  const y = lane.top + heading / 2 + 2;
  drawAbsences(page, lane, [lane.top + heading - 4, 3], "absent");
  const named = { weight: "bold", room: page.width / 2 };
  const x = write(page, name, [4, y], "text", named) + 10;
  write(page, summary, [x, y], "muted", { room: page.width - x - 4 });
}

/** Draws the builds of a slot. */
export function drawLane(page: Page, lane: Lane): void {
  const { pen, colours, width, matches } = page;
  const { lane: height, gutter } = sizes();
  write(page, String(lane.slot), [8, lane.top + height / 2], "muted");
  drawAbsences(page, lane, [lane.top, height], "absent stripes");
  pen.fillStyle = colours.line!;
  pen.fillRect(gutter, lane.top + height - 1, width, 1);
  for (const isMatch of [false, true]) {
    pen.globalAlpha = isMatch ? 1 : 0.15;
    let drawn = -1; // up to which pixel
    for (const bar of inSight(page, lane.bars)) {
      if (matches.has(bar.build!) !== isMatch) continue;
      const [, right] = edges(page, bar);
      // What nobody could see needn't be drawn, but for what went wrong.
      const { outcome } = bar.build!;
      const isWell = outcome === "built" && bar.problem === undefined;
      if (isWell && right < drawn + 0.5) continue;
      drawn = right;
      drawBar(page, bar, lane.top + 2);
    }
  }
}

/** Draws an attempt that failed, or a build: its phases, and its outcome. */
export function drawBar(page: Page, bar: Bar, top: number): void {
  const { pen, colours, data } = page;
  const { outcome, times } = bar.build!;
  const height = sizes().bar;
  const [left, right] = edges(page, bar);
  const fill = (colour: string, from: number, to: number, y = 0) => {
    const [start, end] = [Math.max(left, from), Math.min(right, to)];
    pen.fillStyle = colours[colour]!;
    pen.fillRect(start, top + y, Math.max(0, end - start), height - y);
  };
  if (bar.problem !== undefined) {
    fill("lost stripes", left, right);
    pen.strokeStyle = colours.lost!;
    pen.strokeRect(left + 0.5, top + 0.5, right - left - 1, height - 1);
    return;
  }
  fill(outcome === "built" ? "building" : outcome, left, right);
  if (right - left < 3) return;
  const places = times.map((time) => placeOf(page, time));
  data.phases.forEach(([, colour], index) => {
    if (index < 2) return; // that was before it had the slot
    fill(colour, places[index]!, places[index + 1]!);
  });
  if (outcome === "built") return;
  fill(outcome, left, right, height - 4);
  fill(outcome, right - 12, right);
  if (right - left < 12) return;
  const place = [right - 9, top + height / 2 + 1] as const;
  write(page, data.outcomes[outcome]!, place, "back", { weight: "bold" });
}

/** Draws a frame around what details are shown of. */
export function drawChosen(page: Page): void {
  const { pen, colours, chosen } = page;
  if (!chosen || inSight(page, [chosen.bar]).length === 0) return;
  const [left, right] = edges(page, chosen.bar);
  const [y, height] = [chosen.lane.top + 1, heightOf(chosen.lane) - 2];
  pen.lineWidth = 2;
  pen.strokeStyle = colours.text!;
  pen.strokeRect(left - 1, y, right - left + 2, height);
}

/** Stripes in a colour, of two pixels each for screens that have them. */
export function makeStripes({ pen }: Page, colour: string): CanvasPattern {
  const tile = new OffscreenCanvas(14, 14);
  const brush = tile.getContext("2d")!;
  brush.strokeStyle = colour;
  brush.lineWidth = 4;
  for (const x of [-14, 0, 14]) { // beside it, too: they reach into its corners
    brush.moveTo(x - 2, 16);
    brush.lineTo(x + 16, -2);
  }
  brush.stroke();
  const stripes = pen.createPattern(tile, "repeat")!;
  stripes.setTransform(new DOMMatrix().scale(0.5));
  return stripes;
}

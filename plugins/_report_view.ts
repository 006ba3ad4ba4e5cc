/**
 * What the page of `offload report` does: it shows details, filters, zooms, and
 * lists builds. A browser runs the text of these functions; see _report_draw.ts.
 *
 * @module
 */

import {
  drawSoon,
  edges,
  heightOf,
  makeStripes,
  placeOf,
  sizes,
} from "./_report_draw.ts";
import type { Bar, Lane, Page } from "./_report_draw.ts";
import type { PageBuild, PageData } from "./_report_page.ts";
import { formatSize, formatTime, formatTook } from "./_screen.ts";

/** Begins when all is there. */
export function startPage(): void {
  const data: PageData = JSON.parse(element("data").textContent!);
  const canvas = element<HTMLCanvasElement>("timeline");
  const page: Page = {
    data,
    canvas,
    pen: canvas.getContext("2d")!,
    lanes: makeLanes(data),
    shown: [],
    matches: new Set(),
    width: canvas.clientWidth,
    from: 0,
    until: data.length,
    colours: {},
    isDue: false,
  };
  showFrom(page);
  readColours(page);
  listenToKeys(page);
  listenToPointers(page);
  listenToControls(page);
  applyFilter(page);
}

/** An element that is there. */
export function element<T extends HTMLElement = HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

/** Makes a lane of each machine and slot, and puts into them what was there. */
export function makeLanes({ machines, builds }: PageData): Lane[] {
  const lanes = machines.map(({ slots, absences }, machine) =>
    Array.from({ length: slots + 1 }, (_, index): Lane => {
      const bars = index === 0 ? [...absences] : [];
      return { machine, slot: index - 1, bars, top: 0 };
    })
  );
  for (const build of builds) {
    const { machine, slot, times, earlier } = build;
    for (const { machine, slot, began, ended, problem } of earlier) {
      const bar = { from: began, until: ended, build, problem };
      lanes[machine]![slot + 1]!.bars.push(bar);
    }
    const bar = { from: times[2]!, until: times.at(-1)!, build };
    lanes[machine]![slot + 1]!.bars.push(bar);
  }
  const all = lanes.flat();
  for (const { bars } of all) bars.sort((a, b) => a.from - b.from);
  return all;
}

/** Begins where anything did. */
export function showFrom(page: Page): void {
  const { lanes, data } = page;
  const first = Math.min(...lanes.map(({ bars }) => bars[0]?.from ?? Infinity));
  page.until = data.length;
  page.from = Number.isFinite(first)
    ? Math.max(0, first - (data.length - first) / 50)
    : 0;
}

/** Reads the colours of the style sheet, which are others in the dark. */
export function readColours(page: Page): void {
  const style = getComputedStyle(document.documentElement);
  const names = ["back", "text", "muted", "line", "absent", "lost"]
    .concat(page.data.phases.map(([, colour]) => colour))
    .concat(Object.keys(page.data.outcomes));
  const colours = Object.fromEntries(
    names.map((name) => [name, style.getPropertyValue(`--${name}`)]),
  );
  page.colours = {
    ...colours,
    "absent stripes": makeStripes(page, `${colours.absent}80`),
    "lost stripes": makeStripes(page, colours.lost!),
  };
  drawSoon(page);
}

/** Shows the machine, and marks the builds, that are asked for. */
export function applyFilter(page: Page): void {
  const { data, lanes } = page;
  const words = element<HTMLInputElement>("name").value.toLowerCase();
  const machine = element<HTMLSelectElement>("machine").value;
  const outcome = element<HTMLSelectElement>("outcome").value;
  const isThere = (index: number) => machine === "" || index === +machine;
  const matches = data.builds.filter((build) =>
    (isThere(build.machine) ||
      build.earlier.some((it) => isThere(it.machine))) &&
    build.name.toLowerCase().includes(words) &&
    (outcome === "" || build.outcome === outcome ||
      outcome === "retried" && build.earlier.length > 0)
  );
  page.matches = new Set(matches);
  page.shown = lanes.filter((lane) => isThere(lane.machine));
  let top = sizes().axis;
  for (const lane of page.shown) {
    lane.top = top;
    top += heightOf(lane);
  }
  element("room").style.height = `${top + 4}px`;
  element("count").textContent =
    `${matches.length} of ${data.builds.length} builds`;
  choose(page, undefined);
  listBuilds(page, matches, 0);
}

/** Milliseconds, to be read at a glance. */
export function lengthText(milliseconds: number): string {
  return formatTook(milliseconds / 1000);
}

/** What is to be said of a bar: names and values. */
export function describe(page: Page, lane: Lane, bar: Bar): string[][] {
  const { machines, phases } = page.data;
  const { build, problem } = bar;
  const name = machines[lane.machine]!.name;
  const when = [
    "time",
    `${formatTime(page.data.since + bar.from)}, for ${
      lengthText(bar.until - bar.from)
    }`,
  ];
  if (build === undefined) {
    return [[name, "took nothing"], when, ["why", problem!]];
  }
  const place = ["machine", `${name}, slot ${lane.slot}`];
  if (problem !== undefined) {
    return [[build.name, "attempt that failed"], place, when, ["why", problem]];
  }
  const { times, items = 0, bytesSent, bytesRetrieved, expected } = build;
  const [sent, retrieved] = [bytesSent, bytesRetrieved]
    .map((bytes) => bytes === undefined ? "" : formatSize(bytes));
  return [
    [build.name, build.outcome],
    place,
    when,
    ...phases.map(([phase], index) => {
      const length = times[index + 1]! - times[index]!;
      return [phase, length > 0 ? lengthText(length) : ""];
    }),
    ["expected", expected === undefined ? "" : lengthText(1000 * expected)],
    ["sent", sent! && `${items} items, ${sent}`],
    ["retrieved", retrieved!],
    ["why", build.problem ?? ""],
    ...build.earlier.map((it) => [
      "tried before",
      `${machines[it.machine]!.name}: ${it.problem}`,
    ]),
    ["derivation", build.derivation],
  ].filter(([, value]) => value !== "");
}

/** Shows details of a bar, at its place; of none, nothing. */
export function choose(page: Page, chosen: Page["chosen"]): void {
  const box = element("details");
  page.chosen = chosen;
  box.hidden = chosen === undefined;
  drawSoon(page);
  if (chosen === undefined) return;
  const { lane, bar } = chosen;
  const [[title, outcome] = [], ...lines] = describe(page, lane, bar);
  const parts = lines.flatMap(([name, value]) => [
    Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: value }),
  ]);
  element("title").textContent = title!;
  element("how").textContent = outcome!;
  element("facts").replaceChildren(...parts);
  const { scrollTop } = element("scroller");
  const [left] = edges(page, bar);
  const room = page.width - box.offsetWidth;
  box.style.left = `${Math.max(0, Math.min(left, room))}px`;
  box.style.top = `${lane.top - scrollTop + heightOf(lane) + 4}px`;
}

/** What is drawn at a place, or near it. */
export function barAt(page: Page, x: number, y: number): Page["chosen"] {
  const down = y + element("scroller").scrollTop;
  if (y < sizes().axis) return undefined;
  const lane = page.shown.find((it) =>
    down >= it.top && down < it.top + heightOf(it)
  );
  let nearest: Page["chosen"];
  let least = 4; // pixels
  for (const bar of lane?.bars ?? []) {
    if (bar.build && !page.matches.has(bar.build)) continue;
    const [left, right] = edges(page, bar);
    const distance = Math.max(left - x, x - right, 0);
    if (distance > least || right < left) continue;
    least = distance;
    nearest = { lane: lane!, bar };
  }
  return nearest;
}

/** Which time is drawn there. */
export function timeAt(page: Page, x: number): number {
  const { gutter } = sizes();
  const width = page.width - gutter;
  return page.from + (x - gutter) / width * (page.until - page.from);
}

/** Shows more or less of the time, around a place. */
export function zoom(page: Page, factor: number, x: number): void {
  const middle = timeAt(page, x);
  const span = page.until - page.from;
  const length = Math.min(page.data.length, Math.max(200, span * factor));
  const from = middle - (middle - page.from) / span * length;
  showSpan(page, from, from + length);
}

/** Shows a span of the time, as far as there is one. */
export function showSpan(page: Page, from: number, until: number): void {
  const length = Math.min(until - from, page.data.length);
  page.from = Math.max(0, Math.min(from, page.data.length - length));
  page.until = page.from + length;
  choose(page, page.chosen);
}

/** Has a bar in sight, and shows its details. */
export function goTo(page: Page, chosen: NonNullable<Page["chosen"]>): void {
  const { lane, bar } = chosen;
  const scroller = element("scroller");
  const { axis } = sizes();
  const [above, below] = [lane.top - axis, lane.top + heightOf(lane)];
  if (above < scroller.scrollTop) scroller.scrollTop = above;
  if (below > scroller.scrollTop + scroller.clientHeight) {
    scroller.scrollTop = below - scroller.clientHeight;
  }
  if (bar.from < page.from || bar.until > page.until) {
    const span = Math.max(page.until - page.from, 1.2 * (bar.until - bar.from));
    const middle = (bar.from + bar.until) / 2;
    showSpan(page, middle - span / 2, middle + span / 2);
  }
  choose(page, chosen);
}

/** The bars of a lane that the filter lets pass. */
export function barsOf(page: Page, lane: Lane): Bar[] {
  return lane.bars.filter(({ build }) => !build || page.matches.has(build));
}

/** What is beside the chosen bar: so many bars or lanes further. */
export function neighbour(
  page: Page,
  along: number,
  across: number,
): Page["chosen"] {
  const lanes = page.shown.filter((lane) => barsOf(page, lane).length > 0);
  const { lane, bar } = page.chosen ?? {};
  const at = lane === undefined ? -1 : lanes.indexOf(lane);
  if (at < 0) {
    return lanes[0] && { lane: lanes[0], bar: barsOf(page, lanes[0])[0]! };
  }
  if (across === 0) {
    const bars = barsOf(page, lane!);
    const next = bars[bars.indexOf(bar!) + along];
    return next && { lane: lane!, bar: next };
  }
  const other = lanes[at + across];
  if (other === undefined) return undefined;
  const distance = ({ from, until }: Bar) =>
    Math.max(from - bar!.until, bar!.from - until, 0);
  const bars = barsOf(page, other).sort((a, b) => distance(a) - distance(b));
  return { lane: other, bar: bars[0]! };
}

/** What keys do, by their names. */
export function actions(page: Page): Record<string, () => void> {
  const step = (along: number, across: number) => () => {
    const next = neighbour(page, along, across);
    if (next) goTo(page, next);
  };
  const middle = () => {
    const { chosen, width } = page;
    return chosen ? placeOf(page, chosen.bar.from) : width / 2;
  };
  const whole = () => showSpan(page, 0, page.data.length);
  return {
    ArrowRight: step(1, 0),
    ArrowLeft: step(-1, 0),
    ArrowDown: step(0, 1),
    ArrowUp: step(0, -1),
    "+": () => zoom(page, 0.5, middle()),
    "=": () => zoom(page, 0.5, middle()),
    "-": () => zoom(page, 2, middle()),
    "0": whole,
    Home: whole,
    Escape: () => choose(page, undefined),
    Enter: () => {
      if (page.chosen === undefined) return;
      const { bar: { from, until } } = page.chosen;
      showSpan(page, from - (until - from) / 4, until + (until - from) / 4);
    },
  };
}

/** Has keys move from bar to bar, and zoom. */
export function listenToKeys(page: Page): void {
  const keys = actions(page);
  page.canvas.addEventListener("keydown", (event) => {
    const action = keys[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
}

/** Has pointers show details, move and zoom. */
export function listenToPointers(page: Page): void {
  const { canvas } = page;
  const places = new Map<number, number>();
  let isPinned = false;
  let moved = 0;
  canvas.addEventListener("pointerdown", ({ pointerId, offsetX }) => {
    places.set(pointerId, offsetX);
    moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const { pointerId, offsetX, offsetY } = event;
    if (!places.has(pointerId)) {
      if (!isPinned) choose(page, barAt(page, offsetX, offsetY));
      return;
    }
    const before = [...places.values()];
    moved += Math.abs(offsetX - places.get(pointerId)!);
    places.set(pointerId, offsetX);
    if (moved < 5) return;
    canvas.setPointerCapture(pointerId);
    follow(page, before, [...places.values()]);
  });
  for (const end of ["pointerup", "pointercancel"] as const) {
    canvas.addEventListener(end, ({ pointerId, offsetX, offsetY }) => {
      places.delete(pointerId);
      if (moved >= 5 || end === "pointercancel") return;
      choose(page, barAt(page, offsetX, offsetY));
      isPinned = page.chosen !== undefined;
    });
  }
  canvas.addEventListener("pointerleave", () => {
    if (!isPinned && document.activeElement !== canvas) choose(page, undefined);
  });
  canvas.addEventListener("wheel", (event) => onWheel(page, event));
}

/** Moves with a pointer, and zooms with two. */
export function follow(
  page: Page,
  before: readonly number[],
  after: readonly number[],
): void {
  const [a, b] = [before, after].map((places) => ({
    middle: places.reduce((sum, x) => sum + x, 0) / places.length,
    width: Math.max(1, Math.max(...places) - Math.min(...places)),
  }));
  const span = page.until - page.from;
  const { gutter } = sizes();
  const each = span / (page.width - gutter);
  const by = (a!.middle - b!.middle) * each;
  showSpan(page, page.from + by, page.until + by);
  if (after.length > 1) zoom(page, a!.width / b!.width, b!.middle);
}

/** Zooms where Ctrl is held, as by two fingers; sideways it moves. */
export function onWheel(page: Page, event: WheelEvent): void {
  const { ctrlKey, metaKey, shiftKey, deltaX, deltaY, offsetX } = event;
  if (ctrlKey || metaKey) {
    event.preventDefault();
    return zoom(page, Math.exp(deltaY / 300), offsetX);
  }
  const by = shiftKey ? deltaX + deltaY : deltaX;
  if (by === 0) return;
  event.preventDefault();
  const each = (page.until - page.from) / page.width;
  showSpan(page, page.from + by * each, page.until + by * each);
}

/** Has the other elements do what they are for. */
export function listenToControls(page: Page): void {
  for (const id of ["name", "machine", "outcome"]) {
    element(id).addEventListener("input", () => applyFilter(page));
  }
  const keys = actions(page);
  for (const button of document.querySelectorAll<HTMLElement>("[data-key]")) {
    button.addEventListener("click", () => keys[button.dataset.key!]!());
  }
  element("scroller").addEventListener(
    "scroll",
    () => choose(page, page.chosen),
  );
  addEventListener("resize", () => {
    page.width = page.canvas.clientWidth;
    choose(page, page.chosen);
  });
  matchMedia("(prefers-color-scheme: dark)")
    .addEventListener("change", () => readColours(page));
  for (const link of document.querySelectorAll<HTMLElement>("[data-build]")) {
    const build = page.data.builds[Number(link.dataset.build)]!;
    link.addEventListener("click", () => goToBuild(page, build));
  }
}

/** Shows a build in the timeline, whatever the filter is. */
export function goToBuild(page: Page, build: PageBuild): void {
  if (!page.matches.has(build)) {
    element<HTMLFormElement>("filter").reset();
    applyFilter(page);
  }
  const lane = page.lanes.find((it) =>
    it.machine === build.machine && it.slot === build.slot
  )!;
  const bar = lane.bars.find((it) =>
    it.build === build && it.problem === undefined
  )!;
  page.canvas.focus();
  page.canvas.scrollIntoView({ block: "nearest" });
  goTo(page, { lane, bar });
}

/** What the list says of a build, beside its name. */
export function listTexts({ data }: Page, build: PageBuild): string[] {
  const { machine, slot, outcome, times, problem, earlier } = build;
  return [
    outcome,
    `${data.machines[machine]!.name}, slot ${slot}`,
    formatTime(data.since + times[0]!),
    lengthText(times.at(-1)! - times[0]!),
    String(earlier.length + 1),
    problem ?? earlier.at(-1)?.problem ?? "",
  ];
}

/** Lists builds, some at a time: what the timeline shows, in words. */
export function listBuilds(
  page: Page,
  builds: readonly PageBuild[],
  first: number,
): void {
  const list = element<HTMLTableSectionElement>("list");
  const labels = list.parentElement!.querySelectorAll("th[scope=col]");
  const rows = builds.slice(first, first + 100).map((build) => {
    const row = document.createElement("tr");
    const button = document.createElement("button");
    button.textContent = build.name;
    button.addEventListener("click", () => goToBuild(page, build));
    row.append(Object.assign(document.createElement("th"), { scope: "row" }));
    row.firstElementChild!.append(button);
    listTexts(page, build).forEach((text, index) => {
      const cell = row.insertCell();
      cell.textContent = text;
      cell.dataset.label = labels[index + 1]!.textContent!;
    });
    return row;
  });
  if (first === 0) list.replaceChildren(...rows);
  else list.append(...rows);
  const more = element("more");
  more.hidden = first + 100 >= builds.length;
  more.onclick = () => listBuilds(page, builds, first + 100);
}

/**
 * The page that `offload report --html` writes: one file that needs no other.
 *
 * What came from elsewhere stands in it as text: escaped, or as JSON that no
 * markup ends. Should that ever fail, the page's own policy runs no other script
 * than the page's, and fetches nothing.
 *
 * @module
 */

import { createHash } from "node:crypto";
import type { Absence } from "./_absences.ts";
import { OUTCOMES } from "./_journal.ts";
import type { Attempt, JournalEntry } from "./_journal.ts";
import { PHASES, phaseTimes } from "./_phases.ts";
import type { Phase } from "./_phases.ts";
import * as drawing from "./_report_draw.ts";
import { FORESIGHT, foresightRows } from "./_report_figures.ts";
import type {
  BuildFigures,
  Figures,
  MachineFigures,
  Outcome,
} from "./_report_figures.ts";
import { STYLE } from "./_report_style.ts";
import * as view from "./_report_view.ts";
import {
  formatDuration,
  formatJson,
  formatShare,
  formatSize,
  formatTime,
  formatTook,
  inOneLine,
} from "./_screen.ts";

/** A build in the page; times are milliseconds since the report's beginning. */
export interface PageBuild
  extends
    Pick<JournalEntry, "name" | "derivation" | "slot" | "outcome" | "problem">,
    Pick<JournalEntry, "items" | "bytesSent" | "bytesRetrieved" | "expected"> {
  /** Place of the machine in the list. */
  readonly machine: number;
  /** Between which its phases lie. */
  readonly times: readonly number[];
  /** Attempts before the last one. */
  readonly earlier: readonly (Omit<Attempt, "machine"> & {
    readonly machine: number;
  })[];
}

/** A machine in the page. */
export interface PageMachine {
  /** NAME:PORT. */
  readonly name: string;
  /** How many lanes it has. */
  readonly slots: number;
  /** What is said beside the name. */
  readonly summary: string;
  /** When it took nothing, in the same milliseconds, and why. */
  readonly absences: readonly {
    readonly from: number;
    readonly until: number;
    readonly problem: string;
  }[];
}

/** What the page knows. */
export interface PageData {
  /** Milliseconds since 1970 that times count from. */
  readonly since: number;
  /** How many milliseconds it is about. */
  readonly length: number;
  /** Names of phases, and of the colours of those that are drawn. */
  readonly phases: readonly (readonly [name: string, colour: string])[];
  /** How a build may end, and what stands for it. */
  readonly outcomes: Readonly<Record<string, string>>;
  /** From the top to the bottom. */
  readonly machines: readonly PageMachine[];
  /** The oldest first. */
  readonly builds: readonly PageBuild[];
}

/** The colours of phases, in the style sheet. */
const COLOURS: Readonly<Record<Phase, string>> = {
  "waiting": "waiting",
  "failed attempts": "lost",
  "connecting": "connecting",
  "sending": "sending",
  "building": "building",
  "retrieving": "retrieving",
};

/** What stands for outcomes beside their colours. */
const SIGNS: Readonly<Record<Outcome, string>> = {
  "built": "",
  "failed": "×",
  "timed-out": "!",
  "lost": "?",
  "interrupted": "–",
};

/** The columns of the list of builds. */
const LIST = ["build", "outcome", "machine", "asked", "took", "attempts"]
  .concat("problem");

/** Text that is no markup, and obeyed by nothing. */
function escapeText(text: string): string {
  const names: Record<string, string> = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    '"': "&quot;",
    "'": "&#39;",
  };
  return inOneLine(text).replace(/[&<>"']/g, (it) => names[it]!);
}

/** JSON for an element of a page: neither markup nor control characters. */
function escapeJson(value: unknown): string {
  return formatJson(value).replaceAll("<", "\\u003c");
}

/** What is said of a machine above its lanes. */
function summarize({ builds, used, lost, idle }: MachineFigures): string {
  const [longest] = idle;
  const seconds = idle.reduce((sum, it) => sum + it.seconds, 0);
  return [
    builds === 1 ? "1 build" : `${builds} builds`,
    `${formatShare(used)} used`,
    ...(lost > 0 ? [`${lost} lost`] : []),
    ...(longest === undefined ? [] : [
      `took nothing for ${formatTook(seconds)}: ${inOneLine(longest.why)}`,
    ]),
  ].join(" · ");
}

/** What times and machines are in the page. */
interface Places {
  /** Milliseconds since its beginning. */
  inPage(time: number): number;
  /** The place of NAME:PORT in the list. */
  placeOf(machine: string): number;
}

function makePlaces({ machines, since }: Figures): Places {
  const places = new Map(machines.map((it, index) => [it.machine, index]));
  return {
    inPage: (time) => Math.round(time - since),
    placeOf: (machine) => places.get(machine)!,
  };
}

/** A build as the page has it. */
function pageBuild(
  entry: JournalEntry,
  { inPage, placeOf }: Places,
): PageBuild {
  const { name, derivation, slot, outcome, problem } = entry;
  const { items, bytesSent, bytesRetrieved, expected } = entry;
  return {
    ...{ name, derivation, slot, outcome, problem },
    ...{ items, bytesSent, bytesRetrieved, expected },
    machine: placeOf(entry.machine),
    times: phaseTimes(entry).map(inPage),
    earlier: entry.earlier.map(({ machine, began, ended, ...rest }) => ({
      ...rest,
      machine: placeOf(machine),
      began: inPage(began),
      ended: inPage(ended),
    })),
  } as PageBuild; // JSON leaves out what is undefined
}

/** A machine as the page has it. */
function pageMachine(
  machine: MachineFigures,
  absences: readonly Absence[],
  { inPage }: Places,
): PageMachine {
  return {
    name: inOneLine(machine.machine),
    slots: machine.slots,
    summary: summarize(machine),
    absences: absences.filter((it) => it.machine === machine.machine)
      .map((it) => ({
        from: inPage(it.from),
        until: inPage(it.until),
        problem: it.problem,
      })),
  };
}

/** What the page's script gets to know. */
export function pageData(
  entries: readonly JournalEntry[],
  absences: readonly Absence[],
  figures: Figures,
): PageData {
  const { machines, since, until } = figures;
  const places = makePlaces(figures);
  return {
    since,
    length: Math.round(until - since),
    phases: PHASES.map((phase) => [phase, COLOURS[phase]]),
    outcomes: SIGNS,
    machines: machines.map((it) => pageMachine(it, absences, places)),
    builds: entries.map((it) => pageBuild(it, places)),
  };
}

/** A table; its first column, and no other, is made of markup. */
function makeTable(
  heading: readonly string[],
  rows: readonly (readonly string[])[],
  empty: string,
): string {
  if (rows.length === 0) return `<p class="muted">${escapeText(empty)}</p>`;
  const head = heading.map((it) => `<th scope="col">${escapeText(it)}</th>`);
  const body = rows.map(([first, ...others]) => {
    const cells = others.map((it, index) =>
      `<td data-label="${heading[index + 1]}">${escapeText(it)}</td>`
    );
    return `<tr><th scope="row">${first}</th>${cells.join("")}</tr>`;
  });
  return `<div class="wide"><table><thead><tr>${head.join("")}</tr></thead>
<tbody>${body.join("\n")}</tbody></table></div>`;
}

/** The machines, and why they took nothing when they took nothing. */
function machineTable(machines: readonly MachineFigures[]): string {
  const rows = machines.map((it) => [
    escapeText(it.machine),
    String(it.slots),
    String(it.builds),
    String(it.failed),
    String(it.lost),
    formatShare(it.used),
    it.overhead === undefined ? "–" : formatTook(it.overhead),
    formatSize(it.bytesSent),
    formatSize(it.bytesRetrieved),
    it.idle.map(({ why, seconds, times }) =>
      `${formatTook(seconds)}${times > 1 ? ` in ${times} times` : ""}: ${why}`
    ).join("; ") || "–",
  ]);
  const heading = ["machine", "slots", "builds", "failed", "lost", "slots used"]
    .concat("median overhead", "sent", "retrieved", "took nothing");
  return makeTable(heading, rows, "There are no machines.");
}

/** Builds that are worth a look; each leads to its place in the timeline. */
function buildTable(
  builds: readonly BuildFigures[],
  entries: readonly JournalEntry[],
  empty: string,
): string {
  const rows = builds.map((it) => {
    const index = entries.findIndex(({ derivation, machine, outcome }) =>
      derivation === it.derivation && machine === it.machine &&
      outcome === it.outcome
    );
    const name = escapeText(it.name);
    return [
      `<button type="button" data-build="${index}">${name}</button>`,
      formatTook(it.seconds),
      it.machine,
      String(it.attempts),
      it.outcome,
      it.problem ?? "–",
    ];
  });
  const heading = [
    "build",
    "took",
    "machine",
    "attempts",
    "outcome",
    "problem",
  ];
  return makeTable(heading, rows, empty);
}

/** How well builds were foreseen. */
function foresightTable(figures: Figures): string {
  const rows = foresightRows(figures)
    .map(([machine, ...cells]) => [escapeText(machine!), ...cells]);
  const empty = "Nothing was expected of any build.";
  return makeTable(["machine", ...FORESIGHT], rows, empty);
}

/** Where the time of all builds went: a bar, and what its parts are. */
function phaseBar({ phases }: Figures): string {
  const all = PHASES.reduce((sum, phase) => sum + phases[phase], 0);
  let at = 0;
  const parts = PHASES.map((phase) => {
    const width = all > 0 ? 100 * phases[phase] / all : 0;
    const x = at;
    at += width;
    return `<rect class="${COLOURS[phase]}" x="${x.toFixed(3)}" y="0" ` +
      `width="${width.toFixed(3)}" height="10"/>`;
  });
  const lines = PHASES.map((phase) => {
    const share = all > 0 ? formatShare(phases[phase] / all) : "–";
    const time = formatTook(phases[phase]);
    return `<li>${sample(COLOURS[phase])}${phase}
<b>${share}</b> <span class="muted">${time}</span></li>`;
  });
  return `<svg class="share" viewBox="0 0 100 10" preserveAspectRatio="none"
 aria-hidden="true">${parts.join("")}</svg>
<ul class="legend">${lines.join("\n")}</ul>`;
}

/** A bit of a colour, with the sign that is in it. */
function sample(colour: string, sign = ""): string {
  return `<svg class="sample" viewBox="0 0 12 12" aria-hidden="true">` +
    `<rect class="${colour}" width="12" height="12" rx="2"/>` +
    `<text x="6" y="9.5">${sign}</text></svg>`;
}

/** How many builds came to what. */
function numbers({ outcomes }: Figures, entries: readonly JournalEntry[]) {
  const retried = entries.filter(({ earlier }) => earlier.length > 0).length;
  const counts = [
    ["builds", entries.length],
    ...OUTCOMES.map((outcome) => [outcome, outcomes[outcome]] as const),
    ["retried", retried],
  ];
  return `<ul class="numbers">${
    counts.map(([name, number]) => `<li><b>${number}</b> ${name}</li>`).join("")
  }</ul>`;
}

/** What is chosen from a list; "" is all. */
function makeSelect(
  id: string,
  label: string,
  all: string,
  options: readonly (readonly [value: string, text: string])[],
): string {
  const lines = [["", all] as const, ...options].map(([value, text]) =>
    `<option value="${escapeText(value)}">${escapeText(text)}</option>`
  );
  return `<label>${label} <select id="${id}">${
    lines.join("")
  }</select></label>`;
}

/** What the timeline is filtered and moved by. */
function controls({ machines }: Figures): string {
  const names = machines.map((it, index) =>
    [String(index), it.machine] as const
  );
  const outcomes = [...OUTCOMES, "retried"].map((it) => [it, it] as const);
  return `<form id="filter" autocomplete="off">
<label>Name <input id="name" type="search" placeholder="part of a name"></label>
${makeSelect("machine", "Machine", "all", names)}
${makeSelect("outcome", "Outcome", "all", outcomes)}
<output id="count"></output>
<span class="buttons">
<button type="button" data-key="-" aria-label="show more of the time">−</button>
<button type="button" data-key="+" aria-label="show less of the time">+</button>
<button type="button" data-key="0">all</button>
</span></form>`;
}

/** What signs and patterns in the timeline mean. */
function signs(): string {
  const outcomes = OUTCOMES.filter((it) => it !== "built").map((outcome) =>
    `<li>${sample(outcome, SIGNS[outcome])}${outcome}</li>`
  );
  return `<ul class="legend">${outcomes.join("\n")}
<li><svg class="sample hatched" viewBox="0 0 12 12" aria-hidden="true">
<path class="lost" d="M0 6L6 0M0 12L12 0M6 12L12 6"/></svg>attempt that failed</li>
<li><svg class="sample hatched" viewBox="0 0 12 12" aria-hidden="true">
<path class="absent" d="M0 6L6 0M0 12L12 0M6 12L12 6"/></svg>took nothing</li></ul>`;
}

/** The timeline, and what stands around it. */
function timeline(figures: Figures): string {
  return `${controls(figures)}
<div id="stage"><div id="scroller"><div id="room"><canvas id="timeline"
 tabindex="0" role="application" aria-label="Timeline of builds: the arrow keys
 move from build to build" aria-describedby="keys"></canvas></div></div>
<div id="details" role="status" hidden><h3 id="title"></h3><p id="how"></p>
<dl id="facts"></dl></div></div>
${signs()}
<p id="keys" class="muted">Drag, or turn the wheel sideways, to move, with Ctrl to
zoom. Keys: arrows go from build to build, Enter zooms to one, + and − zoom, 0
shows all, Esc hides the details.</p>`;
}

/** The functions of the page, as text. */
function scriptText(): string {
  const functions = [...Object.values(drawing), ...Object.values(view)]
    .concat([formatDuration, formatTook, formatSize, formatTime]);
  return `"use strict";
${functions.join("\n")}
${view.startPage.name}();
`;
}

/** What a policy names a script or style by. */
function hashOf(text: string): string {
  return `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
}

/** The page's head: it may run and fetch nothing but what it has. */
function head(title: string, script: string): string {
  const policy = [
    "default-src 'none'",
    "img-src data:",
    `script-src ${hashOf(script)}`,
    `style-src ${hashOf(STYLE)}`,
    "base-uri 'none'",
    "form-action 'none'",
  ].join("; ");
  return `<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="${policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>${title}</title>
<style>${STYLE}</style>`;
}

/** Makes the page. */
export function makePage(
  entries: readonly JournalEntry[],
  absences: readonly Absence[],
  figures: Figures,
): string {
  const script = scriptText();
  const { since, until, longest, unluckiest } = figures;
  const span = `${formatTime(since)} to ${formatTime(until)}`;
  const data = escapeJson(pageData(entries, absences, figures));
  return `<!DOCTYPE html>
<html lang="en"><head>${head(`Offload: ${span}`, script)}</head><body>
<header><h1>What the farm did</h1><p class="muted">${span}</p>
${numbers(figures, entries)}</header>
<main><section><h2>Where the time went</h2>${phaseBar(figures)}</section>
<section><h2>Timeline</h2>${timeline(figures)}</section>
<section><h2>Machines</h2>${machineTable(figures.machines)}</section>
<section><h2>What was expected</h2>${foresightTable(figures)}</section>
<section><h2>The longest builds</h2>
${buildTable(longest, entries, "There was no build.")}</section>
<section><h2>The unluckiest builds</h2>
${buildTable(unluckiest, entries, "No machine failed a build.")}</section>
<section><details><summary>All builds that the filter lets pass</summary>
<div class="wide"><table><thead><tr>${
    LIST.map((it) => `<th scope="col">${it}</th>`).join("")
  }</tr></thead><tbody id="list"></tbody></table></div>
<button type="button" id="more" hidden>more</button></details></section></main>
<noscript><p>The timeline needs JavaScript.</p></noscript>
<script type="application/json" id="data">${data}</script>
<script>${script}</script></body></html>
`;
}

/**
 * How the page of `offload report` looks.
 *
 * @module
 */

/** Colours by name; all kinds of colour-blind people can tell them apart. */
export type Palette = Readonly<Record<string, string>>;

/** On white. */
export const LIGHT: Palette = {
  back: "#ffffff",
  panel: "#f3f5f7",
  text: "#1d2328",
  muted: "#59636e",
  line: "#dfe3e8",
  absent: "#8a94a0",
  waiting: "#6d587b",
  connecting: "#a49506",
  sending: "#2f9bd6",
  building: "#034aa4",
  retrieving: "#408862",
  failed: "#dd5a3c",
  "timed-out": "#a064b4",
  lost: "#7a4b21",
  interrupted: "#383e47",
};

/** In the dark. */
export const DARK: Palette = {
  back: "#14181d",
  panel: "#1d232a",
  text: "#e8ebee",
  muted: "#9ba6b2",
  line: "#2a323a",
  absent: "#6c7783",
  waiting: "#85868f",
  connecting: "#e7b651",
  sending: "#63b9e0",
  building: "#4471cd",
  retrieving: "#85e4b3",
  failed: "#f47938",
  "timed-out": "#c485d6",
  lost: "#9a6a3c",
  interrupted: "#c4ccd4",
};

/** Gives colours names for the rest of the style sheet, and the script. */
function properties(palette: Palette): string {
  const lines = Object.entries(palette).map(([name, it]) => `--${name}:${it};`);
  return `:root{${lines.join("")}}`;
}

/** The parts of drawings that have a colour's name as their class. */
function fills(): string {
  return Object.keys(LIGHT).map((name) =>
    `.${name}{fill:var(--${name});stroke:var(--${name})}`
  ).join("\n");
}

/** The style sheet. */
export const STYLE: string = `
${properties(LIGHT)}
@media (prefers-color-scheme: dark) {${properties(DARK)}}
${fills()}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 90rem;
  font: 15px/1.5 system-ui, "Segoe UI", Cantarell, "DejaVu Sans", sans-serif;
  color: var(--text); background: var(--back);
}
h1 { font-size: 1.5rem; margin: 0; line-height: 1.2; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
header p { margin: 0.2rem 0 0.8rem; }
.muted { color: var(--muted); }
ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; }
.numbers { gap: 0.5rem; }
.numbers li {
  background: var(--panel); border-radius: 6px; padding: 0.4rem 0.8rem;
}
.numbers b { font-size: 1.25rem; margin-right: 0.2rem; }
.legend { gap: 0.3rem 1.2rem; margin: 0.6rem 0; font-size: 0.9rem; }
.legend b { margin-left: 0.3rem; }
.share { display: block; width: 100%; height: 1.5rem; border-radius: 4px; }
.share rect { stroke: none; }
.sample { width: 0.9rem; height: 0.9rem; margin-right: 0.4rem;
  vertical-align: -0.1rem; }
.sample rect { stroke: none; }
.sample text { font: bold 10px sans-serif; text-anchor: middle;
  fill: var(--back); }
.hatched path { fill: none; stroke-width: 2; }
form { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: center;
  margin-bottom: 0.6rem; }
label { color: var(--muted); max-width: 100%; }
input, select, button {
  font: inherit; color: var(--text); background: var(--panel);
  border: 1px solid var(--line); border-radius: 6px; padding: 0.25rem 0.6rem;
  max-width: 100%;
}
select { max-width: 14rem; }
button { cursor: pointer; }
:focus-visible { outline: 2px solid var(--sending); outline-offset: 1px; }
.buttons { margin-left: auto; display: flex; gap: 0.3rem; }
.buttons button { min-width: 2.4rem; }
#stage { position: relative; border: 1px solid var(--line);
  border-radius: 6px; }
#scroller { max-height: 75vh; overflow: hidden auto; border-radius: 6px; }
#timeline { position: sticky; top: 0; display: block; width: 100%;
  touch-action: pan-y; cursor: crosshair; }
#details {
  position: absolute; z-index: 1; width: max-content;
  max-width: min(32rem, 100%); padding: 0.6rem 0.8rem; font-size: 0.85rem;
  background: var(--panel); border: 1px solid var(--muted);
  border-radius: 6px; box-shadow: 0 4px 16px #0004;
}
#details h3 { display: inline; margin: 0; font-size: 0.95rem; }
#details p { display: inline; margin-left: 0.5rem; color: var(--muted); }
dl { display: grid; grid-template-columns: max-content 1fr;
  gap: 0.1rem 0.8rem; margin: 0.4rem 0 0; }
dt { color: var(--muted); }
dd { margin: 0; }
h3, dd, td, th, button, option { unicode-bidi: isolate;
  overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; width: 100%; }
th, td { text-align: left; padding: 0.3rem 0.8rem 0.3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--muted); font-weight: normal; white-space: nowrap; }
tbody th { min-width: 8rem; max-width: 24rem; }
td { white-space: nowrap; }
td:last-child { white-space: normal; min-width: 12rem; width: 40%; }
table button { text-align: left; background: none; border: none; padding: 0;
  text-decoration: underline; text-underline-offset: 2px; font-weight: normal; }
summary { cursor: pointer; padding: 0.5rem 0; }
@media (max-width: 40rem) {
  body { padding: 0.7rem; }
  #details { position: static; width: auto; max-width: none;
    box-shadow: none; border: none; border-top: 1px solid var(--line); }
  thead { display: none; }
  tr { display: block; padding: 0.4rem 0; border-bottom: 1px solid var(--line); }
  th, td, td:last-child { display: inline-block; border: none; padding: 0;
    margin-right: 0.9rem; min-width: 0; width: auto; max-width: 100%; }
  td { white-space: normal; }
  th { display: block; }
  td::before { content: attr(data-label) " "; color: var(--muted); }
}
`;

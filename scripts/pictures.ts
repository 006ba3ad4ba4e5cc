/**
 * Makes the pictures of README: machines of the lab build for a minute, one of
 * them loses its daemon meanwhile, and `offload status --watch` shows it; then a
 * browser shows what `offload report` made of it.
 *
 * @module
 */

import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import {
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import process from "node:process";
import { text } from "node:stream/consumers";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath, pathToFileURL } from "node:url";
import { hostOf, lab, makeWork } from "./_bench_lab.ts";
import { withBrowser } from "./_browser.ts";
import type { BrowserPage } from "./_browser.ts";

const USAGE = `usage: pictures [DIRECTORY]

Makes report.png and watch.png in DIRECTORY, 'scripts' of this checkout unless
told, of a run in the lab, which takes two minutes.`;

const HERE = fileURLToPath(new URL(".", import.meta.url));

/** Bytes that the pictures may have together. */
const LARGEST = 200 * 1024;

/** How wide the terminal is, in columns. */
const COLUMNS = 118;

/** What is built: how often, and how each is made. */
const WORK: Readonly<Record<string, readonly [number, ...string[]]>> = {
  "linux-libre-6.16": [
    2,
    "--seconds=22",
    "--inputs=1",
    "--input-size=90000000",
  ],
  "emacs-30.2": [3, "--seconds=11", "--output-size=90000000"],
  "python-numpy-2.3": [5, "--seconds=5", "--inputs=1", "--input-size=30000000"],
  "guile-json-4.7": [6, "--seconds=2.5", "--output-size=20000000"],
  "hello-2.12": [8, "--seconds=1.2", "--text-inputs=50"],
  "broken-0.1": [2, "--seconds=3", "--fail"],
};

/** Makes derivations of all that, in turns. */
function makeAll(most: number): string[] {
  const all = Object.entries(WORK).map(([name, [count, ...options]]) => {
    const common = [`--count=${Math.min(most, count)}`, `--name=${name}`];
    return makeWork([...common, ...options]);
  });
  const longest = Math.max(...all.map((each) => each.length));
  return Array.from({ length: longest }, (_, index) => index)
    .flatMap((index) => all.map((each) => each[index]))
    .filter((derivation) => derivation !== undefined);
}

/** Starts a command on head; its output is collected. */
function start(...command: readonly string[]) {
  const child = spawn(`${HERE}lab/lab`, ["in", "head", ...command], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const ended = once(child, "close");
  return { child, ended, output: text(child.stdout) };
}

/** Builds, whatever comes of it. */
async function build(derivations: readonly string[]): Promise<void> {
  const options = ["--max-jobs=0", "--keep-going", "--quiet"];
  await start("guix", "build", ...options, ...derivations).ended;
}

/** Brings up the hosts, and lets head forget what it saw. */
function setUp(): void {
  lab("browser");
  lab("up", "head", "w1", "w2", "w3");
  const machines = lab("machines", "head", "w1", "w2", "w3")
    .replace('(name "w1")', "$& (speed 2.)")
    .replaceAll(/\(parallel-builds \d+\)/g, "(parallel-builds 3)");
  const root = `/proc/${hostOf("head").pid}/root`;
  writeFileSync(`${root}/etc/guix/machines.scm`, machines);
  rmSync(`${root}/var/guix/offload/observations.sqlite`, { force: true });
  lab("daemon", "head", "GUIX=/offload/scripts/guix", "OFFLOAD_RUNTIME=node");
}

/** The last that a terminal showed of what is drawn over and over. */
async function watch(): Promise<string> {
  const command = `stty cols ${COLUMNS} rows 40; exec env TERM=xterm ` +
    "LANG=C.UTF-8 OFFLOAD_RUNTIME=node /offload/scripts/guix offload status " +
    "--watch";
  const terminal = ["env", "SHELL=/bin/sh", "script", "-qefc", command];
  const { child, output } = start(...terminal, "/dev/null");
  await delay(9000);
  child.stdin.write("\x03");
  const frames = (await output).split("\x1b[H");
  return frames.at(-1)!.split("\x1b[J")[0]!;
}

/** Has w2 lose its daemon for some seconds. */
async function loseMachine(): Promise<void> {
  lab("in", "w2", "sh", "-c", "kill -KILL $(pgrep -x guix-daemon)");
  await delay(6000);
  lab("daemon", "w2");
}

const CLASSES: Readonly<Record<string, string>> = {
  "1": "heading",
  "31": "bad",
  "32": "good",
  "33": "doubtful",
};

/** What a terminal is told beside text, and what is markup. */
// deno-lint-ignore no-control-regex
const SPECIAL = /\x1b\[(\d*)([A-Za-z])|[\r&<]/g;

/** A page that shows what a terminal showed. */
function terminalPage(frame: string): string {
  const shown = frame.trimEnd().replace(SPECIAL, (it, code, command) => {
    if (command === "m") return `</span><span class="${CLASSES[code] ?? ""}">`;
    return ({ "&": "&amp;", "<": "&lt;" })[it] ?? "";
  });
  return `<!DOCTYPE html><meta charset="utf-8"><style>
body { margin: 0; background: #14181d; }
pre { display: inline-block; margin: 0; padding: 14px 18px; color: #e8ebee;
  font: 13px/1.35 "DejaVu Sans Mono", monospace; }
.heading { font-weight: bold } .good { color: #6cc38f }
.bad { color: #f47938 } .doubtful { color: #e7b651 }
</style><pre><b>$ offload status --watch</b>
<span>${shown}</span></pre>`;
}

/** Takes a picture of a page as far as an element goes. */
async function takePicture(
  page: BrowserPage,
  width: number,
  element: string,
): Promise<Uint8Array> {
  const height = await page.evaluate(
    `Math.ceil(${element}.getBoundingClientRect().bottom + scrollY)`,
  );
  await page.show({ width, height });
  const frame = "new Promise((done) => requestAnimationFrame(done))";
  await page.evaluate(`${frame}.then(() => ${frame})`);
  const input = await page.picture();
  return execFileSync("pngquant", ["--speed=1", "-"], { input });
}

/** Makes the pictures of what was seen, in a directory. */
async function drawPictures(
  report: string,
  frame: string,
  directory: string,
): Promise<void> {
  const work = mkdtempSync(`${tmpdir()}/offload-pictures-`);
  const address = (name: string, page: string) => {
    writeFileSync(`${work}/${name}`, page);
    return pathToFileURL(`${work}/${name}`).href;
  };
  try {
    await withBrowser(async (page) => {
      await page.show({ width: 1100, height: 900 });
      await page.open(address("watch.html", terminalPage(frame)));
      const pre = 'document.querySelector("pre")';
      const width = await page.evaluate(
        `Math.ceil(${pre}.getBoundingClientRect().right)`,
      );
      const watched = await takePicture(page, width, pre);
      writeFileSync(`${directory}/watch.png`, watched);
      await page.show({ width: 1100, height: 900 });
      await page.open(address("report.html", report));
      // The longest build, whose details hide the least.
      await page.evaluate('document.querySelector("[data-build]").click()');
      const machines = 'document.querySelectorAll("section")[2]';
      const reported = await takePicture(page, 1100, machines);
      writeFileSync(`${directory}/report.png`, reported);
    });
  } finally {
    rmSync(work, { recursive: true });
  }
}

/** Has the machines work; returns the page, and what was watched. */
async function haveThemWork(): Promise<[report: string, frame: string]> {
  await build(makeAll(1)); // so that it is known how long each takes
  const work = makeAll(Infinity);
  const since = new Date().toISOString().replace(/\.\d+Z$/, "Z");
  const working = build(work);
  const losing = delay(12_000).then(loseMachine);
  await delay(7000);
  const frame = await watch();
  await Promise.all([working, losing]);
  const command = ["env", "OFFLOAD_RUNTIME=node", "/offload/scripts/guix"]
    .concat(
      "offload",
      "report",
      "--since",
      since,
      "--html",
      "/tmp/report.html",
    );
  lab("in", "head", ...command);
  const { pid } = hostOf("head");
  const report = readFileSync(`/proc/${pid}/root/tmp/report.html`, "utf8");
  return [report, frame];
}

async function main(args: readonly string[]): Promise<number> {
  if (args.length > 1 || args[0]?.startsWith("-")) {
    const asked = args[0] === "--help";
    console[asked ? "log" : "error"](USAGE);
    return asked ? 0 : 2;
  }
  const directory = args[0] ?? HERE;
  setUp();
  const [report, frame] = await haveThemWork();
  await drawPictures(report, frame, directory);
  const size = ["report.png", "watch.png"]
    .reduce((sum, name) => sum + statSync(`${directory}/${name}`).size, 0);
  console.log(`${Math.ceil(size / 1024)} KiB`);
  if (size > LARGEST) console.error("pictures: they are too large for README");
  return size > LARGEST ? 1 : 0;
}

main(process.argv.slice(2)).then((code) => process.exit(code));

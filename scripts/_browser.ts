/**
 * Drives a real browser, Debian's Chromium, without a window: over the pipe of
 * the DevTools protocol, so that nothing listens anywhere.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import type { Readable, Writable } from "node:stream";

// deno-lint-ignore no-explicit-any
type Json = any;

/** How a page is shown. */
export interface Look {
  /** In CSS pixels. */
  readonly width: number;
  /** In CSS pixels. */
  readonly height: number;
  /** Pixels of the screen for each of these: 1 unless told. */
  readonly scale?: number;
  /** What the user prefers: light unless told. */
  readonly scheme?: "light" | "dark";
}

/** A page in a browser. */
export interface BrowserPage {
  /** What its console said, and what went wrong in it. */
  readonly messages: readonly string[];
  /** The addresses of all that it asked for. */
  readonly requests: readonly string[];
  /** Calls the protocol. */
  send(method: string, params?: object): Promise<Json>;
  /** Goes to an address, and waits until all is there. */
  open(url: string): Promise<void>;
  /** The value of an expression; one that is thrown is an error. */
  evaluate(expression: string): Promise<Json>;
  /** Shows it otherwise. */
  show(look: Look): Promise<void>;
  /** Presses keys, by their names, one after another. */
  press(...keys: readonly string[]): Promise<void>;
  /** Moves the mouse to a place, and clicks there where it is told to. */
  point(x: number, y: number, clicks?: boolean): Promise<void>;
  /** A picture of what is shown, or of all, as PNG. */
  picture(isWhole?: boolean): Promise<Buffer>;
}

/** It is to do nothing but what it is told. */
const OPTIONS = [
  "--headless",
  "--no-sandbox", // root has none
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--disable-dev-shm-usage",
  "--hide-scrollbars",
  "--remote-debugging-pipe",
] as const;

/** Milliseconds after which a call was in vain. */
const PATIENCE = 60_000;

/** Calls over the pipe, and what is told over it. */
class Pipe {
  readonly #writable: Writable;
  readonly #calls = new Map<number, PromiseWithResolvers<Json>>();
  readonly #listener: (method: string, params: Json) => void;
  #rest = Buffer.alloc(0);

  /** Tells `listener` what happens. */
  constructor(
    readable: Readable,
    writable: Writable,
    listener: (method: string, params: Json) => void,
  ) {
    this.#writable = writable;
    this.#listener = listener;
    readable.on("data", (chunk: Buffer) => this.#take(chunk));
    readable.on("close", () => this.#fail(new Error("the browser is gone")));
    writable.on("error", (error) => this.#fail(error));
  }

  #take(chunk: Buffer): void {
    this.#rest = Buffer.concat([this.#rest, chunk]);
    for (let end; (end = this.#rest.indexOf(0)) >= 0;) {
      const text = this.#rest.subarray(0, end).toString();
      this.#rest = this.#rest.subarray(end + 1);
      const { id, error, result, method, params } = JSON.parse(text);
      if (id === undefined) this.#listener(method, params);
      else if (error) this.#calls.get(id)?.reject(new Error(error.message));
      else this.#calls.get(id)?.resolve(result);
    }
  }

  #fail(error: Error): void {
    for (const call of this.#calls.values()) call.reject(error);
  }

  /** Calls the protocol. */
  async call(method: string, params: object, sessionId?: string) {
    const id = this.#calls.size + 1;
    const call = Promise.withResolvers<Json>();
    this.#calls.set(id, call);
    const late = setTimeout(
      () => call.reject(new Error(`${method}: no answer`)),
      PATIENCE,
    );
    const text = JSON.stringify({ id, method, params, sessionId });
    this.#writable.write(`${text}\0`);
    return await call.promise.finally(() => clearTimeout(late));
  }
}

/** The numbers of keys that write nothing, and of Enter. */
const KEYS: Readonly<Record<string, number>> = {
  Enter: 13,
  Escape: 27,
  Home: 36,
  ArrowLeft: 37,
  ArrowUp: 38,
  ArrowRight: 39,
  ArrowDown: 40,
  Tab: 9,
};

/** What is said of an error in a page, or of a message to its console. */
function messageOf(method: string, params: Json): string | undefined {
  if (method === "Runtime.exceptionThrown") {
    const { text, exception } = params.exceptionDetails;
    return `${text} ${exception?.description ?? ""}`;
  }
  if (method === "Runtime.consoleAPICalled") {
    return params.args.map((it: Json) => it.value ?? it.description).join(" ");
  }
  if (method === "Log.entryAdded") return params.entry.text;
  return undefined;
}

type Send = BrowserPage["send"];

async function evaluate(send: Send, expression: string): Promise<Json> {
  const params = { expression, returnByValue: true, awaitPromise: true };
  const { result, exceptionDetails } = await send("Runtime.evaluate", params);
  if (exceptionDetails === undefined) return result.value;
  throw new Error(exceptionDetails.exception.description);
}

async function show(send: Send, look: Look): Promise<void> {
  const { width, height, scale = 1, scheme = "light" } = look;
  const size = { width, height, deviceScaleFactor: scale, mobile: false };
  await send("Emulation.setDeviceMetricsOverride", size);
  const features = [{ name: "prefers-color-scheme", value: scheme }];
  await send("Emulation.setEmulatedMedia", { features });
}

async function press(send: Send, keys: readonly string[]): Promise<void> {
  for (const key of keys) {
    const code = KEYS[key];
    const event = code === undefined
      ? { key, text: key }
      : { key, windowsVirtualKeyCode: code };
    await send("Input.dispatchKeyEvent", { type: "keyDown", ...event });
    await send("Input.dispatchKeyEvent", { type: "keyUp", ...event });
  }
}

async function point(
  send: Send,
  [x, y]: readonly [number, number],
  clicks: boolean,
): Promise<void> {
  const mouse = (type: string, button: string) =>
    send("Input.dispatchMouseEvent", { type, x, y, button, clickCount: 1 });
  await mouse("mouseMoved", "none");
  if (!clicks) return;
  await mouse("mousePressed", "left");
  await mouse("mouseReleased", "left");
}

async function takePicture(send: Send, isWhole: boolean): Promise<Buffer> {
  const params = { captureBeyondViewport: isWhole };
  const { data } = await send("Page.captureScreenshot", params);
  return Buffer.from(data, "base64");
}

/** Starts a browser; `stop` ends it, and leaves nothing of it. */
function startBrowser() {
  const profile = mkdtempSync(`${tmpdir()}/offload-browser-`);
  const options = [...OPTIONS, `--user-data-dir=${profile}`, "about:blank"];
  const child = spawn("chromium", options, {
    stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"],
  });
  const gone = new Promise<void>((resolve) => {
    child.on("close", () => resolve());
    child.on("error", () => resolve()); // seen on the pipe
  });
  const [, , , writable, readable] = child.stdio;
  return {
    readable: readable as Readable,
    writable: writable as Writable,
    async stop() {
      child.kill("SIGKILL");
      await gone;
      rmSync(profile, { recursive: true, force: true, maxRetries: 9 });
    },
  };
}

/** Attaches to the page of a browser, and has it tell all there is to know. */
async function attach(pipe: Pipe): Promise<Send> {
  const { targetInfos } = await pipe.call("Target.getTargets", {});
  const { targetId } = targetInfos.find((it: Json) => it.type === "page");
  const { sessionId } = await pipe.call("Target.attachToTarget", {
    targetId,
    flatten: true,
  });
  const send: Send = (method, params = {}) =>
    pipe.call(method, params, sessionId);
  for (const domain of ["Page", "Runtime", "Network", "Log"]) {
    await send(`${domain}.enable`);
  }
  return send;
}

/** Opens a page in a browser of its own, which is gone when `use` is done. */
export async function withBrowser<T>(
  use: (page: BrowserPage) => Promise<T>,
): Promise<T> {
  const { readable, writable, stop } = startBrowser();
  const messages: string[] = [];
  const requests: string[] = [];
  let tellLoaded = () => {};
  const pipe = new Pipe(readable, writable, (method, params) => {
    const message = messageOf(method, params);
    if (message !== undefined) messages.push(message);
    if (method === "Network.requestWillBeSent") {
      requests.push(params.request.url);
    }
    if (method === "Page.loadEventFired") tellLoaded();
  });
  try {
    const send = await attach(pipe);
    return await use({
      ...{ messages, requests, send },
      async open(url) {
        const loaded = new Promise<void>((resolve) => tellLoaded = resolve);
        await send("Page.navigate", { url });
        await loaded;
      },
      evaluate: (expression) => evaluate(send, expression),
      show: (look) => show(send, look),
      press: (...keys) => press(send, keys),
      point: (x, y, clicks = false) => point(send, [x, y], clicks),
      picture: (isWhole = false) => takePicture(send, isWhole),
    });
  } finally {
    await stop();
  }
}

/**
 * A wide-area network on loopback: hands on TCP connections, with a delay, at
 * a rate, or cut off.
 *
 * Usage: relay.ts LISTEN TARGET [--delay MS] [--rate BYTES] [--cut-up BYTES]
 * [--cut-down BYTES] [--backlog N]; LISTEN and TARGET are ADDRESS:PORT.
 * `--delay` is one way, `--rate` is per second and direction; a connection is
 * reset once so many bytes went from (up) or to (down) its client; `--backlog`
 * is how many connections wait for a relay that is stopped, before the system
 * drops what more there are. It prints `ready`, and after each line that it
 * reads what it counted since the last one, as JSON. A line may be a command:
 * `drop` (nothing arrives any more, and nobody is told), `cut` (connections
 * are reset), `refuse` (as well, and there are no new ones), and `pass`.
 *
 * @module
 */

import type { Buffer } from "node:buffer";
import { connect, createServer } from "node:net";
import type { Server, Socket } from "node:net";
import process from "node:process";
import { createInterface } from "node:readline";
import { cac } from "../../deps.ts";

/** What went through. */
interface Counts {
  connections: number;
  /** Bytes from the clients. */
  up: number;
  /** Bytes to the clients. */
  down: number;
}

/** What is done to a connection. */
interface Conditions {
  /** Milliseconds, one way. */
  readonly delay: number;
  /** Bytes a second, one way. */
  readonly rate: number;
  /** After how many bytes a connection is cut. */
  readonly cut: Readonly<Record<"up" | "down", number>>;
}

/** How much may be under way, in bytes, beside what the delay needs. */
const WINDOW = 2 ** 23;

/** Milliseconds after which is seen whether a network is there again. */
const PATIENCE = 20;

const sockets = new Set<Socket>();
let isDropping = false;

const zero = (): Counts => ({ connections: 0, up: 0, down: 0 });
let counts = zero();

/** Makes a wire: has work done as late as so many bytes arrive over it. */
function makeWire(
  { delay, rate }: Conditions,
): (work: () => void, size: number) => void {
  let free = 0; // when the wire is free again
  const waiting: { readonly at: number; readonly work: () => void }[] = [];
  // One timer at a time: of two, the second may be the first to end.
  const arrive = () => {
    if (isDropping) return arriveLater(performance.now() + PATIENCE);
    while (waiting.length > 0 && waiting[0]!.at <= performance.now()) {
      waiting.shift()!.work();
    }
    if (waiting.length > 0) arriveLater(waiting[0]!.at);
  };
  const arriveLater = (at: number) =>
    setTimeout(arrive, Math.max(0, at - performance.now()));
  return (work, size) => {
    free = Math.max(free, performance.now()) + size / rate * 1000;
    waiting.push({ at: free + delay, work });
    if (waiting.length === 1) arriveLater(free + delay);
  };
}

/** Hands on what comes from one side, as late as the conditions say. */
function handOn(
  from: Socket,
  to: Socket,
  direction: "up" | "down",
  conditions: Conditions,
): void {
  const cut = conditions.cut[direction];
  const later = makeWire(conditions);
  let underWay = 0;
  let total = 0;
  from.on("data", (chunk: Buffer) => {
    const data = chunk.subarray(0, Math.max(0, cut - total));
    total += chunk.length;
    counts[direction] += data.length;
    underWay += data.length;
    if (underWay > WINDOW) from.pause();
    later(() => {
      underWay -= data.length;
      if (underWay <= WINDOW) from.resume();
      if (!to.destroyed) to.write(data);
      if (total >= cut) {
        to.resetAndDestroy();
        from.resetAndDestroy();
      }
    }, data.length);
  });
  from.on("end", () => later(() => to.end(), 0));
  from.on("error", () => later(() => to.destroy(), 0));
  sockets.add(from);
  from.on("close", () => sockets.delete(from));
}

function reset(): void {
  for (const socket of sockets) socket.resetAndDestroy();
}

/** What the commands do. */
function makeCommands(
  server: Server,
  listen: () => void,
): Record<string, () => void> {
  return {
    pass() {
      isDropping = false;
      if (!server.listening) listen();
    },
    drop() {
      isDropping = true;
    },
    cut: reset,
    refuse() {
      server.close();
      reset();
    },
  };
}

function address(text: string): { host: string; port: number } {
  const [host = "", port] = text.split(":");
  return { host, port: Number(port) };
}

function main(args: readonly string[]): void {
  const cli = cac("relay");
  const { args: [listen, target], options } = cli.parse(["", "", ...args]);
  const conditions = {
    delay: Number(options.delay ?? 0),
    rate: Number(options.rate ?? Infinity),
    cut: {
      up: Number(options.cutUp ?? Infinity),
      down: Number(options.cutDown ?? Infinity),
    },
  };
  const server = createServer(
    { noDelay: true, allowHalfOpen: true },
    (client) => {
      counts.connections++;
      const machine = connect({ ...address(target!), allowHalfOpen: true });
      machine.setNoDelay(true);
      machine.on("error", () => client.resetAndDestroy());
      handOn(client, machine, "up", conditions);
      handOn(machine, client, "down", conditions);
    },
  );
  const backlog = Number(options.backlog ?? 511);
  const open = () => void server.listen({ ...address(listen!), backlog });
  const commands = makeCommands(server, open);
  server.once("listening", () => console.log("ready"));
  open();
  createInterface(process.stdin).on("line", (line) => {
    commands[line]?.();
    console.log(JSON.stringify(counts));
    counts = zero();
  }).on("close", () => process.exit());
}

main(process.argv.slice(2));

/**
 * A network of one connection, with faults: hands on what comes to LISTEN to
 * TARGET (ADDRESS:PORT each), BYTES a second at most in either direction.
 *
 * A line on standard input changes what it does: `pass`, `drop` (nothing
 * arrives any more, and nobody is told), `cut` (connections are reset),
 * `refuse` (as well, and there are no new ones). It prints how many bytes it
 * has handed on, there and back, when that changed, and `ready` at first.
 *
 * @module
 */

import { createConnection, createServer } from "node:net";
import type { Socket } from "node:net";
import process from "node:process";
import { createInterface } from "node:readline";
import { setTimeout as delay } from "node:timers/promises";

const [listen, target, rate] = process.argv.slice(2);
const handedOn = [0, 0];
const sockets = new Set<Socket>();
let gate = Promise.withResolvers<void>();
gate.resolve();

function address(text: string): { host: string; port: number } {
  const [host, port] = text.split(":");
  return { host: host!, port: Number(port) };
}

/** Hands on what comes in, as fast as the line is, while the gate is open. */
async function handOn(from: Socket, to: Socket, direction: 0 | 1) {
  try {
    for await (const chunk of from) {
      await gate.promise;
      to.write(chunk);
      handedOn[direction]! += chunk.length;
      await delay(chunk.length / Number(rate) * 1000);
    }
    await gate.promise;
    to.end();
  } catch {
    to.destroy();
  }
}

function reset(): void {
  for (const socket of sockets) socket.resetAndDestroy();
}

const server = createServer({ allowHalfOpen: true }, (client) => {
  const machine = createConnection({
    ...address(target!),
    allowHalfOpen: true,
  });
  for (const socket of [client, machine]) {
    sockets.add(socket);
    socket.setNoDelay(true).on("error", () => {});
    socket.on("close", () => sockets.delete(socket));
  }
  machine.on("error", () => client.resetAndDestroy());
  handOn(client, machine, 0);
  handOn(machine, client, 1);
});

function open(): void {
  // Few may wait to be accepted: where nobody does, packets are dropped soon.
  if (!server.listening) server.listen({ ...address(listen!), backlog: 1 });
}

const commands: Record<string, () => void> = {
  pass() {
    open();
    gate.resolve();
  },
  drop() {
    gate = Promise.withResolvers();
  },
  cut: reset,
  refuse() {
    server.close();
    reset();
  },
};

server.on("listening", () => console.log("ready"));
open();
let told = "";
setInterval(() => {
  const text = handedOn.join(" ");
  if (text !== told) console.log(told = text);
}, 50);
createInterface({ input: process.stdin })
  .on("line", (line) => commands[line]?.())
  .on("close", () => process.exit());

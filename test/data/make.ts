/**
 * Makes the golden data anew, by real Guix in the lab; see README.md here.
 *
 * @module
 */

import { execFileSync, spawn } from "node:child_process";
import { writeFileSync } from "node:fs";
import { createConnection, createServer } from "node:net";
import type { Socket } from "node:net";
import { text } from "node:stream/consumers";
import { fileURLToPath } from "node:url";

/** What a client sent, and what came back: hexadecimal, turn by turn. */
type Turns = [sent: string, received: string][];

const here = fileURLToPath(new URL(".", import.meta.url));
const labProgram = `${here}/../../scripts/lab/lab`;
const REPL = ["guix", "repl", "--"];
const MAKE = "/offload/test/data/make.scm";
const WORK = "/offload/scripts/lab/work.scm";
const TREE = ["--tree", "--bytes", "--text-inputs=1", "--references=1"];

function lab(...args: string[]): string {
  return execFileSync(labProgram, args, { encoding: "utf8" }).replace(
    /\n$/,
    "",
  );
}

/** Makes a derivation with work.scm. */
function derivation(host: string, ...options: string[]): string {
  return lab("in", host, ...REPL, WORK, "--seed=golden", ...options);
}

function save(name: string, value: unknown): void {
  writeFileSync(here + name, `${JSON.stringify(value, null, 2)}\n`);
}

/** Passes everything on between a client and the daemon, and keeps it. */
function relay(client: Socket, daemonSocket: string): Turns {
  const turns: Turns = [];
  const daemon = createConnection(daemonSocket);
  client.on("data", (data) => {
    if (turns.at(-1)?.[1] !== "") turns.push(["", ""]);
    turns.at(-1)![0] += data.toString("hex");
    daemon.write(data);
  });
  daemon.on("data", (data) => {
    turns.at(-1)![1] += data.toString("hex");
    client.write(data);
  });
  client.on("close", () => daemon.destroy());
  daemon.on("close", () => client.destroy());
  return turns;
}

async function talk(host: string, ...args: string[]) {
  const pid = lab("list").split("\n")
    .map((line) => line.split(" ")).find(([name]) => name === host)![2];
  const root = `/proc/${pid}/root`;
  const conversations: Turns[] = [];
  const server = createServer((client) => {
    const socket = `${root}/var/guix/daemon-socket/socket`;
    conversations.push(relay(client, socket));
  }).listen(`${root}/tmp/relay`);
  const command = ["in", host, ...REPL, MAKE, "talk", "/tmp/relay", ...args];
  const child = spawn(labProgram, command, {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const names = (await text(child.stdout)).trim().split("\n");
  if (!names.includes("import-paths")) throw new Error("it ended early");
  server.close();
  return Object.fromEntries(
    names.map((name, index) => [name, conversations[index]!]),
  );
}

async function makeConversations(host: string, file: string): Promise<void> {
  lab("daemon", host, "--", "--no-offload");
  const key = lab("in", host, "cat", "/etc/guix/signing-key.pub");
  // So that it imports what it signs.
  const authorize = "guix archive --authorize </etc/guix/signing-key.pub";
  lab("in", host, "sh", "-c", authorize);
  const [, output] = /\("out","([^"]*)"/.exec(
    lab("in", host, "cat", derivation(host, "--name=golden", ...TREE)),
  )!;
  const drv = derivation(host, "--name=golden", ...TREE);
  const failing = derivation(host, "--name=broken", "--fail");
  const conversations = await talk(host, drv, output!, failing);
  const acl = lab("in", host, "cat", "/etc/guix/acl");
  save(file, { key, acl, drv, output, failing, conversations });
}

/** Has guix-daemon ask a hook that declines all, and keeps what it says. */
function makeRequests(host: string, file: string): void {
  const hook = '#!/bin/sh\n[ "$1" = offload ] || exec guix "$@"\n' +
    'echo "$*" >>/tmp/requests\nwhile IFS= read -r line; do\n' +
    'echo "$line" >>/tmp/requests\necho "# decline"\ndone\n';
  const script = `printf %s '${hook}' >/tmp/hook; chmod +x /tmp/hook`;
  lab("in", host, "sh", "-c", script);
  lab("daemon", host, "GUIX=/tmp/hook", "--", "--max-jobs=1");
  const plain = derivation(host, "--name=plain");
  const picky = derivation(host, "--name=picky", "--features=kvm,big-parallel");
  for (const drv of [plain, picky]) {
    lab("in", host, "sh", "-c", `guix build ${drv} >/dev/null 2>&1 || :`);
  }
  const [args, ...requests] = lab("in", host, "cat", "/tmp/requests")
    .split("\n").filter((line, index, all) => all.indexOf(line) === index);
  save(file, { args, requests });
  lab("daemon", host);
}

const signatures = lab("in", "head", ...REPL, MAKE, "sign", "offload");
save("signatures.json", JSON.parse(signatures));
await makeConversations("head", "daemon-1.5.json");
await makeConversations("old", "daemon-1.2.json");
makeRequests("head", "requests-1.5.json");
makeRequests("old", "requests-1.2.json");

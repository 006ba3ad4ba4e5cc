/**
 * Drives the system's `ssh`: no more than the machine's host key is believed,
 * and what ~/.ssh/config says of the way there counts.
 *
 * @module
 */

import { spawn } from "node:child_process";
import type {
  ChildProcess,
  ChildProcessWithoutNullStreams,
  StdioOptions,
} from "node:child_process";
import { randomUUID } from "node:crypto";
import { closeSync, existsSync, openSync, readFileSync, rmSync } from "node:fs";
import { Duplex, Writable } from "node:stream";
import type { Machine, Settings } from "../mod.ts";

/** How much of a command's complaints is kept, in bytes. */
const LONGEST_COMPLAINT = 4096;

/** What the connection calls the machine, in its own list of host keys. */
export const ALIAS = "machine";

/** Signature algorithms: of an RSA key there are better ones than its type. */
function keyAlgorithms(hostKey: string): string {
  const [type = ""] = hostKey.trim().split(/\s+/);
  return type === "ssh-rsa" ? "rsa-sha2-512,rsa-sha2-256" : type;
}

/** The host of a machine's name, of which libssh overlooks the rest. */
export function hostOf(name: string): string {
  return name.replace(/^.*@|[[\]]/g, "");
}

/** What every call of ssh is told; the first word on a matter counts there. */
export function sshArguments(
  { name, port, user, hostKey, privateKey }: Machine,
  path: string,
  { connectTimeout, keepaliveTimeout }: Settings,
): string[] {
  const options = {
    BatchMode: "yes",
    CheckHostIP: "no",
    ClearAllForwardings: "yes",
    Compression: "no",
    ConnectTimeout: Math.ceil(connectTimeout),
    ControlMaster: "no",
    ControlPath: `"${path}"`,
    ForwardAgent: "no",
    GlobalKnownHostsFile: "/dev/null",
    HostKeyAlias: ALIAS,
    HostKeyAlgorithms: keyAlgorithms(hostKey),
    KnownHostsCommand: "none",
    LogLevel: "ERROR",
    RemoteCommand: "none",
    RequestTTY: "no",
    ServerAliveCountMax: 3,
    ServerAliveInterval: Math.ceil(keepaliveTimeout / 4),
    StreamLocalBindUnlink: "yes",
    StrictHostKeyChecking: "yes",
    UpdateHostKeys: "no",
    UserKnownHostsFile: `"${path}.known_hosts"`,
    VerifyHostKeyDNS: "no",
  };
  const words = Object.entries(options)
    .flatMap(([option, value]) => ["-o", `${option}=${value}`]);
  // Without the file, those that the agent and the configuration have.
  if (existsSync(privateKey)) words.push("-i", privateKey);
  return [...words, "-p", String(port), "-l", user, "--", hostOf(name)];
}

/** Settles at the end of a process: its exit code. */
function exitOf(child: ChildProcess): Promise<number> {
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code) => resolve(code ?? -1));
  });
}

/** Runs ssh to its end; throws its complaint. */
export async function ssh(
  args: readonly string[],
  path: string,
  signal: AbortSignal,
): Promise<void> {
  // A file: a connection that stays keeps what it was given open.
  const file = `${path}.${randomUUID()}`;
  const errors = openSync(file, "w", 0o600);
  try {
    const stdio: StdioOptions = ["ignore", "ignore", errors];
    const code = await exitOf(spawn("ssh", args, { stdio, signal }));
    if (code === 0) return;
    const complaint = readFileSync(file, "utf8").trim().replace(/\r?\n/g, "; ")
      .replace(/^ssh: connect to host .* port \d+: /, "")
      .replace(/^[A-Z](?=[a-z])/, (letter) => letter.toLowerCase());
    throw new Error(complaint || `ssh: exit code ${code}`);
  } finally {
    closeSync(errors);
    rmSync(file, { force: true });
  }
}

/** What a connection that is there is told: no more than its place counts. */
export function control(
  path: string,
  command: string,
  ...args: string[]
): string[] {
  const place = `ControlPath="${path}"`;
  return ["-F", "none", "-o", place, "-O", command, ...args, "--", ALIAS];
}

/**
 * The input of a process. Its own is closed at the process's end, which would
 * end a duplex stream before what the process has written was read.
 */
function inputOf({ stdin }: ChildProcessWithoutNullStreams): Writable {
  return new Writable({
    write: (chunk, _encoding, done) => void stdin.write(chunk, done),
    final: (done) => void stdin.end(done),
    destroy: (error, done) => {
      stdin.destroy();
      done(error);
    },
  });
}

/** Runs a command on the machine. */
export function execute(args: readonly string[], command: string) {
  const child = spawn("ssh", [...args, command], { stdio: "pipe" });
  let errors = "";
  child.stderr.on("data", (chunk) => {
    if (errors.length < LONGEST_COMPLAINT) errors += chunk;
  });
  child.stdin.on("error", () => {});
  const channel = Duplex.from({
    readable: child.stdout,
    writable: inputOf(child),
  });
  channel.on("error", () => {}); // who reads or writes learns of it
  const ended = exitOf(child).then((code) => ({ code, errors }));
  return { child, process: { channel, ended } };
}

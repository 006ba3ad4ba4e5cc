/**
 * Connects to machines by the system's `ssh`, for sites that need what is in
 * their ~/.ssh/config (ProxyJump, for example), or an agent. All of a master's
 * builds share one connection to a machine, which stays for a minute.
 *
 * The host key stays pinned: what the machine file says is all that counts.
 *
 * @module
 */

import { spawn } from "node:child_process";
import type { ChildProcess, StdioOptions } from "node:child_process";
import { createHash, randomUUID } from "node:crypto";
import {
  closeSync,
  existsSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { createConnection } from "node:net";
import process from "node:process";
import { Duplex } from "node:stream";
import type {
  Connection,
  Machine,
  Plugin,
  PluginContext,
  Settings,
} from "../mod.ts";
import { privateDirectory } from "./programs.ts";

/** How much of a command's complaints is kept, in bytes. */
const LONGEST_COMPLAINT = 4096;

/** What the connection calls the machine, in its own list of host keys. */
const ALIAS = "machine";

function digest(text: string): string {
  return createHash("sha256").update(text).digest("hex");
}

/** Signature algorithms: of an RSA key there are better ones than its type. */
function keyAlgorithms(hostKey: string): string {
  const [type = ""] = hostKey.trim().split(/\s+/);
  return type === "ssh-rsa" ? "rsa-sha2-512,rsa-sha2-256" : type;
}

/** What every call of ssh is told; the first word on a matter counts there. */
function sshArguments(
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
  return [...words, "-p", String(port), "-l", user, "--", name];
}

/** Settles at the end of a process: its exit code. */
function exitOf(child: ChildProcess): Promise<number> {
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code) => resolve(code ?? -1));
  });
}

/** Runs ssh to its end; throws its complaint. */
async function ssh(
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
function control(path: string, command: string, ...args: string[]): string[] {
  const place = `ControlPath="${path}"`;
  return ["-F", "none", "-o", place, "-O", command, ...args, "--", ALIAS];
}

/** Says why ssh failed, and what may help. */
function connectionError({ name }: Machine, cause: unknown): Error {
  const { message } = cause as Error;
  const wrongKey = /host key|REMOTE HOST IDENTIFICATION/i.test(message);
  const hint = wrongKey
    ? "if it was changed on purpose, correct the machine's host-key"
    : `try 'ssh ${name}' as the account that guix-daemon runs as`;
  const text = `failed to connect to '${name}': ${message}`;
  return Object.assign(new Error(text, { cause }), { hint });
}

/** Makes sure that there is a connection, and a way to the daemon's socket. */
async function openMaster(
  machine: Machine,
  args: readonly string[],
  path: string,
  signal: AbortSignal,
): Promise<void> {
  const key = machine.hostKey.trim().split(/\s+/).slice(0, 2).join(" ");
  const hostKeys = `${path}.known_hosts`;
  // At once: another process's ssh may be about to read it.
  writeFileSync(`${hostKeys}.${process.pid}`, `${ALIAS} ${key}\n`, {
    mode: 0o600,
  });
  renameSync(`${hostKeys}.${process.pid}`, hostKeys);
  const check = () => ssh(control(path, "check"), path, signal);
  // Of two processes that do this at once, one makes the connection that stays.
  const stay = ["-o", "ControlMaster=auto", "-o", "ControlPersist=60"];
  await check().catch(() =>
    ssh([...stay, ...args, "exit"], path, signal)
      // The account may be unable to run commands.
      .catch((error) => check().catch(() => Promise.reject(error)))
  );
}

/** Runs a command on the machine. */
function execute(args: readonly string[], command: string) {
  const child = spawn("ssh", [...args, command], { stdio: "pipe" });
  let errors = "";
  child.stderr.on("data", (chunk) => {
    if (errors.length < LONGEST_COMPLAINT) errors += chunk;
  });
  child.stdin.on("error", () => {});
  const channel = Duplex.from({
    readable: child.stdout,
    writable: child.stdin,
  });
  channel.on("error", () => {}); // who reads or writes learns of it
  const ended = exitOf(child).then((code) => ({ code, errors }));
  return { child, process: { channel, ended } };
}

/** Connects, or shares the connection that is there. */
async function connect(
  machine: Machine,
  context: PluginContext,
  reached?: (what: "connect" | "host key") => void,
): Promise<Connection> {
  const { signal, settings } = context;
  const name = digest(JSON.stringify(machine)).slice(0, 16);
  const path = `${privateDirectory("ssh", context)}/${name}`;
  const args = sshArguments(machine, path, settings);
  await openMaster(machine, args, path, signal).catch((cause) => {
    throw connectionError(machine, cause);
  });
  reached?.("connect");
  reached?.("host key");
  const children = new Set<ChildProcess>();
  const streams = new Set<Duplex>();
  const close = (error?: unknown) => {
    // Other builds may go on over it, but no further one should share it.
    const stop = control(path, "stop");
    if (error instanceof Error) spawn("ssh", stop, { stdio: "ignore" }).unref();
    for (const child of children) child.kill();
    for (const stream of streams) stream.destroy();
  };
  return {
    // The process that keeps the connection takes its socket away at its end.
    failure: () => existsSync(path) ? undefined : new Error("it was closed"),
    async openSocket(file) {
      const local = `${path}.${digest(file).slice(0, 8)}`;
      const forward = control(path, "forward", "-L", `${local}:${file}`);
      await ssh(forward, path, signal);
      const socket = createConnection({ path: local });
      streams.add(socket);
      return socket;
    },
    exec(command) {
      const { child, process } = execute(args, command);
      children.add(child);
      streams.add(process.channel);
      return Promise.resolve(process);
    },
    close,
  };
}

const plugin = { name: "openssh", connect } satisfies Plugin;

export default plugin as Plugin;

/**
 * Connects to machines by the system's `ssh`, for sites that need what is in
 * their ~/.ssh/config (ProxyJump, for example), or an agent. The host key stays
 * pinned: what the machine file says is all that counts.
 *
 * All of a master's builds share one connection to a machine, which a process
 * of ssh (a ControlMaster) keeps, and for a minute after the last one. So they
 * share its fate, too: where it breaks, all of them go elsewhere. Whether the
 * server lets one in, and which host key it has, counts when it is made.
 *
 * @module
 */

import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { existsSync } from "node:fs";
import { createConnection } from "node:net";
import type { Duplex } from "node:stream";
import type {
  Connection,
  Machine,
  Plugin,
  PluginContext,
  PluginError,
} from "../mod.ts";
import { digest, privateDirectory, writePrivately } from "./_programs.ts";
import { ALIAS, control, execute, ssh, sshArguments } from "./_ssh.ts";

/** Without ssh no machine is reached, and none is to blame. */
function lackingError(): PluginError {
  const text = "there is no program 'ssh' here, to connect by as the setting " +
    "'connect' has it";
  const hint = "install OpenSSH's client (the package 'openssh' of Guix, " +
    "'openssh-client' of Debian), or set 'connect' to \"guix\"";
  return Object.assign(new Error(text), { hint, isLocal: true });
}

/** Says why ssh failed, and what may help. */
function connectionError({ name }: Machine, cause: unknown): Error {
  const { message, code: errno, syscall } = cause as NodeJS.ErrnoException;
  if (errno === "ENOENT" && syscall?.startsWith("spawn")) return lackingError();
  const wrongKey = /host key|REMOTE HOST IDENTIFICATION/i.test(message);
  const [shown] = /(?<=sent by the remote host is\W+)SHA256:[\w+/]+/
    .exec(message) ?? [];
  const denied = /Permission denied \(/.test(message);
  const code = wrongKey ? "host-key" : denied ? "authentication" : "connect";
  const hint = wrongKey
    ? "if it was changed on purpose, correct the machine's host-key"
    : `try 'ssh ${name}' as the account that guix-daemon runs as`;
  const why = shown ? `it has another host key, ${shown}` : message;
  const text = `failed to connect to '${name}': ${why}`;
  return Object.assign(new Error(text, { cause }), { hint, code });
}

/** Makes sure that there is a connection, and a way to the daemon's socket. */
async function openMaster(
  machine: Machine,
  args: readonly string[],
  path: string,
  signal: AbortSignal,
): Promise<void> {
  const key = machine.hostKey.trim().split(/\s+/).slice(0, 2).join(" ");
  // At once: another process's ssh may be about to read it.
  writePrivately(`${path}.known_hosts`, `${ALIAS} ${key}\n`);
  const check = () => ssh(control(path, "check"), path, signal);
  // Of two processes that do this at once, one makes the connection that stays.
  const stay = ["-o", "ControlMaster=auto", "-o", "ControlPersist=60"];
  await check().catch(() =>
    ssh([...stay, ...args, "exit"], path, signal)
      // The account may be unable to run commands.
      .catch((error) => check().catch(() => Promise.reject(error)))
  );
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
  return connectionBy(args, path, signal);
}

/** What runs over a master connection. */
function connectionBy(
  args: readonly string[],
  path: string,
  signal: AbortSignal,
): Connection {
  const children = new Set<ChildProcess>();
  const streams = new Set<Duplex>();
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
    close(error) {
      // Other builds may go on over it, but no further one should share it.
      const stop = control(path, "stop");
      if (error !== undefined) spawn("ssh", stop, { stdio: "ignore" }).unref();
      for (const child of children) child.kill();
      for (const stream of streams) stream.destroy();
    },
  };
}

const plugin = { name: "openssh", connect } satisfies Plugin;

export default plugin as Plugin;

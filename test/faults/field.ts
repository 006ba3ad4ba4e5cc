/**
 * The field on which builds meet faults: hosts, and what can be done to them.
 *
 * Of two machines, 'w1' is the one to prefer; a relay stands before it, which
 * can be told to lose what passes, and lets little through at a time, so that
 * there is a middle of a transfer. 'w2' is what is left.
 *
 * @module
 */

import { rmSync, writeFileSync } from "node:fs";
import {
  inHost,
  lab,
  makeWork,
  root,
  run,
  up,
  useMachines,
  useOffload,
  useReference,
} from "../lab/lab.ts";
import type { Runtime } from "../lab/lab.ts";
import { relayed, startRelay } from "../lab/relay.ts";
import type { Relay } from "../lab/relay.ts";

/** What runs the hook: Offload under a runtime, or `guix offload`. */
export type HookKind = Runtime | "reference";

/**
 * The built-in plugins that connect or move archives, and by which variables
 * the hook is told to use them. What must hold of a fault holds with each.
 */
export const CHOICES = {
  "guix": [],
  "openssh": ["OFFLOAD_CONNECT=openssh"],
  "archive-command": ["OFFLOAD_TRANSPORT=archive-command"],
} as const satisfies Record<string, readonly string[]>;

export type Choice = keyof typeof CHOICES;

/** Bytes a second: a transfer of some seconds needs no large items. */
const SLOW = 3_000_000;

/** The hosts, and what is between them. */
export interface Field {
  /** What offloads on head. */
  readonly hook: HookKind;
  /** By which of the plugins. */
  readonly choice: Choice;
  /** Before w1. */
  readonly relay: Relay;
}

/** Timers of the suite, in seconds, so that no row takes minutes. */
export const SETTINGS: readonly string[] = [
  "OFFLOAD_CONNECT_TIMEOUT=5",
  "OFFLOAD_KEEPALIVE_TIMEOUT=4",
  "OFFLOAD_STEP_TIMEOUT=15",
  "OFFLOAD_BACKOFF=2",
  "OFFLOAD_OUTAGE_TIMEOUT=20",
  "OFFLOAD_MINIMUM_FREE_SPACE=0",
];

/** Restarts the daemon of a master so that it offloads with a hook. */
export function useHook(
  hook: HookKind,
  master = "head",
  choice: Choice = "guix",
  ...variables: readonly string[]
): void {
  if (hook === "reference") return useReference(master);
  useOffload(master, hook, ...SETTINGS, ...CHOICES[choice], ...variables);
}

/** Brings the hosts up and a relay before w1. */
export async function makeField(
  hook: HookKind,
  choice: Choice = "guix",
): Promise<Field> {
  up("head", "w1", "w2");
  // Few may wait for one that is stopped.
  const relay = await startRelay("w1", `--rate=${SLOW}`, "--backlog=1");
  useHook(hook, "head", choice);
  makeWork("head"); // else a new host has no database of its store
  return { hook, choice, relay };
}

/**
 * Edits a machine file so that w1 is preferred, and reached by the relay. What
 * compresses an archive there may have all of it while little has arrived.
 */
function preferRelayed(text: string): string {
  const fields = '(speed 9.) (compression "none") (port';
  return relayed(text, "w1").replace("(port", fields);
}

/** Has head use both machines. */
export function useBoth(): void {
  useMachines("head", ["w1", "w2"], preferRelayed);
}

/** Regular expressions of the names of processes, for pgrep. */
const PROGRAM = {
  daemon: "-x guix-daemon",
  sshd: "-x 'sshd|sshd-session|sshd-auth'",
  sessions: "-x 'sshd-session|sshd-auth'",
  builder: "-u guixbuilder01,guixbuilder02,guixbuilder03,guixbuilder04",
  archive: "-f '[g]uix archive'",
  // One that stays is none: it serves others.
  hook: "-f '([o]ffload/mod.ts|[g]uix offload) [a-z0-9_]+-linux '",
  // The first keep a connection, the others are a hook's.
  kept: "-f '^ssh: .*[[]mux]'",
  ssh: "-f '^ssh -'",
} as const;

/** The processes of a program in a host. */
export function processes(
  host: string,
  program: keyof typeof PROGRAM,
): string[] {
  const { stdout } = run(host, "sh", "-c", `pgrep ${PROGRAM[program]}`);
  return stdout.trim().split("\n").filter((pid) => pid !== "");
}

/** Sends a signal to the processes of a program in a host. */
export function signal(
  host: string,
  name: "KILL" | "TERM" | "STOP" | "CONT",
  program: keyof typeof PROGRAM,
): void {
  const pids = processes(host, program);
  run(host, "kill", `-${name}`, ...pids);
}

/** Ends what the plugin 'openssh' keeps: no fault meets another's connection. */
export function endKeptConnections(): void {
  if (processes("head", "kept").length > 0) signal("head", "TERM", "kept");
}

/** Starts the SSH server of a host whose processes were killed. */
export function restartSshd(host: string): void {
  rmSync(`${root(host)}/run/sshd.pid`, { force: true });
  lab("sshd", host);
}

/** Replaces the SSH host key of a machine by another, or by the former. */
export function rotateHostKey(host: string, back = false): void {
  const key = "/etc/ssh/ssh_host_ed25519_key";
  const script = back
    ? `mv /root/key ${key}; mv /root/key.pub ${key}.pub`
    : `mv ${key} /root/key; mv ${key}.pub /root/key.pub;
       ssh-keygen -q -N '' -t ed25519 -f ${key}`;
  inHost(host, "sh", "-c", script);
  lab("sshd", host);
}

const ACL = "/etc/guix/acl";

export function emptyAcl(host: string): void {
  writeFileSync(root(host) + ACL, "(acl)\n");
}

/** Lets all hosts trust each other again. */
export function restoreAcls(): void {
  up("head", "w1", "w2");
}

/** Mounts a new file system of a size, in MiB, on a directory of a host. */
export function mountSmall(host: string, directory: string, size: number) {
  const options = `size=${size}m,mode=1777`;
  inHost(host, "mount", "-t", "tmpfs", "-o", options, "tmpfs", directory);
}

/** Takes it away again. */
export function unmount(host: string, directory: string): void {
  inHost(host, "umount", "-l", directory);
}

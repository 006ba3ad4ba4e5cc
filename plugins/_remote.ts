/**
 * Runs commands on build machines, over the connection that there is: what the
 * transports and other plugins have run there, the questions that a machine
 * answers of itself, and the relay to a guix-daemon whose socket the SSH server
 * does not forward to. mod.ts loads it when the first of them is needed.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { randomUUID } from "node:crypto";
import type { Duplex } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { limitUnread } from "../deps.ts";
import type { Client } from "../deps.ts";
import {
  DAEMON_SOCKET,
  greetOver,
  Late,
  noteUse,
  OffloadError,
  reason,
  remoteDaemonError,
  within,
} from "../mod.ts";
import type {
  Context,
  Facts,
  FreeSpace,
  Link,
  RemoteCommands,
  RemoteProcess,
  Session,
  StartedProcess,
  StoreConnection,
} from "../mod.ts";

/** Quotes a word for a POSIX shell. */
export function quoteWord(word: string): string {
  return `'${word.replaceAll("'", "'\\''")}'`;
}

/** Where programs are that a shell which is no login shell does not find. */
const REMOTE_PATH = "PATH=$PATH:/run/current-system/profile/bin" +
  ":/var/guix/profiles/per-user/root/current-guix/bin" +
  ":$HOME/.config/guix/current/bin:/usr/local/bin:/usr/bin:/bin";

/**
 * Writes a command for /bin/sh in such a way that any account's own shell, which
 * may be none of POSIX's, hands it on as it is: without what csh and fish take
 * for their own even between single quotes, such as the end of a line.
 */
export function shellLine(command: string): string {
  const octal = (byte: number) => `\\0${byte.toString(8).padStart(3, "0")}`;
  const plain = command.replace(
    /[!'\\]|[^ -~]/gu,
    (it) => Array.from(Buffer.from(it), octal).join(""),
  );
  return `exec /bin/sh -c 'eval "$(printf %b "$1")"' /bin/sh '${plain}'`;
}

/** The output of a command is not to be found in what is printed. */
export class Noise extends OffloadError {}

/** How much may be printed before the output of a command, in bytes. */
const LONGEST_NOISE = 65536;

/**
 * Skips what the start-up files of an account's shell print before `marker`.
 *
 * @throws {Error} where that does not come in time, with what came instead.
 */
function skipNoise(
  channel: Duplex,
  marker: string,
  seconds: number,
): Promise<void> {
  let noise = Buffer.alloc(0);
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const stop = (error?: Error) => {
    clearTimeout(timer);
    channel.off("readable", read).off("end", end).off("close", end);
    error === undefined ? resolve() : reject(error);
  };
  const end = () => {
    const [said] = noise.toString().trim().split("\n");
    stop(new Error(said && `'${said.slice(0, 80)}' was printed instead`));
  };
  const read = () => {
    for (let chunk; (chunk = channel.read()) !== null;) {
      noise = Buffer.concat([noise, chunk]);
    }
    const at = noise.indexOf(marker);
    if (at < 0) {
      return noise.length > LONGEST_NOISE ? stop(tooMuch()) : undefined;
    }
    stop();
    const rest = noise.subarray(at + marker.length);
    if (rest.length > 0) channel.unshift(rest);
  };
  const late = () => stop(noise.length > 0 ? tooMuch() : new Late("no answer"));
  const timer = setTimeout(late, seconds * 1000);
  channel.on("readable", read).on("end", end).on("close", end);
  return promise;
}

function tooMuch(): Noise {
  return new Noise("the account's shell start-up files print too much", {
    hint: "have them print nothing unless the shell is interactive, as by " +
      "'case $- in *i*) … esac'",
  });
}

/** Has a command run; what is refused beside a short one, again after that. */
async function startThere(
  link: Link,
  line: string,
  isShort: boolean,
): Promise<RemoteProcess> {
  const starting = link.connection.exec(line);
  if (isShort) {
    link.short = starting.then(({ ended }) => ended).catch(() => {});
    return starting;
  }
  return await starting.catch(async (error) => {
    if (link.short === undefined) throw error;
    await link.short; // a server may let one run at a time
    return link.connection.exec(line);
  });
}

/** Says why a command does not run there as it should. */
async function commandError(
  { machine: { name } }: Link,
  command: string,
  cause: unknown,
  process?: RemoteProcess,
): Promise<OffloadError> {
  const ended = await Promise.race([process?.ended, delay(1000)]);
  const [complaint] = ended?.errors.trim().split("\n").slice(-1) ?? [];
  const why = complaint || reason(cause) || `exit code ${ended?.code}`;
  const { hint } = cause as Partial<OffloadError>;
  const what = /^.{1,40}$/.test(command) ? `'${command}'` : "a command";
  const message = `failed to run ${what} on '${name}': ${why}`;
  const isNoise = cause instanceof Noise;
  const options = { cause, hint, code: "command" } as const;
  return new (isNoise ? Noise : OffloadError)(message, options);
}

/** Runs a command, which finds programs, on a machine. */
async function executeThere(
  link: Link,
  command: string,
  isShort = false,
): Promise<StartedProcess> {
  const { connectTimeout, hasSocket, socket } = link;
  // The line may be printed as well: what is looked for is not in there.
  const parts = [randomUUID(), randomUUID()];
  const lines = [`printf '%s:%s\\n' ${parts.join(" ")}`, REMOTE_PATH, command];
  const set = `export GUIX_DAEMON_SOCKET=${quoteWord(socket)}`;
  const line = shellLine((hasSocket ? [set, ...lines] : lines).join("\n"));
  const starting = startThere(link, line, isShort);
  let process: RemoteProcess | undefined;
  try {
    process = await within(connectTimeout, starting, "no answer");
    const started = performance.now();
    // Who reads learns of it; unheard, it would end this process.
    noteUse(process.channel, link).on("error", () => {});
    if (isShort) process.channel.end(); // what runs instead may read
    const marker = `${parts.join(":")}\n`;
    await skipNoise(process.channel, marker, connectTimeout);
    return { ...process, started };
  } catch (cause) {
    starting.then(({ channel }) => channel.destroy(), () => {});
    throw await commandError(link, command, cause, process);
  }
}

/** How much of a command's complaints is kept, in bytes. */
const LONGEST_COMPLAINT = 4096;

function execute(client: Client, command: string): Promise<RemoteProcess> {
  return new Promise((resolve, reject) => {
    client.exec(command, (cause, channel) => {
      if (cause !== undefined) return reject(cause);
      limitUnread(channel, client);
      let errors = "";
      // Unread, it would block the rest.
      channel.stderr.on("data", (chunk) => {
        if (errors.length < LONGEST_COMPLAINT) errors += chunk;
      });
      const ended = new Promise<{ code: number; errors: string }>((resolve) => {
        let code = -1;
        channel.on("exit", (status) => code = status ?? -1);
        channel.on("close", () => resolve({ code, errors }));
      });
      resolve({ channel, ended });
    });
  });
}

/** Connects standard input and output to the daemon there. */
const RELAY_COMMAND = `socket=\${GUIX_DAEMON_SOCKET:-${DAEMON_SOCKET}}
file=\${socket#unix:} file=\${file#file:}
case $file in /*) ;; *) file= ;; esac
if [ "$file" ] && command -v socat >/dev/null; then
  exec socat - "UNIX-CONNECT:$file"
fi
exec guix repl -- /dev/fd/3 "$file" "$socket" 3<<'END'
(use-modules (rnrs io ports) (ice-9 match))
(define daemon
  (match (cdr (command-line))
    (("" uri) ((@@ (guix store) connect-to-daemon) uri))
    ((file _)
     (let ((daemon (socket PF_UNIX SOCK_STREAM 0)))
       (connect daemon AF_UNIX file)
       daemon))))
(define input (current-input-port))
(define output (current-output-port))
(setvbuf input 'block 65536)
(setvbuf daemon 'block 65536)
(define (copy from to)
  (let ((bytes (get-bytevector-some from)))
    (when (eof-object? bytes) (primitive-exit 0))
    (put-bytevector to bytes)
    (force-output to)))
(let loop ()
  (let ((ready (car (select (list input daemon) '() '()))))
    (when (memq input ready) (copy input daemon))
    (when (memq daemon ready) (copy daemon output))
    (loop)))
END`;

/** Says why there is no way to the daemon there, of the two that were tried. */
async function relayError(
  link: Link,
  direct: unknown,
  relayed: unknown,
  relay?: RemoteProcess,
): Promise<OffloadError> {
  const { cause: inner, hint } = relayed as OffloadError;
  const cause = [relayed, inner].find((it) => it instanceof Late) ??
    (relayed instanceof Noise ? relayed : direct);
  const ended = await Promise.race([relay?.ended, delay(1000)]);
  const why = ended?.errors.trim().split(": ").at(-1)?.toLowerCase();
  const error = remoteDaemonError(link, cause, why || reason(cause));
  if (!(cause instanceof Noise)) return error;
  return new OffloadError(error.message, { cause, hint, code: "daemon" });
}

/** Connects to the daemon there by a program; `direct`: why not without. */
async function openRelay(
  link: Link,
  direct: unknown,
): Promise<StoreConnection> {
  let relay: RemoteProcess | undefined;
  try {
    relay = await executeThere(link, RELAY_COMMAND);
    return await greetOver(link, Promise.resolve(relay.channel), 0);
  } catch (error) {
    throw await relayError(link, direct, error, relay);
  }
}

/** The questions, for any POSIX shell: a line `NAME ANSWER…` for each. */
function probeCommand(storeDirectory: string): string {
  return `
exec 2>/dev/null
space() {
  echo "$1-bytes $(df -Pk "$2" | tail -n 1)"
  echo "$1-inodes $(df -Pi "$2" | tail -n 1)"
}
echo "uname $(uname -snrm)"
echo "cores $(nproc || grep -c ^processor /proc/cpuinfo)"
echo "load $(cat /proc/loadavg)"
echo "memory $(grep ^MemAvailable: /proc/meminfo)"
for i in cpu io memory; do echo "$i-stall $(head -n 1 /proc/pressure/$i)"; done
space store '${storeDirectory}'
build=/var/guix/builds; [ -d $build ] || build=/tmp
space build $build
[ -z "$GUIX_DAEMON_SOCKET" ] || echo "socket $GUIX_DAEMON_SOCKET"
echo "clock $(date +%s.%N)"
`;
}

/** Reads numbers from lines `NAME WORD…`: by their name and the word. */
function readAnswers(text: string) {
  const answers = new Map<string, string[]>();
  for (const line of text.split("\n")) {
    const [name = "", ...words] = line.trim().split(/\s+/);
    answers.set(name, words);
  }
  const number = (name: string, index: number, unit = 1) => {
    const value = parseFloat(answers.get(name)?.at(index) ?? "") * unit;
    return Number.isFinite(value) ? value : undefined;
  };
  const words = (name: string) => answers.get(name)?.join(" ");
  return { number, words };
}

type Answers = ReturnType<typeof readAnswers>;

/** What df says is free: of its line the fourth word, in KiB. */
function freeSpace({ number }: Answers, name: string): FreeSpace | undefined {
  const bytes = number(`${name}-bytes`, 3, 1024);
  // Some file systems, such as btrfs, have no number of them: "0 0 0 -".
  const limited = number(`${name}-inodes`, 1) !== 0;
  const free = limited ? number(`${name}-inodes`, 3) : undefined;
  return bytes === undefined ? undefined : { bytes, inodes: free ?? Infinity };
}

/** What the kernel's pressure stall information says; not every one tells. */
function pressureIn({ words }: Answers): Facts["pressure"] {
  const share = (name: string) =>
    parseFloat(/avg10=(\S+)/.exec(words(`${name}-stall`) ?? "")?.[1] ?? "0") ||
    0;
  return words("memory-stall")
    ? { cpu: share("cpu"), io: share("io"), memory: share("memory") }
    : undefined;
}

/**
 * By how many seconds a clock is ahead that said `told` at a time within `took`
 * before `time`, all in seconds: at least, for what it said may have come late.
 */
function clockDifference(told: number, time: number, took: number): number {
  const difference = told - time;
  return difference < 0 ? Math.min(0, difference + took) : difference;
}

/**
 * Reads the facts from what the probe printed, which took so many milliseconds
 * until `time`.
 */
export function parseFacts(
  text: string,
  time: number,
  roundTrip: number,
  took = 0,
): Facts {
  const answers = readAnswers(text);
  const { number, words } = answers;
  const clock = number("clock", 0);
  const socket = words("socket");
  return {
    time,
    roundTrip,
    load: number("load", 0),
    cores: number("cores", 0),
    memory: number("memory", 1, 1024),
    pressure: pressureIn(answers),
    store: freeSpace(answers, "store"),
    build: freeSpace(answers, "build"),
    clock: clock === undefined
      ? undefined
      : clockDifference(clock, time / 1000, took / 1000),
    ...(socket !== undefined && { socket }),
    uname: words("uname")?.replace(/\p{Cc}/gu, ""),
  };
}

/** How much of what the probe prints is read, in characters. */
const LONGEST_FACTS = 16384;

/** Asks a machine for its facts, all by one command. */
export async function probe(
  session: Session,
  context: Context,
): Promise<Facts> {
  const start = performance.now();
  const began = Date.now();
  const command = probeCommand(context.storeDirectory);
  const process = await session.exec(command, true).catch((error) => {
    if (session.failure() || error.cause instanceof Late) throw error;
    return undefined; // it says nothing of itself
  });
  const roundTrip = (process?.started ?? performance.now()) - start;
  const channel = process?.channel ?? [];
  let text = "";
  let time = Date.now();
  for await (const chunk of channel) {
    text += chunk;
    time = Date.now() - roundTrip / 2; // the clock is told last
    if (text.length > LONGEST_FACTS) break; // and hear no more of it
  }
  return parseFacts(text, time, roundTrip, time - began);
}

const remote: RemoteCommands = { execute, executeThere, openRelay, probe };

export default remote;

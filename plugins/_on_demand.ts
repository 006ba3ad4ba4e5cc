/**
 * Starts machines that builds wait for, and stops them when they are idle, for
 * plugins whose lists say how.
 *
 * A script in the background, the keeper, does it: one for each machine, for
 * as long as that is on. It learns from the locks on the machine's slots
 * whether builds of this master run there. The state is in files beside those:
 *
 *     power    WORD TIME: booting, up, stopping or failed; missing: off
 *     keeper   process id of the keeper
 *     log      what the commands print
 *
 * @module
 */

import {
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { createConnection } from "node:net";
import process from "node:process";
import type { Exclusion, Machine, PluginContext } from "../mod.ts";
import { isRecent, runDetached } from "./_programs.ts";
import { hostOf } from "./_ssh.ts";

/** What a list says of a machine that is started on demand. */
export interface Demand {
  /** Shell command that starts it; it may end before the machine answers. */
  readonly start: string;
  /** Shell command that stops it. */
  readonly stop: string;
  /** Seconds within which SSH must answer there. */
  readonly "boot-timeout": number;
  /** Seconds without a build after which it is stopped. */
  readonly "idle-time": number;
}

/** For how many milliseconds a booting machine is listened to. */
const PATIENCE = 200;

/** For how many seconds a machine that failed to start is left at that. */
const RETRY = 60;

const KEEPER = `
directory=$1 mode=$2 start=$3 stop=$4 boot=$5 idle=$6 slots=$7 id=$8
exec </dev/null >>"$directory/log" 2>&1
# Seconds that no setting of the clock moves.
now() { cut -d . -f 1 /proc/uptime; }
state() {
    echo "$1 $(date +%s)" >"$directory/power.new"
    mv "$directory/power.new" "$directory/power"
}
is() { read -r word rest <"$directory/power" && [ "$word" = "$1" ]; }
busy() {
    # In memory are those that the disk does not take.  Inodes alone are looked
    # at: a device may have another number there than a file has.
    for slot in "$slots"/[0-9]* /dev/shm/guix-offload-*/"$id"/[0-9]*; do
        [ -O "$slot" ] || continue
        set -- $(ls -i "$slot")
        ! grep -q ":$1 " /proc/locks || return 0
    done
    return 1
}
run() { timeout "$boot" /bin/sh -c "$1"; }
fail() {
    echo "$1"
    state stopping
    run "$stop"
    state failed
    exit 1
}

# Of two that were started at the same time, one goes on.
echo $$ >"$directory/keeper"
sleep 0.2
[ "$(cat "$directory/keeper")" = $$ ] || exit 0

since=$(now)
if [ "$mode" = start ]; then
    run "$start" || fail "'$start' failed: exit code $?"
    while is booting; do
        [ $(($(now) - since)) -lt "$boot" ] || fail "no answer within $boot s"
        sleep 1
    done
    since=$(now)
fi
while is up; do
    sleep $((idle / 20 + 1))
    if busy; then
        since=$(now)
    elif [ $(($(now) - since)) -ge "$idle" ]; then
        state stopping
        busy || break
        state up
    fi
done
run "$stop"
rm -f "$directory/power" "$directory/keeper"
`;

function readWords(file: string): string[] {
  try {
    if (!statSync(file).isFile()) return []; // a FIFO would be waited for
    return readFileSync(file, "utf8").trim().split(" ");
  } catch {
    return [];
  }
}

/** Whether the keeper of the machine with this directory is there. */
function isKept(directory: string): boolean {
  const [pid = "none"] = readWords(`${directory}/keeper`);
  const text = readWords(`/proc/${pid}/cmdline`).join(" ");
  return text.split("\0").includes(directory);
}

/** Whether an SSH server greets. */
function isReachable({ name, port }: Machine): Promise<boolean> {
  return new Promise((resolve) => {
    const host = hostOf(name);
    const socket = createConnection({ host, port, timeout: PATIENCE });
    const timer = setTimeout(() => socket.destroy(), PATIENCE);
    socket.on("error", () => {});
    socket.on("data", (data) => {
      resolve(String(data).startsWith("SSH-"));
      socket.destroy();
    });
    socket.on("close", () => {
      clearTimeout(timer);
      resolve(false);
    });
  });
}

/** What the keeper of a machine and its hooks tell each other, in files. */
function powerOf(
  machine: Machine,
  demand: Demand,
  { stateDirectory, asOwner, writable }: PluginContext,
) {
  const id = `${machine.name}:${machine.port}`;
  const slots = `${stateDirectory}/offload/${id}`;
  const directory = writable(slots);
  const asIts = <T>(action: () => T) => asOwner(directory, action);
  return {
    log: `${directory}/log`,
    read: () => asIts(() => readWords(`${directory}/power`)),
    write: (word: string) => {
      const seconds = Math.floor(Date.now() / 1000);
      const file = `${directory}/power.${process.pid}`;
      asIts(() => {
        writeFileSync(file, `${word} ${seconds}\n`);
        renameSync(file, `${directory}/power`);
      });
    },
    isKept: () => asIts(() => isKept(directory)),
    keep: (mode: "start" | "watch") => {
      const { start, stop, "boot-timeout": boot, "idle-time": idle } = demand;
      const limits = [String(boot), String(idle)];
      const args = [directory, mode, start, stop, ...limits, slots, id];
      const [uid, gid] = asIts(() => [process.geteuid!(), process.getegid!()]);
      const isOther = uid !== process.geteuid!();
      // Root's environment is not for others to read.
      const env = { PATH: process.env.PATH };
      runDetached(KEEPER, args, isOther ? { uid, gid, env } : {});
    },
    forgetLog: () => asIts(() => rmSync(`${directory}/log`, { force: true })),
  };
}

/**
 * Excludes a machine while it is off, and lets it be started, where it has
 * demands, by NAME:PORT. It is no use to ask it then, but builds should wait.
 */
export async function excludeOff(
  machine: Machine,
  demands: ReadonlyMap<string, Demand>,
  context: PluginContext,
): Promise<Exclusion | undefined> {
  const id = `${machine.name}:${machine.port}`;
  const demand = demands.get(id);
  if (demand === undefined) return undefined;
  const power = powerOf(machine, demand, context);
  const [word = "off", time] = power.read();
  const kept = power.isKept();
  if (word === "failed" && isRecent(Number(time) * 1000, RETRY)) {
    return { why: `failed to start: see ${power.log}`, isBusy: false };
  }
  if (word === "booting" && kept) {
    if (!await isReachable(machine)) {
      return { why: "starting", isBusy: true, isStarting: true };
    }
    power.write("up");
    return undefined;
  }
  if (word === "stopping" && kept) return { why: "stopping", isBusy: true };
  if (word === "up") {
    if (!kept) power.keep("watch"); // this master was restarted
    return undefined;
  }
  const start = () => {
    power.forgetLog();
    power.write("booting");
    power.keep("start");
  };
  return { why: "off, until a build needs it", isBusy: true, start };
}

/**
 * Programs beside a process that stays.
 *
 * @module
 */

import process from "node:process";

/** Where to find programs: a daemon may have next to nothing in its PATH. */
export function toolPath(): Record<string, string> {
  const { PATH = "" } = process.env;
  return { PATH: `${PATH}:/usr/bin:/bin:/run/current-system/profile/bin` };
}

/**
 * Watches a process from outside, which must write something new to a file now
 * and then: shims wait for one that is stopped or hangs as long as it is there.
 * It is the same process as long as its start time is the same.
 */
export const GUARD = `
begun() {
  IFS= read -r line </proc/$1/stat || exit
  set -- \${line##*) }
  echo "\${20}"
}
pid=$1 file=$2 begin=$(begun $1) seen= times=0
while sleep 5; do
  [ "$(begun $pid)" = "$begin" ] || exit 0
  IFS= read -r beat <"$file" || beat=$seen
  [ "$beat" = "$seen" ] && times=$((times + 1)) || times=0
  seen=$beat
  [ $times -lt 6 ] || { kill -KILL $pid; exit; }
done`;

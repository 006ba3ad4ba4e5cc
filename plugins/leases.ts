/**
 * Shares the slots of machines among several masters: who builds there holds a
 * lease, one of as many as the machine has slots. It is a lock on a file there,
 * held by a process at the end of the SSH connection, so that it is free again
 * whatever becomes of the master.
 *
 * @module
 */

import { writeFileSync } from "node:fs";
import type { Machine, Plugin, PluginContext } from "../mod.ts";
import { isFresh } from "./_programs.ts";
import { quoteWord } from "./_remote.ts";

/** For how many seconds a machine is left alone where all leases are taken. */
const PATIENCE = 1;

/** Where leases are, unless told. */
const DIRECTORY = "/run/guix-offload";

/** How many tenths of a second one of its leases is waited for. */
const TRIES = 20;

/** Takes a lease where there is no flock: with Guile. */
function guileLease(numbers: readonly number[]): string {
  return `
(define (take)
  (let loop ((numbers '(${numbers.join(" ")})))
    (and (pair? numbers)
         (let ((port (open-input-file (number->string (car numbers)))))
           (if (false-if-exception (begin (flock port (logior LOCK_EX LOCK_NB)) #t))
               port
               (loop (cdr numbers)))))))
(define lease
  (let loop ((tries ${TRIES}))
    (or (take) (and (> tries 1) (begin (usleep 100000) (loop (- tries 1)))))))
(format #t (if lease "held~%" "full~%"))
(force-output)
(when lease
  (let loop ()
    (unless (eof-object? (read-char)) (loop))))
(primitive-exit 0)
`;
}

/**
 * Takes a lease, says so, and holds it until its standard input ends, as it
 * does with the connection.
 *
 * What others than the account and root could write to or read is refused: a
 * link there would lead this anywhere, and a lock of theirs would stop all
 * builds. The default is root's own; other accounts have one at home.
 */
function leaseCommand(directory: string, leases: number): string {
  const numbers = Array.from({ length: leases }, (_, number) => number);
  return `
user=$(id -u)
directory=${quoteWord(directory)}
[ "$directory" != ${DIRECTORY} ] || [ "$user" = 0 ] ||
    directory=\${XDG_STATE_HOME:-$HOME/.local/state}/guix-offload
[ -e "$directory" ] || mkdir -p -m 700 "$directory"
[ ! -O "$directory" ] || [ -L "$directory" ] || chmod o-rwx "$directory"
set -- $(ls -ldn "$directory")
case $1:$3 in
d????-?---*:0 | d????-?---*:$user) ;;
*) echo "'$directory' is no directory that only user $user or root may enter" >&2
   exit ;;
esac
cd "$directory" || exit
for lease in ${numbers.join(" ")}; do
    [ -e $lease ] || : >$lease || exit
done
command -v flock >/dev/null || exec guix repl -- /dev/fd/3 3<<'END'
${guileLease(numbers)}
END
for try in ${Array(TRIES).fill("0.1").join(" ")}; do
    for lease in ${numbers.join(" ")}; do
        exec 9<$lease
        if flock -n 9; then
            echo held
            exec cat >/dev/null
        fi
    done
    sleep $try
done
echo full
`;
}

/** The file whose time tells when all leases of a machine were taken. */
function fullFile({ name, port }: Machine, context: PluginContext): string {
  return `${context.stateDirectory}/offload/${name}:${port}/full`;
}

const plugin = {
  name: "leases",
  options: {
    directory: {
      default: DIRECTORY,
      description: "directory on the build machines, the same for all masters",
    },
  },
  exclude(machine, context) {
    const file = fullFile(machine, context);
    if (!isFresh(file, PATIENCE)) return undefined;
    return { why: "other masters use all its slots", isBusy: true };
  },
  async admit(machine, context) {
    const directory = String(context.options.directory);
    const command = leaseCommand(directory, machine.parallelBuilds);
    const { channel, ended } = await context.exec(command);
    const answer = await new Promise<string>((resolve) => {
      channel.once("data", (data) => resolve(String(data).trim()));
      ended.then(({ errors }) => resolve(errors.trim() || "no answer"));
    });
    if (answer === "held") return true;
    if (answer !== "full") {
      throw new Error(`failed to take a lease on '${machine.name}': ${answer}`);
    }
    const file = fullFile(machine, context);
    try {
      context.asOwner(file, () => writeFileSync(file, ""));
    } catch (error) { // it costs others a question each
      context.log.debug(`'${file}': ${error}`);
    }
    return false;
  },
} satisfies Plugin;

export default plugin as Plugin;

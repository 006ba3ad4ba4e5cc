#!/bin/sh
# Shows a real build being offloaded by a real guix-daemon: brings up three
# Guix hosts on this machine (see scripts/lab), builds one derivation through
# Offload and one like it through `guix offload`, and takes the hosts down.
#
# usage: demo.sh [--keep]    --keep: leave the hosts up, to look around
set -eu
cd "$(dirname "$0")/.."

lab=scripts/lab/lab
bold=$(tput bold 2>/dev/null || true)
plain=$(tput sgr0 2>/dev/null || true)
step() { printf '\n%s==> %s%s\n' "$bold" "$1" "$plain"; }
now() { date +%s%N; }

# build NAME: builds a new derivation on head; leaves the milliseconds it took
# in $took.
build() {
    derivation=$($lab in head guix repl -- /offload/scripts/lab/work.scm \
        --name="$1" --log-lines=2 --tree)
    start=$(now)
    # --max-jobs=0: head builds nothing itself.
    $lab in head guix build --max-jobs=0 "$derivation" 2>&1 | sed 's/^/    /'
    took=$((($(now) - start) / 1000000))
    echo "    took $took ms"
}

step "1. Fetch the libraries and both runtimes, Node and Deno (npm)"
command -v npm >/dev/null || {
    echo "demo.sh: error: npm is missing: install Node.js, any version" >&2
    exit 1
}
npm ci --no-audit --no-fund --loglevel=error

step "2. Bring up three Guix hosts: head, and the build machines w1 and w2"
[ -n "$($lab list)" ] || [ "${1-}" = --keep ] || trap '$lab down' EXIT
$lab up head w1 w2
$lab list

step "3. The machine file of head, /etc/guix/machines.scm, as guix offload reads it"
$lab in head cat /etc/guix/machines.scm

step "4. Start head's guix-daemon with GUIX=/offload/scripts/guix: that is all"
$lab daemon head GUIX=/offload/scripts/guix
# What is new to the build machines, the builder, goes there once.
for machine in 1 2 3 4; do build warm-up >/dev/null; done

step "5. Build through Offload"
build through-offload
ours=$took

step "6. Build through the original, guix offload"
$lab daemon head
build through-guix-offload

step "7. Offload took $ours ms, guix offload $took ms; the store of head is sound:"
$lab in head guix gc --verify=contents 2>&1 | sed 's/^/    /'

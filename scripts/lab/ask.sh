#!/bin/bash
# ask.sh - start a build hook as guix-daemon does, which finds it by the variable
# GUIX, and ask it once.
#
#   bash ask.sh SYSTEM DERIVATION
#
# It prints the answer, and the microseconds from the start of the hook to it.
# Then it stays until its input ends: what serves hooks ends with their daemon,
# which this is to them. It is bash for its clock.
set -eu

# The daemon's child that talks to the hook.
ask() {
    directory=$(mktemp -d)
    cd "$directory"
    mkfifo requests messages log
    # What opens a FIFO both ways waits for nobody.
    exec 9<>requests 3<requests 5>requests
    exec 9<>messages 6<messages 7>messages
    exec 9<>log 8>log
    cd /
    rm -r "$directory"
    start=$EPOCHREALTIME
    "${GUIX:-guix}" offload "$1" 3600 1 86400 \
        <&3 >&7 2>&7 4>&8 3<&- 5>&- 6<&- 7>&- 8>&- 9>&- &
    echo "0 $1 $2 " >&5
    exec 3<&- 7>&- 8>&-
    text=
    while IFS= read -r line <&6; do
        case $line in
        '# '*)
            echo "${line#??} $((${EPOCHREALTIME/./} - ${start/./}))"
            exec 5>&- # there is no build
            cat <&6 >/dev/null
            wait
            return ;;
        esac
        text="$text$line"$'\n'
    done
    echo "ask.sh: error: the hook did not answer: $text" >&2
    return 1
}

(ask "$@")
cat >/dev/null

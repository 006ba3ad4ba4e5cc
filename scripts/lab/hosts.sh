# The hosts of a lab: which there are, and what each is.
#
# The directory of a host, $lab/hosts/NAME, holds: flavours, address, pid (of
# its process 1), upper, work and root (of the overlay), log (of process 1),
# cgroup (the name of its own, if any), cpu (that by which its share of the
# processors is limited, if it is), entered (written to once its own root is
# in place) and ready (once it is up).

# Find the $pid of a host's process 1, out here.  Its last argument is the
# host's directory, so that a pid given to somebody else since is not taken
# for it; the zeros between arguments are not read.
find_pid() {
    read -r pid 2>/dev/null <"$lab/hosts/$1/pid" || return
    before=
    while :; do
        line=
        read -r line 2>/dev/null <"/proc/$pid/cmdline" || :
        case $line in *"$lab/hosts/$1") return ;; esac
        # While a process becomes another program there is nothing, or, as this
        # is read byte by byte, some of both.
        [ -z "$line" ] || [ "$line" != "$before" ] || return 1
        ! is_dead "$pid" || return 1
        before=$line
        sleep 0.02
    done
}

is_up() { [ -e "$lab/hosts/$1/ready" ] && find_pid "$1"; }

flavours_of() {
    of=
    while read -r line; do of="$of $line"; done <"$lab/hosts/$1/flavours"
    echo $of
}

has() {
    while read -r line; do
        [ "$line" != "$2" ] || return 0
    done <"$lab/hosts/$1/flavours"
    return 1
}

address_of() {
    read -r line <"$lab/hosts/$1/address"
    echo "$line"
}

known_hosts() {
    for directory in "$lab"/hosts/*/; do
        directory=${directory%/}
        [ ! -d "$directory" ] || echo "${directory##*/}"
    done
}

hosts_up() {
    for name in $(known_hosts); do
        ! is_up "$name" || echo "$name"
    done
}

masters() { for h in $(hosts_up); do ! has "$h" master || echo "$h"; done; }
build_machines() { for h in $(hosts_up); do has "$h" master || echo "$h"; done; }
without_strangers() { for h in "$@"; do has "$h" stranger || echo "$h"; done; }

# Its root directory, seen from here.
files() { find_pid "$1" && echo "/proc/$pid/root"; }

# Split NAME:FLAVOUR:… into $name and $flavours, one a line, sorted.
parse_host() {
    name=${1%%:*}
    flavours=$(echo "$1" | tr : '\n' | tail -n +2 | sort -u)
    case $name in
        head) flavours=$(printf 'master\n%s\n' "$flavours" | grep . | sort -u) ;;
        [!a-z]* | *[!a-z0-9-]* | '') fail "invalid host name '$name': use a-z, 0-9 and -" ;;
    esac
    for flavour in $flavours; do
        case $flavour in
            master | bullseye | unprivileged | systemd | nodejs | stranger) ;;
            *) fail "unknown flavour '$flavour' of '$name': master, bullseye, unprivileged, systemd, nodejs and stranger exist" ;;
        esac
    done
    case $(echo $flavours) in
        *bullseye*unprivileged*) fail "'$name' can't be both: Guix 1.2 has no unprivileged daemon" ;;
        *bullseye*systemd*) fail "'$name' can't be both: only the root of sid has systemd" ;;
        *bullseye*nodejs*) fail "'$name' can't be both: the Node of bullseye is too old" ;;
    esac
}

# The Debian suite for $flavours.
suite() {
    case $flavours in
        *bullseye*) echo bullseye ;;
        *) echo sid ;;
    esac
}

choose_address() {
    case $1 in
        head) echo "$net.1" ;;
        w1) echo "$net.2" ;;
        w2) echo "$net.3" ;;
        *)  n=4
            while grep -qx "$net.$n" "$lab"/hosts/*/address 2>/dev/null; do
                n=$((n + 1))
            done
            echo "$net.$n" ;;
    esac
}

find_checkout() {
    self=$(readlink -f "$0")
    checkout=${self%/scripts/lab/*}
}

# Tells this checkout from another one, also where that took its place.
checkout_id() { stat -c '%n %d:%i' "$checkout"; }

# Whether the host $name has another checkout than this one at /offload.
has_other_checkout() {
    has "$name" master && [ "$(cat "$lab/hosts/$name/checkout" 2>/dev/null)" != "$(checkout_id)" ]
}

#!/bin/sh
# Installs Offload and has guix-daemon use it, or undoes that: see usage below.
#
# It changes all or nothing: whatever is put in place or taken away is noted in
# a journal, and undone where something fails before the end.  A manifest under
# the prefix says what is installed, and which directories were made for it; it
# comes first, so that after a power cut both ways are still open.
set -eu
umask 022

usage() {
    cat <<END
usage: install.sh [OPTION]…

Installs Offload, or brings it up to date, and has guix-daemon use it.

  --from DIR|URL  take the release from there; else it is what this script is a
                  part of: a release or a checkout.  An URL is one of https, or
                  comes with --sha256
  --sha256 SUM    demand that the release's SHA256SUMS has this checksum
  --prefix DIR    install under DIR; /usr/local unless told
  --yes           don't ask: restart guix-daemon, whose builds are lost, and have
                  Guix get Node where there is no runtime
  --uninstall     undo it all
  --dry-run       say what would be done, and change nothing
  --help          print this

environment:
  OFFLOAD_RUNTIME  node, deno, or the file name of either; else whichever is
                   there and new enough, Node first
END
}

fail() {
    echo "offload: error: $1" >&2
    [ -z "${2-}" ] || echo "hint: $2" >&2
    exit 1
}

# told DONE DO WHAT: says what was done, or would be.
told() {
    if [ -n "$dry_run" ]; then echo "would $2 $3"
    else echo "$1 $3"
    fi
}

can_ask() { (: </dev/tty) 2>/dev/null; }

# Asks on the terminal, since the standard input may be this script.
ask() {
    [ -z "$yes" ] || return 0
    can_ask || return 1
    printf '%s [y/N] ' "$1" >/dev/tty
    read -r answer </dev/tty
    case $answer in
    [yY]*) ;;
    *) return 1 ;;
    esac
}

# --- All or nothing

# Keeps what is at a place, or notes that nothing is, for undo.
keep() {
    if [ -e "$1" ] || [ -L "$1" ]; then
        kept=$((kept + 1))
        cp -Pp "$1" "$work/kept-$kept"
        echo "kept-$kept $1" >>"$work/journal"
    else
        echo "new $1" >>"$work/journal"
    fi
}

# Makes a directory, and those above it.
make_directory() {
    if [ ! -d "$1" ]; then
        make_directory "$(dirname "$1")"
        if [ -z "$dry_run" ]; then
            mkdir "$1"
            echo "directory $1" >>"$work/journal"
        fi
        echo "directory $1" >>"$work/manifest"
    fi
}

# put FILE PLACE: puts a copy of a file, or of a symbolic link, in place.
put() {
    echo "file $2" >>"$work/manifest"
    make_directory "$(dirname "$2")"
    ! same "$1" "$2" || return 0
    if [ -z "$dry_run" ]; then
        rm -f "$2.new"
        cp -Pp "$1" "$2.new"
        keep "$2"
        mv -f "$2.new" "$2"
    fi
    told installed install "$2"
}

# Whether two files, or links, are the same, with their modes.
same() {
    [ -e "$2" ] || return 1
    if [ -L "$1" ]; then [ "$(readlink "$1")" = "$(readlink "$2")" ]
    else [ "$(stat -c %a "$1")" = "$(stat -c %a "$2")" ] && cmp -s "$1" "$2"
    fi
}

take_away() {
    [ -e "$1" ] || [ -L "$1" ] || return 0
    if [ -z "$dry_run" ]; then
        keep "$1"
        rm -f "$1"
    fi
    told removed remove "$1"
}

backwards() { sed '1!G;h;$!d' "$1"; }

undo() {
    [ -s "$work/journal" ] || return 0
    backwards "$work/journal" | while read -r what place; do
        case $what in
        new) rm -f "$place" ;;
        directory) rmdir "$place" || : ;;
        *)
            cp -Pp "$work/$what" "$place.new"
            # It could lead into a directory.
            [ ! -L "$place" ] || rm -f "$place"
            mv -f "$place.new" "$place" ;;
        esac
    done
    [ -z "$reloaded" ] || systemctl daemon-reload
    [ -z "$restarted" ] || systemctl restart guix-daemon.service
    echo "offload: nothing was changed" >&2
}

finish() {
    status=$?
    trap '' HUP INT TERM
    [ -n "$committed" ] || undo
    [ ! -L "$work/node" ] || forget_root "$work/node"
    [ -z "$rooted" ] || [ -L "$lib/node" ] || forget_root "$lib/node"
    rm -rf "$work"
    exit "$status"
}

# --- The release

# Unless a checksum is known, nobody on the way may choose what is fetched:
# redirects stay with https, or aren't followed where wget can't promise that.
download() {
    if command -v curl >/dev/null; then
        protocols==https
        [ -z "$sha256" ] || protocols==http,https
        curl -fsSL --proto "$protocols" --proto-redir "$protocols" -o "$2" "$1"
    elif command -v wget >/dev/null; then
        redirects=--max-redirect=0
        [ -z "$sha256" ] || redirects=
        wget -q $redirects -O "$2" "$1"
    else fail "neither curl nor wget is there" "install one of them"
    fi || fail "failed to fetch '$1'" \
        "--from names the URL of the directory that the release's files are in; redirects lead nowhere but to https, with curl"
}

# Refuses an URL whose answers anybody on the way could have made.
check_source() {
    case $from in
    http://*) [ -n "$sha256" ] ||
        fail "'$from' is not https: anybody on the way could change what it sends" \
            "name an https URL, or give the checksum of its SHA256SUMS by --sha256" ;;
    esac
}

check_sum() {
    [ -n "$sha256" ] || return 0
    sum=$(sha256sum "$work/release/SHA256SUMS")
    [ "${sum%% *}" = "$sha256" ] ||
        fail "'$from/SHA256SUMS' has the checksum ${sum%% *}, not $sha256" \
            "it is of another release, or somebody changed it"
}

fetch() {
    case $from in
    http://* | https://*) download "$from/$1" "$work/release/$1" ;;
    *) cp "$from/$1" "$work/release/$1" 2>/dev/null ||
        fail "failed to read '$from/$1'" "make a release with scripts/bundle" ;;
    esac
}

# What of a release is installed: the program, what authors of plugins need, and
# what other programs read.
installed="runtime.sh offload.mjs guix offload install.sh
    offload.d.mts contract.mjs contract.d.mts
    machines.schema.json settings.schema.json
    offload.1 offload.bash offload.fish offload.zsh"

# Prints where a file of a release is installed.
place_of() {
    case $1 in
    *.1) echo "$prefix/share/man/man1/$1" ;;
    *.bash) echo "$prefix/share/bash-completion/completions/offload" ;;
    *.fish) echo "$prefix/share/fish/vendor_completions.d/$1" ;;
    *.zsh) echo "$prefix/share/zsh/site-functions/_offload" ;;
    *) echo "$lib/$1" ;;
    esac
}

# Leaves in $work/release what is to be installed.
get_release() {
    if [ -z "$from" ] && [ -e "$here/SHA256SUMS" ]; then from=$here; fi
    if [ -z "$from" ] && [ -e "$here/bundle.ts" ]; then
        [ -z "$sha256" ] || fail "--sha256: this checkout has no release to check" \
            "name one by --from, or install what is here without --sha256"
        "$here/bundle" "$work/release" >/dev/null
        from=$work/release
        return
    fi
    [ -n "$from" ] || fail "expected --from DIR or --from URL" \
        "name the directory, or the base of the URL, of the release's files"
    check_source
    mkdir "$work/release"
    fetch SHA256SUMS
    check_sum
    for name in choose.sh tell.sh $installed; do
        grep "^[0-9a-f]\{64\} [ *]$name\$" "$work/release/SHA256SUMS" \
            >>"$work/sums" ||
            fail "'$from/SHA256SUMS' lacks $name" "it is of no complete release"
        fetch "$name"
    done
    # What fails is the first that it prints.
    wrong=$(cd "$work/release" && sha256sum -c "$work/sums" 2>/dev/null |
        sed -n 's/: FAILED.*//p' | head -n 1)
    [ -z "$wrong" ] || fail "'$from/$wrong' has a wrong checksum" \
        "it was damaged on the way, or is not of the same release: try again"
    chmod 644 "$work/release"/*
    chmod 755 "$work/release/guix" "$work/release/install.sh" "$work/release/offload"
}

# --- The machine

# The account that guix-daemon runs as owns the store.
find_account() {
    store=${NIX_STORE:-/gnu/store}
    [ -d "$store" ] || fail "there is no '$store'" "install Guix first"
    account=$(stat -c %U "$store")
}

# Runs a shell command as guix-daemon would.
as_daemon() {
    if [ "$account" = root ] || [ "$(id -u)" != 0 ]; then sh -c "$1"
    else su -s /bin/sh -c "$1" "$account"
    fi
}

# Has the garbage collector forget that a file kept something from it.
forget_root() {
    for root in "${GUIX_STATE_DIRECTORY:-/var/guix}"/gcroots/auto/*; do
        [ "$(readlink "$root")" != "$1" ] || rm -f "$root" || :
    done
}

# Puts a link to Guix's Node in place, which keeps it from the collector.
put_node() {
    echo "file $lib/node" >>"$work/manifest"
    make_directory "$lib"
    ! same "$work/node" "$lib/node" || return 0
    if [ -z "$dry_run" ]; then
        keep "$lib/node"
        rooted=yes
        rm -f "$lib/node"
        "$guix" build node --root="$lib/node" >/dev/null
    fi
    told installed install "$lib/node"
}

# Prints the process id of the guix-daemon that runs, if one does; those that
# serve its clients are its children.
find_daemon() {
    owner=$(stat -c %u "${NIX_STORE:-/gnu/store}" 2>/dev/null) || owner=0
    for process in /proc/[0-9]*; do
        is_daemon "$process" || continue
        parent=$(sed -n 's/^PPid:[^0-9]*//p' "$process/status" 2>/dev/null) || continue
        is_daemon "/proc/$parent" || { echo "${process#/proc/}"; return; }
    done
}

# Whether a process is a guix-daemon, rather than somebody's that calls itself
# so: it is alive, of root or of the store's owner, whatever it may become (a
# program that is setuid is its caller's), and none of what daemons build, which
# runs in a pid namespace of its own.
is_daemon() {
    name=$(cat "$1/comm" 2>/dev/null) || return 1
    case $name in
    guix-daemon | .guix-daemon*) ;;
    *) return 1 ;;
    esac
    state=$(sed -n 's/^State:[^A-Z]*\(.\).*/\1/p' "$1/status" 2>/dev/null) || return 1
    users=$(sed -n 's/^Uid:[^0-9]*//p' "$1/status" 2>/dev/null | tr '\t' '\n' | sort -u)
    case $state:$users in
    [ZX]:* | :*) return 1 ;;
    *:0 | *:"$owner") ;;
    *) return 1 ;;
    esac
    # Only root may look.
    its=$(readlink "$1/ns/pid") || return 0
    [ "$its" = "$(readlink /proc/self/ns/pid)" ]
}

# Prints what process $1 is told to take for guix.
guix_of() { tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | sed -n 's/^GUIX=//p'; }

# Whether that is this installation.
uses_offload() { [ "$(guix_of "$1")" = "$lib/guix" ]; }

has_systemd_unit() {
    [ -d /run/systemd/system ] &&
        systemctl cat guix-daemon.service >/dev/null 2>&1
}

may_restart() { ask "Restart guix-daemon now? Builds that run are lost."; }

reload_systemd() {
    [ -z "$dry_run" ] || return 0
    reloaded=yes
    systemctl daemon-reload
}

restart_systemd() {
    if [ -z "$dry_run" ]; then
        restarted=yes
        systemctl restart guix-daemon.service ||
            fail "guix-daemon does not start again" "see 'journalctl -u guix-daemon'"
    fi
    told restarted restart guix-daemon
}

# The command that started process $1, for a shell: its words are quoted where
# they are odd, and nothing in them controls the terminal.
command_of() {
    if [ -z "$1" ]; then
        echo "guix-daemon --build-users-group=guixbuild"
        return
    fi
    tr '\0\n' '\n?' <"/proc/$1/cmdline" |
        LC_ALL=C tr '\001-\011\013-\037\177-\377' '?' | sed "
            s/'/'\\\\''/g
            /^[A-Za-z0-9_.,:=+@%\/-][A-Za-z0-9_.,:=+@%\/-]*\$/!s/.*/'&'/" |
        tr '\n' ' ' | sed 's/ $//'
}

# --- Installing

# Stops where something is in the way that an earlier installation did not put
# there.
check_place() {
    [ -e "$1" ] || [ -L "$1" ] || return 0
    ! grep -qsxF "file $1" "$lib/manifest" ||
        return 0
    fail "'$1' is there already and not Offload's" \
        "move it away, or install under another --prefix"
}

install_files() {
    for name in $installed; do
        put "$work/release/$name" "$(place_of "$name")"
    done
    [ ! -L "$work/node" ] || put_node
    put "$work/runtime" "$lib/runtime"
    put "$work/command" "$prefix/bin/offload"
    # Where another prefix has it, too, the last one that goes takes it away.
    echo "directory $users" >>"$work/manifest"
    put "$work/user" "$user"
    ! has_systemd_unit || put "$work/unit" "$unit"
}

# Puts the manifest in place, of what install_files would do.  What an earlier
# installation had and this one has not goes; directories that were made for it
# are remembered.
install_manifest() {
    echo "file $lib/manifest" >>"$work/manifest"
    (dry_run=yes && install_files >/dev/null)
    if [ -e "$lib/manifest" ]; then
        while read -r kind place; do
            grep -qxF "$kind $place" "$work/manifest" && continue
            if [ "$kind" = file ]; then take_away "$place"
            else echo "$kind $place" >>"$work/manifest"
            fi
        done <"$lib/manifest"
    fi
    sort -u "$work/manifest" >"$work/sorted"
    put "$work/sorted" "$lib/manifest"
}

switch_systemd() {
    reload_systemd
    [ -n "$dry_run" ] || systemctl show --property=Environment --value guix-daemon.service |
        tr ' ' '\n' | grep -qxF "GUIX=$lib/guix" ||
        fail "a drop-in after '$unit' sets GUIX, too" "see 'systemctl cat guix-daemon'"
    if uses_offload "$daemon"; then echo "guix-daemon uses Offload already"
    # Nothing that is stopped is to be started.
    elif systemctl is-active --quiet guix-daemon.service &&
        { [ -n "$dry_run" ] || may_restart; }; then restart_systemd
    else echo "guix-daemon uses Offload from its next start on:" \
        "systemctl restart guix-daemon"
    fi
}

install_offload() {
    get_release
    find_account
    . "$work/release/runtime.sh"
    . "$work/release/choose.sh"
    . "$work/release/tell.sh"
    choose_runtime
    told using use "$runtime, to run Offload as $account"
    unit=/etc/systemd/system/guix-daemon.service.d/offload.conf
    for name in $installed; do check_place "$(place_of "$name")"; done
    check_place "$prefix/bin/offload"
    check_place "$unit"
    ln -s "$runtime" "$work/runtime"
    ln -s ../lib/offload/offload "$work/command"
    echo "$prefix" >"$work/user"
    printf '[Service]\nEnvironment=GUIX=%s\n' "$lib/guix" >"$work/unit"
    install_manifest
    install_files
    daemon=$(find_daemon)
    if has_systemd_unit; then switch_systemd
    else explain_switch
    fi
    committed=yes
    explain_confinement
    echo
    test_machines
}

# --- Uninstalling

# guix-daemon must not call what is no longer there.
switch_back() {
    daemon=$(find_daemon)
    if grep -q '^file /etc/systemd/' "$lib/manifest"; then
        reload_systemd
        if [ -n "$dry_run" ]; then restart_systemd
        elif uses_offload "$daemon"; then
            may_restart || fail "guix-daemon still uses Offload" \
                "let it be restarted: add --yes"
            restart_systemd
        fi
    elif uses_offload "$daemon"; then
        fail "guix-daemon, process $daemon, still uses Offload" \
            "start it without GUIX=$lib/guix, then try again: $(command_of "$daemon")"
    fi
}

# Leaves in $other where Offload is used from as well, if it is: where else it is
# installed, or the guix-daemon that runs has it from.
find_other() {
    for other in "$users"/*; do
        [ "$other" != "$user" ] && [ -f "$other" ] || continue
        other=$(cat "$other")/lib/offload/guix
        [ ! -e "${other%/*}/manifest" ] || return 0
    done
    other=$(guix_of "$daemon")
    [ "$other" != "$lib/guix" ] && [ -e "${other%/*}/runtime.sh" ]
}

# What the hook keeps beside the slots, NAME:PORT, which are also the
# reference's.  Another installation may have it now.
forget() {
    state=${GUIX_STATE_DIRECTORY:-/var/guix}/offload
    ! find_other || { echo "left '$state', which '$other' uses"; return 0; }
    for kept in "$state"/*; do
        [ "${kept%:[0-9]*}" = "$kept" ] && [ -e "$kept" ] || continue
        [ -n "$dry_run" ] || rm -rf "$kept"
        told removed remove "$kept"
    done
    [ -n "$dry_run" ] || rmdir "$state" 2>/dev/null || :
}

uninstall_offload() {
    [ -e "$lib/manifest" ] || {
        echo "Offload is not installed under '$prefix'."
        return
    }
    # It would write once more what is removed here.
    [ -n "$dry_run" ] || (
        find_account
        as_daemon "exec '$lib/offload' serve --stop"
    ) >/dev/null 2>&1 || :
    cp "$lib/manifest" "$work/manifest"
    sed -n 's/^file //p' "$work/manifest" >"$work/files"
    # First what names it, then what it is.
    for pattern in "^/etc/" "^$prefix/" "^$users/"; do
        grep "$pattern" "$work/files" >"$work/some" || continue
        [ "$pattern" != "^$prefix/" ] || switch_back
        while read -r place; do
            take_away "$place"
            [ -n "$dry_run" ] || rm -f "$place.new"
        done <"$work/some"
    done
    committed=yes
    # The longest names are the innermost ones.
    sed -n 's/^directory //p' "$work/manifest" | sort -r | while read -r place; do
        [ -n "$dry_run" ] || rmdir "$place" 2>/dev/null || {
            [ "$place" = "$users" ] ||
                echo "left '$place', which is not empty"
            continue
        }
        told removed remove "$place"
    done
    forget
}

# ---

main() {
    from= sha256= prefix= yes= dry_run= action=install_offload
    committed= reloaded= restarted= rooted= kept=0
    here=
    case $0 in
    */*) [ ! -f "$0" ] || here=$(cd "$(dirname "$0")" && pwd) ;;
    esac
    while [ $# -gt 0 ]; do
        case $1 in
        --from | --prefix | --sha256)
            [ -n "${2-}" ] || fail "$1: expected a value" "run it with --help"
            case $1 in
            --from) from=${2%/} ;;
            --prefix) prefix=${2%/} ;;
            --sha256) sha256=$2 ;;
            esac
            shift ;;
        --yes) yes=yes ;;
        --dry-run) dry_run=yes ;;
        --uninstall) action=uninstall_offload ;;
        --help) usage; exit ;;
        *) fail "$1: unrecognized option" "run it with --help" ;;
        esac
        shift
    done
    # The copy that was installed knows where.
    if [ -z "$prefix" ] && [ -n "$here" ] && [ -e "$here/manifest" ]; then
        prefix=${here%/lib/offload}
    fi
    prefix=${prefix:-/usr/local}
    case $prefix in
    [!/]* | *[!A-Za-z0-9_./+@-]*) fail "--prefix: expected an absolute file name without odd characters" \
        "take one such as /opt/offload" ;;
    esac
    lib=$prefix/lib/offload
    users=/var/lib/offload
    user=$users/$(echo "$prefix" | tr / :)
    [ -n "$dry_run" ] || [ "$(id -u)" = 0 ] ||
        fail "not root" "run it with sudo, or see what it would do with --dry-run"
    [ ! -L "$lib/node" ] || rooted=yes
    work=$(mktemp -d)
    trap finish EXIT
    trap 'exit 1' HUP INT TERM
    : >"$work/manifest"
    $action
}

main "$@"

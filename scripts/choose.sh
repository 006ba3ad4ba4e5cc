# Chooses the runtime that install.sh, which reads this, has Offload run on, and
# has Guix get one where none is there.

# Leaves the file name of a runtime that guix-daemon can use in $runtime.
choose_runtime() {
    set -- node deno
    for directory in /usr/local/bin /usr/bin /run/current-system/profile/bin; do
        set -- "$@" "$directory/node" "$directory/deno"
    done
    # What an earlier installation found stays.
    [ ! -L "$lib/runtime" ] || set -- "$(readlink "$lib/runtime")" "$@"
    [ -z "${OFFLOAD_RUNTIME-}" ] || set -- "$OFFLOAD_RUNTIME"
    if runtime=$(find_runtime "$@"); then
        runtime=${runtime#* }
        runtime=$(cd "$(dirname "$runtime")" && pwd)/${runtime##*/}
        program=$runtime
        # That stays, too.
        [ "$runtime" != "$lib/node/bin/node" ] || cp -P "$lib/node" "$work/node"
    else get_node
    fi
    [ -z "$program" ] || as_daemon "exec '$program' --version" >/dev/null 2>&1 ||
        fail "'$account', which guix-daemon runs as, can't run '$program'" \
            "install it where everybody can, such as in /usr/local, or name another in OFFLOAD_RUNTIME"
}

# Prints the file name of the guix command, where root's PATH may lack it.
find_guix() {
    command -v guix && return
    for directory in /run/current-system/profile/bin \
        /var/guix/profiles/per-user/root/current-guix/bin /usr/local/bin; do
        [ ! -x "$directory/guix" ] || { echo "$directory/guix"; return; }
    done
    return 1
}

# Has Guix get Node, which will be in $runtime and is in $program, unless this is
# a dry run.
get_node() {
    lacking="neither Node 22.14 nor Deno 2.7.14, or newer, is there"
    others="install one of them, or set OFFLOAD_RUNTIME to its file name"
    [ -z "${OFFLOAD_RUNTIME-}" ] && guix=$(find_guix) || fail "$lacking" "$others"
    runtime=$lib/node/bin/node program=
    told "$lacking: getting" get "Node from Guix"
    if [ -n "$dry_run" ]; then
        ln -s / "$work/node"
        return
    fi
    # It says what that takes: to build it takes hours.
    [ -n "$yes" ] || { can_ask && "$guix" build node --dry-run &&
        ask "Have Guix do that now?"; } ||
        fail "$lacking" "to have Guix get Node, add --yes; or $others"
    "$guix" build node --root="$work/node" >/dev/null ||
        fail "'guix build node' failed" "$others"
    program=$(readlink "$work/node")/bin/node
    find_runtime "$program" >/dev/null ||
        fail "'$program' is too old" "run 'guix pull', or $others"
}

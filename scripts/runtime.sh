# Finds a JavaScript runtime that can run Offload, for the scripts beside it.
#
# OFFLOAD_RUNTIME  node, deno, or the file name of either; else whichever is
#                  there and new enough, Node first

fail() {
    echo "offload: error: $1" >&2
    echo "hint: $2" >&2
    exit 1
}

# cannot_start REASON HINT: what is done where `run` can't, unless whoever reads
# this has something else to do.
command -v cannot_start >/dev/null || cannot_start() { fail "$@"; }

# start PROGRAM ARGUMENT…: how `run` starts it.
start() { exec "$@"; }

# new_enough VERSION MAJOR MINOR PATCH: whether VERSION is at least that.
new_enough() {
    IFS=. read -r major minor patch <<END
${1%%[-+ ]*}
END
    case .$major.$minor.$patch. in
    *[!0-9.]* | *..*) return 1 ;;
    esac
    [ "$major" -ne "$2" ] && { [ "$major" -gt "$2" ]; return; }
    [ "$minor" -ne "$3" ] && { [ "$minor" -gt "$3" ]; return; }
    [ "$patch" -ge "$4" ]
}

# runs_types FILE: whether Node can run what is to be run. Debian's is built
# without what runs TypeScript; that of the checkout is not, and isn't asked.
runs_types() {
    case ${script-} in
    *.ts) [ "$1" = "$node" ] ||
        [ "$("$1" --experimental-strip-types -p process.features.typescript)" != false ] ;;
    esac </dev/null 2>/dev/null
}

# Prints "node FILE" or "deno FILE" for the first program given that can run
# Offload; "node-strip FILE" for a Node that takes TypeScript only if told.
find_runtime() {
    for program; do
        file=$(command -v "$program") || continue
        version=$("$file" --version 2>/dev/null) || continue
        case $version in
        v*) runs_types "$file" || continue ;;
        esac
        case $version in
        v22.1[4-7].* | v23.[0-5].*) echo "node-strip $file" && return ;;
        v*) new_enough "${version#v}" 22 14 0 && echo "node $file" && return ;;
        "deno "*) new_enough "${version#deno }" 2 7 14 && echo "deno $file" && return ;;
        esac
    done
    return 1
}

# run ROOT FILE ARGUMENT…: becomes the script FILE of the checkout or release
# ROOT.
run() {
    # A release has all in one file.
    [ "$2" = offload.mjs ] || [ -d "$1/node_modules" ] ||
        cannot_start "there is no '$1/node_modules'" "run 'npm ci' in '$1'"
    [ -r "$1/$2" ] || cannot_start "cannot read '$1/$2'" \
        "install Offload anew, readable for all"
    # Where this is a checkout, `npm install` brought both; where it was
    # installed, `runtime` is what that found, whatever the daemon's PATH is.
    script=$1/$2
    node=$1/node_modules/node/bin/node
    deno=$(echo "$1"/node_modules/@deno/*/deno)
    case ${OFFLOAD_RUNTIME-} in
    "") runtime=$(find_runtime "$1/runtime" node deno "$node" "$deno") ;;
    node) runtime=$(find_runtime node "$node") ;;
    deno) runtime=$(find_runtime deno "$deno") ;;
    *) runtime=$(find_runtime "$OFFLOAD_RUNTIME") ;;
    esac || cannot_start "neither Node 22.14 nor Deno 2.7.14, or newer, is there" \
        "install one of them, or set OFFLOAD_RUNTIME to its file name$(
            [ "$2" = offload.mjs ] ||
                echo '; from source, Node has to run TypeScript, as Debian'\''s does not'
        )"

    # Both compile a script once where they can keep the result, and guix-daemon
    # waits for each start.  Nobody else may write there, nor have put another's
    # directory, or a link, in its place: root would run what was left there.
    above=${GUIX_STATE_DIRECTORY:-/var/guix}
    state=$above/offload
    if [ -O "$state" ] && [ ! -L "$state" ] &&
        { [ -O "$above" ] || [ ! -w "$above" ]; }; then
        export NODE_COMPILE_CACHE="${NODE_COMPILE_CACHE:-$state/node-cache}"
        export DENO_DIR="${DENO_DIR:-$state/deno-cache}"
    fi

    shift 2
    # A small nursery: what moves is garbage soon, and would be 200 MiB of it.
    nursery=--max-semi-space-size=2
    case $runtime in
    # Type stripping and SQLite warn while they are young.
    node-strip*) start "${runtime#* }" --disable-warning=ExperimentalWarning \
        --experimental-strip-types "$nursery" "$script" "$@" ;;
    node*) start "${runtime#* }" --disable-warning=ExperimentalWarning \
        "$nursery" "$script" "$@" ;;
    deno*)
        export DENO_NO_UPDATE_CHECK=1
        start "${runtime#* }" run --v8-flags="$nursery" \
            --allow-all --no-prompt "$script" "$@" ;;
    esac
}

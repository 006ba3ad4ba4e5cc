#!/bin/sh
# Runs all tests and ends with a line `N passed, N failed`.  Installs what they
# need: into the checkout by npm and, for the lab, into the machine by apt.
#
# usage: test.sh [--unit | --faults]
#   --unit    without the lab of real Guix hosts
#   --faults  all faults of test/faults, not a selection of them, and a soak
set -u
cd "$(dirname "$0")/.." || exit 1

command -v npm >/dev/null || {
    echo "test.sh: error: npm is missing: install Node.js, any version" >&2
    exit 1
}
# The libraries and both runtimes, the oldest ones too, at the versions of
# package-lock.json.
npm ci --no-audit --no-fund --loglevel=error || exit 1
node=$PWD/node_modules/node/bin/node
deno=$(echo "$PWD"/node_modules/@deno/*/deno)
oldest_node=$PWD/node_modules/node-oldest/bin/node
oldest_deno=$(echo "$PWD"/node_modules/deno-oldest/node_modules/@deno/*/deno)

work=$(mktemp -d)
output=$work/output
passed=0
failed=0
trap 'rm -rf "$work"' EXIT

# check NAME COMMAND…: a test that is one command.
check() {
    name=$1
    shift
    if "$@" >"$output" 2>&1; then
        passed=$((passed + 1))
        echo "ok   $name"
    else
        failed=$((failed + 1))
        cat "$output"
        echo "FAIL $name"
    fi
}

# count FILE: adds up what test/run.ts, whose output it holds, has counted.
count() {
    counts=$(sed -n 's/^[a-z]*: \([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$1")
    if [ -z "$counts" ]; then
        echo "FAIL ${1#"$work/"}: it ended early"
        counts="0 1"
    fi
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
}

check "deno fmt" "$deno" fmt --check
check "deno lint" "$deno" lint
check "deno check" "$deno" check mod.ts plugins scripts test
check "deno doc" "$deno" doc --lint mod.ts
check "deno publish" "$deno" publish --dry-run --allow-dirty --set-version 0.0.0

# units NAME COMMAND…: runs the unit suites with a runtime.
units() {
    name=$1
    shift
    "$@" test/run.ts >"$work/$name" 2>&1
}

# The oldest Node strips types where it is told to, and all take the option.
strip="--disable-warning=ExperimentalWarning --experimental-strip-types"
units node "$node" $strip &
units deno "$deno" run --allow-all &
units oldest-node "$oldest_node" $strip &
units oldest-deno "$oldest_deno" run --allow-all
wait
for name in node deno oldest-node oldest-deno; do
    cat "$work/$name"
    count "$work/$name"
done

result() { echo "$work/$(echo "$1" | tr / .)"; }

# take SUITE…: runs those that nobody else has taken.
take() {
    for suite; do
        result=$(result "$suite")
        mkdir "$result" 2>/dev/null || continue
        "$node" --disable-warning=ExperimentalWarning test/run.ts "$suite" \
            >"$result/output" 2>&1
        cat "$result/output"
    done
}

# lane LAB NET: takes suites, in a lab of its own; hosts that were up before
# are left up.
lane() (
    export OFFLOAD_LAB="$1" OFFLOAD_LAB_NET="$2"
    [ -n "$(scripts/lab/lab list)" ] || trap 'scripts/lab/lab down' EXIT
    take $suites
)

# What is published is the same under all runtimes.
suites=$(ls test/release/*.test.ts)
if [ "${1-}" = --unit ]; then
    take $suites
else
    # The largest first: a long one that began last would be waited for. What
    # takes the longest is not in the file that begins it.
    longest=test/faults/faults.test.ts
    suites=$(
        echo "$longest"
        ls -S test/*/*.test.ts | grep -vx "$longest"
    )
    if [ "${1-}" = --faults ]; then export OFFLOAD_FAULTS=.
    else suites=$(echo "$suites" | grep -v /soak)
    fi
    # Three at a time: they wait as much as they work.
    first=${OFFLOAD_LAB:-/var/cache/offload-lab}
    scripts/lab/lab roots || exit 1
    scripts/lab/lab browser || exit 1
    net=1
    for other in second third; do
        mkdir -p "$first.$other"
        ln -sfn "$first/roots" "$first.$other/roots"
        net=$((net + 1))
        lane "$first.$other" "127.0.$net" &
    done
    lane "$first" "${OFFLOAD_LAB_NET:-127.0.1}"
    wait
fi
for suite in $suites; do count "$(result "$suite")/output"; done

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

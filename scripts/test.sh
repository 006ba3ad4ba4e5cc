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
# The libraries and both runtimes, at the versions of package-lock.json.
npm ci --no-audit --no-fund --loglevel=error || exit 1
node=$PWD/node_modules/node/bin/node
deno=$(echo "$PWD"/node_modules/@deno/*/deno)

output=$(mktemp)
passed=0
failed=0
trap 'rm -f "$output"' EXIT

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

# suites COMMAND…: test suites under test/run.ts, which counts.
suites() {
    "$@" 2>&1 | tee "$output"
    counts=$(sed -n 's/^[a-z]*: \([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$output")
    if [ -z "$counts" ]; then
        echo "FAIL $*: it ended early"
        counts="0 1"
    fi
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
}

check "deno fmt" "$deno" fmt --check
check "deno lint" "$deno" lint
check "deno check" "$deno" check mod.ts plugins scripts test
check "deno doc" "$deno" doc --lint mod.ts
check "deno publish" "$deno" publish --dry-run --allow-dirty
suites "$node" --disable-warning=ExperimentalWarning test/run.ts
suites "$deno" run --allow-all test/run.ts
if [ "${1-}" != --unit ]; then
    if [ -z "$(scripts/lab/lab list)" ]; then
        trap 'rm -f "$output"; scripts/lab/lab down' EXIT
    fi
    faults=$(echo test/faults/*.test.ts)
    if [ "${1-}" = --faults ]; then export OFFLOAD_FAULTS=.
    else faults=$(echo "$faults" | tr ' ' '\n' | grep -v /soak)
    fi
    suites "$node" --disable-warning=ExperimentalWarning test/run.ts \
        test/lab/*.test.ts $faults
fi

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

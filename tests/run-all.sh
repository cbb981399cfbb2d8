#!/bin/bash
# run-all.sh: all checks and tests, each phase with its time. The last line is the total:
# "N passed, N failed, N skipped". What could not run says "SKIPPED: what: why".
#
# Unit tests and doc tests run on this machine; integration tests (the tests/ directory of a crate,
# tests/e2e among them) run as root in the KVM host, with the release build. A check counts as one.
# Logs: target/test-logs. TESTS=WORD runs only the integration tests whose name contains it.
set -euo pipefail
. "$(dirname "$0")/host/lib.sh"
cd "$REPO"
export REPO
LOGS=$TARGET/test-logs
THREADS=${HULL_TEST_THREADS:-1}
PASSED=0 FAILED=0 SKIPPED=0 BROKEN=()

main() {
    rm -rf "$LOGS"; mkdir -p "$LOGS"
    [ -n "${TESTS:-}" ] || phase checks checks
    phase build build
    [ -n "${TESTS:-}" ] || phase "guest root" guest_root
    [ -n "${TESTS:-}" ] || phase "unit tests" units
    phase "integration tests" integration
    echo
    local name
    for name in ${BROKEN[@]+"${BROKEN[@]}"}; do echo "FAILED: $name"; done
    echo "$PASSED passed, $FAILED failed, $SKIPPED skipped"
    [ "$FAILED" = 0 ]
}

# phase NAME FUNCTION: what FUNCTION cannot count itself, because it ended early, is a failure.
phase() {
    local begin=$SECONDS
    echo "=== $1"
    "$2" || fail "$1"
    echo "=== $1: $((SECONDS - begin)) s"
}

fail() { FAILED=$((FAILED + 1)); BROKEN+=("$1"); }

checks() {
    local line
    tests/checks/run.sh 2>&1 | tee "$LOGS/checks.log" || true
    while read -r line; do
        case $line in
            check\ *:\ ok) PASSED=$((PASSED + 1)) ;;
            check\ *:\ FAILED) fail "${line%:*}" ;;
        esac
    done <"$LOGS/checks.log"
    grep -q '^check ' "$LOGS/checks.log"
}

build() { make --no-print-directory build; }

# Counts as one.
guest_root() { guest-image/test-root.sh && PASSED=$((PASSED + 1)); }

units() {
    suite unit cargo test --locked --workspace --lib --bins --no-fail-fast -- --show-output
    suite doc cargo test --locked --workspace --doc --no-fail-fast -- --show-output
}

integration() {
    local images name dir program
    images=$(tests/images/build.sh)
    # The examples too: some tests run one as the other side.
    cargo test --locked --workspace --test '*' --examples --no-run --message-format=json-render-diagnostics \
        >"$LOGS/executables.json" || return 1
    # Built outside of the checkout, they must be visible too.
    case $TARGET/ in "$REPO"/*) ;; *) export SHARE=$TARGET ;; esac
    while read -r name dir program; do
        case $name in *"${TESTS:-}"*) ;; *) continue ;; esac
        HULL_TEST_IMAGES=$images suite "$name" tests/host/run.sh "
            cd $(printf %q "$dir") && CARGO_MANIFEST_DIR=\$PWD $(printf %q "$program") --test-threads=$THREADS --show-output"
    done < <(jq -r 'select(.executable and .target.kind == ["test"]) |
        (.manifest_path | rtrimstr("/Cargo.toml")) as $dir |
        ["\($dir | ltrimstr(env.REPO + "/"))/\(.target.name)", $dir, .executable] | @tsv' "$LOGS/executables.json")
}

# suite NAME CMD...: runs CMD, shows the lines that matter, and adds up what libtest reports.
suite() {
    local name=$1 log rc=0 passed failed ignored skipped; shift
    log=$LOGS/${name//\//-}.log
    echo "--- $name"
    watched "$log" "$@" || rc=$?
    # Not the tests' failure: the emulated machine itself crashes once in a few hours.
    if [ "$rc" = 125 ]; then
        echo "--- $name: the KVM host died (console: $log.died); once more in a new one"
        mv "$log" "$log.died"
        rc=0; watched "$log" "$@" || rc=$?
    fi
    read -r passed failed ignored < <(awk '/^test result: / { p += $4; f += $6; i += $8 } END { print p+0, f+0, i+0 }' "$log")
    # A test that says so and returns has passed, for libtest.
    skipped=$(grep -c '^SKIPPED: ' "$log" || true)
    PASSED=$((PASSED + passed - skipped)) FAILED=$((FAILED + failed)) SKIPPED=$((SKIPPED + ignored + skipped))
    if [ "$failed" -gt 0 ]; then
        # From the list at the end: what a child of the test prints may stand between name and result.
        mapfile -t -O ${#BROKEN[@]} BROKEN < <(awk -v suite="$name" '
            /^failures:$/ { names = "" }
            /^    [^ ]+$/ { names = names suite ": " $1 "\n" }
            /^test result: FAILED/ { printf "%s", names; names = "" }' "$log")
    elif [ "$rc" != 0 ]; then
        # Did not compile, crashed, or the KVM host did not start.
        fail "$name (exit code $rc)"
    fi
    if [ "$rc" != 0 ] || [ "$failed" -gt 0 ]; then
        echo "--- $name failed; from $log:"
        # Without backtraces: the log has them.
        sed -n '/^failures:/,$p' "$log" | grep -vE '^( +[0-9]+: | +at |stack backtrace:|$)' || tail -n 60 "$log"
    fi
}

# watched LOG CMD...: runs CMD, all of its output goes to LOG, what matters to us; its exit code is ours.
watched() {
    local log=$1; shift
    "$@" </dev/null 2>&1 | tee "$log" | { grep --line-buffered -E '^(test [^ ]|SKIPPED: |[a-z-]+\.sh: |error)' || true; }
    return "${PIPESTATUS[0]}"
}

main

#!/bin/bash
# run-all.sh: all checks and tests, each phase with its time. The last line is the total:
# "N passed, N failed, N skipped". What could not run says "SKIPPED: what: why".
#
# Unit tests and doc tests run on this machine. Integration tests (the tests/ directory of a crate,
# tests/e2e among them) run as root with the release build: those that need a microVM in the KVM host,
# the others on this machine, which is many times faster than emulation.
# A check counts as one.
# Logs: target/test-logs. TESTS=WORD runs only the integration tests whose name contains it.
#
# In the emulated KVM host the tests of a suite run in two machines at once, a half in each. They have
# one CPU each: with two, QEMU breaks about one guest of a hundred (a triple fault, or it spins for ever;
# one was looked at: its CR3 and RIP were those of the emulated host's kernel right behind VMRUN). A test
# that fails there runs once more, alone in a new machine. If it passes then, "FLAKY: suite: test"
# says so, here and at the end; its first log is kept.
set -euo pipefail
. "$(dirname "$0")/host/lib.sh"
cd "$REPO"
export REPO
LOGS=$TARGET/test-logs
THREADS=${HULL_TEST_THREADS:-1}
PASSED=0 FAILED=0 SKIPPED=0 BROKEN=()
export KVM_HOST_CPUS=${KVM_HOST_CPUS:-1}

main() {
    rm -rf "$LOGS"; mkdir -p "$LOGS"; : >"$LOGS/flaky"
    # Also when it is interrupted.
    trap 'for n in 1 2; do KVM_HOST_NAME=lane$n tests/host/kvm-host.sh stop; done' EXIT
    [ -n "${TESTS:-}" ] || phase checks checks
    phase build build
    [ -n "${TESTS:-}" ] || phase "guest root" guest_root
    [ -n "${TESTS:-}" ] || phase "unit tests" units
    phase "integration tests" integration
    echo
    local name
    sed 's/^/FLAKY: /' "$LOGS/flaky"
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
            SKIPPED:\ *) SKIPPED=$((SKIPPED + 1)) ;;
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
    local images posix name dir program tests
    images=$(tests/images/build.sh)
    posix=$(tests/posix/build.sh)
    # The examples too: some tests run one as the other side.
    cargo test --locked --workspace --test '*' --examples --no-run --message-format=json-render-diagnostics \
        >"$LOGS/executables.json" || return 1
    # Built outside of the checkout, they must be visible too.
    case $TARGET/ in "$REPO"/*) ;; *) export SHARE=$TARGET ;; esac
    while read -r name dir program; do
        case $name in *"${TESTS:-}"*) ;; *) continue ;; esac
        export HULL_TEST_IMAGES=$images HULL_POSIX=$posix
        case $name in
            agent/* | vmm/tests/* | vmm/guests | vmm/linux | tests/*)
                mapfile -t tests < <("$program" --list </dev/null | sed -n 's/: test$//p')
                with_vms "$name" "$dir" "$program" "${tests[@]}"
                ;;
            *) here "$name" "$dir" "$program" ;;
        esac
    done < <(jq -r 'select(.executable and .target.kind == ["test"]) |
        (.manifest_path | rtrimstr("/Cargo.toml")) as $dir |
        ["\($dir | ltrimstr(env.REPO + "/"))/\(.target.name)", $dir, .executable] | @tsv' "$LOGS/executables.json")
}

# in_kvm_host DIR PROGRAM [TEST...]: runs all or some tests of PROGRAM in the KVM host, in DIR.
in_kvm_host() {
    local dir=$1 program=$2; shift 2
    [ $# = 0 ] || set -- --exact "$@"
    tests/host/run.sh "cd $(printf %q "$dir") && CARGO_MANIFEST_DIR=\$PWD $(printf '%q ' "$program" "$@") \
        --test-threads=$THREADS --show-output"
}

# here NAME DIR PROGRAM: a suite that needs no microVM, on this machine; what it skips here, in the
# KVM host.
here() {
    local name=$1 log=$LOGS/${1//[\/ ]/-}.log tests; shift
    HULL_HOST=direct suite "$name" in_kvm_host "$@"
    mapfile -t tests < <(awk '/^---- / { test = $2 } /^SKIPPED: / && test { print test; test = "" }' "$log")
    [ ${#tests[@]} -gt 0 ] || return 0
    SKIPPED=$((SKIPPED - ${#tests[@]}))
    with_vms "$name, what was skipped here" "$@" "${tests[@]}"
}

# with_vms NAME DIR PROGRAM TEST...: a suite that needs microVMs, in the KVM host.
with_vms() {
    local name=$1 dir=$2 program=$3 log=$LOGS/${1//[\/ ]/-}.log rc=0 begin=$SECONDS; shift 3
    if ! is_emulated; then
        suite "$name" in_kvm_host "$dir" "$program" "$@"
        return
    fi
    echo "--- $name"
    local number lanes=()
    for number in 1 2; do
        mapfile -t tests < <(printf '%s\n' "$@" | sed -n "$number~2p")
        [ ${#tests[@]} -gt 0 ] || continue
        KVM_HOST_NAME=lane$number lane "$name" "$log.$number" "$dir" "$program" "${tests[@]}" &
        lanes+=($!)
    done
    for number in "${lanes[@]}"; do wait "$number" || rc=$?; done
    cat "$log".[12] >"$log"; rm -f "$log".[12]
    count "$name" "$log" "$rc" "$begin"
}

is_emulated() {
    [ -n "${EMULATED:-}" ] || EMULATED=$(KVM_HOST_NAME=lane1 tests/host/run.sh 'echo "$HULL_ASSETS"' 2>/dev/null </dev/null)
    [ "$EMULATED" = /opt/hull ]
}

# lane NAME LOG DIR PROGRAM TEST...: tests in one emulated machine. Those that fail run once more, and
# those that had not passed when the machine died or stood still go on in a new one.
lane() {
    local name=$1 log=$2 dir=$3 program=$4 rc=0 attempt failed; shift 4
    export KVM_HOST_NAME
    watched "$log" in_kvm_host "$dir" "$program" "$@" || rc=$?
    for attempt in 1 2 3; do
        [ "$rc" = 125 ] || break
        echo "$name: the KVM host died" >>"$LOGS/flaky"
        mv "$log" "$log.died$attempt"
        mapfile -t tests < <(printf '%s\n' "$@" | grep -vxFf <(passed_tests "$log".died*))
        echo "--- $name: the KVM host died; the other ${#tests[@]} tests in a new one. The end of $log.died$attempt:"
        { sed -n '/kvm-host.sh: the emulated KVM host died/,$p' "$log.died$attempt" | grep . || tail -n 20 "$log.died$attempt"; } | head -n 60
        rc=0; watched "$log" in_kvm_host "$dir" "$program" "${tests[@]}" || rc=$?
        # What had passed counts.
        echo "test result: ok. $(passed_tests "$log.died$attempt" | wc -l) passed; 0 failed; 0 ignored;" >>"$log"
    done
    mapfile -t failed < <(failed_tests "$log")
    # More are no accident.
    if [ "$rc" != 125 ] && [ ${#failed[@]} -gt 0 ] && [ ${#failed[@]} -le 5 ]; then
        tests/host/kvm-host.sh stop
        again "$name" "$log" "$dir" "$program" "${failed[@]}" && rc=0
    fi
    return "$rc"
}

# again NAME LOG DIR PROGRAM TEST...: runs the tests of LOG that failed once more, and puts the results
# into LOG. Succeeds if all of them pass now.
again() {
    local name=$1 log=$2 dir=$3 program=$4 rc=0 test; shift 4
    mv "$log" "$log.failed"
    echo "--- $name: once more: $*; the first time ($log.failed):"
    complaints "$log.failed"
    watched "$log.again" in_kvm_host "$dir" "$program" "$@" || rc=$?
    # What passed the first time did pass; the others count as they did now.
    awk -v n="$#" '/^test result: FAILED/ { $3 = "ok."; $6 -= n } 1' "$log.failed" | sed '/^failures:$/d' >"$log"
    cat "$log.again" >>"$log"
    if [ "$rc" = 0 ]; then for test; do echo "$name: $test" >>"$LOGS/flaky"; done; fi
    return "$rc"
}

# suite NAME CMD...: runs CMD, and adds up what libtest reports.
suite() {
    local name=$1 log=$LOGS/${1//[\/ ]/-}.log rc=0 begin=$SECONDS; shift
    echo "--- $name"
    shown "$log" "$@" || rc=$?
    count "$name" "$log" "$rc" "$begin"
}

# count NAME LOG RC BEGIN: adds up what LOG has of a suite that ended with RC.
count() {
    local name=$1 log=$2 rc=$3 begin=$4 passed failed ignored skipped
    read -r passed failed ignored < <(awk '/^test result: / { p += $4; f += $6; i += $8 } END { print p+0, f+0, i+0 }' "$log")
    # A test that says so and returns has passed, for libtest.
    skipped=$(grep -c '^SKIPPED: ' "$log" || true)
    PASSED=$((PASSED + passed - skipped)) FAILED=$((FAILED + failed)) SKIPPED=$((SKIPPED + ignored + skipped))
    if [ "$failed" -gt 0 ]; then
        mapfile -t -O ${#BROKEN[@]} BROKEN < <(failed_tests "$log" | sed "s|^|$name: |")
    elif [ "$rc" != 0 ]; then
        # Did not compile, crashed, or the KVM host did not start.
        fail "$name (exit code $rc)"
    fi
    if [ "$rc" != 0 ] || [ "$failed" -gt 0 ]; then
        echo "--- $name failed; from $log:"
        complaints "$log"
    fi
    echo "--- $name: $((SECONDS - begin)) s"
}

# Prints the names of the tests that passed, also while others ran on.
passed_tests() { sed -n 's/^test \([^ ]*\) \.\.\. ok$/\1/p' "$@"; }

# Prints the names of the tests that failed, from the list at the end: what a child of the test
# prints may stand between name and result.
failed_tests() {
    awk '/^failures:$/ { names = "" }
        /^    [^ ]+$/ { names = names $1 "\n" }
        /^test result: FAILED/ { printf "%s", names; names = "" }' "$1"
}

# Prints what failed tests said, without backtraces: the log has them.
complaints() {
    sed -n '/^failures:/,$p' "$1" | grep -vE '^( +[0-9]+: | +at |stack backtrace:|$)' || tail -n 60 "$1"
}

# shown LOG CMD...: runs CMD, all of its output goes to LOG, what matters to us; its exit code is ours.
shown() {
    local log=$1; shift
    "$@" </dev/null 2>&1 | tee "$log" | { grep --line-buffered -E '^(test [^ ]|SKIPPED: |[a-z-]+\.sh: |error)' || true; }
    return "${PIPESTATUS[0]}"
}

# watched LOG CMD...: as shown; stops the emulated host when LOG has not grown for ten minutes: no test
# is silent for so long.
watched() {
    local log=$1 rc=0 dog; shift
    : >"$log"
    stalled "$log" & dog=$!
    shown "$log" "$@" || rc=$?
    kill "$dog" 2>/dev/null || true
    return "$rc"
}

stalled() {
    trap 'kill $! 2>/dev/null; exit' TERM
    while sleep 30 & wait $!; do
        if [ -n "$(find "$1" -mmin +10)" ]; then
            echo "run-all.sh: nothing happens any more"
            tests/host/kvm-host.sh stop
            return
        fi
    done
}

main

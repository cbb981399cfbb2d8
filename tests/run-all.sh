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
# A test that failed in the emulated KVM host runs once more, alone, and up to twice more if its VM died of a
# triple fault: in QEMU's software emulation about one guest of a hundred does, or spins for ever. (One
# was looked at: its CR3 and RIP were those of the emulated host's kernel right behind VMRUN.) If it
# passes then, "FLAKY: suite: test" says so, here and at the end; its first log is kept.
set -euo pipefail
. "$(dirname "$0")/host/lib.sh"
cd "$REPO"
export REPO
LOGS=$TARGET/test-logs
THREADS=${HULL_TEST_THREADS:-1}
PASSED=0 FAILED=0 SKIPPED=0 BROKEN=() FLAKY=()

main() {
    rm -rf "$LOGS"; mkdir -p "$LOGS"
    [ -n "${TESTS:-}" ] || phase checks checks
    phase build build
    [ -n "${TESTS:-}" ] || phase "guest root" guest_root
    [ -n "${TESTS:-}" ] || phase "unit tests" units
    phase "integration tests" integration
    echo
    local name
    for name in ${FLAKY[@]+"${FLAKY[@]}"}; do echo "FLAKY: $name"; done
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
    local images posix name dir program
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
            agent/* | vmm/tests/* | vmm/guests | vmm/linux | tests/*) suite "$name" in_kvm_host "$dir" "$program" ;;
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
    suite "$name, what was skipped here" in_kvm_host "$@" "${tests[@]}"
}

# suite NAME CMD...: runs CMD, shows the lines that matter, and adds up what libtest reports.
suite() {
    local name=$1 log rc=0 begin=$SECONDS passed failed ignored skipped; shift
    log=$LOGS/${name//[\/ ]/-}.log
    echo "--- $name"
    watched "$log" "$@" || rc=$?
    resume "$name" "$log" rc "$@"
    if grep -q '^test result: FAILED' "$log" && grep -q '^run.sh: KVM host: emulated' "$log"; then
        # Of a hundred VMs one dies so: a test that starts many may meet it several times.
        local attempt
        for attempt in 1 2 3; do
            if again "$name" "$log" "$@"; then rc=0; break; fi
            grep -qs 'VM ended by itself' "$log.second" || break
        done
    fi
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

# resume NAME LOG RC CMD...: not the tests' failure: the emulated machine itself may crash or stop (exit
# code 125). Runs those tests that had not passed by then in a new one, and adds the results to LOG; RC is
# the variable with CMD's exit code. Three times at most.
resume() {
    local name=$1 log=$2 code=$3 attempt tests passed; shift 3
    for attempt in 1 2 3; do
        [ "${!code}" = 125 ] || return 0
        mapfile -t tests < <(unfinished "$log" "$@")
        passed=$(grep -c '^test [^ ]* \.\.\. ok$' "$log" || true)
        echo "--- $name: the KVM host died; the other ${#tests[@]} tests in a new one. The end of $log.died$attempt:"
        { sed -n '/kvm-host.sh: the emulated KVM host died/,$p' "$log" | grep . || tail -n 20 "$log"; } | head -n 60
        FLAKY+=("$name: the KVM host died")
        mv "$log" "$log.died$attempt"
        printf -v "$code" 0
        watched "$log.rest" "$@" "${tests[@]}" || printf -v "$code" '%s' $?
        { grep '^test [^ ]* \.\.\. ok$' "$log.died$attempt" || true
          [ "$passed" = 0 ] || echo "test result: ok. $passed passed; 0 failed; 0 ignored;"
          cat "$log.rest"; } >"$log"
    done
}

# unfinished LOG CMD...: prints the tests of CMD that LOG does not say have passed.
unfinished() {
    local log=$1; shift
    "$@" --list </dev/null 2>/dev/null | sed -n 's/: test$//p' | grep -vxFf <(sed -n 's/^test \([^ ]*\) \.\.\. ok$/\1/p' "$log")
}

# again NAME LOG CMD...: runs the tests of LOG that failed once more, and puts the results into LOG.
# Succeeds if all of them pass now.
again() {
    local name=$1 log=$2 rc=0 attempt tests count test; shift 2
    mapfile -t tests < <(failed_tests "$log")
    count=${#tests[@]}
    # That many are no accident.
    [ "$count" -gt 0 ] && [ "$count" -le 5 ] || return 1
    echo "--- $name: once more: ${tests[*]}; the first time ($log.first):"
    mv "$log" "$log.first"
    complaints "$log.first"
    # Slower, but with one CPU QEMU does nothing at the same time: no guest of such a machine was seen
    # to die yet.
    local -x KVM_HOST_CPUS=1
    tests/host/kvm-host.sh stop
    for attempt in 1 2 3; do
        rc=0; watched "$log.second" "$@" "${tests[@]}" || rc=$?
        [ "$rc" = 125 ] || break
        echo "--- $name: the KVM host died; once more in a new one"
    done
    tests/host/kvm-host.sh stop
    if [ "$rc" = 0 ]; then
        for test in "${tests[@]}"; do FLAKY+=("$name: $test"); done
        # All but those passed the first time, and those the second.
        awk -v n="$count" '/^test result: FAILED/ { $3 = "ok."; $4 += n; $6 -= n } 1' "$log.first" >"$log"
    else
        # The second run's failures count; what passed the first time did pass.
        awk -v n="$count" '/^test result: FAILED/ { $3 = "ok."; $6 -= n } 1' "$log.first" >"$log"
        cat "$log.second" >>"$log"
    fi
    return "$rc"
}

# watched LOG CMD...: runs CMD, all of its output goes to LOG, what matters to us; its exit code is ours.
watched() {
    local log=$1 rc=0 dog; shift
    : >"$log"
    stalled "$log" & dog=$!
    "$@" </dev/null 2>&1 | tee "$log" | { grep --line-buffered -E '^(test [^ ]|SKIPPED: |[a-z-]+\.sh: |error)' || true; }
    rc=${PIPESTATUS[0]}
    kill "$dog" 2>/dev/null || true
    return "$rc"
}

# Stops the emulated host when LOG has not grown for six minutes: no test and no compiler is silent for
# so long.
stalled() {
    trap 'kill $! 2>/dev/null; exit' TERM
    while sleep 30 & wait $!; do
        if [ -n "$(find "$1" -mmin +6)" ]; then
            echo "run-all.sh: nothing happens any more"
            tests/host/kvm-host.sh stop
            return
        fi
    done
}

main

#!/bin/bash
# run-all.sh: all checks and tests, each phase with its time. The last line is the total:
# "N passed, N failed, N skipped". What could not run says "SKIPPED: what: why".
#
# cargo-nextest runs the tests, each in a process of its own (.config/nextest.toml says which and how).
# Unit tests, and the integration tests (the tests/ directory of a crate) that need no microVM, run on
# this machine, which is many times faster than emulation. The other integration tests, tests/e2e among
# them, run as root with the release build in the KVM host, and so does what was skipped here.
# A check counts as one.
# Logs and JUnit reports: target/test-logs. TESTS=WORD runs only the integration tests whose name, or
# whose suite's, contains it.
#
# Where KVM is emulated, tests run in two machines at once. They have one CPU each: with two, QEMU breaks
# about one guest of a hundred (a triple fault, or it spins for ever; one was looked at: its CR3 and RIP
# were those of the emulated host's kernel right behind VMRUN). A test that fails there, or whose machine
# dies under it, runs once more in a new one. If it passes then, "FLAKY: suite: test" says so at the end.
set -euo pipefail
. "$(dirname "$0")/host/lib.sh"
cd "$REPO"
LOGS=$TARGET/test-logs
PASSED=0 FAILED=0 SKIPPED=0 BROKEN=()
REPORTS=()
export KVM_HOST_CPUS=${KVM_HOST_CPUS:-1}

main() {
    rm -rf "$LOGS"; mkdir -p "$LOGS"
    # Also when it is interrupted.
    trap 'pkill -f "^$TARGET/simulate/examples/simulate " || true
          for n in 0 1; do KVM_HOST_NAME=machine$n tests/host/kvm-host.sh stop; done' EXIT
    [ -n "${TESTS:-}" ] || phase checks checks
    phase build build
    [ -n "${TESTS:-}" ] || phase "guest root" guest_root
    [ -n "${TESTS:-}" ] || phase "doc tests" docs
    phase "tests: build" compile
    [ -n "${TESTS:-}" ] || simulation >"$LOGS/simulation.log" 2>&1 & SIMULATION=$!
    phase "tests on this machine" here
    phase "tests with microVMs" with_vms
    [ -n "${TESTS:-}" ] || phase simulation simulated
    [ -n "${TESTS:-}" ] || phase "system calls" calls
    [ -n "${TESTS:-}" ] || phase demo demo
    echo
    total
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

# Nextest does not run them. Counts as one.
docs() { cargo test --locked --quiet --workspace --doc >"$LOGS/docs.log" 2>&1 && PASSED=$((PASSED + 1)) || { cat "$LOGS/docs.log"; return 1; }; }

# What is run is compiled once; the examples too: some tests run one as the other side.
compile() {
    HULL_TEST_IMAGES=$(tests/images/build.sh) || return
    HULL_POSIX=$(tests/posix/build.sh) || return
    export HULL_TEST_IMAGES HULL_POSIX
    tests/host/install.sh cargo-tools grpcio prometheus || return
    cargo metadata --format-version 1 --locked >"$LOGS/workspace.json" || return
    "$TOOLS/cargo/bin/cargo-nextest" nextest list --locked --workspace --lib --bins --tests --examples --cargo-quiet \
        --list-type binaries-only --message-format json >"$LOGS/binaries.json"
}

here() {
    [ -s "$LOGS/binaries.json" ] || return
    HULL_HOST=direct nextest here "default()"
}

# A node under 2,000 seeds (`make simulate` has more), when the tests beside it leave processors idle: also those
# of the emulator, whose session is another, so that it takes more than to be nice (sched(7), "The autogroup feature").
simulation() {
    nice -n 19 cargo build --locked --profile simulate -p hull-pod --example simulate || return
    # shellcheck disable=SC2016 # expands there
    setsid --wait sh -c 'echo 19 >/proc/self/autogroup 2>/dev/null; exec nice -n 19 "$@"' sh \
        "$TARGET/simulate/examples/simulate" 1 2000
}

# Counts as one.
simulated() { wait "$SIMULATION" && PASSED=$((PASSED + 1)) || { cat "$LOGS/simulation.log"; return 1; }; }

with_vms() {
    local wanted skipped
    [ -s "$LOGS/binaries.json" ] || return
    wanted="default()"
    skipped=$(tests/results --skipped "${REPORTS[@]}")
    [ -z "$skipped" ] || wanted+=" + $skipped"
    if ! is_emulated; then
        nextest vm "$wanted" tests/host/count-calls.sh while "$LOGS/calls"
        tests/host/run.sh tests/host/count-calls.sh end
        return
    fi
    # Built outside of the checkout, the tests must be visible in the machines too.
    case $TARGET/ in "$REPO"/*) ;; *) export SHARE=$TARGET ;; esac
    local number machines=()
    for number in 0 1; do KVM_HOST_NAME=machine$number tests/host/kvm-host.sh exec true & machines+=($!); done
    wait "${machines[@]}"
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$REPO/tests/host/nextest-runner.sh HULL_HOST=direct \
        HULL_CALLS=$LOGS/calls nextest emulated "$wanted"
}

# What lists of system calls allow and no test with microVMs needed. Counts as one.
calls() {
    { "$ASSETS/hull-vmm" syscalls && "$ASSETS/hull-fs" syscalls; } >"$LOGS/lists" || return
    if [ -z "$(find "$LOGS" -name 'calls.*' -size +0)" ]; then
        echo "SKIPPED: lists of system calls: the KVM host's kernel does not trace them"
        SKIPPED=$((SKIPPED + 1))
    elif tests/checks/syscalls "$LOGS/lists" "$LOGS"/calls.*; then
        PASSED=$((PASSED + 1))
    else
        fail "lists of system calls"
    fi
}

# What the README has a newcomer run. Counts as one.
demo() {
    KVM_HOST_NAME=machine0 tests/demo.sh >"$LOGS/demo.log" 2>&1 </dev/null && PASSED=$((PASSED + 1)) || { cat "$LOGS/demo.log"; return 1; }
}

is_emulated() { [ "$(KVM_HOST_NAME=machine0 tests/host/run.sh 'echo "$HULL_ASSETS"' </dev/null)" = /opt/hull ]; }

# nextest PROFILE FILTER [CMD...]: runs tests, below CMD, and keeps their report.
nextest() {
    local report=$REPO/target/nextest/$1/junit.xml rc=0 filter=$2 suites
    if [ -n "${TESTS:-}" ]; then
        suites=$(jq -r '."rust-binaries" | keys[]' "$LOGS/binaries.json" | grep -F "$TESTS" | sed 's/.*/ + binary_id(=&)/' || true)
        filter="($filter) & kind(test) & (test($TESTS) $suites)"
    fi
    rm -f "$report"
    tests/host/run.sh "${@:3}" "$TOOLS/cargo/bin/cargo-nextest" nextest run --profile "$1" --no-tests pass \
        --binaries-metadata "$LOGS/binaries.json" --cargo-metadata "$LOGS/workspace.json" \
        --ignore-default-filter -E "$filter" --color never --show-progress none </dev/null 2>&1 | tee "$LOGS/$1.log" || rc=$?
    if [ -f "$report" ]; then
        cp "$report" "$LOGS/$1.xml"
        REPORTS+=("$LOGS/$1.xml")
    fi
    # 100: a test failed, which its report tells.
    [ "$rc" = 0 ] || [ "$rc" = 100 ]
}

total() {
    local name line
    for name in ${BROKEN[@]+"${BROKEN[@]}"}; do echo "FAILED: $name"; done
    if [ ${#REPORTS[@]} -gt 0 ]; then
        while read -r line; do
            if [[ $line =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed,\ ([0-9]+)\ skipped$ ]]; then
                PASSED=$((PASSED + BASH_REMATCH[1]))
                FAILED=$((FAILED + BASH_REMATCH[2]))
                SKIPPED=$((SKIPPED + BASH_REMATCH[3]))
            else
                echo "$line"
            fi
        done < <(tests/results "${REPORTS[@]}")
    fi
    echo "$PASSED passed, $FAILED failed, $SKIPPED skipped"
}

main

#!/bin/bash
# exec.sh: what a running container answers: in a clone of a template, in a pod whose VM boots, and in Debian's containerd
# and runc, in turn in the same KVM host; ROUNDS of COMMANDS each. Lines are
#   bench exec-NAME hull=… peer=… ratio=… target=… ok|short
# hull is the clone, cold-NAME the pod that boots, peer containerd; a ratio below 1 is in Hull's favour.
#
#   true, true-p90    ExecSync of `true`, ms: median, and what nine of ten take at most
#   output            ExecSync of a command that prints 1 MiB, ms
#   log               4 MiB of lines of 100 bytes through a container's log, ms, until the last is there
#   log-cpu           time of all CPUs meanwhile, ms, of the host and of what runs on it
#   stats             ListContainerStats of CONTAINERS containers, ms
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
. "$REPO/tests/bench/modes.sh"
ROUNDS=${ROUNDS:-3} COMMANDS=${COMMANDS:-10} CONTAINERS=${CONTAINERS:-20} BENCH=exec

outside() {
    HULL_ROUNDS=$ROUNDS HULL_COMMANDS=$COMMANDS HULL_CONTAINERS=$CONTAINERS run_in_host tests/bench/exec.sh
}

# In the KVM host, as root.
inside() {
    set_up_modes
    start_modes
    local mode round
    for ((round = 0; round < HULL_ROUNDS; round++)); do
        for mode in "${MODES[@]}"; do measure "$mode" "$round"; done
    done
    for mode in "${MODES[@]}"; do stats "$mode"; done
    report
}

measure() {
    local mode=$1 number begin
    pod "$mode" "$2"
    container "$mode" "$2" sleep 1000000
    # The first reads the program.
    at "$mode" exec --sync "$CONTAINER" -- true
    for ((number = 0; number < HULL_COMMANDS; number++)); do
        timed "$mode" true at "$mode" exec --sync "$CONTAINER" -- true
    done
    timed "$mode" output at "$mode" exec --sync "$CONTAINER" -- sh -c 'yes 0123456789abcdef | head -c 1048576' >/dev/null
    begin=$(busy)
    timed "$mode" log write_log "$mode" "$2-log"
    note "$mode" log-cpu $((($(busy) - begin) * 10))
    end_pod "$mode" "$POD"
}

# What of the CPUs' time was not idle, in hundredths of a second.
busy() { awk '$1 == "cpu" { print $2 + $3 + $4 + $7 + $8 }' /proc/stat; }

write_log() {
    local log=$DIR/logs/$1-$2.log
    cp "$DIR/$1-${2%-log}.pod" "$DIR/$1-$2.pod"
    container "$1" "$2" sh -c 'line=$(printf %099d 0); yes "$line" | head -n 41943; echo the last'
    for _ in {1..3000}; do
        if tail -n 1 "$log" 2>/dev/null | grep -q ' the last$'; then return 0; fi
        sleep 0.05
    done
    die "the log of $1 does not end"
}

stats() {
    local mode=$1 number
    pod "$mode" stats
    for ((number = 0; number < HULL_CONTAINERS; number++)); do
        describe "$mode-stats-$number" sleep 1000000
        at "$mode" start "$(at "$mode" create "$POD" "$DIR/container.json" "$DIR/$mode-stats.pod")" >/dev/null
    done
    for _ in {1..5}; do timed "$mode" stats at "$mode" stats >/dev/null; done
    end_pod "$mode" "$POD"
}

report() {
    local figure mode prefix
    for mode in clone cold; do
        prefix=''
        [ $mode = clone ] || prefix=cold-
        at_most "${prefix}true" "$(median $mode true)" "$(median containerd true)" 0.4
        at_most "${prefix}true-p90" "$(percentile $mode true 90)" "$(percentile containerd true 90)"
        for figure in output log log-cpu stats; do
            at_most "$prefix$figure" "$(median $mode $figure)" "$(median containerd $figure)"
        done
    done
    return $SHORT
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

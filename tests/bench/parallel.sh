#!/bin/bash
# parallel.sh: pods that are asked for at once: clones of a template, pods whose VM boots, and Debian's containerd and runc,
# one after another in the same KVM host. COUNTS of pods (1 10 50) at once, each a RunPodSandbox; all are removed before
# the next. Lines are
#   bench parallel-NAME hull=… peer=… ratio=… target=… ok|short
#
#   rate-N, cold-rate-N  pods per second of N at once. hull is the clone, or the one that boots; peer containerd. A ratio
#                        above 1 is in Hull's favour
#   p50-N, p99-N, cold-…  how long the call of one of them took, ms: below 1 is in Hull's favour
#   after-N              how long one pod takes when N clones are there, ms; the peer is that beside none
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
. "$REPO/tests/bench/modes.sh"
COUNTS=${COUNTS:-1 10 50} BENCH=parallel

outside() {
    HULL_COUNTS=$COUNTS run_in_host tests/bench/parallel.sh
}

# In the KVM host, as root.
inside() {
    set_up_modes
    # Emulated, guests boot one after another.
    start_modes 'boot_timeout_seconds = 3600'
    local mode count
    for mode in "${MODES[@]}"; do
        for count in $HULL_COUNTS; do at_once "$mode" "$count"; done
    done
    report
}

# at_once MODE COUNT
at_once() {
    local mode=$1 count=$2 number begin pids=() pid
    begin=$(now)
    for ((number = 0; number < count; number++)); do
        (timed "$mode" "call-$count" pod "$mode" "$count-$number") & pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || die "a pod of $mode failed"; done
    note "$mode" "rate-$count" "$(awk -v n="$count" -v ns=$(($(now) - begin)) 'BEGIN { printf "%.3f", n * 1e9 / ns }')"
    if [ "$mode" = clone ]; then
        timed clone "after-$count" pod clone "$count-after"
        end_pod clone "$POD"
    fi
    pids=()
    for POD in $(at "$mode" pods --quiet); do end_pod "$mode" "$POD" & pids+=($!); done
    for pid in "${pids[@]}"; do wait "$pid" || die "a pod of $mode can't be ended"; done
}

report() {
    local count prefix mode percent
    for count in $HULL_COUNTS; do
        for mode in clone cold; do
            prefix=''
            [ $mode = clone ] || prefix=cold-
            at_most "${prefix}rate-$count" "$(median $mode "rate-$count")" "$(median containerd "rate-$count")"
            for percent in 50 99; do
                at_most "${prefix}p$percent-$count" "$(percentile $mode "call-$count" $percent)" \
                    "$(percentile containerd "call-$count" $percent)"
            done
        done
        at_most "after-$count" "$(median clone "after-$count")" "$(median clone call-1)"
    done
    return $SHORT
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

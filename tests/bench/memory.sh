#!/bin/bash
# memory.sh: what idle pods take of a host: clones of a template, pods whose VM boots, and Debian's containerd and runc,
# one after another in the same KVM host. COUNTS of pods (1 10 50), without limits and without containers. Lines are
#   bench memory-NAME hull=… peer=… ratio=… target=… ok|short
# in KiB.
#
#   host-N, cold-host-N  what each of N pods takes of the whole host: all but page cache, and with its memory that is
#                        shared; 5 s after the last is up. hull is the clone, or the one that boots; peer containerd
#   pss-N, cold-pss-N    likewise: of that the memory of its processes (PSS without files)
#   guest                what a clone has written of its guest's memory;  vmm  what a VMM has for itself: heap, stacks, its
#                        own data. Medians of all, with the most pods;  cold-…  likewise
#   template             what the template of all clones takes, once
#   daemon, daemon-N     what the daemon has (PSS) with no pods, and with so many clones
#   peak-over            what a clone keeps of a program's PEAK MiB (1024) that has ended;  peak-time  ms after its end until
#                        that was less than 32 MiB, at most 60 s
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
. "$REPO/tests/bench/modes.sh"
COUNTS=${COUNTS:-1 10 50} PEAK=${PEAK:-1024} BENCH=memory

outside() {
    HULL_COUNTS=$COUNTS HULL_PEAK=$PEAK run_in_host tests/bench/memory.sh
}

# In the KVM host, as root.
inside() {
    set_up_modes
    start_modes
    local mode
    note clone daemon "$(pss "${DAEMONS[1]}")"
    for mode in "${MODES[@]}"; do fill "$mode"; done
    note clone template $(($(stat -L -c %b "$(template)") / 2))
    peak
    report
}

# fill MODE: pods, until there are as many as the most of COUNTS; then none.
fill() {
    local mode=$1 before wanted ids=() pid
    sleep 5
    before=$(used)
    for wanted in $HULL_COUNTS; do
        while [ ${#ids[@]} -lt "$wanted" ]; do
            pod "$mode" "$wanted-${#ids[@]}"
            ids+=("$POD")
        done
        sleep 5
        note "$mode" "host-$wanted" $((($(used) - before) / wanted))
        # shellcheck disable=SC2046 # A list of pids.
        note "$mode" "pss-$wanted" $(($(pss $(processes "$mode")) / wanted))
        [ "$mode" != clone ] || note clone "daemon-$wanted" "$(pss "${DAEMONS[1]}")"
    done
    [ "$mode" = containerd ] || for pid in $(processes "$mode"); do
        note "$mode" guest "$(private guest "$pid")"
        note "$mode" vmm "$(private vmm "$pid")"
    done
    for POD in "${ids[@]}"; do end_pod "$mode" "$POD"; done
}

# All that is in memory but page cache, which is of files; KiB.
used() {
    sync
    echo 1 >/proc/sys/vm/drop_caches
    awk '{ v[$1] = $2 } END { print v["MemTotal:"] - v["MemFree:"] - v["Cached:"] - v["Buffers:"] + v["Shmem:"] }' /proc/meminfo
}

# The pids of all pods' processes. A shim's children are those of its pod.
processes() {
    local pid
    case $1 in
        containerd)
            for pid in $(pgrep -f "containerd-shim.* -address $DIR/containerd.sock" || true); do
                echo "$pid"
                pgrep -P "$pid" || true
            done ;;
        *) pgrep -f "hull-(vmm|fs) .*$DIR/$1/" || true ;;
    esac
}

# pss PID...: what of processes' memory is no file's, KiB.
pss() {
    local pid
    for pid; do cat "/proc/$pid/smaps_rollup" 2>/dev/null || true; done | awk '/^Pss_(Anon|Shmem):/ { sum += $2 } END { print sum + 0 }'
}

# private guest|vmm PID: what a VMM's process has written of its guest's memory, and what else it has, KiB. A guest's
# memory is in mappings of more than 8 MiB, which the VMM has for nothing else; that of a clone is what is mapped of
# the template's, and what took the place of a part of it.
private() {
    local low high range
    range=$(awk '/ \/memfd:template-memory/ { split($1, ends, "-"); if (low == "") low = ends[1]; high = ends[2] }
        END { print low, high }' "/proc/$2/smaps")
    read -r low high <<<"$range"
    # Addresses are of one length, so that they compare as text.
    awk -v wanted="$1" -v low="${low:-}" -v high="${high:-}" '
        /^[0-9a-f]+-[0-9a-f]+ / { split($1, ends, "-"); is_guest = low != "" && ends[1] >= low && ends[2] <= high }
        $1 == "Size:" { is_guest = is_guest || $2 > 8192 }
        $1 == "Private_Dirty:" { sum[is_guest ? "guest" : "vmm"] += $2 }
        END { print sum[wanted] + 0 }' "/proc/$2/smaps"
}

# A program that takes PEAK MiB and ends.
peak() {
    local vmm before begin over
    pod clone peak
    container clone peak sleep 1000000
    vmm=$(pgrep -f "hull-vmm.*$POD")
    sleep 5
    before=$(rss "$vmm")
    # It takes as much as its block, and writes all of it.
    at clone exec --sync "$CONTAINER" -- dd if=/dev/zero of=/dev/null bs="${HULL_PEAK}M" count=1 >/dev/null 2>&1 ||
        die "the program of $HULL_PEAK MiB failed"
    begin=$(now)
    note clone peak-over-at-end $(($(rss "$vmm") - before))
    while over=$(($(rss "$vmm") - before)) && [ "$over" -ge 32768 ] && [ $(($(now) - begin)) -lt 60000000000 ]; do sleep 0.2; done
    note clone peak-over "$over"
    note clone peak-time $((($(now) - begin) / 1000000))
    end_pod clone "$POD"
}

rss() { awk '$1 == "VmRSS:" { print $2 }' "/proc/$1/status"; }

report() {
    local count target last=${HULL_COUNTS##* }
    for count in $HULL_COUNTS; do
        at_most "host-$count" "$(median clone "host-$count")" "$(median containerd "host-$count")"
        at_most "pss-$count" "$(median clone "pss-$count")" "$(median containerd "pss-$count")"
        at_most "cold-host-$count" "$(median cold "host-$count")" "$(median containerd "host-$count")"
        at_most "cold-pss-$count" "$(median cold "pss-$count")" "$(median containerd "pss-$count")"
    done
    held "each-of-$last" "$(median clone "host-$last")" 12288
    held guest "$(median clone guest)" 8192
    held vmm "$(median clone vmm)" 3072
    held cold-guest "$(median cold guest)"
    held cold-vmm "$(median cold vmm)" 3072
    held template "$(median clone template)"
    held daemon "$(median clone daemon)"
    for count in $HULL_COUNTS; do held "daemon-$count" "$(median clone "daemon-$count")"; done
    held peak-over-at-end "$(median clone peak-over-at-end)"
    held peak-over "$(median clone peak-over)" 32768
    held peak-time "$(median clone peak-time)" 30000
    return $SHORT
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

#!/bin/bash
# pods.sh: what a pod costs whose VM boots, and one whose VM is a clone of a template. Two daemons in the same
# KVM host, one with `[vm] template = true`; ROUNDS pods of each, in turn, one at a time, with a bridge of CNI.
# Lines are
#   bench pods-NAME hull=… peer=… ratio=… target=… ok|short
# where hull is the clone and peer the pod that boots: medians, times in ms.
#
#   RunPodSandbox     time of the call
#   stage-NAME        its parts as the daemon measures them: network, spawn (the VMM's process until it answers)
#                     and scratch are side by side; vm (configured, or restored, and started), agent (until it
#                     answers, or was woken and has its cards) and configure follow
#   exits             exits to KVM until the pod is up;  faults  page faults of the VMM's process (minor)
#   private           what the VMM has written and shares with nobody, KiB, 3 s after it was up;  mapped  with what
#                     it shares or could (RSS);  template  what the template of all clones has, once
#   create, start, exec, end
#                     CreateContainer, StartContainer, ExecSync of `true`, and StopPodSandbox with
#                     RemovePodSandbox
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
ROUNDS=${ROUNDS:-5}

outside() {
    local images
    images=$("$REPO/tests/images/build.sh")
    HULL_TEST_IMAGES=$images HULL_ROUNDS=$ROUNDS "$REPO/tests/host/run.sh" "$REPO/tests/bench/pods.sh" inside
}

# In the KVM host, as root.
inside() {
    DIR=$(mktemp -d /tmp/bench.XXXXXX)
    trap clean_up EXIT
    trap 'exit 143' TERM INT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" bench.registry
    local mode number DAEMON
    DAEMONS=()
    for mode in cold clone; do
        mkdir "$DIR/$mode"
        sed "s|^root = .*|root = \"$DIR/$mode/root\"|; s|^state = .*|state = \"$DIR/$mode/s\"|
             s|^listen = .*|listen = \"$DIR/$mode/hull.sock\"|" "$DIR/hull.toml" >"$DIR/$mode/hull.toml"
        [ $mode = cold ] || printf '[vm]\ntemplate = true\n' >>"$DIR/$mode/hull.toml"
        start_daemon "$DIR/$mode" || die "hull serve does not answer"
        DAEMONS+=("$DAEMON")
        at $mode pull bench.registry/demo/busybox:latest >/dev/null
        # The first pod of a node is not one of those that are measured: it fills caches, and has the template made.
        pod $mode 0; end $mode
    done
    for _ in {1..600}; do
        [ "$(at clone info | jq '.info.info | fromjson.templates.ready')" = 0 ] || break
        sleep 0.2
    done
    for ((number = 1; number <= HULL_ROUNDS; number++)); do
        for mode in cold clone; do measure $mode "$number"; done
    done
    [ "$(at clone info | jq '.info.info | fromjson.templates.clones')" = "$HULL_ROUNDS" ] || die "not all are clones"
    note clone template $(($(stat -L -c %b "$(template)") / 2))
    report
}

# The file with the template's memory, which the daemon of the clones holds.
template() { find "/proc/${DAEMONS[1]}/fd" -lname '/memfd:template-memory*' -print -quit; }

# at MODE COMMAND...: asks that daemon.
at() { local mode=$1; shift; hull-cri -r "$DIR/$mode/hull.sock" "$@"; }
note() { echo "$2 $3" >>"$DIR/$1.figures"; }
# timed MODE FIGURE COMMAND...: notes how long a call took, and prints what it prints.
timed() {
    local mode=$1 figure=$2 begin; shift 2
    begin=$(now)
    at "$mode" "$@"
    note "$mode" "$figure" "$(awk -v ns=$(($(now) - begin)) 'BEGIN { printf "%.1f", ns / 1e6 }')"
}

# pod MODE NUMBER: runs one; sets POD.
pod() {
    cat >"$DIR/pod.json" <<J
{"metadata": {"name": "$1-$2", "uid": "$1-$2", "namespace": "bench", "attempt": 0}, "log_directory": "$DIR/logs", "linux": {}}
J
    POD=$(at "$1" runp "$DIR/pod.json")
}

end() { at "$1" stopp "$POD" >/dev/null && at "$1" rmp "$POD" >/dev/null; }

measure() {
    local mode=$1 number=$2 begin vmm container info
    begin=$(now)
    pod "$mode" "$number"
    note "$mode" RunPodSandbox "$(awk -v ns=$(($(now) - begin)) 'BEGIN { printf "%.1f", ns / 1e6 }')"
    vmm=$(pgrep -f "hull-vmm.*$POD")
    note "$mode" exits "$(cat /sys/kernel/debug/kvm/"$vmm"-*/exits)"
    note "$mode" faults "$(sed 's/.*) //' "/proc/$vmm/stat" | cut -d ' ' -f 8)"
    info=$(at "$mode" inspectp "$POD")
    jq -r '.info.info | fromjson.bootMicroseconds | to_entries[] | "stage-\(.key) \(.value / 1000)"' \
        <<<"$info" >>"$DIR/$mode.figures"
    jq -r '.info.info | fromjson.metrics | (.start_ns[] | "vmm-\(.[0]) \(.[1] / 1000000)")' \
        <<<"$info" >>"$DIR/$mode.figures" 2>/dev/null || true
    sleep 3
    # What is mapped of the template counts as private while no other clone is there, so it is not that.
    note "$mode" private "$(awk '$1 == "Anonymous:" { print $2 }' "/proc/$vmm/smaps_rollup")"
    note "$mode" mapped "$(awk '$1 == "Rss:" { print $2 }' "/proc/$vmm/smaps_rollup")"
    cat >"$DIR/container.json" <<J
{"metadata": {"name": "main", "attempt": 0}, "image": {"image": "bench.registry/demo/busybox:latest"},
 "log_path": "$mode-$number.log", "command": ["sleep", "1000"]}
J
    container=$(timed "$mode" create create "$POD" "$DIR/container.json" "$DIR/pod.json")
    timed "$mode" start start "$container" >/dev/null
    timed "$mode" exec exec "$container" -- true
    begin=$(now)
    end "$mode"
    note "$mode" end "$(awk -v ns=$(($(now) - begin)) 'BEGIN { printf "%.1f", ns / 1e6 }')"
}

report() {
    local figure clone cold
    for figure in $(cut -d ' ' -f 1 "$DIR/clone.figures" "$DIR/cold.figures" | sort -u); do
        clone=$(median clone "$figure") cold=$(median cold "$figure")
        case $figure in
            private) tell "$figure" "$clone" "$cold" 8192 "$clone" ;;
            *) tell "$figure" "$clone" "$cold" ;;
        esac
    done
}

# tell NAME CLONE COLD [TARGET VALUE]: the value may be at most the target.
tell() {
    local word=ok
    [ $# -lt 5 ] || awk -v v="$5" -v t="$4" 'BEGIN { exit !(v <= t) }' || word=short
    echo "bench pods-$1 hull=${2:-none} peer=${3:-none} ratio=$(ratio "${2:-0}" "${3:-0}") target=${4:-none} $word"
}

clean_up() {
    local mode pod
    for mode in cold clone; do
        while read -r pod; do
            { at $mode stopp "$pod" && at $mode rmp "$pod"; } >/dev/null || true
        done < <(at $mode pods --quiet 2>/dev/null || true)
        [ -z "${HULL_BENCH_KEEP:-}" ] || cp "$DIR/$mode/hull.log" "$HULL_BENCH_KEEP/$mode.log" || true
    done
    kill "${DAEMONS[@]}" 2>/dev/null || true
    wait "${DAEMONS[@]}" 2>/dev/null || true
    DAEMON='' take_down_node "$DIR"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

#!/bin/bash
# neighbours.sh: how much longer a pod waits while another makes noise. Two pods, weighted as kubelet has
# them: the one that is measured as a pod that requests one CPU, the noisy one as one without requests.
#
#   start   create and start a container, until its first line is in its log, ms
#   exec    a command in a running container, ms
#   log     a line through a running container to its log, with the command that has it written, ms
#     cpu         loops on each CPU                      memory   a process that takes all, again and again
#     disk        writes and syncs its quota             network  datagrams, as fast as it can
#     interrupts  timers, as fast as they fire           logs     output, as fast as it can
#     forks       processes that end at once             threads  a fork bomb
#
# Medians of ROUNDS. Lines are
#   bench neighbours-NOISE-FIGURE hull=(with noise) peer=(without) ratio=… target=0.5 ok|short
# where a ratio of 0.5 is twice as long. The others:
#
#   limit-cpu      what a pod with a CPU limit of a fifth uses of a CPU, all of its threads together, percent
#   limit-outside  threads of its VMM and file server that are in another cgroup
#   limit-memory   what it has at most, MiB, with a limit of MEMORY_MIB on its parent
#   NOISE-cpu-WHO  what the daemon, the quiet and the noisy pod use of a CPU meanwhile, percent
#   daemon-memory  what the daemon has more after the logs' noise, MiB;  log-rate: what it wrote, MB/s
#
# Exit code 1 if one is short of its target.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
ROUNDS=${ROUNDS:-5} NOISES=${NOISES:-cpu memory disk network interrupts logs forks threads}
CGROUPS=/sys/fs/cgroup MEMORY_MIB=160

outside() {
    local images tools
    images=$("$REPO/tests/images/build.sh")
    tools=$("$REPO/tests/posix/build.sh")
    HULL_TEST_IMAGES=$images HULL_POSIX=$tools HULL_ROUNDS=$ROUNDS HULL_NOISES=$NOISES \
        "$REPO/tests/host/run.sh" "$REPO/tests/bench/neighbours.sh" inside
}

# In the KVM host, as root.
inside() {
    DIR=$(mktemp -d /tmp/bench.XXXXXX) SHORT=0
    trap 'take_down_node "$DIR"; remove_cgroups' EXIT
    trap 'exit 143' TERM INT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" bench.registry
    printf '[vm]\nmemory_mib = 128\nscratch_mib = 64\n' >>"$DIR/hull.toml"
    start_daemon "$DIR" || die "hull serve does not answer"
    cri pull bench.registry/demo/busybox:latest >/dev/null
    # As kubelet: a request of one CPU, and none.
    cgroup quiet cpu.weight 39
    cgroup noisy cpu.weight 1
    cgroup noisy memory.max $((MEMORY_MIB << 20))
    pod quiet; pod noisy
    # What the first line of a container waits for is the container, not the image.
    # shellcheck disable=SC2016 # the container's variables
    container quiet main 'mkfifo /f; while :; do read -r line </f && echo "$line"; done'
    measure without
    used without
    local noise
    for noise in $HULL_NOISES; do with_noise "$noise"; done
    limits
    return $SHORT
}

# cgroup NAME FILE VALUE
cgroup() {
    mkdir -p "$CGROUPS/bench/$1"
    echo "+cpu +memory +pids" >"$CGROUPS/cgroup.subtree_control"
    echo "+cpu +memory +pids" >"$CGROUPS/bench/cgroup.subtree_control"
    echo "$3" >"$CGROUPS/bench/$1/$2"
}

remove_cgroups() { rmdir "$CGROUPS"/bench/* "$CGROUPS/bench" 2>/dev/null || true; }

# pod NAME: runs it below the cgroup of its name.
pod() {
    mkdir -p "$DIR/logs/$1"
    cat >"$DIR/$1.pod" <<J
{"metadata": {"name": "$1", "uid": "$1", "namespace": "bench", "attempt": 0},
 "log_directory": "$DIR/logs/$1", "linux": {"cgroup_parent": "/bench/$1"}}
J
    cri runp "$DIR/$1.pod" >"$DIR/$1.id"
}

# container POD NAME SCRIPT: starts it. The noisy pod's have its tools.
container() {
    jq -n --arg pod "$1" --arg name "$2" --arg script "$3" --arg tools "$HULL_POSIX" '{
        metadata: {name: $name, attempt: 0}, image: {image: "bench.registry/demo/busybox:latest"},
        command: ["/bin/sh", "-c", $script], log_path: ($name + ".log"),
        mounts: (if $pod == "noisy" then [{container_path: "/tools", host_path: $tools, readonly: true}] else [] end)
    }' >"$DIR/$2.container"
    cri create "$(cat "$DIR/$1.id")" "$DIR/$2.container" "$DIR/$1.pod" >"$DIR/$2.cid"
    cri start "$(cat "$DIR/$2.cid")" >/dev/null
}

remove() { cri stop --timeout 0 "$(cat "$DIR/$1.cid")" >/dev/null; cri rm "$(cat "$DIR/$1.cid")" >/dev/null; }

# measure PEER: appends to its figures.
measure() {
    local round begin
    cpu >"$DIR/$1.begun"
    for ((round = 1; round <= HULL_ROUNDS; round++)); do
        begin=$(now)
        container quiet "s$round" 'echo begun; exec sleep 1000'
        line_in "s$round" begun
        figure "$1" start "$begin"
        begin=$(now)
        cri exec --sync "$(cat "$DIR/main.cid")" -- true
        figure "$1" exec "$begin"
        begin=$(now)
        cri exec --sync "$(cat "$DIR/main.cid")" -- sh -c "echo $1-$round >/f"
        line_in main "$1-$round"
        figure "$1" log "$begin"
        remove "s$round"
    done
}

# The time now, and that used of CPUs by the daemon, the quiet and the noisy pod; µs.
cpu() {
    local pod
    echo now $(($(now) / 1000))
    awk '{ sub(/.*\) /, ""); print "daemon", ($12 + $13) * 10000 }' "/proc/$DAEMON/stat"
    for pod in quiet noisy; do awk -v pod=$pod '$1 == "usage_usec" { print pod, $2 }' "$CGROUPS/bench/$pod/cpu.stat"; done
}

# used PEER: what was used of a CPU since it was begun to be measured.
used() {
    local who percent
    while read -r who percent; do tell "$1-cpu-$who" "$percent"; done < <(cpu | awk '
        NR == FNR { begun[$1] = $2; next }
        $1 == "now" { time = $2 - begun[$1]; next }
        { printf "%s %.0f\n", $1, ($2 - begun[$1]) * 100 / time }' "$DIR/$1.begun" -)
}

# figure PEER NAME BEGIN
figure() { echo "$2 $((($(now) - $3) / 1000000))" >>"$DIR/$1.figures"; }

# line_in CONTAINER TEXT: waits until it is in the container's log.
line_in() { until grep -qs " $2\$" "$DIR/logs/quiet/$1.log"; do sleep 0.005; done; }

noise() {
    case $1 in
        cpu) echo 'for n in 1 2 3 4; do while :; do :; done & done; wait' ;;
        memory) echo 'while :; do tail /dev/zero; done' ;;
        disk) echo 'while :; do dd if=/dev/zero of=/fill bs=1M count=40 conv=fsync; done' ;;
        network) echo "exec /tools/hull-hostile flood 10.87.0.1:9" ;;
        interrupts) echo 'exec /tools/hull-hostile wake' ;;
        logs) echo 'exec yes all work and no play makes jack a dull boy' ;;
        forks) echo 'for n in 1 2 3 4; do while :; do /bin/true; done & done; wait' ;;
        threads) echo 'bomb() { bomb & bomb & wait; }; bomb; sleep 1000' ;;
        *) die "no noise $1" ;;
    esac
}

with_noise() {
    local name before after cutting='' begin bytes
    before=$(daemon_memory) begin=$(now)
    container noisy "$1" "$(noise "$1")"
    if [ "$1" = logs ]; then
        # Its size is kubelet's to bound: what was written is thrown away.
        ( while sleep 0.5; do
            stat -c %s "$DIR/logs/noisy/logs.log" >>"$DIR/written"; : >"$DIR/logs/noisy/logs.log"
        done ) & cutting=$!
    fi
    sleep 3
    measure "$1"
    used "$1"
    for name in start exec log; do
        compare "$1-$name" "$(median "$1" "$name")" "$(median without "$name")"
    done
    if [ -n "$cutting" ]; then
        after=$(daemon_memory)
        kill "$cutting"; wait "$cutting" || true
        bytes=$(awk '{ sum += $1 } END { print sum + 0 }' "$DIR/written")
        tell daemon-memory $(((after - before) / 1024)) 64
        tell log-rate "$(awk -v b="$bytes" -v ns="$(($(now) - begin))" 'BEGIN { printf "%.1f", b * 1000 / ns }')"
    fi
    remove "$1"
}

daemon_memory() { awk '$1 == "VmRSS:" { print $2 }' "/proc/$DAEMON/status"; }

limits() {
    local group pid outside=0 before after
    group=$CGROUPS/bench/noisy
    cgroup noisy cpu.max "20000 100000"
    container noisy limited "$(noise cpu) & $(noise disk)"
    sleep 2
    for pid in $(pgrep -f "hull-(vmm|fs) .*$(cat "$DIR/noisy.id")"); do
        outside=$((outside + $(cat "/proc/$pid"/task/*/cgroup | grep -vc "^0::/bench/noisy/" || true)))
    done
    tell limit-outside "$outside" 0
    before=$(awk '$1 == "usage_usec" { print $2 }' "$group/cpu.stat")
    sleep 5
    after=$(awk '$1 == "usage_usec" { print $2 }' "$group/cpu.stat")
    tell limit-cpu $(((after - before) / 50000)) 22
    tell limit-memory $(($(cat "$group/memory.peak" 2>/dev/null || cat "$group/memory.current") >> 20)) "$MEMORY_MIB"
}

# compare NAME WITH WITHOUT: a target of twice the time.
compare() {
    local word=ok
    [ $(($2)) -le $((2 * $3)) ] || word=short SHORT=1
    echo "bench neighbours-$1 hull=$2 peer=$3 ratio=$(ratio "$3" "$2") target=0.5 $word"
}

# tell NAME VALUE [MOST]
tell() {
    local word=ok
    [ $# -lt 3 ] || [ "$2" -le "$3" ] || word=short SHORT=1
    echo "bench neighbours-$1 hull=$2 peer=none ratio=none target=${3:-none} $word"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

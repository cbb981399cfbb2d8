#!/bin/bash
# network.sh: what a pod's network carries, next to what others carry on the same host and bridge:
#
#   hull   a pod of `hull serve`
#   qemu   QEMU's microvm with a tap of user space (no vhost), the same guest kernel, 1 vCPU, 256 MiB
#   veth   a network namespace behind a veth, which is what containerd and runc give
#
# tests/netload is the load: its server runs in each of them, its client on the host. All are
# measured in turn, ROUNDS times SECONDS each, and medians are compared. Each figure is a line
#   bench NAME hull=… peer=… ratio=… target=… ok|short
# where a ratio above 1 is in Hull's favour. Throughput is in MB/s (10^6 bytes), requests and packets
# are per second, latency is in microseconds; exits (of the VM) and system calls (of the VMM) are per
# packet. Exit code 1 if one is short of its target.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
ROUNDS=${ROUNDS:-3} SECONDS_EACH=${SECONDS_EACH:-2}
FIGURES=(tcp-to-pod tcp-from-pod requests latency packets-to-pod packets-from-pod)
TARGETS_QEMU=(0.8 0.8 0.8 none none none)
TARGETS_VETH=(0.5 0.5 0.5 none none none)

outside() {
    local images
    images=$("$REPO/tests/images/build.sh")
    # Static: it runs in guests that have nothing else.
    (cd "$REPO" && RUSTFLAGS='-C target-feature=+crt-static' \
        cargo build --locked --quiet --release -p hull-netload --target x86_64-unknown-linux-gnu)
    HULL_TEST_IMAGES=$images HULL_NETLOAD=$TARGET/x86_64-unknown-linux-gnu/release/hull-netload \
        HULL_ROUNDS=$ROUNDS HULL_SECONDS=$SECONDS_EACH KVM_HOST_PACKAGES=qemu-system-x86 \
        "$REPO/tests/host/run.sh" "$REPO/tests/bench/network.sh" inside
}

# In the KVM host, as root.
inside() {
    command -v qemu-system-x86_64 >/dev/null || die "no qemu-system-x86_64"
    DIR=$(mktemp -d /tmp/bench.XXXXXX)
    PIDS=()
    trap 'clean_up' EXIT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" bench.registry
    cp "$HULL_NETLOAD" "$DIR/netload"
    start_daemon "$DIR" || die "hull serve does not answer"
    start_hull
    start_veth
    start_qemu
    local round peer
    for peer in hull qemu veth; do wait_for "$peer"; done
    for ((round = 0; round < HULL_ROUNDS; round++)); do
        for peer in hull qemu veth; do
            "$DIR/netload" measure "$(address "$peer")" "$HULL_SECONDS" >>"$DIR/$peer.figures"
        done
    done
    count_work
    report
}

cri() { hull-cri -r "$DIR/hull.sock" "$@"; }

start_hull() {
    cat >"$DIR/pod.json" <<J
{"metadata": {"name": "bench", "uid": "bench-uid", "namespace": "default", "attempt": 0},
 "log_directory": "$DIR/logs", "linux": {"resources": {"memory_limit_in_bytes": 134217728}}}
J
    cat >"$DIR/container.json" <<J
{"metadata": {"name": "load", "attempt": 0}, "image": {"image": "bench.registry/demo/busybox:latest"},
 "log_path": "load.log", "command": ["/load/netload", "serve"],
 "mounts": [{"container_path": "/load", "host_path": "$DIR/load", "readonly": true}]}
J
    mkdir "$DIR/load"; cp "$DIR/netload" "$DIR/load/"
    cri pull bench.registry/demo/busybox:latest >/dev/null
    POD=$(cri runp "$DIR/pod.json")
    local container; container=$(cri create "$POD" "$DIR/container.json" "$DIR/pod.json")
    cri start "$container" >/dev/null
    HULL_ADDRESS=$(cri inspectp "$POD" | jq -r '.status.network.ip')
    HULL_PID=$(pgrep -f "hull-vmm.*$POD")
}

# Like the bridge plugin's.
start_veth() {
    ip netns add hull-bench
    ip link add "$BRIDGE-v" type veth peer name eth0 netns hull-bench
    ip link set "$BRIDGE-v" master "$BRIDGE" up
    ip -n hull-bench link set lo up
    ip -n hull-bench addr add 10.87.0.201/24 dev eth0
    ip -n hull-bench link set eth0 up
    nsenter --net=/run/netns/hull-bench "$DIR/netload" serve & PIDS+=($!)
}

# A disk with busybox, and the load as what init becomes.
start_qemu() {
    local root=$DIR/qemu
    mkdir -p "$root"/{bin,dev,proc,sys}
    cp /bin/busybox "$root/bin/busybox"; cp "$DIR/netload" "$root/netload"
    cat >"$root/init" <<'I'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox ip link set lo up
/bin/busybox ip addr add 10.87.0.202/24 dev eth0
/bin/busybox ip link set eth0 up
exec /netload serve
I
    chmod +x "$root/init"
    mkfs.erofs "$DIR/qemu.erofs" "$root" >/dev/null 2>&1
    ip tuntap add "$BRIDGE-q" mode tap vnet_hdr
    ip link set "$BRIDGE-q" master "$BRIDGE" up
    qemu-system-x86_64 -M microvm,x-option-roms=off,rtc=on,acpi=off,pit=off,pic=off -accel kvm -cpu host \
        -smp 1 -m 256 -nodefaults -no-user-config -display none -no-reboot -serial file:"$DIR/qemu.console" \
        -kernel "$HULL_ASSETS/vmlinux" -append "console=ttyS0 quiet panic=-1 root=/dev/vda rootfstype=erofs ro init=/init" \
        -drive file="$DIR/qemu.erofs",format=raw,if=none,id=root,readonly=on -device virtio-blk-device,drive=root \
        -netdev tap,id=n,ifname="$BRIDGE-q",script=no,downscript=no,vhost=off \
        -device virtio-net-device,netdev=n,mac=02:00:00:00:87:02 >"$DIR/qemu.log" 2>&1 &
    QEMU_PID=$!; PIDS+=($!)
}

address() {
    case $1 in hull) echo "$HULL_ADDRESS" ;; qemu) echo 10.87.0.202 ;; veth) echo 10.87.0.201 ;; esac
}

wait_for() {
    for _ in {1..300}; do
        if (: <>"/dev/tcp/$(address "$1")/5201") 2>/dev/null; then return 0; fi
        sleep 0.2
    done
    cat "$DIR/qemu.log" "$DIR/qemu.console" "$DIR/hull.log" 2>/dev/null | tail -n 40
    die "$1 does not answer"
}

# Exits of the VM of process $1, of all kinds.
exits() { cat /sys/kernel/debug/kvm/"$1"-*/exits; }
# Packets that the machine at address $1 received and sent, by what the host's end of it counts.
packets() {
    local link=$1
    echo $(($(cat "/sys/class/net/$link/statistics/rx_packets") + $(cat "/sys/class/net/$link/statistics/tx_packets")))
}
# System calls of the threads of process $1 since the trace began.
calls() {
    local tid sum=0 count
    for tid in /proc/"$1"/task/*; do
        count=$(sed -n "s/.*common_pid: *${tid##*/} .*hitcount: *\([0-9]*\).*/\1/p" "$TRACE/hist")
        sum=$((sum + ${count:-0}))
    done
    echo $sum
}

# Exits and system calls per packet, while the load runs once more. A packet is as large as
# segmentation makes it.
count_work() {
    TRACE=/sys/kernel/tracing/events/raw_syscalls/sys_enter
    local peer pid link veth before_exits before_packets exits packets
    veth=$(ip -o link | sed -n "s/^[0-9]*: \(veth[^@]*\)@.*master $BRIDGE.*/\1/p" | head -n 1)
    for peer in hull qemu; do
        case $peer in hull) pid=$HULL_PID link=$veth ;; qemu) pid=$QEMU_PID link=$BRIDGE-q ;; esac
        echo 'hist:keys=common_pid:size=4096' >"$TRACE/trigger"
        before_exits=$(exits "$pid") before_packets=$(packets "$link")
        "$DIR/netload" measure "$(address "$peer")" "$HULL_SECONDS" >"$DIR/$peer.traced"
        exits=$(($(exits "$pid") - before_exits)) packets=$(($(packets "$link") - before_packets))
        echo "exits-per-packet $(ratio "$exits" "$packets")" >>"$DIR/$peer.figures"
        echo "calls-per-packet $(ratio "$(calls "$pid")" "$packets")" >>"$DIR/$peer.figures"
        echo '!hist:keys=common_pid:size=4096' >"$TRACE/trigger"
    done
}

# line FIGURE PEER TARGET
line() {
    local hull peer ratio word=ok
    hull=$(median hull "$1") peer=$(median "$2" "$1")
    case $1 in latency | *-per-packet) ratio=$(ratio "$peer" "$hull") ;; *) ratio=$(ratio "$hull" "$peer") ;; esac
    if [ "$3" != none ] && awk -v r="$ratio" -v t="$3" 'BEGIN { exit !(r < t) }'; then word=short SHORT=1; fi
    echo "bench network-$1-$2 hull=$hull peer=$peer ratio=$ratio target=$3 $word"
}

report() {
    local i SHORT=0
    for i in "${!FIGURES[@]}"; do line "${FIGURES[i]}" qemu "${TARGETS_QEMU[i]}"; done
    for i in exits calls; do line "$i-per-packet" qemu none; done
    for i in "${!FIGURES[@]}"; do line "${FIGURES[i]}" veth "${TARGETS_VETH[i]}"; done
    [ -z "${HULL_BENCH_KEEP:-}" ] || cat "$DIR"/*.figures
    return $SHORT
}

clean_up() {
    [ ${#PIDS[@]} = 0 ] || { kill "${PIDS[@]}" 2>/dev/null; wait "${PIDS[@]}" 2>/dev/null; } || true
    ip netns del hull-bench 2>/dev/null || true
    ip link del "$BRIDGE-q" 2>/dev/null || true
    take_down_node "$DIR"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

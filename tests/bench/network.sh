#!/bin/bash
# network.sh: what a pod's network carries, next to what others carry on the same host and bridge:
#
#   hull        a pod of `hull serve`
#   qemu        QEMU's microvm with a tap of user space (no vhost), the same guest kernel, 1 vCPU, 256 MiB
#   qemu-vhost  the same, but the host's kernel moves the packets (vhost-net), which Hull does not use
#   veth        a network namespace behind a veth, which is what containerd and runc give
#
# tests/netload is the load: its server runs in each of them, its client on the host. All are
# measured in turn, ROUNDS times SECONDS each, and medians are compared. Each figure is a line
#   bench NAME hull=… peer=… ratio=… target=… ok|short
# where a ratio above 1 is in Hull's favour. Throughput is in MB/s (10^6 bytes), requests and packets
# are per second, latency is in microseconds. Per packet are: exits of the VM, those of them that the
# VMM handles (user-exits), and system calls of the VMM. Exit code 1 if one is short of its target.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
ROUNDS=${ROUNDS:-3} SECONDS_EACH=${SECONDS_EACH:-2}
FIGURES=(tcp-to-pod tcp-from-pod requests latency packets-to-pod packets-from-pod)
TARGETS_QEMU=(0.8 0.8 0.8 none none none)
TARGETS_VETH=(0.5 0.5 0.5 none none none)
COUNTED=(tcp-to-pod tcp-from-pod requests)
PEERS=(hull qemu veth)

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
    PIDS=() TAPS=()
    declare -gA VMM LINK
    trap 'clean_up' EXIT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" bench.registry
    cp "$HULL_NETLOAD" "$DIR/netload"
    start_daemon "$DIR" || die "hull serve does not answer"
    start_hull
    start_veth
    start_qemu qemu off
    if modprobe vhost_net 2>/dev/null && [ -c /dev/vhost-net ]; then
        PEERS+=(qemu-vhost)
        start_qemu qemu-vhost on
    else
        say "no qemu-vhost: this host has no vhost_net"
    fi
    local round peer
    for peer in "${PEERS[@]}"; do wait_for "$peer"; done
    for ((round = 0; round < HULL_ROUNDS; round++)); do
        for peer in "${PEERS[@]}"; do
            "$DIR/netload" measure "$(address "$peer")" "$HULL_SECONDS" >>"$DIR/$peer.figures" ||
                die "measure $peer"
        done
    done
    count_work
    report
}

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
    VMM[hull]=$(pgrep -f "hull-vmm.*$POD")
    LINK[hull]=$(ip -o link | sed -n "s/^[0-9]*: \(veth[^@]*\)@.*master $BRIDGE.*/\1/p" | head -n 1)
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

# start_qemu PEER VHOST: a disk with busybox, and the load as what init becomes.
start_qemu() {
    local peer=$1 root=$DIR/$1 link=$BRIDGE-${1/qemu-vhost/k} mac
    link=${link/qemu/q}
    mac=02:00:00:00:87:$(printf %02x "$(address "$peer" | cut -d . -f 4)")
    mkdir -p "$root"/{bin,dev,proc,sys}
    cp /bin/busybox "$root/bin/busybox"; cp "$DIR/netload" "$root/netload"
    cat >"$root/init" <<I
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox ip link set lo up
/bin/busybox ip addr add $(address "$peer")/24 dev eth0
/bin/busybox ip link set eth0 up
exec /netload serve
I
    chmod +x "$root/init"
    mkfs.erofs "$root.erofs" "$root" >/dev/null 2>&1
    ip tuntap add "$link" mode tap vnet_hdr
    TAPS+=("$link")
    ip link set "$link" master "$BRIDGE" up
    qemu-system-x86_64 -M microvm,x-option-roms=off,rtc=on,acpi=off,pit=off,pic=off -accel kvm -cpu host \
        -smp 1 -m 256 -nodefaults -no-user-config -display none -no-reboot -serial file:"$root.console" \
        -kernel "$HULL_ASSETS/vmlinux" -append "console=ttyS0 quiet panic=-1 root=/dev/vda rootfstype=erofs ro init=/init" \
        -drive file="$root.erofs",format=raw,if=none,id=root,readonly=on -device virtio-blk-device,drive=root \
        -netdev tap,id=n,ifname="$link",script=no,downscript=no,vhost="$2" \
        -device virtio-net-device,netdev=n,mac="$mac" >"$root.log" 2>&1 &
    PIDS+=($!)
    VMM[$peer]=$! LINK[$peer]=$link
}

address() {
    case $1 in
        hull) echo "$HULL_ADDRESS" ;;
        qemu) echo 10.87.0.202 ;;
        qemu-vhost) echo 10.87.0.203 ;;
        veth) echo 10.87.0.201 ;;
    esac
}

wait_for() {
    for _ in {1..300}; do
        if (: <>"/dev/tcp/$(address "$1")/5201") 2>/dev/null; then return 0; fi
        sleep 0.2
    done
    tail -n 20 "$DIR"/*.log "$DIR"/*.console 2>/dev/null || true
    die "$1 does not answer"
}

# counter NAME PID: what KVM counts for the VM of the process: exits, mmio_exits, io_exits…
counter() { cat /sys/kernel/debug/kvm/"$2"-*/"$1"; }
# Packets in both directions, by what the host's end $1 of the cable counts.
packets() {
    cat "/sys/class/net/$1/statistics/"{rx,tx}_packets | awk '{ sum += $1 } END { print sum }'
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

# Exits and system calls per packet of each load in COUNTED, which runs once more for it. A packet is
# as large as segmentation makes it. The system calls of vhost-net's thread are none: it is one of the
# kernel's.
count_work() {
    TRACE=/sys/kernel/tracing/events/raw_syscalls/sys_enter
    local peer load pid packets before exits user
    for peer in "${PEERS[@]}"; do
        [ -n "${VMM[$peer]:-}" ] || continue
        pid=${VMM[$peer]}
        for load in "${COUNTED[@]}"; do
            echo 'hist:keys=common_pid:size=4096' >"$TRACE/trigger"
            before=$(packets "${LINK[$peer]}") exits=$(counter exits "$pid") user=$(user_exits "$pid")
            "$DIR/netload" measure "$(address "$peer")" "$HULL_SECONDS" "$load" >/dev/null
            packets=$(($(packets "${LINK[$peer]}") - before))
            exits=$(($(counter exits "$pid") - exits)) user=$(($(user_exits "$pid") - user))
            {
                echo "$load-exits $(ratio "$exits" "$packets")"
                echo "$load-user-exits $(ratio "$user" "$packets")"
                echo "$load-calls $(ratio "$(calls "$pid")" "$packets")"
            } >>"$DIR/$peer.figures"
            echo '!hist:keys=common_pid:size=4096' >"$TRACE/trigger"
        done
    done
}

user_exits() { echo $(($(counter mmio_exits "$1") + $(counter io_exits "$1"))); }

# line FIGURE PEER TARGET
line() {
    local hull peer ratio word=ok
    hull=$(median hull "$1") peer=$(median "$2" "$1")
    case $1 in latency | *-exits | *-calls) ratio=$(ratio "$peer" "$hull") ;; *) ratio=$(ratio "$hull" "$peer") ;; esac
    if [ "$3" != none ] && awk -v r="$ratio" -v t="$3" 'BEGIN { exit !(r < t) }'; then word=short SHORT=1; fi
    echo "bench network-$1-$2 hull=$hull peer=$peer ratio=$ratio target=$3 $word"
}

report() {
    local i peer SHORT=0
    for i in "${!FIGURES[@]}"; do line "${FIGURES[i]}" qemu "${TARGETS_QEMU[i]}"; done
    for i in "${!FIGURES[@]}"; do line "${FIGURES[i]}" veth "${TARGETS_VETH[i]}"; done
    if [ -n "${VMM[qemu-vhost]:-}" ]; then
        for i in "${FIGURES[@]}"; do line "$i" qemu-vhost none; done
    fi
    for peer in qemu qemu-vhost; do
        [ -n "${VMM[$peer]:-}" ] || continue
        for i in "${COUNTED[@]}"; do
            line "$i-exits" "$peer" none
            line "$i-user-exits" "$peer" none
            line "$i-calls" "$peer" none
        done
    done
    [ -z "${HULL_BENCH_KEEP:-}" ] || grep . "$DIR"/*.figures
    return $SHORT
}

clean_up() {
    [ ${#PIDS[@]} = 0 ] || { kill "${PIDS[@]}" 2>/dev/null; wait "${PIDS[@]}" 2>/dev/null; } || true
    ip netns del hull-bench 2>/dev/null || true
    local tap
    for tap in "${TAPS[@]}"; do ip link del "$tap" 2>/dev/null || true; done
    take_down_node "$DIR"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

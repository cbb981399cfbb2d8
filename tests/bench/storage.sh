#!/bin/bash
# storage.sh: what images, root file systems and host paths cost in a pod, next to containerd and runc
# with overlayfs on the same host, from the same registry, on the same disk (an ext4 of the benchmark's
# own, in a file) and with the same network.
#
#   pull-*              pull and unpack, s: bench/many (10 000 files in ten layers, 83 MiB) and bench/large
#                       (three files in one, 240 MiB)
#   start-container     create and start in a pod that is there, s;  start-pod  with the pod itself
#   rootfs-*            files of the image
#   scratch-*           files that the container writes beside them
#   host-path-*         files of a host directory: virtio-fs in Hull, a bind mount in the peer
#     *-read            in order, MB/s (10^6 bytes)       *-walk   finds and reads small files, files/s
#     *-random          blocks of 4 KiB, per second       *-write  in order, and one fsync, MB/s
#     *-fsync           blocks of 4 KiB, an fsync after each, per second
#     cold: in no cache; warm: read in this container before; next: read in another pod alone
#   page-cache-N        the host's page cache after N pods of bench/shared (40 MiB) have read all of it, MiB
#   page-cache-added    what each pod between the last two counts added, MiB
#   memory-N            what else N such pods use on the host, MiB: everything but page cache
#   pss-N               what of that their processes share out among them (PSS without files), MiB
#
# tests/diskload is the load. All figures are of fresh pods, ROUNDS times in turn, and medians are
# compared; those of memory once, for PODS pods. Each figure is a line
#   bench NAME hull=… peer=… ratio=… target=… ok|short
# where a ratio above 1 is in Hull's favour. Exit code 1 if one is short of its target:
#
#   pull-*: 1, as fast as containerd. page-cache-added: at most a tenth of what the pod read. A pod that
#   cached the image anew would add all of it; one that shares it adds what its own writable layer, logs
#   and state occupy, a MiB or two as the peer's does. The others have none: they tell what a VM costs.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
. "$REPO/tests/bench/peers.sh"
ROUNDS=${ROUNDS:-3} PODS=${PODS:-1 5 20}
# As tests/images/bench.py makes it.
SHARED_MIB=40

outside() {
    HULL_ROUNDS=$ROUNDS HULL_PODS=$PODS run_in_host tests/bench/storage.sh
}

# In the KVM host, as root.
inside() {
    set_up_peers
    # Twenty have to fit into the KVM host.
    printf '[vm]\nmemory_mib = 128\n' >>"$DIR/hull.toml"
    start_peers
    local round peer
    for ((round = 0; round < HULL_ROUNDS; round++)); do
        for peer in "${PEERS[@]}"; do pull "$peer"; done
    done
    for peer in "${PEERS[@]}"; do cri "$peer" pull bench.registry/bench/shared:latest >/dev/null; done
    make_data
    for ((round = 0; round < HULL_ROUNDS; round++)); do
        for peer in "${PEERS[@]}"; do files "$peer"; done
    done
    for peer in "${PEERS[@]}"; do pods "$peer"; done
    report
}

pull() {
    local image begin
    for image in many large shared; do cri "$1" rmi "bench.registry/bench/$image:latest" >/dev/null 2>&1 || true; done
    for image in many large; do
        drop
        begin=$(now)
        cri "$1" pull "bench.registry/bench/$image:latest" >/dev/null || die "pull $image with $1"
        since "$1" "pull-$image" "$begin"
    done
}

# What host-path-* reads: as much as is read of the image.
make_data() {
    mkdir -p "$DISK/data/many"
    "$DISK/load/diskload" -="write:$DISK/data/0:40" -="write:$DISK/data/1:40" >/dev/null
    # 100 files of 8 KiB.
    head -c $((800 << 10)) "$DISK/data/0" | split -a 3 -b 8k - "$DISK/data/many/"
}

# start_pod PEER NAME: a pod with a container of either image, MANY and LARGE.
start_pod() {
    local mounts='[{"container_path": "/load", "host_path": "'$DISK'/load", "readonly": true},
        {"container_path": "/data", "host_path": "'$DISK'/data"}]'
    local begin between
    begin=$(now)
    new_pod "$1" "$2" 448
    between=$(now)
    new_container "$1" "$2" many "$mounts" sleep 1000000; MANY=$CONTAINER
    since "$1" start-container "$between"
    since "$1" start-pod "$begin"
    new_container "$1" "$2" large "$mounts" sleep 1000000; LARGE=$CONTAINER
}

files() {
    local peer=$1 first first_large
    start_pod "$peer" first; first=$POD first_large=$LARGE
    drop
    load "$peer" "$LARGE" rootfs-read-cold=read:/large/1 rootfs-random-cold=random:/large/2:200
    load "$peer" "$MANY" rootfs-walk-cold=walk:/many/0
    load "$peer" "$LARGE" rootfs-read-warm=read:/large/1 rootfs-random-warm=random:/large/1:2000
    load "$peer" "$MANY" rootfs-walk-warm=walk:/many/0

    # The host has in its memory what the first pod read, or that pod has.
    start_pod "$peer" next
    load "$peer" "$LARGE" rootfs-read-next=read:/large/1 rootfs-random-next=random:/large/2:200
    load "$peer" "$MANY" rootfs-walk-next=walk:/many/0
    end_pod "$peer" "$POD"
    LARGE=$first_large

    load "$peer" "$LARGE" scratch-write=write:/written:32 scratch-fsync=sync:/synced:100 \
        -=write:/random:32 -=forget:/written -=forget:/random
    drop
    load "$peer" "$LARGE" scratch-read-cold=read:/written scratch-random-cold=random:/random:200
    load "$peer" "$LARGE" scratch-read-warm=read:/written scratch-random-warm=random:/written:2000

    drop
    load "$peer" "$LARGE" host-path-read-cold=read:/data/0 host-path-random-cold=random:/data/1:200 \
        host-path-walk-cold=walk:/data/many
    load "$peer" "$LARGE" host-path-read-warm=read:/data/0 host-path-random-warm=random:/data/0:500 \
        host-path-walk-warm=walk:/data/many
    load "$peer" "$LARGE" host-path-write=write:/data/written:32 host-path-fsync=sync:/data/synced:100
    end_pod "$peer" "$first"
}

# What is in memory, KiB: page cache (of disks: shared memory and tmpfs are not on any), and the rest.
page_cache() { awk '{ v[$1] = $2 } END { print v["Cached:"] + v["Buffers:"] - v["Shmem:"] }' /proc/meminfo; }
memory() { awk -v cache="$(page_cache)" '{ v[$1] = $2 } END { print v["MemTotal:"] - v["MemFree:"] - cache }' /proc/meminfo; }

# Of the pods' processes, KiB. A shim's children are those of its pod.
pss() {
    local pids pid
    case $1 in
        hull) pids=$(pgrep -d ' ' -f "hull-(vmm|fs) .*$DIR/" || true) ;;
        containerd)
            pids=$(pgrep -d ' ' -f "containerd-shim.* -address $DIR/containerd.sock" || true)
            for pid in $pids; do pids+=" $(pgrep -d ' ' -P "$pid" || true)"; done ;;
    esac
    for pid in $pids; do cat "/proc/$pid/smaps_rollup" 2>/dev/null || true; done |
        awk '/^Pss_(Anon|Shmem):/ { sum += $2 } END { print sum + 0 }'
}

mib() { awk -v kib="$1" 'BEGIN { printf "%.1f", kib / 1024 }'; }

# Pods that read all of bench/shared: the first brings it into memory.
pods() {
    local peer=$1 count=0 wanted ids=() cache=0 cache_before=0 count_before=0 before
    # What ended pods had goes with a delay.
    sleep 5
    drop
    before=$(memory)
    for wanted in $HULL_PODS; do
        cache_before=$cache count_before=$count
        while [ "$count" -lt "$wanted" ]; do
            count=$((count + 1))
            new_pod "$peer" "pod$count" 64; ids+=("$POD")
            new_container "$peer" "pod$count" shared '[]' sh -c 'dd if=/shared of=/dev/null bs=128k && echo read; exec sleep 1000000'
            wait_for_log "$DIR/logs/$peer-pod$count/shared.log" ' read$'
        done
        sync
        cache=$(page_cache)
        figure "$peer" "page-cache-$count" "$(mib "$cache")"
        figure "$peer" "memory-$count" "$(mib $(($(memory) - before)))"
        figure "$peer" "pss-$count" "$(mib "$(pss "$peer")")"
    done
    if [ "$count_before" -gt 0 ]; then
        figure "$peer" page-cache-added "$(mib $(((cache - cache_before) / (count - count_before))))"
    fi
    for POD in "${ids[@]}"; do end_pod "$peer" "$POD"; done
}

wait_for_log() {
    for _ in {1..1200}; do
        if grep -qs "$2" "$1"; then return 0; fi
        sleep 0.2
    done
    tail -n 5 "$1"
    die "$1 does not say $2"
}

# line FIGURE
line() {
    local hull peer ratio target=none word=ok
    hull=$(median hull "$1") peer=$(median containerd "$1")
    { [ -n "$hull" ] && [ -n "$peer" ]; } || die "$1 was not measured in both"
    case $1 in
        pull-* | start-* | page-cache-* | memory-* | pss-*) ratio=$(ratio "$peer" "$hull") ;;
        *) ratio=$(ratio "$hull" "$peer") ;;
    esac
    case $1 in
        pull-*) target=1.0; smaller "$ratio" 1.0 && word=short ;;
        page-cache-added) target=$((SHARED_MIB / 10))MiB; smaller "${target%MiB}" "$hull" && word=short ;;
    esac
    [ "$word" = ok ] || SHORT=1
    echo "bench storage-$1 hull=$hull peer=$peer ratio=$ratio target=$target $word"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

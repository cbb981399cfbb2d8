#!/bin/bash
# files.sh: what files of the host cost in a pod, next to containerd and runc on the same host: virtio-fs in
# Hull, a bind mount in the peer.
#
#   read-*      a file of 32 MiB in order, MB/s (10^6 bytes)
#   random-*    blocks of 4 KiB anywhere in another, per second
#   stat-*      FILES files in one directory are listed, and each asked for its attributes, files/s
#   walk-*      the same files, of 1 KiB, are listed, opened and read, files/s
#     cold: in no cache; again: as soon as that is done; later: five seconds after, when no guest believes
#     any longer what it was told, and files are old enough to be kept (vmm/fs/src/life.rs, keep_cache.rs)
#   create, unlink   as many files of 1 KiB are made, and removed, files/s
#   write, fsync     32 MiB in order and one fsync, MB/s; blocks of 4 KiB, an fsync after each, per second
#
# tests/diskload is the load. All figures are of fresh pods, ROUNDS times in turn, and medians are compared.
# Each figure is a line
#   bench files-NAME hull=… peer=… ratio=… target=… ok|short
# where a ratio above 1 is in Hull's favour. Exit code 1 if one is short of its target:
#
#   1 for what is read again or later, which is in the guest's own memory. The others ask the host for each
#   file or block, which takes exits that the peer has not: they have no target.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
. "$REPO/tests/bench/peers.sh"
ROUNDS=${ROUNDS:-3} FILES=${FILES:-2000}

outside() {
    HULL_ROUNDS=$ROUNDS HULL_FILES=$FILES run_in_host tests/bench/files.sh
}

# In the KVM host, as root.
inside() {
    set_up_peers
    printf '[vm]\nmemory_mib = 128\n' >>"$DIR/hull.toml"
    start_peers
    local round peer
    for peer in "${PEERS[@]}"; do cri "$peer" pull bench.registry/bench/busybox:latest >/dev/null; done
    mkdir "$DISK/data"
    "$DISK/load/diskload" -="write:$DISK/data/0:32" -="write:$DISK/data/1:32" \
        -="create:$DISK/data/many:$HULL_FILES" >/dev/null
    for ((round = 0; round < HULL_ROUNDS; round++)); do
        for peer in "${PEERS[@]}"; do files "$peer"; done
    done
    report
}

files() {
    local peer=$1 mounts
    mounts='[{"container_path": "/load", "host_path": "'$DISK'/load", "readonly": true},
        {"container_path": "/data", "host_path": "'$DISK'/data"}]'
    new_pod "$peer" files 448
    new_container "$peer" files busybox "$mounts" sleep 1000000
    # Here, too, so that what starts the load is not measured.
    load "$peer" "$CONTAINER" -=read:/load/diskload
    drop
    load "$peer" "$CONTAINER" read-cold=read:/data/0 random-cold=random:/data/1:200 \
        stat-cold=stat:/data/many stat-again=stat:/data/many
    drop
    load "$peer" "$CONTAINER" walk-cold=walk:/data/many
    # The second time that a file is opened, it is known to be older than a tick.
    load "$peer" "$CONTAINER" -=read:/data/0 -=random:/data/1:200 -=walk:/data/many
    load "$peer" "$CONTAINER" read-again=read:/data/0 random-again=random:/data/1:200 walk-again=walk:/data/many
    sleep 5
    load "$peer" "$CONTAINER" read-later=read:/data/0 random-later=random:/data/1:200
    sleep 5
    load "$peer" "$CONTAINER" stat-later=stat:/data/many
    sleep 5
    load "$peer" "$CONTAINER" walk-later=walk:/data/many
    load "$peer" "$CONTAINER" "create=create:/data/new:$HULL_FILES" unlink=unlink:/data/new \
        write=write:/data/written:32 fsync=sync:/data/synced:100
    end_pod "$peer" "$POD"
}

# line FIGURE
line() {
    local hull peer ratio target=none word=ok
    hull=$(median hull "$1") peer=$(median containerd "$1")
    { [ -n "$hull" ] && [ -n "$peer" ]; } || die "$1 was not measured in both"
    ratio=$(ratio "$hull" "$peer")
    case $1 in
        *-again | *-later) target=1.0; smaller "$ratio" 1.0 && word=short ;;
    esac
    [ "$word" = ok ] || SHORT=1
    echo "bench files-$1 hull=$hull peer=$peer ratio=$ratio target=$target $word"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

#!/bin/bash
# files.sh: what files of the host cost in a pod, by virtio-fs, next to others on the same host. `private` is Hull
# with a volume that no other pod has, as kubelet mounts it:
#
#   containerd         and runc, a bind mount
#   virtiofsd-auto     QEMU's microvm with the same guest kernel and Debian's virtiofsd, --cache auto (its
#   virtiofsd-always   default), or always, which sees no change of the host
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
#   bench files-NAME-PEER hull=… peer=… ratio=… target=… ok|short, and the same for files-private-NAME-PEER
# where a ratio above 1 is in Hull's favour. Exit code 1 if one is short of its target:
#
#   containerd       1 for what is read again or later, which is in the guest's own memory. The others ask
#                    the host for each file or block, which takes exits that the peer has not: no target.
#   virtiofsd-auto   1 for each, and 1.5 for the median of all ratios, files-median.
#   virtiofsd-always none: it believes what it was told for ever.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
. "$REPO/tests/bench/peers.sh"
. "$REPO/tests/bench/qemu.sh"
ROUNDS=${ROUNDS:-3} FILES=${FILES:-2000}
OTHERS=(containerd virtiofsd-auto virtiofsd-always)
MIB=448

outside() {
    "$REPO/tests/host/install.sh" emulator
    HULL_ROUNDS=$ROUNDS HULL_FILES=$FILES run_in_host tests/bench/files.sh
}

# In the KVM host, as root.
inside() {
    { [ -x "$QEMU" ] && [ -x "$VIRTIOFSD" ]; } || die "no QEMU or virtiofsd in $TOOLS/emulator"
    set_up_peers
    printf '[vm]\nmemory_mib = 128\n' >>"$DIR/hull.toml"
    start_peers
    local round peer
    ln -s hull.sock "$DIR/private.sock"
    for peer in hull containerd; do cri "$peer" pull bench.registry/bench/busybox:latest >/dev/null; done
    # Of the pod of the uid `private`.
    DATA=$DISK/kubelet/pods/private/volumes/kubernetes.io~csi/pv/mount
    mkdir -p "$DATA"
    truncate -s 1G "$DIR/volume"
    mkfs.ext4 -q "$DIR/volume"
    mount -o loop "$DIR/volume" "$DATA"
    "$DISK/load/diskload" -="write:$DATA/0:32" -="write:$DATA/1:32" -="create:$DATA/many:$HULL_FILES" >/dev/null
    for ((round = 0; round < HULL_ROUNDS; round++)); do
        for peer in hull private "${OTHERS[@]}"; do
            begin "$peer"
            files
            end "$peer"
        done
    done
    report
}

# begin PEER: it has the files in /data.
begin() {
    PEER=$1
    case $PEER in
        hull | private | containerd)
            new_pod "$PEER" "$PEER" $MIB
            new_container "$PEER" "$PEER" busybox '[{"container_path": "/load", "host_path": "'$DISK'/load", "readonly": true},
                {"container_path": "/data", "host_path": "'$DATA'"}]' sleep 1000000
            # Here, too, so that what starts the load is not measured.
            load "$PEER" "$CONTAINER" -=read:/load/diskload ;;
        virtiofsd-*)
            serve_files "$PEER" "$DATA" "${PEER#virtiofsd-}"
            start_guest "$PEER" $MIB 'mount -t virtiofs data /data' "${SHARE[@]}" ;;
    esac
}

# steps STEP...: of the load, in the peer that is on.
steps() {
    case $PEER in
        virtiofsd-*) in_guest "$PEER" "$@" ;;
        *) load "$PEER" "$CONTAINER" "$@" ;;
    esac
}

end() {
    case $1 in
        virtiofsd-*) stop_guests ;;
        *) end_pod "$1" "$POD" ;;
    esac
}

files() {
    drop
    steps read-cold=read:/data/0 random-cold=random:/data/1:200 stat-cold=stat:/data/many stat-again=stat:/data/many
    drop
    steps walk-cold=walk:/data/many
    # The second time that a file is opened, it is known to be older than a tick.
    steps -=read:/data/0 -=random:/data/1:200 -=walk:/data/many
    steps read-again=read:/data/0 random-again=random:/data/1:200 walk-again=walk:/data/many
    sleep 5
    steps read-later=read:/data/0 random-later=random:/data/1:200
    sleep 5
    steps stat-later=stat:/data/many
    sleep 5
    steps walk-later=walk:/data/many
    steps "create=create:/data/new:$HULL_FILES" unlink=unlink:/data/new write=write:/data/written:32 \
        fsync=sync:/data/synced:100
}

# line FIGURE: next to each peer.
line() {
    local peer
    for peer in "${OTHERS[@]}"; do
        line_of hull files "$1" "$peer"
        line_of private files-private "$1" "$peer"
    done
}

# line_of OURS PREFIX FIGURE PEER
line_of() {
    local ours=$1 prefix=$2 hull peer ratio target=none word=ok; shift 2
    hull=$(median "$ours" "$1") peer=$(median "$2" "$1")
    { [ -n "$hull" ] && [ -n "$peer" ]; } || die "$1 was not measured in both"
    ratio=$(ratio "$hull" "$peer")
    case $2,$1 in
        containerd,*-again | containerd,*-later | virtiofsd-auto,*) target=1.0; smaller "$ratio" 1.0 && word=short ;;
    esac
    [ "$word" = ok ] || SHORT=1
    [ "$2" != virtiofsd-auto ] || note ratios "$prefix" "$ratio"
    echo "bench $prefix-$1-$2 hull=$hull peer=$peer ratio=$ratio target=$target $word"
}

# After all lines.
last_line() {
    local prefix ratio word
    for prefix in files files-private; do
        word=ok ratio=$(median ratios "$prefix")
        if smaller "$ratio" 1.5; then word=short SHORT=1; fi
        echo "bench $prefix-median-virtiofsd-auto hull=none peer=none ratio=$ratio target=1.5 $word"
    done
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

#!/bin/bash
# pmem.sh: an image as memory of the guest (virtio-pmem, files used in place), next to the same image
# as a disk (virtio-blk, files copied to the guest's page cache). Both are measured in turn in the same
# KVM host: PODS pods of one image of about 80 MiB, each of which reads all of its files. Lines are
#   bench NAME hull=… peer=… ratio=… target=none ok
# where hull is memory, peer is the disk, and a ratio above 1 is in favour of memory. Times are in
# microseconds, sizes in KiB. Emulated, an exit for a page that the guest has not used yet costs many
# times what it does on a real processor, and a copy by the VMM little: times favour the disk there.
#
#   attach             time of CreateContainer, most of which is attaching and mounting
#   sequential-cold    64 MiB that neither host nor guest has read, with exits of the VM
#   sequential-first   64 MiB that the host has in its cache, and this guest has not read
#   sequential-again   once more; random-again: 2000 times 4 KiB of it
#   random-first       2000 times 4 KiB of 64 MiB that this guest has not read
#   tree-first         2000 files of 6000 bytes that this guest has not read
#   host-N             what the host has in use with N pods more than with none, page cache included
#   private-N          what N VMMs do not share (Pss), the mean
#   guest-cached       page cache of a guest that has read all, guest-free its free memory
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
PODS=${PODS:-10}
COUNTS="1 5 10"

outside() {
    local images load=$TARGET/tmp/pmem-load
    images=$("$REPO/tests/images/build.sh")
    mkdir -p "${load%/*}"
    # Static: nothing else is in the image.
    rustc --edition 2024 -O -C target-feature=+crt-static --target x86_64-unknown-linux-gnu \
        -o "$load" "$REPO/tests/bench/pmem.rs"
    make_image "$load" "$load.tar"
    HULL_TEST_IMAGES=$images HULL_IMAGE=$load.tar HULL_PODS=$PODS \
        "$REPO/tests/host/run.sh" "$REPO/tests/bench/pmem.sh" inside
}

# In the KVM host, as root.
inside() {
    DIR=$(mktemp -d /tmp/bench.XXXXXX)
    trap 'clean_up' EXIT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" bench.registry
    # A file system with a page cache of its own, which can be dropped.
    modprobe loop 2>/dev/null || true
    truncate -s 1G "$DIR/disk"; mkfs.ext4 -q "$DIR/disk"
    mkdir "$DIR/root"; mount -o loop "$DIR/disk" "$DIR/root"
    local mode
    for mode in pmem blk; do
        cp "$DIR/hull.toml" "$DIR/hull.toml.plain"
        printf '[vm]\nimage_device = "%s"\n' "$mode" >>"$DIR/hull.toml"
        start_daemon "$DIR" || die "hull serve does not answer"
        hull --config "$DIR/hull.toml" images import --quiet "$HULL_IMAGE" >/dev/null
        measure "$mode"
        stop_pods
        kill "$DAEMON"; wait "$DAEMON" 2>/dev/null || true; DAEMON=
        mv "$DIR/hull.toml.plain" "$DIR/hull.toml"
    done
    report
}

# make_image LOAD IMAGE: an archive as `docker save` writes it.
make_image() {
    local work; work=$(mktemp -d)
    mkdir -p "$work"/tree/{small,proc,sys,dev}
    cp "$1" "$work/tree/load"
    head -c 64M /dev/urandom >"$work/tree/large"
    head -c 12000000 /dev/urandom | split -b 6000 -a 3 - "$work/tree/small/"
    tar -C "$work/tree" -cf "$work/layer.tar" .
    printf '{"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": ["sha256:%s"]}}' \
        "$(sha256sum "$work/layer.tar" | cut -d ' ' -f 1)" >"$work/config.json"
    echo '[{"Config": "config.json", "RepoTags": ["bench.registry/pmem:latest"], "Layers": ["layer.tar"]}]' >"$work/manifest.json"
    tar -C "$work" -cf "$2" manifest.json config.json layer.tar
    rm -rf "$work"
}

# start MODE NUMBER: sets POD, CONTAINER and VMM.
start() {
    local begin
    cat >"$DIR/pod.json" <<J
{"metadata": {"name": "$1-$2", "uid": "$1-$2", "namespace": "default", "attempt": 0}, "log_directory": "$DIR/logs", "linux": {}}
J
    cat >"$DIR/container.json" <<J
{"metadata": {"name": "load", "attempt": 0}, "image": {"image": "bench.registry/pmem:latest"},
 "log_path": "$1-$2.log", "command": ["/load", "idle"]}
J
    POD=$(cri runp "$DIR/pod.json")
    begin=$(date +%s%N)
    CONTAINER=$(cri create "$POD" "$DIR/container.json" "$DIR/pod.json")
    note "$1" attach $((($(date +%s%N) - begin) / 1000))
    cri start "$CONTAINER" >/dev/null
    VMM=$(pgrep -f "hull-vmm.*$POD")
}

# load MODE FIGURE ARGUMENT...: time and exits of one load in the container.
load() {
    local mode=$1 figure=$2 before after; shift 2
    before=$(exits)
    note "$mode" "$figure" "$(cri exec "$CONTAINER" -- /load "$@")"
    after=$(exits)
    note "$mode" "$figure-exits" $((after - before))
}
# Exits of the VM, of all kinds.
exits() { cat /sys/kernel/debug/kvm/"$VMM"-*/exits; }
meminfo() { awk -v name="$1:" '$1 == name { print $2 }' /proc/meminfo; }
used() { echo $(($(meminfo MemTotal) - $(meminfo MemFree))); }
# What the processes of all VMMs have for themselves, in KiB, the mean.
private() {
    local pid
    for pid in $(pgrep -x "hull-vmm:.*"); do
        awk '$1 == "Pss:" { print $2 }' "/proc/$pid/smaps_rollup"
    done | awk '{ sum += $1 } END { print int(sum / NR) }'
}
drop_caches() { sync; echo 3 >/proc/sys/vm/drop_caches; }

measure() {
    local mode=$1 number before
    drop_caches
    before=$(used)
    for ((number = 1; number <= HULL_PODS; number++)); do
        start "$mode" "$number"
        case $number in
            1)
                # What CreateContainer and the start read is little.
                drop_caches
                load "$mode" sequential-cold sequential /large
                load "$mode" sequential-again sequential /large
                load "$mode" random-again random /large 2000
                ;;
            2) load "$mode" random-first random /large 2000 ;;
            3) load "$mode" tree-first tree /small ;;
            4) load "$mode" sequential-first sequential /large ;;
        esac
        cri exec "$CONTAINER" -- /load sequential /large >/dev/null
        cri exec "$CONTAINER" -- /load tree /small >/dev/null
        case " $COUNTS $HULL_PODS " in *" $number "*)
            note "$mode" "host-$number" $(($(used) - before))
            note "$mode" "private-$number" "$(private)"
            ;;
        esac
    done
    cri exec "$CONTAINER" -- /load show /proc/meminfo >"$DIR/meminfo"
    note "$mode" guest-cached "$(awk '$1 == "Cached:" { print $2 }' "$DIR/meminfo")"
    note "$mode" guest-free "$(awk '$1 == "MemFree:" { print $2 }' "$DIR/meminfo")"
    [ -z "${HULL_BENCH_KEEP:-}" ] || cat "$DIR/$mode.figures" "$DIR/meminfo"
}

stop_pods() {
    local pod
    for pod in $(cri pods --quiet); do
        cri stopp "$pod" >/dev/null; cri rmp "$pod" >/dev/null
    done
}

report() {
    local figure memory disk ratio
    while read -r figure; do
        memory=$(median pmem "$figure") disk=$(median blk "$figure")
        case $figure in
            guest-free) ratio=$(ratio "$memory" "$disk") ;;
            *) ratio=$(ratio "$disk" "$memory") ;;
        esac
        echo "bench pmem-$figure hull=$memory peer=$disk ratio=$ratio target=none ok"
    done < <(awk '!seen[$1]++ { print $1 }' "$DIR/pmem.figures")
}

clean_up() {
    [ -z "${DAEMON:-}" ] || stop_pods || true
    take_down_node_with_disk
}

take_down_node_with_disk() {
    if [ -n "${DAEMON:-}" ]; then
        kill "$DAEMON" 2>/dev/null || true; wait "$DAEMON" 2>/dev/null || true; DAEMON=
    fi
    umount "$DIR/root" 2>/dev/null || true
    take_down_node "$DIR"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

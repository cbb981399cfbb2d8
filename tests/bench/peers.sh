# shellcheck shell=bash
# Shared by the benchmarks that run tests/diskload in Hull and in containerd with runc: on the same host,
# with the same registry and network, on the same disk, an ext4 of the benchmark's own in a file. Source it
# after lib.sh and node.sh. It sets DIR, of lib.sh, and DISK, where the disk is; DISK/load has the load.
PEERS=(hull containerd)

# run_in_host SCRIPT: runs SCRIPT `inside` in the KVM host, with all that it needs.
run_in_host() {
    local images
    images=$("$REPO/tests/images/build.sh" bench)
    # Static: it runs in containers that have nothing else.
    (cd "$REPO" && RUSTFLAGS='-C target-feature=+crt-static' \
        cargo build --locked --quiet --release -p hull-diskload --target x86_64-unknown-linux-gnu)
    HULL_TEST_IMAGES=$images HULL_DISKLOAD=$TARGET/x86_64-unknown-linux-gnu/release/hull-diskload \
        KVM_HOST_PACKAGES=containerd,runc "$REPO/tests/host/run.sh" "$REPO/$1" inside
}

# Then $DIR/hull.toml may be changed, until start_peers.
set_up_peers() {
    command -v containerd >/dev/null || die "no containerd"
    DIR=$(mktemp -d /tmp/bench.XXXXXX) DISK=$(mktemp -d /tmp/bench-disk.XXXXXX)
    trap 'clean_up' EXIT
    trap 'exit 143' TERM INT
    truncate -s 6G "$DIR/disk"
    mkfs.ext4 -q "$DIR/disk"
    mount -o loop "$DIR/disk" "$DISK"
    mkdir "$DISK/hull" "$DISK/containerd" "$DISK/load"
    cp "$HULL_DISKLOAD" "$DISK/load/diskload"
    # In memory: how fast the registry's own disk is matters to nobody.
    cp -r "$HULL_TEST_IMAGES" "$DIR/storage"
    set_up_node "$DIR" "$DIR/storage" bench.registry
    sed -i "s|^root = .*|root = \"$DISK/hull\"|" "$DIR/hull.toml"
}

start_peers() {
    start_daemon "$DIR" || die "hull serve does not answer"
    start_containerd "$DIR" "$DISK/containerd" bench.registry/bench/pause:latest
}

# cri PEER COMMAND...
cri() { local peer=$1; shift; hull-cri -r "$DIR/$peer.sock" "$@"; }

# figure PEER NAME VALUE
figure() { echo "$2 $3" >>"$DIR/$1.figures"; }
# since PEER NAME BEGIN: the figure is the time since BEGIN (of `now`), s.
since() { figure "$1" "$2" "$(awk -v ns="$(($(now) - $3))" 'BEGIN { printf "%.3f", ns / 1e9 }')"; }

# Nothing of any disk is in the host's memory then.
drop() { sync; echo 3 >/proc/sys/vm/drop_caches; }

# new_pod PEER NAME MIB: POD is its id, and the file of its configuration is $DIR/NAME.pod.
new_pod() {
    mkdir -p "$DIR/logs/$1-$2"
    cat >"$DIR/$2.pod" <<J
{"metadata": {"name": "$2", "uid": "$2", "namespace": "bench", "attempt": 0}, "log_directory": "$DIR/logs/$1-$2",
 "linux": {"resources": {"memory_limit_in_bytes": $(($3 << 20))}}}
J
    POD=$(cri "$1" runp "$DIR/$2.pod") || die "run a pod of $1"
}

# new_container PEER POD-NAME IMAGE MOUNTS COMMAND...: one in POD; CONTAINER is its id.
new_container() {
    local peer=$1 pod=$2 image=$3 mounts=$4; shift 4
    cat >"$DIR/container.json" <<J
{"metadata": {"name": "$image", "attempt": 0}, "image": {"image": "bench.registry/bench/$image:latest"},
 "log_path": "$image.log", "command": $(jq -cn '$ARGS.positional' --args -- "$@"), "mounts": $mounts}
J
    CONTAINER=$(cri "$peer" create "$POD" "$DIR/container.json" "$DIR/$pod.pod") || die "create a container of $peer"
    cri "$peer" start "$CONTAINER" >/dev/null || die "start a container of $peer"
}

end_pod() { cri "$1" stopp "$2" >/dev/null; cri "$1" rmp "$2" >/dev/null; }

# load PEER CONTAINER STEP...
load() {
    local peer=$1 container=$2; shift 2
    cri "$peer" exec --sync "$container" -- /load/diskload "$@" >>"$DIR/$peer.figures" || die "load in $peer: $*"
}

smaller() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a < b) }'; }

# Calls `line FIGURE` for each, in the order in which they were measured. It sets SHORT if a figure is short.
report() {
    local name SHORT=0
    while read -r name; do line "$name"; done < <(awk '$1 != "-" && !seen[$1]++ { print $1 }' "$DIR/hull.figures")
    if declare -F last_line >/dev/null; then last_line; fi
    [ -z "${HULL_BENCH_KEEP:-}" ] || (cd "$DIR" && grep . ./*.figures)
    return $SHORT
}

clean_up() {
    local pod
    if declare -F stop_guests >/dev/null; then stop_guests; fi
    if [ -n "${CONTAINERD:-}" ]; then
        while read -r pod; do end_pod containerd "$pod" || true; done < <(cri containerd pods --quiet || true)
        kill "$CONTAINERD" 2>/dev/null || true
        wait "$CONTAINERD" 2>/dev/null || true
        # Sockets of shims and runc's state are there, whatever its configuration says.
        rmdir /run/containerd/{s,runc/k8s.io,runc,} 2>/dev/null || true
    fi
    take_down_node "$DIR"
    umount -R "$DISK" && rmdir "$DISK"
}

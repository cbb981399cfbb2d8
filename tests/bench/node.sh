#!/bin/bash
# node.sh: what a node with many pods costs the daemon: `hull serve` as it is released, the VMM and the guest
# those of the tests of hull-pod (examples/fake-vmm), so that 1,000 pods fit and no KVM is needed. Each pod
# has three containers, made as kubelet makes them: labels, annotations, environment, logs, and a file of the
# host, its service account and a termination log as mounts. Network: an interface that leads nowhere. PODS
# are the numbers of pods (10, 100 and 1000, or as many as the limit of open files allows). Runs on this
# machine, as root, in namespaces of its own; all files are in memory. node.rs calls the daemon and prints a
# table, and for each target
#   bench node-NAME hull=… peer=none ratio=… target=… held|SHORT
#
# HULL is another program to measure than target/hull/hull. LOAD=log-load is for logs.sh: it takes that load
# instead, with its own arguments in PODS.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
# A pod takes 20 descriptors of the daemon.
most=$(ulimit -Hn)
[ "$most" != unlimited ] && [ "$most" -lt 21000 ] && most=$(((most - 1000) / 20)) || most=1000
PODS=${PODS:-10 100 $most} LOAD=${LOAD:-node-load}

outside() {
    (cd "$REPO" && cargo build --locked --release -p hull-pod -p hull-tests --example fake-vmm --example "$LOAD")
    # A process per VM and file server, all gone with the last of the script.
    HULL=${HULL:-$TARGET/hull/hull} PODS=$PODS LOAD=$LOAD exec unshare --net --mount --pid --fork --kill-child --mount-proc \
        "$REPO/tests/bench/node.sh" inside
}

inside() {
    local dir=/tmp/hull-node hull daemon
    hull=$(realpath "$HULL")
    mkdir -p "$dir"
    mount -t tmpfs -o size=4g node "$dir"
    ip link set lo up
    # A pod takes more than a dozen.
    ulimit -n "$(ulimit -Hn)"
    mkdir -p "$dir"/{assets,net.d,bin,state,kubelet}
    : >"$dir/assets/vmlinux"
    truncate -s 4096 "$dir/assets/root.erofs"
    cp "$TARGET/release/examples/fake-vmm" "$dir/assets/hull-vmm"
    ln "$dir/assets/hull-vmm" "$dir/assets/hull-fs"
    image "$dir"
    plugin >"$dir/bin/dead-end"
    chmod +x "$dir/bin/dead-end"
    cat >"$dir/net.d/10-node.conflist" <<J
{"cniVersion": "1.0.0", "name": "node", "plugins": [{"type": "dead-end"}]}
J
    cat >"$dir/hull.toml" <<T
root = "$dir/root"
state = "$dir/state"
assets = "$dir/assets"
log = "warn"
[cni]
conf_dir = "$dir/net.d"
bin_dirs = ["$dir/bin"]
[vm]
memory_mib = 32
scratch_mib = 64
T
    "$hull" --config "$dir/hull.toml" serve >"$dir/log" 2>&1 &
    daemon=$!
    for _ in {1..100}; do [ -S "$dir/state/hull.sock" ] || sleep 0.1; done
    # shellcheck disable=SC2086
    "$hull" --config "$dir/hull.toml" images import "$dir/image.tar" >/dev/null &&
        "$TARGET/release/examples/$LOAD" "$dir" "$daemon" $PODS || { tail -n 20 "$dir/log"; return 1; }
    grep -E 'ERROR|WARN' "$dir/log" | tail -n 5
}

# An image of one file, in the form of `docker save`.
image() {
    mkdir "$1/image" "$1/image/root"
    touch "$1/image/root/app"
    tar -C "$1/image/root" -cf "$1/image/layer.tar" app
    cat >"$1/image/config.json" <<J
{"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/app"], "Env": ["PATH=/usr/bin:/bin"]},
 "rootfs": {"type": "layers", "diff_ids": ["sha256:$(sha256sum "$1/image/layer.tar" | cut -d ' ' -f 1)"]}}
J
    echo '[{"Config": "config.json", "RepoTags": ["bench.local/app:1"], "Layers": ["layer.tar"]}]' >"$1/image/manifest.json"
    tar -C "$1/image" -cf "$1/image.tar" manifest.json config.json layer.tar
}

# A CNI plugin that makes an interface which leads nowhere: its other end stays down.
plugin() {
    cat <<'S'
#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
exec 3>&1 >/dev/null
address=10.$(($$ / 65536 % 256)).$(($$ / 256 % 256)).$(($$ % 256))
nsenter "--net=$CNI_NETNS" ip -batch - <<B
link add $CNI_IFNAME type veth peer name v$$ netns $$
address add $address/8 dev $CNI_IFNAME
link set $CNI_IFNAME up
B
cat >&3 <<J
{"cniVersion": "1.0.0", "interfaces": [{"name": "$CNI_IFNAME", "sandbox": "$CNI_NETNS"}],
 "ips": [{"address": "$address/8", "interface": 0}]}
J
S
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

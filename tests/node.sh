# shellcheck shell=bash
# One Hull node in a directory of its own, for demo.sh and critest.sh: a registry, a network, a
# configuration and the daemon. Source it after host/lib.sh; runs in the KVM host.

# set_up_node DIR STORAGE HOST...: a registry that serves STORAGE and is the mirror of each HOST,
# and the daemon's configuration.
set_up_node() {
    local dir=$1 storage=$2 host; shift 2
    BRIDGE=hull-$(basename "$dir" | sha256sum | cut -c 1-8)
    mkdir -p "$dir"/{logs,net.d,certs.d}
    "$REPO/tests/images/registry.sh" start "$storage" 0 "$dir/registry"
    REGISTRY=127.0.0.1:$(cat "$dir/registry/port")
    for host; do
        mkdir "$dir/certs.d/$host"
        cat >"$dir/certs.d/$host/hosts.toml" <<T
[host."http://$REGISTRY"]
  capabilities = ["pull", "resolve"]
T
    done
    cat >"$dir/net.d/10-node.conflist" <<J
{"cniVersion": "1.0.0", "name": "node", "plugins": [
  {"type": "bridge", "bridge": "$BRIDGE", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$dir/leases",
            "ranges": [[{"subnet": "10.87.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
J
    cat >"$dir/hull.toml" <<T
root = "$dir/root"
state = "$dir/run"
listen = "$dir/hull.sock"
assets = "$HULL_ASSETS"
[cni]
conf_dir = "$dir/net.d"
bin_dirs = ["/opt/cni/bin", "/usr/lib/cni"]
[registries]
config_dir = "$dir/certs.d"
T
}

# start_daemon DIR: returns when it answers. In a session of its own: a signal to the script's group must
# leave it there for take_down_node.
start_daemon() {
    setsid hull --config "$1/hull.toml" serve >"$1/hull.log" 2>&1 &
    DAEMON=$!
    for _ in {1..300}; do
        if hull-cri -r "$1/hull.sock" version >/dev/null 2>&1; then return 0; fi
        kill -0 "$DAEMON" 2>/dev/null || break
        sleep 0.1
    done
    cat "$1/hull.log"
    return 1
}

# Where CNI's plugins of containerd are.
PLUGINS=/usr/lib/cni

# containerd_config ROOT STATE SOCKET NETWORKS REGISTRIES PAUSE SNAPSHOTTER: prints the configuration of Debian's containerd.
# PAUSE is the image of its sandboxes.
containerd_config() {
    cat <<T
version = 2
root = "$1"
state = "$2"
[grpc]
address = "$3"
[plugins."io.containerd.internal.v1.opt"]
path = "${2%/*}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "$6"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "$7"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "$PLUGINS"
conf_dir = "$4"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "$5"
T
}

# start_containerd DIR ROOT PAUSE: Debian's containerd, which keeps images in ROOT and has the network and registries of
# the node in DIR; returns when it answers on DIR/containerd.sock.
start_containerd() {
    mkdir -p "$1/containerd"
    containerd_config "$2" "$1/containerd/run" "$1/containerd.sock" "$1/net.d" "$1/certs.d" "$3" overlayfs >"$1/containerd/config.toml"
    setsid containerd --config "$1/containerd/config.toml" >>"$1/containerd/log" 2>&1 &
    CONTAINERD=$!
    for _ in {1..300}; do
        if hull-cri -r "$1/containerd.sock" version >/dev/null 2>&1; then return 0; fi
        kill -0 "$CONTAINERD" 2>/dev/null || break
        sleep 0.2
    done
    tail -n 20 "$1/containerd/log"
    die "containerd does not answer"
}

# set_up_containerd DIR PAUSE: starts containerd as above, beside the node in DIR.
set_up_containerd() {
    mkdir "$1/containerd"
    # Overlays are not mounted on a root that is one.
    truncate -s 2G "$1/disk"
    mkfs.ext4 -q "$1/disk"
    mount -o loop "$1/disk" "$1/containerd"
    start_containerd "$1" "$1/containerd/root" "$2"
}

# set_up_delegate DIR PAUSE: the same, for pods of the node that ask for namespaces of the host. Before start_daemon.
set_up_delegate() {
    sed -i "1i delegate_host_pods = \"runc\"\nhandlers.runc.delegate = \"$1/containerd.sock\"" "$1/hull.toml"
    set_up_containerd "$@"
}

# take_down_containerd DIR: what set_up_containerd made, and the pods in it. Before take_down_node.
take_down_containerd() {
    local cri=(hull-cri -r "$1/containerd.sock") pod
    while read -r pod; do
        { "${cri[@]}" stopp "$pod" && "${cri[@]}" rmp "$pod"; } >/dev/null 2>&1 || true
    done < <("${cri[@]}" pods --quiet 2>/dev/null || true)
    kill "${CONTAINERD:-}" 2>/dev/null && wait "$CONTAINERD" 2>/dev/null || true
    umount -l "$1/containerd" || true
}

# The CRI client of the node in DIR.
cri() { hull-cri -r "$DIR/hull.sock" "$@"; }

# take_down_node DIR: removes pods that are left, then everything that set_up_node made.
take_down_node() {
    local cri=(hull-cri -r "$1/hull.sock") pod
    if [ -n "${DAEMON:-}" ]; then
        while read -r pod; do
            { "${cri[@]}" stopp "$pod" && "${cri[@]}" rmp "$pod"; } >/dev/null || true
        done < <("${cri[@]}" pods --quiet || true)
        kill "$DAEMON" 2>/dev/null || true
        wait "$DAEMON" 2>/dev/null || true
    fi
    "$REPO/tests/images/registry.sh" stop "$1/registry"
    ip link del "$BRIDGE" 2>/dev/null || true
    rm -rf "$1"
}

#!/bin/bash
# delegate.sh: one socket for pods in microVMs and pods of Debian's containerd and runc, in the KVM host: a pod with the
# host's network beside one in a VM, each of the two daemons killed under both. Each line is what was seen to hold.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/host/lib.sh"
. "$REPO/tests/node.sh"

IMAGE=bench.registry/bench/busybox:latest

outside() {
    local images
    images=$("$REPO/tests/images/build.sh" bench)
    HULL_TEST_IMAGES=$images KVM_HOST_PACKAGES=containerd,runc "$REPO/tests/host/run.sh" "$REPO/tests/delegate.sh" inside
}

# In the KVM host, as root.
inside() {
    command -v containerd >/dev/null || die "no containerd"
    DIR=$(mktemp -d /tmp/hull.XXXXXX)
    trap clean_up EXIT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" bench.registry
    set_up_delegate "$DIR" bench.registry/bench/pause:latest
    start_daemon "$DIR" || die "hull serve does not answer"
    configure

    cri pull "$IMAGE" >/dev/null
    local vm host
    vm=$(cri runp "$DIR/vm.json")
    host=$(cri runp "$DIR/host.json")
    holds "a pod that asks for the host's network is one of containerd" is_of "$DIR/containerd.sock" "$host"
    holds "a pod that asks for nothing is none" fails is_of "$DIR/containerd.sock" "$vm"
    holds "both are told by one socket" told_pods "$host" "$vm"
    VM=$(cri create "$vm" "$DIR/container.json" "$DIR/vm.json")
    HOST=$(cri create "$host" "$DIR/container.json" "$DIR/host.json")
    cri start "$VM" "$HOST" >/dev/null
    holds "the image is pulled for containerd, too" of_containerd images
    holds "containers run in both" told_running "$HOST" "$VM"
    holds "commands run in both, by either way" commands
    holds "the guest has a network of its own" fails same_network "$VM"
    holds "the other pod has the host's" same_network "$HOST"
    holds "both write their logs where kubelet looks" logs
    holds "both have figures" figures

    kill -9 "$CONTAINERD"
    wait "$CONTAINERD" 2>/dev/null || true
    holds "containerd killed: its pod is still told" told_pods "$host" "$vm"
    holds "its container is unknown, the guest's runs" told_running "$VM"
    holds "its calls say what is wrong" says "$DIR/containerd.sock" cri exec --sync "$HOST" -- true
    holds "commands run in the guest" cri exec --sync "$VM" -- true
    start_containerd "$DIR" "$DIR/containerd/root" bench.registry/bench/pause:latest
    holds "containerd is back: both run" eventually told_running "$HOST" "$VM"
    holds "commands run in both" commands

    kill -9 "$DAEMON"
    wait "$DAEMON" 2>/dev/null || true
    start_daemon "$DIR" || die "hull serve does not answer"
    holds "hull killed and started again: both run" eventually told_running "$HOST" "$VM"
    holds "commands run in both" commands
    holds "hull reset has pods in VMs alone" reset_spares "$host"
    cri stopp "$host" >/dev/null
    cri rmp "$host" >/dev/null
    holds "nothing is left" told_pods
    echo "delegate: all of it held"
}

holds() {
    local what=$1; shift
    "$@" || { echo "does not hold: $what"; return 1; }
    echo "holds: $what"
}
fails() { ! "$@"; }
eventually() { local try; for try in {1..100}; do "$@" && return 0; sleep 0.2; done; return 1; }
says() { local word=$1; shift; ! "$@" >"$DIR/said" 2>&1 && grep -qF "$word" "$DIR/said"; }

of_containerd() { [ -n "$(hull-cri -r "$DIR/containerd.sock" "$@" --quiet)" ]; }
is_of() { hull-cri -r "$1" pods --quiet | grep -q "$2"; }
told_pods() { diff <(printf '%s\n' "$@" | grep . | sort) <(cri pods --quiet | sort); }
told_running() { diff <(printf '%s\n' "$@" | sort) <(cri ps --quiet | sort); }
commands() {
    local container
    for container in "$VM" "$HOST"; do
        [ "$(cri exec --sync "$container" -- cat /proc/1/comm)" = sh ] || return 1
        [ "$(cri exec "$container" -- echo streamed)" = streamed ] || return 1
    done
}
same_network() { [ "$(cri exec --sync "$1" -- ls /sys/class/net | sort | tr '\n' ' ')" = "$(ls /sys/class/net | sort | tr '\n' ' ')" ]; }
logs() { local name; for name in vm host; do eventually grep -q "stdout F hello" "$DIR/logs/$name/main.log" || return 1; done; }
figures() { [ "$(hull --config "$DIR/hull.toml" stats --no-stream -o json | jq -s "flatten | length")" = 2 ]; }
reset_spares() {
    hull --config "$DIR/hull.toml" reset --force >/dev/null
    told_pods "$1"
}

configure() {
    local name network
    for name in vm host; do
        mkdir "$DIR/logs/$name"
        network=0
        [ "$name" = vm ] || network=2
        cat >"$DIR/$name.json" <<J
{"metadata": {"name": "$name", "uid": "$name", "namespace": "default", "attempt": 0}, "log_directory": "$DIR/logs/$name",
 "linux": {"security_context": {"namespace_options": {"network": $network, "pid": 1}}}}
J
    done
    cat >"$DIR/container.json" <<J
{"metadata": {"name": "main", "attempt": 0}, "image": {"image": "$IMAGE"}, "log_path": "main.log",
 "command": ["sh", "-c", "echo hello; while :; do sleep 0.2; done"],
 "linux": {"security_context": {"namespace_options": {"pid": 1}}}}
J
}

clean_up() {
    local code=$?
    if [ $code != 0 ]; then tail -n 20 "$DIR/hull.log" "$DIR/containerd/log" || true; fi
    take_down_containerd "$DIR"
    take_down_node "$DIR"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

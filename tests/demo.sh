#!/bin/bash
# demo.sh: one real pod, step by step: an image made of Debian packages in a real registry, pulled
# and run by `hull serve` through its CRI socket, in a microVM; and nothing is left of it at the end.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/host/lib.sh"
. "$REPO/tests/node.sh"

IMAGE=demo.registry/demo/busybox:latest
BEGIN=${EPOCHREALTIME/./}

# Bash has no fractions: tenths of a second, printed with an exponent.
step() { printf '\n\033[1m%6.1f s  %s\033[0m\n' "$(((${EPOCHREALTIME/./} - BEGIN) / 100000))e-1" "$*"; }
show() { printf '+ %s\n' "$*"; "$@"; }
fail() { echo "demo: $*"; exit 1; }

outside() {
    local images
    images=$("$REPO/tests/images/build.sh")
    HULL_TEST_IMAGES=$images "$REPO/tests/host/run.sh" "$REPO/tests/demo.sh" inside
}

# In the KVM host, as root: hull, hull-cri and docker-registry are in PATH.
inside() {
    DIR=$(mktemp -d /tmp/hull-demo.XXXXXX)
    trap clean_up EXIT
    set_up
    step "Host: kernel $(uname -r)"
    show hull --config "$DIR/hull.toml" check

    step "Start the runtime: one daemon, one socket"
    start_daemon "$DIR" || fail "hull serve does not answer"
    show cri version
    leftovers >"$DIR/before"

    step "Pull an OCI image from the registry on $REGISTRY"
    show cri pull "$IMAGE"
    show cri images

    step "Run a pod: this boots a microVM"
    show cri runp "$DIR/pod.json" | tee "$DIR/pod"
    local pod container; pod=$(tail -n 1 "$DIR/pod")
    show cri pods
    echo "its processes on the host:"
    show ps -o pid,rss,args -p "$(pgrep -d , hull-vmm)"

    step "Run a container in it"
    container=$(cri create "$pod" "$DIR/container.json" "$DIR/pod.json")
    show cri start "$container"
    show cri ps
    sleep 1
    step "What it printed (guest kernel, not the host's $(uname -r))"
    show cri logs "$container"
    [ "$(cri exec "$container" -- uname -r)" != "$(uname -r)" ] || fail "the container runs on the host's kernel"

    step "Execute a command in it"
    # shellcheck disable=SC2016 # expands in the container
    show cri exec "$container" -- sh -c 'set -- /proc/[0-9]*; echo "pid $$ of $# processes, in $(pwd)"; ip -4 -o addr show eth0; cat /etc/replaced'
    local code=0
    show cri exec "$container" -- sh -c 'exit 42' || code=$?
    echo "exit code $code"
    [ "$code" = 42 ] || fail "exit code $code, not 42"

    step "Stop it; the log file that kubelet would read"
    show cri stop --timeout 5 "$container"
    show cat "$DIR/logs/hello.log"

    step "Remove it and the pod"
    show cri rm "$container"
    show cri stopp "$pod"
    show cri rmp "$pod"
    show cri rmi "$IMAGE"

    step "What is left of it on the host: processes, netns, links, mounts, cgroups, files"
    local try
    for try in {1..50}; do
        leftovers >"$DIR/after"
        if diff "$DIR/before" "$DIR/after" >"$DIR/diff"; then break; fi
        [ "$try" -lt 50 ] || { cat "$DIR/diff"; fail "something is left"; }
        sleep 0.1
    done
    echo "nothing"
    step "Done"
}

# The node, and what runs on it.
set_up() {
    set_up_node "$DIR" "$HULL_TEST_IMAGES" demo.registry
    cat >"$DIR/pod.json" <<J
{"metadata": {"name": "demo", "uid": "demo-uid", "namespace": "default", "attempt": 0},
 "hostname": "demo", "log_directory": "$DIR/logs",
 "linux": {"resources": {"memory_limit_in_bytes": 134217728}}}
J
    cat >"$DIR/container.json" <<J
{"metadata": {"name": "hello", "attempt": 0}, "image": {"image": "$IMAGE"}, "log_path": "hello.log",
 "command": ["sh", "-c", "echo \"\$GREETING\"; echo kernel \$(uname -r) on \$(hostname), \$(nproc) CPU; trap 'echo bye; exit 0' TERM; while :; do sleep 0.2; done"]}
J
}

# Everything on this machine that a pod may make.
leftovers() {
    pgrep -l hull-vmm || true
    { find /run/netns "$DIR/run/netns" -mindepth 1 2>/dev/null || true; } | sort
    # The bridge belongs to the network, not to a pod.
    find /sys/class/net -mindepth 1 ! -name "$BRIDGE" | sort
    awk '{print "mount", $2}' /proc/mounts | grep -v tracing | sort
    find /sys/fs/cgroup -mindepth 1 -type d | sort
    # The address pool remembers the last address it gave.
    { find "$DIR/run/pods" "$DIR/root/pods" 2>/dev/null || true; } | sort
    { find "$DIR/leases" -type f ! -name lock ! -name 'last_reserved*' 2>/dev/null || true; } | sort
}

clean_up() {
    local code=$?
    [ $code = 0 ] || echo "demo: failed with exit code $code"
    if [ $code != 0 ]; then
        echo "--- the daemon's log"
        tail -n 40 "$DIR/hull.log"
    fi
    take_down_node "$DIR"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

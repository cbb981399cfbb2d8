#!/bin/bash
# burst.sh: PODS pods that are asked for at once, each a VM of 64 MiB, and all ended at once. Checks
# that each has an address of its own and reaches the node's end of the bridge with it, and that nothing of
# any is left: no VMM, network namespace, lease, or interface. Lines are
#   bench burst-NAME hull=… peer=none ratio=none target=… ok|short
#
#   ready, addresses    pods that became ready, and different addresses among them
#   start, stop         all of them, s;  first: the first that was ready
#   left                what is left after the last has been removed
#   memory              what a pod uses on the host, MiB: everything but page cache
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
PODS=${PODS:-12}

outside() {
    local images
    images=$("$REPO/tests/images/build.sh")
    HULL_TEST_IMAGES=$images HULL_PODS=$PODS "$REPO/tests/host/run.sh" "$REPO/tests/bench/burst.sh" inside
}

# In the KVM host, as root.
inside() {
    DIR=$(mktemp -d /tmp/bench.XXXXXX)
    trap 'take_down_node "$DIR"' EXIT
    trap 'exit 143' TERM INT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" bench.registry
    # Emulated, guests boot one after another.
    printf '[vm]\nmemory_mib = 64\nboot_timeout_seconds = 3600\n' >>"$DIR/hull.toml"
    start_daemon "$DIR" || die "hull serve does not answer"
    local number begin memory first ready addresses SHORT=0
    memory=$(used) begin=$(now)
    for ((number = 1; number <= HULL_PODS; number++)); do start "$number" & done
    wait_for "$HULL_PODS" ids
    first=$(sort -n "$DIR"/begun.* | head -n 1)
    ready=$(cri pods | awk -F '\t' '$2 == "Ready"' | wc -l)
    addresses=$(for id in $(cat "$DIR"/ids.*); do cri inspectp "$id" | jq -r '.status.network.ip'; done | sort -u)
    tell ready "$ready" "$HULL_PODS"
    tell addresses "$(grep -c . <<<"$addresses")" "$HULL_PODS"
    tell answering "$(for ip in $addresses; do ping -q -c 1 -W 30 "$ip" >/dev/null && echo "$ip"; done | wc -l)" "$HULL_PODS"
    tell first "$(seconds "$begin" "$first")"
    tell start "$(seconds "$begin" "$(sort -n "$DIR"/begun.* | tail -n 1)")"
    tell memory $((($(used) - memory) / HULL_PODS / 1024))
    begin=$(now)
    for id in $(cat "$DIR"/ids.*); do end "$id" & done
    wait_for "$HULL_PODS" ended
    tell stop "$(seconds "$begin" "$(now)")"
    tell left "$(left)" 0
    return $SHORT
}

seconds() { awk -v ns="$(($2 - $1))" 'BEGIN { printf "%.1f", ns / 1e9 }'; }
used() { awk '{ v[$1] = $2 } END { print v["MemTotal:"] - v["MemFree:"] - v["Cached:"] - v["Buffers:"] + v["Shmem:"] }' /proc/meminfo; }

start() {
    mkdir -p "$DIR/logs/$1"
    cat >"$DIR/$1.pod" <<J
{"metadata": {"name": "pod$1", "uid": "pod$1", "namespace": "bench", "attempt": 0}, "log_directory": "$DIR/logs/$1", "linux": {}}
J
    cri runp "$DIR/$1.pod" >"$DIR/id.$1" 2>"$DIR/error.$1" || { cat "$DIR/error.$1" >&2; touch "$DIR/failed"; return; }
    now >"$DIR/begun.$1"
    mv "$DIR/id.$1" "$DIR/ids.$1"
}

end() {
    { cri stopp "$1" && cri rmp "$1"; } >/dev/null || touch "$DIR/failed"
    touch "$DIR/ended.$1"
}

# wait_for COUNT PREFIX: until there are as many such files.
wait_for() {
    while [ "$(find "$DIR" -maxdepth 1 -name "$2.*" | wc -l)" -lt "$1" ]; do
        [ ! -e "$DIR/failed" ] || die "a pod failed"
        kill -0 "$DAEMON" || die "hull serve ended"
        sleep 0.5
    done
}

# How many things are there that only pods have.
left() {
    {
        pgrep -f "hull-(vmm|fs) .*$DIR/" || true
        find /run/netns -name 'hull-*' 2>/dev/null || true
        find "$DIR/leases" -name '10.*' || true
        ip -o link show master "$BRIDGE"
    } | wc -l
}

# tell NAME VALUE [TARGET]
tell() {
    local word=ok
    [ $# -lt 3 ] || [ "$2" = "$3" ] || word=short SHORT=1
    echo "bench burst-$1 hull=$2 peer=none ratio=none target=${3:-none} $word"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

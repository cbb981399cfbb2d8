#!/bin/bash
# checkpoint.sh: what a checkpoint of a pod costs, and a pod that goes on from one. ROUNDS checkpoints of a pod that
# has written DIRTY MiB of memory and of one that is idle, in turn, and a restore of each. Lines are
#   bench checkpoint-NAME hull=… peer=… ratio=… target=… ok|short
# of medians, times in ms.
#
#   pause-dirty       how long the VM stood still whose container has DIRTY MiB in memory;  pause-idle  the idle one
#   again-dirty, …    memory that was written while the VM stood still, as it had changed meanwhile, KiB
#   time-…            `hull checkpoint`, until all is on the disk with its digests
#   size-…            what the checkpoint occupies on the disk, KiB
#   restore-…         `hull restore` until the container goes on; the peer is `hull run -d` of the idle one
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
ROUNDS=${ROUNDS:-3}
DIRTY=${DIRTY:-100}

outside() {
    local images
    images=$("$REPO/tests/images/build.sh" bench)
    HULL_TEST_IMAGES=$images HULL_ROUNDS=$ROUNDS HULL_DIRTY=$DIRTY \
        "$REPO/tests/host/run.sh" "$REPO/tests/bench/checkpoint.sh" inside
}

# In the KVM host, as root.
inside() {
    DIR=$(mktemp -d /tmp/bench.XXXXXX)
    trap 'take_down_node "$DIR"' EXIT
    trap 'exit 143' TERM INT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" bench.registry
    sed -i '1i log = "info,hull_pod=debug"' "$DIR/hull.toml"
    start_daemon "$DIR" || die "hull serve does not answer"
    local kind number
    hull pull --quiet "$IMAGE" >/dev/null
    for ((number = 0; number <= HULL_ROUNDS; number++)); do
        timed hull run run idle "sleep 100000"
        # The first pod of a node fills caches.
        [ "$number" != 0 ] || { hull rm -f idle >/dev/null; rm "$DIR/hull.figures"; continue; }
        # The first byte comes when all are in its buffer.
        run dirty "dd if=/dev/urandom bs=${HULL_DIRTY}M count=1 iflag=fullblock | { head -c 1 >/filled; sleep 100000; }"
        until hull exec dirty test -s /filled; do sleep 1; done
        for kind in idle dirty; do save $kind "$number"; done
    done
    for kind in idle dirty; do report $kind; done
    return $SHORT
}

IMAGE=bench.registry/bench/busybox:latest
SHORT=0
hull() { command hull --config "$DIR/hull.toml" "$@"; }
run() { hull run -d --name "$1" --memory 512m "$IMAGE" sh -c "$2" >/dev/null; }

# save KIND NUMBER: a checkpoint of that pod, and one that goes on from it; none stays.
save() {
    local place=$DIR/$1-$2
    timed hull "time-$1" hull checkpoint "$1" "$place" >/dev/null
    note hull "pause-$1" "$(tail -n +2 "$place/manifest" | jq '.paused_us / 1000')"
    note hull "size-$1" "$(du -k -s "$place" | cut -f 1)"
    note hull "again-$1" "$(sed 's/\x1b\[[0-9;]*m//g' "$DIR/hull.log" |
        awk '/memory that is written again/ { sub(/.*bytes=/, ""); last = $1 } END { print int(last / 1024) }')"
    hull rm -f "$1" >/dev/null
    timed hull "restore-$1" hull restore "$place" --name "$1" >/dev/null
    hull exec "$1" true
    hull rm -f "$1" >/dev/null
    rm -r "$place"
}

report() {
    tell "pause-$1" "$(median hull "pause-$1")" none 100
    for figure in again time size; do tell "$figure-$1" "$(median hull "$figure-$1")" none; done
    tell "restore-$1" "$(median hull "restore-$1")" "$(median hull run)"
}

# tell NAME HULL PEER [TARGET]: the figure may be at most the target.
tell() {
    local ratio=none word=ok
    [ "$3" = none ] || ratio=$(ratio "$2" "$3")
    [ -z "${4:-}" ] || awk -v v="$2" -v t="$4" 'BEGIN { exit !(v <= t) }' || { word=short; SHORT=1; }
    echo "bench checkpoint-$1 hull=$2 peer=$3 ratio=$ratio target=${4:-none} $word"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

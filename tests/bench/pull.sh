#!/bin/bash
# pull.sh: how long a pull from a registry of this machine takes, and PEER=PROGRAM beside it, another build of
# hull, in turn. Runs on this machine, as root; the store is in memory, and new for each pull.
#
#   pull-large, pull-tiny, pull-many   the images of pull.py, ms: medians of ROUNDS (7), less what `hull images list`
#                                      takes, since each pull starts a daemon for itself
#
# Each is a line
#   bench NAME hull=… peer=… ratio=… target=… ok|short
# where the ratio is the peer's time by ours, and the target with a peer 0.833: 1.2 times its time.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/bench/lib.sh"
ROUNDS=${ROUNDS:-7} HULL=${HULL:-$TARGET/hull/hull} PEER=${PEER:-}

outside() {
    "$REPO/tests/host/install.sh" registry
    HULL=$(realpath "$HULL") PEER=${PEER:+$(realpath "$PEER")} ROUNDS=$ROUNDS \
        exec unshare --mount "$REPO/tests/bench/pull.sh" inside
}

inside() {
    DIR=$(mktemp -d /tmp/bench.XXXXXX) SHORT=0
    trap '"$REPO/tests/images/registry.sh" stop "$DIR/registry"; umount "$DIR"; rmdir "$DIR"' EXIT
    trap 'exit 143' TERM INT
    mount -t tmpfs -o size=6g pull "$DIR"
    mkdir -p "$DIR"/{storage,certs.d/pull.registry}
    REGISTRY_WRITE=1 "$REPO/tests/images/registry.sh" start "$DIR/storage" 0 "$DIR/registry"
    local url peer round name
    url=http://127.0.0.1:$(cat "$DIR/registry/port")
    python3 -B "$REPO/tests/bench/pull.py" "$url"
    printf '[host."%s"]\n  capabilities = ["pull", "resolve"]\n' "$url" >"$DIR/certs.d/pull.registry/hosts.toml"
    cat >"$DIR/hull.toml" <<T
root = "$DIR/root"
state = "$DIR/state"
[registries]
config_dir = "$DIR/certs.d"
T
    for ((round = 0; round <= ROUNDS; round++)); do
        for name in list large tiny many; do
            for peer in hull ${PEER:+peer}; do once "$peer" "$name" "$round"; done
        done
    done
    for name in large tiny many; do compare "$name"; done
    return $SHORT
}

# once PEER NAME ROUND: the first round only warms caches.
once() {
    local program=$HULL begin
    [ "$1" = hull ] || program=$PEER
    rm -rf "$DIR/root" "$DIR/state"
    begin=$(now)
    if [ "$2" = list ]; then
        "$program" --config "$DIR/hull.toml" images list >/dev/null
    else
        "$program" --config "$DIR/hull.toml" images pull --quiet "pull.registry/pull/$2:latest" >/dev/null
    fi
    [ "$3" = 0 ] || echo "$2 $((($(now) - begin) / 1000))" >>"$DIR/$1.figures"
}

figure() { echo $((($(median "$1" "$2") - $(median "$1" list)) / 1000)); }

compare() {
    local hull peer word=ok
    hull=$(figure hull "$1")
    if [ -z "$PEER" ]; then
        echo "bench pull-$1 hull=$hull peer=none ratio=none target=none ok"
        return
    fi
    peer=$(figure peer "$1")
    [ $((hull * 5)) -le $((peer * 6)) ] || word=short SHORT=1
    echo "bench pull-$1 hull=$hull peer=$peer ratio=$(ratio "$peer" "$hull") target=0.833 $word"
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

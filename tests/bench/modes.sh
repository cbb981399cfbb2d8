# shellcheck shell=bash
# Shared by the benchmarks that compare pods whose VM is a clone of a template (MODE clone), pods whose VM
# boots (cold) and those of Debian's containerd and runc (containerd), by the same client in the same KVM host.
# Source it after the libraries of host, node and benchmarks; DIR is the benchmark's.
MODES=(cold clone containerd)

# run_in_host SCRIPT: runs SCRIPT `inside` in the KVM host.
run_in_host() {
    local images
    # It has the image of containerd's sandboxes, too.
    images=$("$REPO/tests/images/build.sh" bench)
    HULL_TEST_IMAGES=$images KVM_HOST_PACKAGES=containerd,runc "$REPO/tests/host/run.sh" "$REPO/$1" inside
}

# Before start_modes, $DIR/hull.toml and the network of the node may be changed.
set_up_modes() {
    command -v containerd >/dev/null || die "no containerd"
    DIR=$(mktemp -d /tmp/bench.XXXXXX)
    DAEMONS=()
    trap clean_up EXIT
    trap 'exit 143' TERM INT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" bench.registry
}

# start_modes [VM-KEY...]: lines of [vm] in the daemons' configuration. One pod of each mode has been when it returns,
# and the template of the clones is there: it fills caches.
start_modes() {
    local mode DAEMON
    set_up_containerd "$DIR" bench.registry/bench/pause:latest
    for mode in cold clone; do
        mkdir "$DIR/$mode"
        sed "s|^root = .*|root = \"$DIR/$mode/root\"|; s|^state = .*|state = \"$DIR/$mode/s\"|
             s|^listen = .*|listen = \"$DIR/$mode/hull.sock\"|" "$DIR/hull.toml" >"$DIR/$mode/hull.toml"
        {
            echo '[vm]'
            [ $mode = cold ] || echo 'template = true'
            [ $# = 0 ] || printf '%s\n' "$@"
        } >>"$DIR/$mode/hull.toml"
        start_daemon "$DIR/$mode" || die "hull serve does not answer"
        DAEMONS+=("$DAEMON")
    done
    for mode in "${MODES[@]}"; do
        at "$mode" pull bench.registry/bench/busybox:latest >/dev/null
        pod "$mode" 0; end_pod "$mode" "$POD"
    done
    for _ in {1..600}; do
        [ "$(at clone info | jq '.info.info | fromjson.templates.ready')" = 0 ] || return 0
        sleep 0.2
    done
    die "no template is made"
}

# The file with the template's memory, which the daemon of the clones holds.
template() { find "/proc/${DAEMONS[1]}/fd" -lname '/memfd:template-memory*' -print -quit; }

# at MODE COMMAND...: asks that daemon.
at() { local mode=$1; shift; hull-cri -r "$(socket "$mode")" "$@"; }
socket() { if [ "$1" = containerd ]; then echo "$DIR/containerd.sock"; else echo "$DIR/$1/hull.sock"; fi; }

# pod MODE NUMBER: runs one; sets POD. Its configuration is $DIR/MODE-NUMBER.pod.
pod() {
    local file=$DIR/$1-$2.pod
    cat >"$file" <<J
{"metadata": {"name": "$1-$2", "uid": "$1-$2", "namespace": "bench", "attempt": 0}, "log_directory": "$DIR/logs", "linux": {}}
J
    POD=$(at "$1" runp "$file")
}

end_pod() { at "$1" stopp "$2" >/dev/null && at "$1" rmp "$2" >/dev/null; }

# container MODE NUMBER COMMAND...: starts one in POD; sets CONTAINER. Its log is $DIR/logs/MODE-NUMBER.log.
container() {
    local mode=$1 number=$2; shift 2
    describe "$mode-$number" "$@"
    CONTAINER=$(at "$mode" create "$POD" "$DIR/container.json" "$DIR/$mode-$number.pod")
    at "$mode" start "$CONTAINER" >/dev/null
}

# describe NAME COMMAND...: writes $DIR/container.json.
describe() {
    local name=$1; shift
    cat >"$DIR/container.json" <<J
{"metadata": {"name": "$name", "attempt": 0}, "image": {"image": "bench.registry/bench/busybox:latest"},
 "log_path": "$name.log", "command": $(jq -cn '$ARGS.positional' --args -- "$@")}
J
}

# at_most FIGURE HULL PEER [RATIO]: a line of BENCH where the ratio of Hull to its peer may be at most that. It sets
# SHORT if it is more.
at_most() {
    local ratio word=ok
    ratio=$(ratio "${2:-0}" "${3:-0}")
    [ -z "${4:-}" ] || awk -v v="$ratio" -v t="$4" 'BEGIN { exit !(v <= t) }' || word=short SHORT=1
    echo "bench $BENCH-$1 hull=${2:-none} peer=${3:-none} ratio=$ratio target=${4:-none} $word"
}

# held FIGURE HULL [TARGET]: a line where Hull's own figure may be at most the target.
held() {
    local word=ok
    [ -z "${3:-}" ] || awk -v v="${2:-0}" -v t="$3" 'BEGIN { exit !(v <= t) }' || word=short SHORT=1
    echo "bench $BENCH-$1 hull=${2:-none} peer=none ratio=none target=${3:-none} $word"
}
SHORT=0

# All pods, daemons and the node.
clean_up() {
    local mode pod
    for mode in "${MODES[@]}"; do
        while read -r pod; do end_pod "$mode" "$pod" || true; done < <(at "$mode" pods --quiet 2>/dev/null || true)
        [ -z "${HULL_BENCH_KEEP:-}" ] || cp "$DIR/$mode/hull.log" "$HULL_BENCH_KEEP/$mode.log" 2>/dev/null || true
    done
    [ ${#DAEMONS[@]} = 0 ] || { kill "${DAEMONS[@]}" 2>/dev/null; wait "${DAEMONS[@]}" 2>/dev/null; } || true
    take_down_containerd "$DIR"
    DAEMON='' take_down_node "$DIR"
}

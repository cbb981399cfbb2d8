#!/bin/bash
# software.sh [NAME...]: runs software as its users do, each in a pod of its own against a `hull serve` of its
# own in the KVM host: it becomes ready, keeps data that is read back, and stops cleanly. The last lines are a
# table; docs/SOFTWARE.md tells what was met.
#
# tests/software/NAME.sh says what one is:
#   PACKAGES      the Debian packages of its image, installed as in a Dockerfile
#   prepare ROOT  changes the image's tree as a Dockerfile would (optional; chroot "$ROOT" works)
#   CONFIG        the image's configuration: JSON of OCI's image-spec, "Cmd" and the like
#   steps         what is done with it, in the KVM host, by the words below; a step that fails ends it
#
# Logs are in target/software.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/host/lib.sh"
. "$REPO/tests/node.sh"
HERE=$REPO/tests/software
LOGS=$REPO/target/software

# --- words for steps -------------------------------------------------------------------------

# pod [JQ]: runs a sandbox, whose configuration JQ changes. Sets POD.
pod() {
    jq -n --arg n "$NAME" --arg logs "$DIR/logs" \
        '{metadata: {name: $n, uid: ($n + "-uid"), namespace: "software"}, hostname: $n, log_directory: $logs, linux: {}}' \
        | jq "${1:-.}" >"$DIR/pod.json"
    POD=$(cri runp "$DIR/pod.json")
}
# container NAME [JQ]: creates and starts a container of the image, whose configuration JQ changes. As kubelet
# has it, it has PIDs of its own. Sets CTR.
container() {
    jq -n --arg n "$1" --arg i "$IMAGE" \
        '{metadata: {name: $n}, image: {image: $i}, log_path: ($n + ".log"), linux: {}}' | jq "${2:-.}" \
        | jq '.linux.security_context.namespace_options.pid //= 1' >"$DIR/$1.json"
    CTR=$(cri create "$POD" "$DIR/$1.json" "$DIR/pod.json")
    cri start "$CTR" >/dev/null
}
# inside CMD...: runs a command in the container CTR.
inside() { cri exec --sync --timeout 300 "$CTR" -- "$@"; }
# says TEXT CMD...: the command's output has TEXT.
says() {
    local text=$1 output; shift
    output=$("$@" 2>&1) || true
    case $output in *"$text"*) ;; *) fail "no \"$text\" from: $*: $output" ;; esac
}
# ready CMD...: waits until the command succeeds in the container CTR.
ready() {
    local end=$((SECONDS + 300))
    until inside "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "not ready: $*: $(cri logs "$CTR" 2>&1 | tail -n 5)"
        [ "$(status state)" = 1 ] || fail "it ended with $(status exit_code): $(cri logs "$CTR" 2>&1 | tail -n 5)"
        sleep 1
    done
}
# ended CODE: waits until the container CTR has exited, with this code.
ended() {
    local end=$((SECONDS + 300))
    until [ "$(status state)" = 2 ]; do
        [ $SECONDS -lt $end ] || fail "it does not end"
        sleep 1
    done
    [ "$(status exit_code)" = "$1" ] || fail "it ended with $(status exit_code), not $1: $(cri logs "$CTR" 2>&1 | tail -n 5)"
}
# stops CODE [SECONDS]: stops the container CTR, which has so long to end by itself with this code.
stops() {
    local begin=$SECONDS grace=${2:-60}
    cri stop --timeout "$grace" "$CTR" >/dev/null
    [ $((SECONDS - begin)) -lt "$grace" ] || fail "it had to be killed after $grace s"
    ended "$1"
}
status() { cri inspect "$CTR" | jq -r ".status.$1"; }
# met WORDS: tells what the table shows.
met() { echo "$*" | tr -s '\n\t ' ' ' >>"$DIR/met"; }
fail() { echo "software: $NAME: $*" >&2; met "FAILED: $(cut -c 1-300 <<<"$*")"; exit 1; }

# --- outside of the KVM host -----------------------------------------------------------------

outside() {
    local name storage all images=()
    mapfile -t all < <(cd "$HERE" && basename -s .sh -- *.sh)
    for name in "${@:-${all[@]}}"; do
        [ -f "$HERE/$name.sh" ] || die "no software $name: there are ${all[*]}"
        storage=$(describe "$name" && stored "$name")
        images+=("$name=$storage")
    done
    rm -rf "$LOGS"; mkdir -p "$LOGS"
    "$REPO/tests/host/run.sh" "$REPO/tests/software.sh" in-host "${images[@]}"
}

# describe NAME: sets PACKAGES, CONFIG, prepare and steps.
describe() {
    prepare() { :; }
    # shellcheck source=/dev/null
    . "$HERE/$1.sh"
}

# Prints the registry's storage with the image of the software that was described.
stored() {
    local name=$1 suite out
    suite=$(debian_suite)
    out=$HULL_CACHE/software/$name-$({ echo "$suite $PACKAGES $CONFIG"; declare -f prepare build; } | sha256sum | cut -c 1-16)
    mkdir -p "${out%/*}"
    exec 7>"$out.lock"
    flock 7
    [ -d "$out" ] || build "$name" "$suite" "$out" 7>&- >&2
    exec 7>&-
    echo "$out"
}

build() {
    local name=$1 suite=$2 new=$3.new root=$3.root
    need_root "make images"
    "$REPO/tests/host/install.sh" build registry
    install_packages debootstrap
    say "making the image of $name"
    rm -rf "$new" "$root"; mkdir -p "$new"
    base "$suite" "$root"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    # Services must not start while an image is made.
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"; chmod 755 "$root/usr/sbin/policy-rc.d"
    # In a mount namespace: Java is set up with /proc.
    unshare --mount --pid --fork chroot "$root" sh -c "mount -t proc proc /proc && apt-get -qq update && \
        DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends $PACKAGES" \
        >"$new.log" 2>&1 || { tail -n 20 "$new.log"; die "apt-get install $PACKAGES"; }
    prepare "$root"
    rm -rf "$root"/usr/sbin/policy-rc.d "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}
    : >"$root/etc/resolv.conf"
    tar -C "$root" --numeric-owner --sort=name --xattrs --xattrs-include='security.*' -cf "$new.tar" .
    REGISTRY_WRITE=1 "$REPO/tests/images/registry.sh" start "$new" 0 "$new.registry"
    PYTHONPATH=$REPO/tests/images python3 -B "$HERE/push.py" "http://127.0.0.1:$(cat "$new.registry/port")" \
        "software/$name" "$new.tar" "$CONFIG"
    "$REPO/tests/images/registry.sh" stop "$new.registry"
    rm -rf "$root" "$new".{tar,log,registry}
    mv "$new" "$3"
}

# base SUITE ROOT: a tree of Debian alone, made once.
base() {
    local tree=$HULL_CACHE/software/$1
    (
        flock 6
        if [ ! -d "$tree" ]; then
            rm -rf "$tree.new"
            debootstrap --variant=minbase "$1" "$tree.new" "$MIRROR" >/dev/null
            rm -rf "$tree.new"/var/cache/apt/*
            mv "$tree.new" "$tree"
        fi
    ) 6>"$tree.lock"
    cp -a "$tree" "$2"
}

# --- in the KVM host, as root ----------------------------------------------------------------

in_host() {
    local image failed=0
    for image; do run "${image%%=*}" "${image#*=}" || failed=1; done
    echo
    cat "$LOGS/table"
    return $failed
}

# run NAME STORAGE: one software, and its line of the table.
run() {
    local outcome=ok begin=$SECONDS
    NAME=$1 IMAGE=software.test/software/$1:latest
    DIR=$(mktemp -d /tmp/software.XXXXXX)
    set_up_node "$DIR" "$2" software.test
    start_daemon "$DIR" || die "hull serve does not answer"
    # Not as a condition: bash would go on after a step that failed.
    (
        describe "$NAME"
        cri pull "$IMAGE" >/dev/null
        met "pulled in $((SECONDS - begin)) s"
        steps
        met "all in $((SECONDS - begin)) s"
    ) >"$LOGS/$NAME.log" 2>&1 &
    if ! wait $!; then
        outcome=FAILED
        tail -n 5 "$LOGS/$NAME.log"
    fi
    printf '| %s | %s | %s |\n' "$NAME" "$outcome" "$(paste -sd ';' "$DIR/met" 2>/dev/null | sed 's/;/; /g')" | tee -a "$LOGS/table"
    cp "$DIR/hull.log" "$LOGS/$NAME.hull.log"
    cp -r "$DIR/logs" "$LOGS/$NAME.containers"
    take_down_node "$DIR"
    [ $outcome = ok ]
}

case ${1:-} in
    in-host) shift; in_host "$@" ;;
    *) outside "$@" ;;
esac

#!/bin/bash
# assets.sh [image]: builds what Hull needs at run time and puts it into one directory, target/hull:
# hull, hull-vmm, hull-fs, vmlinux, root.erofs, root-debug.erofs, and hull-cri, the client of the demo. With
# `image`, only the guest's kernel and roots. PROFILE=dev builds the host's programs faster, and slower ones.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

OUT=$TARGET/hull
PROFILE=${PROFILE:-release}

image() {
    local kernel agent
    kernel=$("$REPO/guest-image/build-kernel.sh" | tail -n 1)
    agent=$("$REPO/guest-image/build-agent.sh" | tail -n 1)
    ln -sfn "$kernel" "$OUT/vmlinux"
    "$REPO/guest-image/build-root.sh" "$agent" "$OUT/.root.erofs"
    put "$OUT/.root.erofs" "$OUT/root.erofs"
    "$REPO/guest-image/build-root.sh" "$agent" "$OUT/.root.erofs" "$TOOLS/busybox/busybox"
    put "$OUT/.root.erofs" "$OUT/root-debug.erofs"
    rm -f "$OUT/.root.erofs"
}

programs() {
    local dir=$TARGET/$PROFILE program
    [ "$PROFILE" != dev ] || dir=$TARGET/debug
    (cd "$REPO" && cargo build --locked --profile "$PROFILE" -p hull -p hull-vmm -p hull-fs -p hull-tests --bins)
    for program in hull hull-vmm hull-fs hull-cri; do put "$dir/$program" "$OUT/$program"; done
}

# Replaces $2 by $1 only if they differ: what did not change need not go to the KVM host again.
put() {
    cmp -s "$1" "$2" || { cp -p "$1" "$2.new" && mv -f "$2.new" "$2"; }
}

"$REPO/tests/host/install.sh" build
mkdir -p "$OUT"
# One at a time: a second `make` in the same checkout waits.
exec 9>"$OUT/.lock"
flock 9
case ${1:-all} in
    image) image ;;
    all) programs; image ;;
    *) die "unknown: $1" ;;
esac
(cd "$OUT" && stat -L -c '%s bytes  %n' -- *)

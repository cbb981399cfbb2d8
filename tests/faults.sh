#!/bin/bash
# faults.sh faults|soak: tests/faults with real microVMs in the KVM host, as root: a daemon that has points
# where it can be killed (the feature `faults`), and all else as it is released. FOCUS: only the faults with
# that in their names. VMS=fake: with fake ones alone, here. MINUTES: how long the soak goes on at least. The
# last line is the result.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/host/lib.sh"
cd "$REPO"
case ${1:-} in
    faults) test=every_point_is_survived ;;
    soak) test=what_comes_and_goes_leaves_nothing ;;
    *) die "faults or soak" ;;
esac
program=$(cargo test --locked -p hull-tests --test faults --no-run --message-format json |
    jq -r 'select(.profile.test? and .target.name == "faults") | .executable')
HULL_TEST_IMAGES=$("$REPO/tests/images/build.sh")
export HULL_TEST_IMAGES HULL_FOCUS=${FOCUS:-} HULL_SOAK_MINUTES=${MINUTES:-1}
run() { "$@" "$program" --exact "$test" --ignored --nocapture; }
if [ "${VMS:-}" = fake ] || [ "$1" = soak ]; then
    # On this machine; the programs are those of the tests.
    cargo build --locked -p hull --features faults --bins
    cargo build --locked -p hull-pod --examples
    HULL_FAULTS_VMS=fake run env
    [ "${VMS:-}" != fake ] || exit 0
fi
cargo build --locked --release -p hull --features faults --bins
mkdir -p "$TARGET/faults"
cp "$TARGET/release/hull" "$TARGET/faults/hull"
export HULL_FAULTS_VMS=real HULL_FAULTS_DAEMON=$TARGET/faults/hull
run "$REPO/tests/host/run.sh"

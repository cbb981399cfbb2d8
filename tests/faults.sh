#!/bin/bash
# faults.sh faults|soak: tests/faults, as root: a daemon that has points where it can be killed (the feature
# `faults`). Its pods are real microVMs in the KVM host, and all else is as it is released; with VMS=fake they
# are fake, here. The soak runs with both. FOCUS: only the faults that have one of these words (commas between
# them) in their names; `sample`: each point once, and each thing that happens once in each call. MINUTES: how
# long the soak goes on at least. The last line is the result.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/host/lib.sh"
cd "$REPO"
case ${1:-} in
    faults) test=every_point_is_survived ;;
    soak) test=what_comes_and_goes_leaves_nothing ;;
    *) die "faults or soak" ;;
esac
# The daemon and what stands for VMs are built with it, and with it the daemon has the points. Another crate has
# a test of that name too.
program=$(cargo build --locked --workspace --bins --example fake-vmm --test faults --message-format json |
    jq -r 'select(.profile.test? and .target.src_path == "'"$REPO"'/tests/faults/main.rs") | .executable')
HULL_TEST_IMAGES=$("$REPO/tests/images/build.sh")
export HULL_TEST_IMAGES HULL_FOCUS=${FOCUS:-} HULL_SOAK_MINUTES=${MINUTES:-1}
run() { "$REPO/tests/host/run.sh" "$program" --exact "$test" --ignored --nocapture; }
if [ "${VMS:-}" = fake ] || [ "$1" = soak ]; then HULL_HOST=direct HULL_FAULTS_VMS=fake run; fi
[ "${VMS:-}" != fake ] || exit 0
make --no-print-directory build >&2
# As `make build` builds it, but for the points.
cargo build --locked --release -p hull -p hull-vmm -p hull-fs -p hull-tests --features hull/faults --bins
mkdir -p "$TARGET/faults"
cp "$TARGET/release/hull" "$TARGET/faults/hull"
export HULL_FAULTS_VMS=real HULL_FAULTS_DAEMON=$TARGET/faults/hull
run

#!/bin/bash
# boot.sh: from the start of a VMM's process until there is somebody in its guest: the agent that answers, in Hull; an init
# that says so on the console, and does nothing else, in QEMU's microvm with the same kernel and as much memory. ROUNDS of
# each, in turn, in one KVM host. Lines are
#   bench boot-NAME hull=… peer=… ratio=… target=… ok|short
# of medians; a ratio below 1 is in Hull's favour.
#
#   cold        Hull boots, against QEMU's microvm, ms;  clone  a clone of a template against Hull's boot
#   cold-exits  exits to KVM until then;  clone-exits  likewise, against Hull's boot
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
. "$REPO/tests/bench/modes.sh"
. "$REPO/tests/bench/qemu.sh"
ROUNDS=${ROUNDS:-5} BENCH=boot
MIB=256

outside() {
    "$REPO/tests/host/install.sh" emulator
    HULL_ROUNDS=$ROUNDS run_in_host tests/bench/boot.sh
}

# In the KVM host, as root.
inside() {
    [ -x "$QEMU" ] || die "no QEMU in $TOOLS/emulator"
    set_up_modes
    start_modes "memory_mib = $MIB" "max_memory_mib = $MIB"
    local number
    for ((number = 0; number < HULL_ROUNDS; number++)); do
        boot cold "$number"
        boot clone "$number"
        boot_qemu
    done
    at_most cold "$(median cold time)" "$(median qemu boot)" 1.0
    at_most clone "$(median clone time)" "$(median cold time)" 0.05
    at_most cold-exits "$(median cold exits)" "$(median qemu exits)"
    held exits "$(median cold exits)" 700
    at_most clone-exits "$(median clone exits)" "$(median cold exits)"
    return $SHORT
}

# boot MODE NUMBER: as the daemon measures it.
boot() {
    local mode=$1 vmm
    pod "$mode" "$2"
    vmm=$(pgrep -f "hull-vmm.*$POD")
    note "$mode" exits "$(exits "$vmm")"
    note "$mode" time "$(at "$mode" inspectp "$POD" |
        jq '.info.info | fromjson.bootMicroseconds | (.spawn + .vm + .agent) / 1000')"
    end_pod "$mode" "$POD"
}

boot_qemu() {
    start_guest qemu $MIB ''
    note qemu exits "$(exits "${GUESTS[0]}")"
    stop_guests
}

exits() { cat /sys/kernel/debug/kvm/"$1"-*/exits; }

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

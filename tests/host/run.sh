#!/bin/bash
# run.sh [CMD [ARG...]]: runs CMD (one word: shell text) as root in the KVM host, in the checkout,
# with the built binaries in PATH and HULL_ASSETS set; its exit code is ours. Without CMD: a shell.
#
# The KVM host is this machine if its /dev/kvm runs our guest, which `hull-vmm probe` finds out by
# running one; otherwise the emulated one (kvm-host.sh), which is started if need be.
# HULL_HOST=direct|emulated decides otherwise. SHARE=dir is visible there too.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

# Sets HOST and WHY.
choose() {
    HOST=emulated
    if [ -n "${HULL_HOST:-}" ]; then
        HOST=$HULL_HOST WHY="HULL_HOST says so"
    elif [ ! -e /dev/kvm ]; then
        WHY="there is no /dev/kvm"
    elif [ "$(id -u)" != 0 ]; then
        die "must be root"
    else
        local vmm=$ASSETS/hull-vmm
        [ -x "$vmm" ] || vmm=$TARGET/release/hull-vmm
        if [ ! -x "$vmm" ]; then
            WHY="/dev/kvm is there, but hull-vmm is not built and cannot try it (make build)"
        elif WHY=$(timeout 20 "$vmm" probe 2>&1); then
            HOST=direct WHY="hull-vmm probe: $(tail -n 1 <<<"$WHY")"
        else
            WHY="hull-vmm probe: $(tail -n 1 <<<"$WHY")"
        fi
    fi
}

direct() {
    need_root "run microVMs"
    "$REPO/tests/host/install.sh" host
    export PATH=$ASSETS:$TOOLS:$PATH HULL_ASSETS=$ASSETS HULL_HOST=direct
    cd "$REPO"
    case $# in
        0) exec bash -i ;;
        1) exec bash -c "$1" ;;
        *) exec "$@" ;;
    esac
}

choose
# Inside the emulated host HULL_HOST is set: say it once, outside.
[ "$WHY" = "HULL_HOST says so" ] || say "KVM host: $HOST ($WHY)"
case $HOST in
    direct) direct "$@" ;;
    emulated) exec "$REPO/tests/host/kvm-host.sh" exec "$@" ;;
    *) die "HULL_HOST=$HOST: neither direct nor emulated" ;;
esac

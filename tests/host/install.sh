#!/bin/bash
# install.sh WHAT...: installs the Debian packages that are missing; a no-op where nothing is.
#
#   build      what compiling needs (cargo itself is the developer's)
#   emulator   what the emulated KVM host needs: QEMU >= 10, virtiofsd, debootstrap, ssh;
#              not needed on a machine whose /dev/kvm can run our guest
#   host       what Hull and its tests need on the machine where they run
#   registry   Debian's docker-registry, unpacked beside the cache: installed, it would be a service
set -euo pipefail
. "$(dirname "$0")/lib.sh"

build() {
    # libseccomp-dev: the agent links libseccomp.a. The rest: cargo's C dependencies and our scripts.
    install_packages gcc libc6-dev make pkg-config libseccomp-dev curl jq python3 git
}

host() {
    install_packages attr containernetworking-plugins e2fsprogs erofs-utils openssl iproute2 iptables nftables \
        procps util-linux kmod curl jq ca-certificates
    registry
}

registry() {
    command -v docker-registry >/dev/null && return
    [ -x "$TOOLS/docker-registry" ] && return
    local tmp; tmp=$(mktemp -d)
    say "unpacking docker-registry into $TOOLS"
    apt_update_once
    (cd "$tmp" && apt -o APT::Sandbox::User=root download docker-registry && dpkg-deb -x docker-registry_*.deb tree)
    mkdir -p "$TOOLS"
    mv "$tmp/tree/usr/bin/docker-registry" "$TOOLS/docker-registry"
    rm -rf "$tmp"
}

# bookworm's own QEMU (7.2) corrupts the memory of the machine it emulates; backports has 10.
qemu_major() { qemu-system-x86_64 --version 2>/dev/null | sed -n 's/.*version \([0-9]*\).*/\1/p;q'; }

emulator() {
    install_packages debootstrap openssh-client binutils xz-utils kmod
    local major suite
    suite=$(debian_suite)
    major=$(qemu_major || true)
    if [ "${major:-0}" -lt 10 ]; then
        need_root "install QEMU"
        say "installing QEMU"
        if [ "$suite" = bookworm ]; then
            local dir; dir=$(mktemp -d)
            private_apt "$dir" bookworm bookworm-updates bookworm-backports
            apt "${PRIVATE_APT[@]}" install -y --no-install-recommends -t bookworm-backports qemu-system-x86 seabios
            rm -rf "$dir"
        else
            apt_update_once
            apt install -y --no-install-recommends qemu-system-x86 seabios
        fi
    fi
    virtiofsd "$suite"
}

virtiofsd() {
    [ -x /usr/libexec/virtiofsd ] || [ -x "$TOOLS/bin/virtiofsd" ] || {
        if [ "$1" = bookworm ]; then
            # bookworm's is part of QEMU 7.2, and backports has none.
            install_packages gcc libc6-dev libcap-ng-dev libseccomp-dev
            say "building virtiofsd (about two minutes, once)"
            CARGO_TARGET_DIR=$TOOLS/build cargo install --quiet virtiofsd --version 1.14.0 --locked --root "$TOOLS" >&2
            rm -rf "$TOOLS/build"
        else
            install_packages virtiofsd
        fi
    }
}

[ $# -gt 0 ] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
for what; do
    case $what in
        build | emulator | host | registry) "$what" ;;
        *) die "unknown: $what" ;;
    esac
done

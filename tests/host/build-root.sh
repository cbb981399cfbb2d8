#!/bin/bash
# build-root.sh DIR PACKAGE,PACKAGE...: makes the emulated KVM host's root tree (DIR/root) and its
# kernel (DIR/vmlinuz) out of Debian packages of this machine's suite, so that binaries built here
# run there. About a minute and 500 MB. Called by kvm-host.sh, which keys DIR by what goes in.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

DIR=$1 PACKAGES=$2
NEW=$DIR.new
ROOT=$NEW/root

main() {
    need_root "build the emulated KVM host"
    rm -rf "$NEW"; mkdir -p "$NEW"
    local suite; suite=$(debian_suite)
    say "debootstrap $suite"
    debootstrap --variant=minbase --include="$PACKAGES" "$suite" "$ROOT" "$MIRROR" >"$NEW/debootstrap.log" 2>&1 \
        || { tail -n 20 "$NEW/debootstrap.log" >&2; die "debootstrap failed"; }
    rm -rf "$ROOT"/var/cache/apt/archives "$ROOT"/var/lib/apt/lists "$ROOT"/usr/share/{doc,man,locale}
    kernel "$suite"
    modules
    login
    echo kvm-host > "$ROOT/etc/hostname"
    echo '127.0.0.1 localhost kvm-host' > "$ROOT/etc/hosts"
    # An overlay cannot be another overlay's upper layer, so state that holds layers needs a mount.
    mkdir -p "$ROOT/var/lib/hull"
    rm -rf "$DIR"; mv "$NEW" "$DIR"
}

# The cloud kernel, 6.12 or newer: virtiofs, fuse and virtio-pci are built in, so neither a disk
# image nor an initrd is needed. bookworm's own 6.1 has them as modules.
kernel() {
    local suite=$1 apt=$NEW/apt package
    [ "$suite" != bookworm ] || suite=bookworm-backports
    private_apt "$apt" "$suite"
    package=$(apt-cache "${PRIVATE_APT[@]}" depends linux-image-cloud-amd64 \
        | awk '/Depends: linux-image-.*-cloud-amd64/ {print $2; exit}')
    [ -n "$package" ] || die "no cloud kernel in $suite"
    say "kernel $package"
    (cd "$apt" && apt "${PRIVATE_APT[@]}" download "$package")
    dpkg-deb -x "$apt"/linux-image-*.deb "$apt/k"
    mkdir -p "$ROOT/usr/lib/modules"
    # /lib in the package, /usr/lib in the newer ones
    find "$apt/k" -path '*lib/modules/*' -prune -exec cp -a {} "$ROOT/usr/lib/modules/" \;
    cp "$apt"/k/boot/vmlinuz-* "$NEW/vmlinuz"
    # Programs ask there what the kernel was built with.
    mkdir -p "$ROOT/boot"
    cp "$apt"/k/boot/config-* "$ROOT/boot"
    rm -rf "$apt"
}

# Nothing to decompress, verify or parse when a module is loaded: each is slow in emulation.
modules() {
    find "$ROOT/usr/lib/modules" -name '*.ko.xz' -exec xz -d -T0 {} +
    find "$ROOT/usr/lib/modules" -name '*.ko' -exec objcopy --strip-debug -R .BTF -R .BTF.base {} \;
    local version
    for version in "$ROOT"/usr/lib/modules/*; do chroot "$ROOT" depmod "${version##*/}"; done
}

# The key of whoever may log in is this machine's own and never leaves the cache.
login() {
    ssh-keygen -q -t ed25519 -N '' -C hull-kvm-host -f "$NEW/id"
    mkdir -p "$ROOT/root/.ssh" "$ROOT/etc/ssh"
    cp "$NEW/id.pub" "$ROOT/root/.ssh/authorized_keys"
    rm -f "$ROOT"/etc/ssh/ssh_host_*
    ssh-keygen -q -t ed25519 -N '' -f "$ROOT/etc/ssh/ssh_host_ed25519_key"
}

main

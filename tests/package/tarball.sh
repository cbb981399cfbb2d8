# shellcheck shell=bash
# The tarball with install.sh: installed, upgraded by itself under a running pod, removed, purged.

try_tarball() {
    boot "$1" "$KEPT/hull.tar.xz"
    left >"$DIR/before"

    step "tarball: a disk that is full"
    in_it mkdir -p /unpacked /small
    show tar -xJf /packages/hull.tar.xz -C /unpacked --strip-components=1
    in_it mount -t tmpfs -o size=16m tmpfs /small
    expect 73 "MiB are needed; nothing was changed" env DESTDIR=/small /unpacked/install.sh
    [ -z "$(in_it find /small -type f)" ] || fail "files on the full disk"
    in_it umount /small

    step "tarball: install"
    expect 2 "unknown: --help" /unpacked/install.sh --help
    expect 0 "hull check" /unpacked/install.sh
    active
    in_it install -Dm644 /usr/share/hull/99-hull.conflist -t /etc/cni/net.d
    expect 0 "a small guest ran" hull check
    mirror demo.registry
    show hull run -d --name web $IMAGE sleep 10000
    VM=$(vms)
    [ -n "$VM" ] || fail "no VM"
    alive

    step "tarball: upgrade under a running pod"
    local daemon; daemon=$(main_pid)
    expect 0 "installed" /unpacked/install.sh
    active; alive
    [ "$(main_pid)" != "$daemon" ] || fail "the daemon was not restarted"
    in_it cp /usr/lib/hull/formats /root/formats
    in_it sed -i 's/^records .*/records 99/' /usr/lib/hull/formats
    expect 75 "can't take over what the installed one left: records of version 99" /unpacked/install.sh
    in_it cp /root/formats /usr/lib/hull/formats
    alive

    step "tarball: remove and purge"
    expect 0 "hull-run/web" /unpacked/install.sh --remove
    [ -z "$(vms)" ] || fail "VMs are left"
    in_it test -e /etc/hull/config.toml || fail "the configuration is gone"
    in_it /unpacked/install.sh --purge
    # Those of the test.
    in_it rm -rf /unpacked /small /root/formats /etc/cni/net.d/99-hull.conflist /var/lib/cni/networks/hull
    ip link del hull0
    in_it rmdir --ignore-fail-on-non-empty -p /var/lib/cni/networks /etc/cni/net.d
    left >"$DIR/after"
    diff "$DIR/before" "$DIR/after" || fail "something is left"
    echo "nothing is left"
}

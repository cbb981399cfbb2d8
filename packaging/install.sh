#!/bin/sh
# install.sh [--remove | --purge]: installs Hull from the directory where this file is, on a system with glibc
# @GLIBC@ or newer and systemd; or upgrades it, while pods go on. --remove ends the daemon and all pods, and
# removes the programs; --purge also images, records and the configuration. Other systems than Debian's:
# Debian's have a package. DESTDIR=DIR installs below DIR and starts nothing. Exit codes: 2, wrong arguments; 69,
# the daemon does not start; 71, this system lacks something; 73, no room; 75, what is installed can't be taken over.
set -eu

NEEDED=@GLIBC@
here=$(cd "$(dirname "$0")" && pwd)
dest=${DESTDIR:-}

# die CODE WORDS
die() { code=$1; shift; echo "install.sh: $*" >&2; exit "$code"; }
systemd() { [ -z "$dest" ] && [ -d /run/systemd/system ]; }

@FUNCTIONS@

# As `sort -V`, which not every system has.
is_older() {
    awk -v a="$1" -v b="$2" 'BEGIN { split(a, x, "."); split(b, y, ".");
        exit !(x[1] + 0 < y[1] + 0 || (x[1] + 0 == y[1] + 0 && x[2] + 0 < y[2] + 0)) }'
}

files() { (cd "$here/root" && find usr -type f); }

install_all() {
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d ' ' -f 2)
    [ -n "$glibc" ] || die 71 "the C library is not glibc; $NEEDED or newer is needed"
    ! is_older "$glibc" "$NEEDED" || die 71 "glibc is $glibc; $NEEDED or newer is needed"
    ! dpkg-query -W -f "\${db:Status-Status}" hull 2>/dev/null | grep -qx installed || die 75 "the Debian package is installed; upgrade that"
    command -v mkfs.ext4 >/dev/null || [ -x /usr/sbin/mkfs.ext4 ] || die 71 "there is no mkfs.ext4: install e2fsprogs"
    why=''
    [ -n "$dest" ] || why=$(cannot_take_over /usr/lib/hull/formats "$(cat "$here/root/usr/lib/hull/formats")")
    [ -z "$why" ] || die 75 "this version can't take over what the installed one left: $why; drain this node, or end its pods with \`hull reset -f\`, and install it then"
    mkdir -p "$dest/usr"
    why=$(no_room "$dest/usr" "$(du -sk "$here/root" | cut -f 1)")
    [ -z "$why" ] || die 73 "$why; nothing was changed"
    # By new files under their names: the old ones are running. And all or none.
    trap 'files | while read -r file; do rm -f "$dest/$file.hull-new"; done' EXIT
    files | while read -r file; do
        mkdir -p "$dest/${file%/*}"
        cp -p "$here/root/$file" "$dest/$file.hull-new"
    done
    files | while read -r file; do mv -f "$dest/$file.hull-new" "$dest/$file"; done
    mkdir -p "$dest/etc/hull/config.d" "$dest/etc/hull/certs.d"
    # Yours stays.
    [ -e "$dest/etc/hull/config.toml" ] || cp "$here/root/etc/hull/config.toml" "$dest/etc/hull/config.toml"
    if systemd; then
        systemctl daemon-reload
        systemctl enable --quiet hull.service
        systemctl restart hull.service || die 69 "it is installed, and the daemon does not start: $(journalctl -u hull -t hull -n 1 -o cat)"
    fi
    echo "installed; \`hull check\` tells what is missing on this host"
}

remove() {
    # Not there if it was removed before.
    if systemd && [ -e /usr/lib/systemd/system/hull.service ]; then systemctl disable --quiet --now hull.service || true; fi
    if [ -z "$dest" ] && [ -e /var/lib/hull/hull.redb ] && [ -x /usr/bin/hull ]; then
        hull reset --force || echo "install.sh: some pods could not be ended; a reboot ends them" >&2
    fi
    files | while read -r file; do rm -f "$dest/$file"; done
    rmdir "$dest/usr/lib/hull" "$dest/usr/share/hull/monitoring" "$dest/usr/share/hull" "$dest/usr/share/doc/hull" 2>/dev/null || true
    if systemd; then systemctl daemon-reload; fi
}

[ -d "$here/root/usr" ] || die 1 "there is no directory root beside this file"
[ -n "$dest" ] || [ "$(id -u)" = 0 ] || die 1 "must be root"
case ${1:-} in
    '') install_all ;;
    --remove) remove ;;
    --purge)
        remove
        rm -rf "$dest/var/lib/hull" "$dest/run/hull" "$dest/etc/hull"
        ;;
    *) die 2 "unknown: $1" ;;
esac

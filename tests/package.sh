#!/bin/bash
# package.sh: the packages as an administrator has them, on a fresh Debian under systemd: the Debian package
# (package/deb.sh), the tarball (package/tarball.sh) and the installer of Kubernetes nodes (package/node.sh). PART names
# some of them: deb, tarball, node. In the KVM host, each in a container of its own, whose system is a tree of Debian
# packages alone; for the last two with what an administrator would have installed before. For node: KUBELET=FILE, a
# kubelet that you have, as Debian has none; without one the part is left out. SUITE=trixie: that Debian, in place of
# this machine's.
#
# The package that is upgraded is that of an earlier commit: PREVIOUS=FILE, or the newest of those before HEAD
# that was built once (packaging/build-deb keeps them), or else HEAD~1, which takes a whole build.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/host/lib.sh"
. "$REPO/tests/node.sh"
for file in lib deb tarball node; do . "$REPO/tests/package/$file.sh"; done

KEPT=$HULL_CACHE/package
IMAGE=demo.registry/demo/busybox:latest
PART=${PART:-deb tarball${KUBELET:+ node}}

outside() {
    local part old tree images
    mkdir -p "$KEPT"
    for part in $PART; do
        case $part in
            deb)
                "$REPO/packaging/build-deb" "$KEPT/new.deb"
                old=${PREVIOUS:-$(previous)}
                cp "$old" "$KEPT/old.deb"
                ;;
            tarball) "$REPO/packaging/build-tarball" "$KEPT/hull.tar.xz" ;;
            node)
                [ -x "${KUBELET:-}" ] || die "KUBELET is to be the path of a kubelet"
                "$REPO/packaging/build-image" "$KEPT/installer.tar"
                cp "$KUBELET" "$KEPT/kubelet"
                ;;
            *) die "unknown: $part" ;;
        esac
    done
    find "$KEPT" -maxdepth 1 '(' -name '*.deb' -o -name 'hull.*' -o -name 'installer.*' ')' -printf '%s %f\n' >&2
    for part in $PART; do
        tree=$(fresh_tree "$(packages "$part")")
        # Those of the node have an image for containerd's sandboxes.
        if [ "$part" = node ]; then images=bench; else images=images; fi
        HULL_TEST_IMAGES=$("$REPO/tests/images/build.sh" $images)
        export HULL_TEST_IMAGES
        "$REPO/tests/host/run.sh" "$REPO/tests/package.sh" inside "$part" "$tree"
    done
}

previous() {
    local commit file source
    for commit in $(git -C "$REPO" rev-list --max-count=100 HEAD~1); do
        file=$KEPT/$commit.deb
        if [ -e "$file" ]; then echo "$file"; return; fi
    done
    commit=$(git -C "$REPO" rev-parse HEAD~1) source=$KEPT/source
    say "building the package of $commit"
    rm -rf "$source"; git -C "$REPO" worktree prune
    git -C "$REPO" worktree add --quiet --detach "$source" "$commit" >&2
    (cd "$source" && CARGO_TARGET_DIR=$KEPT/target make --no-print-directory deb) >&2
    git -C "$REPO" worktree remove --force "$source"
    echo "$KEPT/$commit.deb"
}

# What an administrator has installed before a part.
packages() {
    local all=systemd-sysv,ca-certificates
    [ "$1" = deb ] || all+=,containernetworking-plugins,iproute2,xz-utils
    [ "$1" != node ] || all+=,iptables,containerd,runc
    echo "$all"
}

# fresh_tree PACKAGE,PACKAGE...: a Debian with them, and in apt's cache what our package depends on and recommends, as
# there is no network.
fresh_tree() {
    local suite tree
    suite=${SUITE:-$(debian_suite)}
    tree=$KEPT/$suite-$({ echo "$1"; sed -n '/^fresh_tree/,/^}/p' "$0"; } | sha256sum | cut -c 1-12)
    if [ ! -d "$tree" ]; then
        need_root "make a fresh Debian"
        "$REPO/tests/host/install.sh" emulator
        say "debootstrap $suite with $1"
        rm -rf "$tree.new"
        debootstrap --variant=minbase --include="$1" "$suite" "$tree.new" "$MIRROR" >"$KEPT/debootstrap.log" 2>&1
        chroot "$tree.new" apt-get -qq update >&2
        chroot "$tree.new" apt-get -qq -y --download-only install containernetworking-plugins iproute2 e2fsprogs >&2
        rm -f "$tree.new/etc/resolv.conf"
        # Waits for a terminal or device that is not there.
        ln -sf /dev/null "$tree.new/etc/systemd/system/console-getty.service"
        mv "$tree.new" "$tree"
    fi
    echo "$tree"
}

# --- in the KVM host ---------------------------------------------------------------------------

inside() {
    DIR=$(mktemp -d /tmp/hull-package.XXXXXX)
    trap clean_up EXIT
    "$REPO/tests/images/registry.sh" start "$HULL_TEST_IMAGES" 0 "$DIR/registry"
    step "$1: boot a fresh Debian"
    "try_$1" "$2"
    step "$1: done"
}

clean_up() {
    local code=$?
    # Of a function whose output goes elsewhere, perhaps.
    exec >&2
    if [ $code != 0 ]; then
        echo "package: failed with exit code $code"
        in_it journalctl -u hull --no-pager 2>/dev/null | tail -n 40 || true
    fi
    "$REPO/tests/images/registry.sh" stop "$DIR/registry" || true
    unboot
    exit $code
}

case ${1:-} in
    '') outside ;;
    inside) inside "$2" "$3" ;;
    *) die "no arguments" ;;
esac

#!/bin/bash
# build-kernel.sh [--update] - build the guest kernel from Debian's newest linux-source-6.* package
# and the fragments in kernel/. The last line on stdout is the path of vmlinux; beside it are its
# config, System.map, build-info.txt and build.log.
#
# The result is kept in ${HULL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/hull}/kernel/<hash of the inputs>.
# While the inputs stay the same, that result is used and the network is not; --update looks
# whether Debian has a newer package. HULL_DEBIAN_MIRROR (and the same with -security) is used
# in place of http://deb.debian.org/debian.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/common.sh"

cache=$(realpath -m "${HULL_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/hull}/kernel")
mirror=${HULL_DEBIAN_MIRROR:-http://deb.debian.org/debian}
tools=(bc binutils bison flex gcc libc6-dev libelf-dev make xz-utils)

# The options of all fragments, without the comments.
options() { grep -hE '^(CONFIG_|# CONFIG_[A-Za-z0-9_]+ is not set)' "$here"/kernel/*.config; }

# Hash of everything that the result depends on, for package version $1.
key() {
    { echo "$1"; gcc --version; ld --version; options; declare -f fetch kmake build; } | sha256sum | cut -c1-16
}

# Prints the result and ends, if the cache has one for package version $1.
finish_if_built() {
    local out; out=$cache/$(key "$1")
    [ -f "$out/vmlinux" ] || return 0
    echo "$1" >"$cache/package.$$" && mv "$cache/package.$$" "$cache/package"
    echo "$out/vmlinux"
    exit 0
}

# apt with package lists of its own: Debian only, signature required, whatever the host is set up with.
apt() {
    local command=$1; shift
    "$command" -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::Lists="$work/lists" -o Dir::Cache::pkgcache="$work/pkgcache.bin" -o Dir::Cache::srcpkgcache= \
        -o APT::Sandbox::User=root -o APT::Update::Error-Mode=any -o APT::Get::AllowUnauthenticated=false \
        -o Acquire::AllowInsecureRepositories=false -o Acquire::Languages=none -o Acquire::Retries=3 "$@"
}

# Sets `package` and `version` to the newest that Debian offers for this suite.
resolve() {
    local suite signed='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mkdir -p "$work/lists/partial"
    cat >"$work/sources.list" <<SOURCES
deb $signed $mirror $suite main
deb $signed $mirror $suite-backports main
deb $signed $mirror-security $suite-security main
SOURCES
    apt apt-get update >&2 || die "cannot get signed package lists from $mirror"
    package=$(apt apt-cache pkgnames linux-source-6. | grep -E '^linux-source-6\.[0-9]+$' | sort -V | tail -n 1) || true
    [ -n "$package" ] || die "no linux-source-6.* in Debian $suite"
    version=$(apt apt-cache madison "$package" | awk '{ print $3 }' | sort -V | tail -n 1)
}

# Downloads and unpacks the source to $work/src. apt checks it against the signed lists; so do we.
fetch() {
    log "downloading $package $version"
    (cd "$work" && apt apt-get download "$package=$version") >&2 || die "cannot download $package=$version"
    deb_sha256=$(sha256sum "$work"/*.deb | cut -d' ' -f1)
    [ "$deb_sha256" = "$(apt apt-cache show "$package=$version" | awk '/^SHA256:/ { print $2; exit }')" ] \
        || die "$package=$version does not match the signed package list"
    mkdir "$work/src"
    dpkg-deb --fsys-tarfile "$work"/*.deb | tar -xO "./usr/src/$package.tar.xz" | tar -xJ -C "$work/src" --strip-components=1
    rm "$work"/*.deb
}

# The kernel's make, with nothing of the caller's environment that could change the result.
kmake() {
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C LOCALVERSION= KCONFIG_ALLCONFIG="$work/options" \
        KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 +0000' KBUILD_BUILD_VERSION=1 KBUILD_BUILD_USER=hull KBUILD_BUILD_HOST=hull \
        nice -n 5 make -C "$work/src" -j"$(nproc)" "$@" >>"$cache/build.log" 2>&1 \
        || { tail -n 30 "$cache/build.log" >&2; die "make $* failed, see $cache/build.log"; }
}

# Builds $work/src into $1.
build() {
    log "building Linux $version (10 to 20 minutes on 2 cores), log: $cache/build.log"
    options >"$work/options"
    : >"$cache/build.log"
    kmake allnoconfig
    # An option that Kconfig dropped is found now, not after the build.
    "$here/check-kernel.sh" "$work/src" >&2
    kmake vmlinux
    local new=$work/new
    mkdir "$new"
    strip -s -R .comment -o "$new/vmlinux" "$work/src/vmlinux"
    cp "$work/src/.config" "$new/config"
    cp "$work/src/System.map" "$cache/build.log" "$new/"
    cat >"$new/build-info.txt" <<INFO
release         $(cat "$work/src/include/config/kernel.release")
package         $package $version
package sha256  $deb_sha256
config sha256   $(sha256sum "$new/config" | cut -d' ' -f1)
compiler        $(gcc --version | head -n 1)
linker          $(ld --version | head -n 1)
vmlinux sha256  $(sha256sum "$new/vmlinux" | cut -d' ' -f1)
INFO
    "$here/check-kernel.sh" "$new" >&2
    mv "$new" "$1"
}

[ $# = 0 ] || [ "$*" = --update ] || die "usage: $0 [--update]"
mkdir -p "$cache"
remembered() { [ -f "$cache/package" ] && command -v gcc >/dev/null; }
if [ $# = 0 ] && remembered; then finish_if_built "$(cat "$cache/package")"; fi

exec 9>"$cache/lock"
flock -n 9 || { log "waiting for another build"; flock 9; }
if [ $# = 0 ] && remembered; then finish_if_built "$(cat "$cache/package")"; fi
need_packages "${tools[@]}"
rm -rf "$cache"/work.* # of a build that was killed; nobody else holds the lock
work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
resolve
finish_if_built "$package $version"
# Decided before the build: who edits a fragment meanwhile gets another key, and another build.
out=$cache/$(key "$package $version")
fetch
build "$out"
finish_if_built "$package $version"

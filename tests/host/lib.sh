# shellcheck shell=bash
# Shared by the scripts of tests/: where things are, and how Debian packages arrive.
# Source it; it only defines names.

REPO=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
HULL_CACHE=${HULL_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/hull}
case $HULL_CACHE in /*) ;; *) HULL_CACHE=$PWD/$HULL_CACHE ;; esac
export HULL_CACHE
TARGET=${CARGO_TARGET_DIR:-$REPO/target}
case $TARGET in /*) ;; *) TARGET=$REPO/$TARGET ;; esac
# Where `make build` puts what Hull needs at run time: hull, hull-vmm, hull-fs, vmlinux, root.erofs.
# (Like every name here, used by the scripts that source this file.)
# shellcheck disable=SC2034
ASSETS=${HULL_ASSETS:-$TARGET/hull}
# shellcheck disable=SC2034
TOOLS=$HULL_CACHE/tools
MIRROR=${HULL_DEBIAN_MIRROR:-http://deb.debian.org/debian}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

say() { echo "${0##*/}: $*" >&2; }
die() { say "$*"; exit 125; }

# Prints the Debian suite of this machine (bookworm, trixie, ...).
debian_suite() {
    local suite
    suite=$(. /etc/os-release && [ "${ID:-}" = debian ] && echo "${VERSION_CODENAME:-sid}") \
        || die "this is not Debian: the test tools are installed from Debian packages"
    echo "$suite"
}

need_root() { [ "$(id -u)" = 0 ] || die "must be root to $1"; }

# apt-get without questions, waiting for another apt that holds the lock.
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 \
        -o Dpkg::Use-Pty=0 -qq "$@" >/dev/null
}

# Prints those of the packages $@ that are not installed.
missing_packages() {
    local p
    for p; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || echo "$p"
    done
}

# Installs those of the packages $@ that are missing.
install_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    need_root "install ${missing[*]}"
    say "installing ${missing[*]}"
    apt_update_once
    apt install -y --no-install-recommends "${missing[@]}"
}

# Refreshes apt's lists, unless that was done in the last hour: an image often has none.
apt_update_once() {
    local lists=/var/lib/apt/lists
    if [ -n "$(find $lists -maxdepth 1 -name '*_Packages*' -mmin -60 2>/dev/null | head -n 1)" ]; then return 0; fi
    (flock 9; apt update) 9>/var/lock/hull-apt-update
}

# private_apt DIR SUITE...: makes apt options (array PRIVATE_APT) for a source list of our own, so
# that the machine's sources stay as they are, and fetches its package lists into DIR.
private_apt() {
    local dir=$1 suite; shift
    mkdir -p "$dir/lists/partial" "$dir/archives/partial"
    for suite; do echo "deb [signed-by=$KEYRING] $MIRROR $suite main"; done > "$dir/sources.list"
    PRIVATE_APT=(-o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=-
        -o Dir::State::Lists="$dir/lists" -o Dir::Cache::archives="$dir/archives"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
    apt "${PRIVATE_APT[@]}" update
}

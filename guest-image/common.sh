# shellcheck shell=bash
# Shared by the scripts of this directory; sourced, not run.

log() { echo "${0##*/}: $*" >&2; }
die() { log "$*"; exit 1; }

# Installs those of the given Debian packages that are missing.
need_packages() {
    local p missing=()
    for p; do
        dpkg-query -W -f='${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "missing packages, install them as root: apt-get install ${missing[*]}"
    log "installing ${missing[*]}"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=120
                   --no-install-recommends install "${missing[@]}")
    # Package lists may be missing or too old: update only then.
    "${install[@]}" >/dev/null 2>&1 || { apt-get -qq update >&2 && "${install[@]}" >&2; } \
        || die "cannot install ${missing[*]}"
}

#!/bin/bash
# build.sh [critest|bench|conformance DIR]: makes the test images (images.py; critest: those that critest
# names, critest.py; bench: those of the storage benchmark, bench.py; conformance: those of the Kubernetes
# node suite in DIR, conformance.py) from Debian packages, once, and prints the directory that holds
# them: a docker-registry storage, to be served with registry.sh. In it is also a file `images` that lists
# names and digests.
set -euo pipefail
HERE=$(dirname "$(realpath "$0")")
. "$HERE/../host/lib.sh"

SET=${1:-images}
case $SET in images | critest | bench | conformance) ;; *) die "unknown set of images: $SET" ;; esac
# Only for conformance: the agnhost of its images, and the names and tags that the suite pulls.
AGNHOST='' WANTED=''
if [ "$SET" = conformance ]; then
    AGNHOST=$2/agnhost
    WANTED=$(cd / && "$2/e2e_node.test" --list-images | sort)
fi

main() {
    local out
    out=$HULL_CACHE/images/$(cat "$HERE"/{build.sh,oci.py,"$SET".*} ${AGNHOST:+"$AGNHOST"} - \
        <<<"$(debian_suite)$WANTED" | sha256sum | cut -c 1-16)
    # In the emulated KVM host the cache is read-only, and this has run outside before.
    if [ ! -f "$out/images" ]; then
        mkdir -p "${out%/*}"
        exec 7>"$out.lock"
        flock 7
        [ -f "$out/images" ] || build "$out" 7>&-
    fi
    echo "$out"
}

build() {
    local new=$1.new work
    "$HERE/../host/install.sh" build registry
    say "making the test images"
    work=$(mktemp -d)
    # Expanded now: `work` is local.
    # shellcheck disable=SC2064
    trap "'$HERE/registry.sh' stop '$work/state' 2>/dev/null || true; rm -rf '$work'" EXIT
    rm -rf "$new"; mkdir -p "$new" "$work/debs" "$work/tree"
    apt_update_once
    # Unpacked, not installed: busybox and busybox-static exclude each other.
    (cd "$work/debs" && apt -o APT::Sandbox::User=root download busybox busybox-static libc6)
    local deb
    for deb in "$work"/debs/*.deb; do
        dpkg-deb -x "$deb" "$work/tree/$(dpkg-deb -f "$deb" Package)"
        echo "$(dpkg-deb -f "$deb" Package) $(dpkg-deb -f "$deb" Version)"
    done >"$work/versions"
    "unpack_$SET" "$work"
    REGISTRY_WRITE=1 "$HERE/registry.sh" start "$new" 0 "$work/state"
    "push_$SET" "http://127.0.0.1:$(cat "$work/state/port")" "$work"
    "$HERE/registry.sh" stop "$work/state"
    "finish_$SET" "$new" "$work"
    rm -rf "$1"; mv "$new" "$1"
}

# unpack_whole WORK NAME PACKAGE...: the packages and all that they depend on, in one tree of that name.
unpack_whole() {
    local work=$1 name=$2 deb packages; shift 2
    mapfile -t packages < <(apt-cache depends --recurse --no-{recommends,suggests,conflicts,breaks,replaces,enhances} \
        "$@" | grep '^[a-z]')
    mkdir "$work/$name" "$work/tree/$name"
    (cd "$work/$name" && apt -o APT::Sandbox::User=root download "${packages[@]}")
    for deb in "$work/$name"/*.deb; do dpkg-deb -x "$deb" "$work/tree/$name"; done
}

# The packages of demo/network.
unpack_images() { unpack_whole "$1" network iptables nftables iproute2 iputils-ping socat ethtool inotify-tools; }
push_images() { python3 -B "$HERE/images.py" "$1" "$2/tree" "$2/versions" >"$2/pushed"; }
finish_images() {
    flip_bit "$1" "$(awk '$1 == "flip" {print $2}' "$2/pushed")"
    grep -v '^flip ' "$2/pushed" >"$1/images"
}

unpack_critest() { :; }
push_critest() {
    pause "$2/pause"
    gcc -Os -static -s -o "$2/euid" "$HERE/critest.c"
    python3 -B "$HERE/critest.py" "$1" "$2/tree" "$2" >"$2/pushed"
}
finish_critest() { cp "$2/pushed" "$1/images"; }

unpack_bench() { :; }
push_bench() {
    pause "$2/pause"
    python3 -B "$HERE/bench.py" "$1" "$2/tree" "$2" >"$2/pushed"
}
finish_bench() { cp "$2/pushed" "$1/images"; }

unpack_conformance() { unpack_whole "$1" tools curl util-linux; }
push_conformance() {
    pause "$2/pause"
    gcc -Os -static -s -o "$2/euid" "$HERE/critest.c"
    cp "$AGNHOST" "$2/agnhost"
    # What agnhost serves with where it is asked for TLS; nobody trusts it.
    install_packages openssl
    openssl req -x509 -newkey rsa:2048 -nodes -days 20000 -subj "/O=Acme Co" \
        -addext "subjectAltName=DNS:example.com,IP:127.0.0.1,IP:::1" -keyout "$2/localhost.key" -out "$2/localhost.crt" 2>/dev/null
    python3 -B "$HERE/conformance.py" "$1" "$2/tree" "$2" "$WANTED" >"$2/pushed"
}
finish_conformance() { cp "$2/pushed" "$1/images"; }

pause() {
    install_packages gcc libc6-dev
    gcc -Os -static -s -DPAUSE -o "$1" "$HERE/critest.c"
}

# A registry whose disk went bad: the size stays, the content does not.
flip_bit() {
    local hex=${2#sha256:} file
    file=$1/docker/registry/v2/blobs/sha256/${hex:0:2}/$hex/data
    printf '\377' | dd of="$file" bs=1 seek=1000 conv=notrunc status=none
}

main

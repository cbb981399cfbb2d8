#!/bin/bash
# build.sh: builds the programs that check a file system and attack the guest from within a container,
# static, and prints the directory that holds them:
#
#   pjdfstest   system calls that concern names, modes and owners, and their errors (BSD-2-Clause)
#   fsx         random writes, mappings, truncations against a model in memory (APSL-2.0)
#   hull-posix  what those leave out; ours
#   hull-hostile  attacks on what is around a container; ours (agent/hostile)
#
# The first two are packages of crates.io, run as they are: nothing of ours is linked with them. They are
# built once and kept in the cache.
set -euo pipefail
HERE=$(dirname "$(realpath "$0")")
. "$HERE/../host/lib.sh"
PACKAGES=(pjdfstest@0.2.2 fsx@0.3.2)
TRIPLE=x86_64-unknown-linux-gnu
# Without symbols the programs fit into a pod's /dev/shm, where they are run, too.
export RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols'

main() {
    local kept out=$TARGET/posix
    kept=$HULL_CACHE/posix/$(cat "$0" - <<<"$(debian_suite) $(rustc --version)" | sha256sum | cut -c 1-16)
    if [ ! -d "$kept" ]; then
        mkdir -p "${kept%/*}"
        exec 7>"$kept.lock"
        flock 7
        [ -d "$kept" ] || packages "$kept" 7>&-
    fi
    # Not optimized, but a failed check says where, and goes on: a release build would abort.
    (cd "$REPO" && cargo build --locked --quiet -p hull-posix -p hull-hostile --target "$TRIPLE")
    mkdir -p "$out"
    cp -u "$kept"/* "$TARGET/$TRIPLE/debug/hull-posix" "$TARGET/$TRIPLE/debug/hull-hostile" "$out"
    echo "$out"
}

packages() {
    local work package
    work=$(mktemp -d)
    # Expanded now: `work` is local.
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    for package in "${PACKAGES[@]}"; do
        say "building $package"
        CARGO_TARGET_DIR=$work/target cargo install --locked --quiet --target "$TRIPLE" --root "$work/root" "$package"
    done
    rm -f "$work"/root/.crates*
    rm -rf "$1.new"; cp -r "$work/root/bin" "$1.new"; mv "$1.new" "$1"
}

main

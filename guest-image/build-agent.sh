#!/bin/bash
# build-agent.sh - build the guest agent as one static program. The last line on stdout is its path.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/common.sh"

need_packages binutils gcc libc6-dev libseccomp-dev
target=x86_64-unknown-linux-gnu
cd "$here/.."
# Naming the target keeps these flags away from build scripts and procedural macros.
RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static' \
    LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/x86_64-linux-gnu \
    cargo build --profile guest -p hull-agent --target $target >&2
agent=$(realpath "${CARGO_TARGET_DIR:-target}/$target/guest/hull-agent")

# Nothing is there to load it: no interpreter, no shared library.
headers=$(readelf -l -d "$agent")
! grep -qE 'INTERP|NEEDED' <<<"$headers" || die "$agent is not static"
echo "$agent"

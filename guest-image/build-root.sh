#!/bin/bash
# build-root.sh AGENT OUT [BUSYBOX] - make the guest's root, a small read-only EROFS: the static program AGENT
# as /init, the AppArmor policy that it gives the kernel, and empty directories to mount on. With BUSYBOX, a static one, it is the root of guests that may be
# entered (vm.debug), which have it as /debug/busybox. The same bytes give the same OUT bytes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/common.sh"

[ $# = 2 ] || [ $# = 3 ] || die "usage: $0 AGENT OUT [BUSYBOX]"
agent=$1 out=$2 busybox=${3:-}
for program in "$agent" ${busybox:+"$busybox"}; do
    [ -f "$program" ] || die "no program at $program"
    ! readelf -l "$program" 2>/dev/null | grep -q INTERP ||
        die "$program is not static: nothing in the guest could load it"
done
need_packages apparmor erofs-utils

umask 022
stage=$(mktemp -d) && chmod 755 "$stage"
trap 'rm -rf "$stage" "$out.new"' EXIT
# One level deep: what else the agent needs it makes in tmpfs.
mkdir "$stage"/{dev,etc,mnt,proc,run,sbin,sys,tmp,var}
install -m 755 "$agent" "$stage/init"
ln -s ../init "$stage/sbin/hull-agent"
# Nothing of this machine's kernel or configuration goes in.
mkdir "$stage/etc/apparmor"
apparmor_parser --config-file=/dev/null --features-file=/etc/apparmor.d/abi/kernel-5.4-vanilla \
    --skip-cache --skip-kernel-load --ofile="$stage/etc/apparmor/hull-default" "$here/hull-default.apparmor" >&2
[ -z "$busybox" ] || install -D -m 755 "$busybox" "$stage/debug/busybox"

# Fixed owner, times and UUID. No inline data: only whole pages can be mapped from pmem (DAX).
mkfs.erofs --quiet --all-root -T0 -U 68756c6c-0000-4000-8000-000000000000 -x-1 -Enoinline_data "$out.new" "$stage" >&2
mv "$out.new" "$out"

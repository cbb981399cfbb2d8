#!/bin/bash
# test-root.sh [AGENT] - check that build-root.sh is reproducible and that its image is whole:
# the same agent gives the same bytes whatever its owner, mode, times, place and our umask; another
# agent gives others; fsck accepts the image; what comes out of it is the agent, executable, root's.
# Without AGENT a static stand-in is compiled.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/common.sh"

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0
check() { # NAME COMMAND...
    local name=$1; shift
    if "$@" >"$tmp/log" 2>&1; then echo "ok    $name"; else echo "FAIL  $name"; sed 's/^/      /' "$tmp/log"; failed=1; fi
}

if [ $# = 0 ]; then
    need_packages gcc libc6-dev
    echo 'int main(void) { return 0; }' | gcc -static -x c - -o "$tmp/stand-in"
fi
agent=${1:-$tmp/stand-in}

mkdir "$tmp/a" "$tmp/b"
cp "$agent" "$tmp/a/agent"
cp "$agent" "$tmp/b/other-name"; chmod 700 "$tmp/b/other-name"; touch -d 2001-02-03 "$tmp/b/other-name"
cp "$agent" "$tmp/changed"; printf x >>"$tmp/changed"

check "build" "$here/build-root.sh" "$tmp/a/agent" "$tmp/a.erofs"
check "build again, elsewhere" bash -c "umask 077; cd / && TMPDIR='$tmp/b' '$here/build-root.sh' '$tmp/b/other-name' '$tmp/b.erofs'"
check "build with a changed agent" "$here/build-root.sh" "$tmp/changed" "$tmp/c.erofs"
check "same agent, same bytes" cmp "$tmp/a.erofs" "$tmp/b.erofs"
check "changed agent, changed bytes" bash -c "! cmp -s '$tmp/a.erofs' '$tmp/c.erofs'"
check "fsck.erofs" fsck.erofs "$tmp/a.erofs"
check "extract" fsck.erofs --extract="$tmp/x" "$tmp/a.erofs"
check "/init is the agent" cmp "$agent" "$tmp/x/init"
check "/sbin/hull-agent leads to it" test "$(readlink "$tmp/x/sbin/hull-agent")" = ../init
check "modes and owners" diff <(cd "$tmp/x" && find . -printf '%M %U:%G %T@ %p\n' | LC_ALL=C sort -k4) - <<'LIST'
drwxr-xr-x 0:0 0.0000000000 .
drwxr-xr-x 0:0 0.0000000000 ./dev
drwxr-xr-x 0:0 0.0000000000 ./etc
drwxr-xr-x 0:0 0.0000000000 ./etc/apparmor
-rw-r--r-- 0:0 0.0000000000 ./etc/apparmor/hull-default
-rwxr-xr-x 0:0 0.0000000000 ./init
drwxr-xr-x 0:0 0.0000000000 ./mnt
drwxr-xr-x 0:0 0.0000000000 ./proc
drwxr-xr-x 0:0 0.0000000000 ./run
drwxr-xr-x 0:0 0.0000000000 ./sbin
lrwxrwxrwx 0:0 0.0000000000 ./sbin/hull-agent
drwxr-xr-x 0:0 0.0000000000 ./sys
drwxr-xr-x 0:0 0.0000000000 ./tmp
drwxr-xr-x 0:0 0.0000000000 ./var
LIST
check "build with a shell" "$here/build-root.sh" "$tmp/a/agent" "$tmp/s.erofs" "$tmp/a/agent"
check "extract it" fsck.erofs --extract="$tmp/s" "$tmp/s.erofs"
check "the shell is there, and nothing else" diff <(cd "$tmp/s" && find . -printf '%M %p\n' | LC_ALL=C sort -k2) \
    <({ cd "$tmp/x" && find . -printf '%M %p\n'; echo 'drwxr-xr-x ./debug'; echo '-rwxr-xr-x ./debug/busybox'; } |
        LC_ALL=C sort -k2)
check "a dynamic agent is refused" bash -c "! '$here/build-root.sh' /bin/ls '$tmp/d.erofs'"
exit $failed

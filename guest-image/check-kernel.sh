#!/bin/bash
# check-kernel.sh DIR - print the sizes of the kernel in DIR (a result of build-kernel.sh or a kernel
# source tree) and check that every option of kernel/*.config has the value that was asked for.
# Exit code 1 and a list if one has not, or if an option has no reason above it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/common.sh"

[ $# = 1 ] || die "usage: $0 DIR"
config=$1/config
[ -f "$config" ] || config=$1/.config
[ -f "$config" ] || die "no config in $1"

if [ -f "$1/vmlinux" ]; then
    echo "vmlinux $(stat -c %s "$1/vmlinux") bytes"
    size "$1/vmlinux" | awk 'NR == 2 { print "text", $1, "data", $2, "bss", $3 }'
fi

awk '
    FNR == 1       { reason = 0 }
    # The final configuration, read first: option -> value; what is missing is off.
    FILENAME == ARGV[1] { if (/^CONFIG_/) { i = index($0, "="); set[substr($0, 1, i - 1)] = substr($0, i + 1) } next }
    /^# CONFIG_[A-Za-z0-9_]+ is not set$/ { check($2, ""); next }
    /^CONFIG_/     { i = index($0, "="); check(substr($0, 1, i - 1), substr($0, i + 1)); next }
    /^# ./         { reason = 1; next }
    /^$/           { reason = 0; next }
                   { print FILENAME ": not understood: " $0; bad++ }
    function check(name, want) {
        asked++
        if (!reason) { print FILENAME ": no reason above " name; bad++ }
        if (set[name] != want) {
            print FILENAME ": " name " asked for " (want == "" ? "off" : want) ", is " (set[name] == "" ? "off" : set[name]); bad++
        }
        reason = 0
    }
    END { print asked + 0 " options asked for, " bad + 0 " wrong"; exit bad > 0 || asked == 0 }
' "$config" "$here"/kernel/*.config

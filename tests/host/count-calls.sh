#!/bin/bash
# count-calls.sh begin | print | end: in the KVM host: counts which system calls the threads of hull-vmm and
# hull-fs make, with which of the arguments that their lists check, by histograms of ftrace, which cost
# next to nothing. tests/checks/syscalls compares what is printed with the lists.
set -euo pipefail
EVENTS=/sys/kernel/tracing/events
BEGUN=/run/hull-calls-counted

lists() { hull-vmm syscalls; hull-fs syscalls; }

# Names the arguments of a call, in their order.
arguments() { awk '/field:/ { if (seen) { sub(";", "", $0); split($0, part, ";"); n = split(part[1], word, /[ *]/); print word[n] }; if (/__syscall_nr/) seen = 1 }' "$EVENTS/syscalls/sys_enter_$1/format"; }

begin() {
    local threads name checks event pattern positions position keys
    touch "$BEGUN"
    if [ ! -d "$EVENTS/syscalls" ]; then
        echo "count-calls.sh: this kernel does not trace system calls" >&2
        return
    fi
    declare -A checked patterns
    while IFS=$'\t' read -r threads name _ checks _; do
        for pattern in ${threads//,/ }; do
            patterns[$pattern]=1
            [ "$checks" = - ] || checked[$name,$pattern]+=" $(tr ',' '\n' <<<"$checks" | cut -d '&' -f 1 | tr '\n' ' ')"
        done
    done < <(set -f; lists)
    for pattern in "${!patterns[@]}"; do
        echo "hist:keys=id:size=1024 if comm ~ \"$pattern\"" >>"$EVENTS/raw_syscalls/sys_enter/trigger"
    done
    for event in "${!checked[@]}"; do
        name=${event%%,*} pattern=${event#*,}
        mapfile -t names < <(arguments "$name")
        keys=
        positions=$(tr ' ' '\n' <<<"${checked[$event]}" | sort -un)
        for position in $positions; do keys+=${keys:+,}${names[$position]}.hex; done
        echo "hist:keys=$keys:size=1024 if comm ~ \"$pattern\"" >>"$EVENTS/syscalls/sys_enter_$name/trigger"
    done
}

# What was counted, each call's histograms below a line with its name and its arguments' positions.
print() {
    local event name
    [ -e "$BEGUN" ] || { echo "count-calls.sh: nothing was counted here" >&2; exit 1; }
    [ -d "$EVENTS/syscalls" ] || return 0
    echo "event all"
    cat "$EVENTS/raw_syscalls/sys_enter/hist"
    for event in "$EVENTS"/syscalls/sys_enter_*; do
        grep -q '^hist' "$event/trigger" || continue
        name=${event##*/sys_enter_}
        echo "event $name $(arguments "$name" | tr '\n' ' ')"
        cat "$event/hist"
    done
}

end() {
    local event trigger
    for event in "$EVENTS"/raw_syscalls/sys_enter "$EVENTS"/syscalls/sys_enter_*; do
        while read -r trigger; do echo "!${trigger% \[*}" >>"$event/trigger"; done < <(grep '^hist' "$event/trigger")
    done
    rm -f "$BEGUN"
}

case ${1:-} in
    begin) [ -e "$BEGUN" ] || begin ;;
    print) print ;;
    end) end ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac

#!/bin/bash
# count-calls.sh begin | print | end: in the KVM host: counts which system calls the threads of hull-vmm and
# hull-fs make, with which of the arguments that their lists check, by histograms of ftrace, which cost
# next to nothing. tests/checks/syscalls compares what is printed with the lists.
set -euo pipefail
EVENTS=/sys/kernel/tracing/events
BEGUN=/run/hull-calls-counted

lists() { hull-vmm syscalls; hull-fs syscalls; }

# Sets NAMES to those of a call's arguments, in their order. Without other programs, which take their time.
arguments() {
    local line seen=
    NAMES=()
    while read -r line; do
        case $line in
            *__syscall_nr*) seen=1 ;;
            field:*) if [ -n "$seen" ]; then line=${line%%;*} NAMES+=("${line##*[ *]}"); fi ;;
        esac
    done <"$EVENTS/syscalls/sys_enter_$1/format"
}

begin() {
    local threads name checks event pattern part position keys
    local -a parts
    set -f
    touch "$BEGUN"
    if [ ! -d "$EVENTS/syscalls" ]; then
        echo "count-calls.sh: this kernel does not trace system calls" >&2
        return
    fi
    declare -A checked patterns
    while IFS=$'\t' read -r threads name _ checks _; do
        for pattern in ${threads//,/ }; do
            patterns[$pattern]=1
            [ "$checks" != - ] || continue
            IFS=, read -ra parts <<<"$checks"
            for part in "${parts[@]}"; do checked[$name,$pattern]+=" ${part%%&*} "; done
        done
    done < <(lists)
    for pattern in "${!patterns[@]}"; do
        echo "hist:keys=id:size=1024 if comm ~ \"$pattern\"" >>"$EVENTS/raw_syscalls/sys_enter/trigger"
    done
    for event in "${!checked[@]}"; do
        name=${event%%,*} pattern=${event#*,}
        arguments "$name"
        keys=
        for position in 0 1 2 3 4 5; do
            [[ ${checked[$event]} != *" $position "* ]] || keys+=${keys:+,}${NAMES[$position]}.hex
        done
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
        arguments "$name"
        echo "event $name ${NAMES[*]}"
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

#!/bin/bash
# count-calls.sh while FILE CMD [ARG...] | end: in the KVM host: counts which system calls the threads of
# hull-vmm and hull-fs make while CMD runs, with which of the arguments that their lists check, by histograms
# of ftrace, which cost next to nothing. What was counted since the machine started is written to FILE.BOOT,
# for tests/checks/syscalls to compare with the lists. Counting goes on until `end`.
set -euo pipefail
EVENTS=/sys/kernel/tracing/events
BEGUN=/run/hull-calls-counted

lists() { hull-vmm syscalls; hull-fs syscalls; }

# Sets NAMES to those of an event's arguments, in their order. Without other programs, which take their time.
arguments() {
    local line seen=
    NAMES=()
    while read -r line; do
        case $line in
            *__syscall_nr*) seen=1 ;;
            field:*) if [ -n "$seen" ]; then line=${line%%;*} NAMES+=("${line##*[ *]}"); fi ;;
        esac
    done <"$1/format"
}

begin() {
    local threads name checks event key pattern part position keys
    local -a parts
    set -f
    : >"$BEGUN"
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
    event=$EVENTS/raw_syscalls/sys_enter
    echo "event $event" >>"$BEGUN"
    for pattern in "${!patterns[@]}"; do
        echo "hist:keys=id:size=1024 if comm ~ \"$pattern\"" >>"$event/trigger"
    done
    for key in "${!checked[@]}"; do
        name=${key%%,*} pattern=${key#*,} event=$EVENTS/syscalls/sys_enter_${key%%,*}
        arguments "$event"
        echo "event $event ${NAMES[*]}" >>"$BEGUN"
        keys=
        for position in 0 1 2 3 4 5; do
            [[ ${checked[$key]} != *" $position "* ]] || keys+=${keys:+,}${NAMES[$position]}.hex
        done
        echo "hist:keys=$keys:size=1024 if comm ~ \"$pattern\"" >>"$event/trigger"
    done
    sort -u -o "$BEGUN" "$BEGUN"
}

# Prints the arguments of the events, and what was counted, each line behind its file's name.
print() {
    local event files=()
    while read -r _ event _; do files+=("$event/hist"); done <"$BEGUN"
    [ ${#files[@]} = 0 ] || { cat "$BEGUN"; grep -H . "${files[@]}"; }
}

end() {
    local event trigger
    while read -r _ event _; do
        while read -r trigger; do echo "!${trigger% \[*}" >>"$event/trigger"; done < <(grep '^hist' "$event/trigger")
    done <"$BEGUN"
    rm "$BEGUN"
}

case ${1:-} in
    while)
        [ -e "$BEGUN" ] || begin
        code=0
        "${@:3}" || code=$?
        print >"$2.$(</proc/sys/kernel/random/boot_id)"
        exit $code
        ;;
    end) end ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac

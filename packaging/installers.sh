# Of the installers, into which the build scripts put it.

# cannot_take_over FILE OURS: prints why a daemon with the formats OURS can't take over what the one with those of
# FILE left: the records of a newer one, or VMs that speak otherwise. Nothing if it can. Both: lines of NAME VERSION.
cannot_take_over() {
    [ -f "$1" ] || return 0
    theirs=$(cat "$1")
    format() { printf '%s\n' "$1" | awk -v name="$2" '$1 == name { print $2 }'; }
    if [ -e /var/lib/hull/hull.redb ] && [ -n "$(ls -A /var/lib/hull/pods 2>/dev/null)" ]; then
        wrote=$(format "$theirs" records) reads=$(format "$2" records)
        if [ "${wrote:-0}" -gt "$reads" ]; then echo "records of version $wrote, and it knows $reads"; return 0; fi
    fi
    ls /run/hull/pods/*/vmm.process >/dev/null 2>&1 || return 0
    for name in vmm agent; do
        speaks=$(format "$theirs" $name) hears=$(format "$2" $name)
        if [ "$speaks" != "$hears" ]; then echo "running VMs ($name $speaks, and it knows $hears)"; return 0; fi
    done
}

# no_room DIR KIB: prints what is missing where DIR is to get KIB more, or nothing.
no_room() {
    free=$(df -Pk "$1" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$2" ] || echo "$1 has $((free / 1024)) MiB free, and $((($2 + 1023) / 1024)) MiB are needed"
}

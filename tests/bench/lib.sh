# shellcheck shell=bash
# Shared by the benchmarks: the emulated machine's size, the time, and arithmetic on figures. Source it;
# DIR has the files PEER.figures, of lines "FIGURE VALUE".

# With more, guests die and connections stand still in all peers, most likely by faults of the emulation.
export KVM_HOST_CPUS=${KVM_HOST_CPUS:-1}
# Numbers are of guests without AppArmor: peers' have none, and neither had those that were measured before.
export KVM_HOST_APPARMOR=${KVM_HOST_APPARMOR:-0}

ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.3f", (b > 0 ? a / b : 0) }'; }

# median PEER FIGURE
median() { awk -v name="$2" '$1 == name { print $2 }' "$DIR/$1.figures" | sort -g | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }

# percentile PEER FIGURE PERCENT: the least of the values that so many are not above.
percentile() {
    awk -v name="$2" '$1 == name { print $2 }' "$DIR/$1.figures" | sort -g |
        awk -v p="$3" '{ v[NR] = $1 } END { n = NR * p / 100; print v[n == int(n) ? n : int(n) + 1] }'
}

# The time, ns.
now() { date +%s%N; }

# note PEER FIGURE VALUE
note() { echo "$2 $3" >>"$DIR/$1.figures"; }

# timed PEER FIGURE COMMAND...: notes how long a command took, in ms, and prints what it prints.
timed() {
    local peer=$1 figure=$2 begin; shift 2
    begin=$(now)
    "$@"
    note "$peer" "$figure" "$(awk -v ns=$(($(now) - begin)) 'BEGIN { printf "%.1f", ns / 1e6 }')"
}

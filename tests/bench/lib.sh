# shellcheck shell=bash
# Shared by the benchmarks: arithmetic on figures. Source it; DIR has the files PEER.figures, of lines
# "FIGURE VALUE".

ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.3f", (b > 0 ? a / b : 0) }'; }

# median PEER FIGURE
median() { awk -v name="$2" '$1 == name { print $2 }' "$DIR/$1.figures" | sort -g | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }

#!/bin/bash
# run.sh [SECONDS]: builds the fuzz targets and runs one after the other, each so long (60); the last lines are a
# table. The exit code is 1 if a target crashed.
#
#   FUZZ_TARGET=NAME  only this one (of make: TARGET)
#   INPUT=FILE        runs it over this input alone, once
#   KEEP=1            afterwards, the fewest inputs with all coverage that was reached become tests/fuzz/corpus/NAME
#
# What is found is in target/fuzz/work/NAME, and the next run goes on from there. Needed: a nightly compiler
# (libFuzzer's counters are an unstable option of it) and a C++ compiler for libFuzzer.
set -euo pipefail
. "$(dirname "$0")/../host/lib.sh"
cd "$REPO"
LIMIT=${1:-60}
WORK=$TARGET/fuzz/work
# The TARGET of lib.sh is cargo's directory.
ONLY=${FUZZ_TARGET:-}
# The longest input that is made, and the most that is kept of a target, in bytes.
LONGEST=4096 MOST=24576
BINARY=$TARGET/fuzz/x86_64-unknown-linux-gnu/release/target

main() {
    build
    local all
    all=$("$BINARY")
    [ -z "$ONLY" ] || grep -qx -- "$ONLY" <<<"$all" || die "TARGET=$ONLY: no such target; there are" $all
    [ -z "${INPUT:-}" ] || { run "${ONLY:?INPUT needs a TARGET}" "$INPUT"; return; }
    local name row rows=() crashed=0
    for name in ${ONLY:-$all}; do
        say "$name"
        fuzz "$name" || crashed=1
        rows+=("$(row "$name")")
        [ -z "${KEEP:-}" ] || keep "$name"
    done
    printf '%-22s %12s %10s %8s %9s %8s\n' target executions 'a second' edges features crashes
    printf '%s\n' "${rows[@]}"
    return $crashed
}

build() {
    rustc +nightly --version >/dev/null 2>&1 \
        || die "there is no nightly compiler; with rustup: rustup toolchain install nightly --profile minimal"
    tests/host/install.sh build fuzz
    # The versions of everything are those of the workspace.
    cp Cargo.lock tests/fuzz/Cargo.lock
    # AddressSanitizer has nothing to watch: the unsafe code is about a guest's memory, which is mapped.
    RUSTUP_TOOLCHAIN=nightly CARGO_INCREMENTAL=0 "$TOOLS/cargo/bin/cargo-fuzz" build --fuzz-dir tests/fuzz \
        --sanitizer none --target-dir "$TARGET/fuzz" target
}

# run NAME ARG...: the program as this target. As in Rust's own programs, a pipe that nobody reads is no reason to end.
run() (trap '' PIPE; HULL_FUZZ_TARGET=$1 exec "$BINARY" "${@:2}")

fuzz() {
    local dir=$WORK/$1 code=0 file
    mkdir -p "$dir/corpus" "$dir/crashes"
    run "$1" "$dir/corpus" "tests/fuzz/corpus/$1" -max_total_time="$LIMIT" -max_len=$LONGEST -timeout=25 \
        -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix="$dir/crashes/" >"$dir/log" 2>&1 || code=$?
    for file in "$dir"/crashes/*; do
        [ -e "$file" ] || continue
        say "$1 crashed with $file: make fuzz TARGET=$1 INPUT=$file"
        code=1
    done
    [ $code = 0 ] || tail -n 30 "$dir/log" >&2
    return $code
}

# row NAME: its line of the table.
row() {
    local log=$WORK/$1/log last
    last=$(grep -o 'cov: [0-9]* ft: [0-9]*' "$log" | tail -n 1)
    # shellcheck disable=SC2086
    set -- "$1" ${last:-cov: - ft: -}
    printf '%-22s %12s %10s %8s %9s %8s\n' "$1" "$(stat number_of_executed_units "$log")" \
        "$(stat average_exec_per_sec "$log")" "$3" "$5" "$(find "$WORK/$1/crashes" -type f | wc -l)"
}

stat() { sed -n "s/^stat::$1: *//p" "$2" | grep . || echo -; }

# keep NAME: the smallest inputs that reach everything, as many as fit, and those that found a fault.
keep() {
    local dir=$WORK/$1 kept=tests/fuzz/corpus/$1 size total=0 file
    rm -rf "$dir/merged"; mkdir "$dir/merged"
    run "$1" -merge=1 -set_cover_merge=1 "$dir/merged" "$dir/corpus" "$kept" >"$dir/merge.log" 2>&1
    find "$kept" -type f ! -name 'found-*' -delete
    while read -r size file; do
        total=$((total + size))
        [ $total -le $MOST ] || break
        cp "$file" "$kept/"
    done < <(find "$dir/merged" -type f -printf '%s %p\n' | sort -n)
}

main

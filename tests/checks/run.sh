#!/bin/bash
# run.sh: the checks that need no test: format, lints, dependencies, layering, circles, points of faults, bugs
# for the simulation. All of them run; the exit code is the number of those that failed.
set -euo pipefail
. "$(dirname "$0")/../host/lib.sh"
cd "$REPO"
"$REPO/tests/host/install.sh" build

failed=0
check() {
    local name=$1; shift
    if "$@"; then echo "check $name: ok"; else echo "check $name: FAILED"; failed=$((failed + 1)); fi
}
circles() { tests/checks/circles --self-test && tests/checks/circles; }
check format cargo fmt --all --check
check lints cargo clippy --locked --quiet --workspace --all-targets -- -D warnings
check dependencies tests/checks/dependencies
check "bill of materials" tests/host/sbom --check
check layering tests/checks/layering
check circles circles
check points tests/checks/points
check "documented commands" tests/checks/documented
check mutants tests/mutants/run --check
exit $failed

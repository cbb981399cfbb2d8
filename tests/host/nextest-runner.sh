#!/bin/bash
# nextest-runner.sh PROGRAM [ARG...]: cargo-nextest's runner for tests in emulated KVM hosts, of which
# each slot has one. A test that failed there gets a new one, since it may be the machine that broke.
# Lists of tests are had without.
set -euo pipefail
case " $* " in *" --list "*) exec "$@" ;; esac
. "$(dirname "$0")/lib.sh"
host=$REPO/tests/host/kvm-host.sh counts=$REPO/tests/host/count-calls.sh logs=$TARGET/test-logs
export KVM_HOST_NAME=machine$NEXTEST_TEST_GLOBAL_SLOT
if [ "$NEXTEST_ATTEMPT" != 1 ]; then
    # What was counted in it would be gone.
    timeout 60 "$host" exec "$counts" print </dev/null >"$logs/calls.$KVM_HOST_NAME.$$" || touch "$logs/calls.lost"
    "$host" stop
fi
exec "$host" exec "[ -e /run/hull-calls-counted ] || $(printf %q "$counts") begin; cd $(printf %q "$PWD") && CARGO_MANIFEST_DIR=\$PWD exec $(printf '%q ' "$@")"

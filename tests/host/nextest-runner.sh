#!/bin/bash
# nextest-runner.sh PROGRAM [ARG...]: cargo-nextest's runner for tests in emulated KVM hosts, of which
# each slot has one. A test that failed there gets a new one, since it may be the machine that broke.
# Lists of tests are had without.
set -euo pipefail
case " $* " in *" --list "*) exec "$@" ;; esac
host=$(dirname "$(realpath "$0")")/kvm-host.sh
export KVM_HOST_NAME=machine$NEXTEST_TEST_GLOBAL_SLOT
[ "$NEXTEST_ATTEMPT" = 1 ] || "$host" stop
exec "$host" exec "cd $(printf %q "$PWD") && CARGO_MANIFEST_DIR=\$PWD exec $(printf '%q ' "$@")"

#!/bin/bash
# nextest-runner.sh PROGRAM [ARG...]: cargo-nextest's runner for tests in emulated KVM hosts, of which
# each slot has one. A test that failed there gets a new one, since it may be the machine that broke.
# Lists of tests are had without. The tests of a machine share a registry. The system calls that were counted in
# a machine are written after each test, to $HULL_CALLS.BOOT.
set -euo pipefail
case " $* " in *" --list "*) exec "$@" ;; esac
here=$(dirname "$(realpath "$0")")
export KVM_HOST_NAME=machine$NEXTEST_TEST_GLOBAL_SLOT
[ "$NEXTEST_ATTEMPT" = 1 ] || "$here/kvm-host.sh" stop
printf -v counted '%q ' "$here/count-calls.sh" while "$HULL_CALLS" "$@"
printf -v dir %q "$PWD"
printf -v serve '%q ' "$here/../images/registry.sh" start "$HULL_TEST_IMAGES" 0
exec "$here/kvm-host.sh" exec "set -e; [ -s /run/hull-registry/port ] || $serve; cd $dir
    export CARGO_MANIFEST_DIR=\$PWD HULL_TEST_REGISTRY=127.0.0.1:\$(</run/hull-registry/port); exec $counted"

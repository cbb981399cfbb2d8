#!/bin/bash
# critest.sh: runs a critest binary ($CRITEST) against `hull serve` in the KVM host, with stand-ins
# for all images that it names. The last lines are the counts and the name of each spec that failed.
#
#   CRITEST     path of the binary (kubernetes-sigs/cri-tools, cmd/critest)
#   FOCUS       only the specs whose names match this regular expression; SKIP: not those
#   FLAGS       more flags of critest, as -websocket-exec
#   CRITEST_LOGS  where its report and the daemon's log go (target/critest)
#
# Exit code: critest's.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/host/lib.sh"
. "$REPO/tests/node.sh"
LOGS=${CRITEST_LOGS:-$TARGET/critest}

outside() {
    local program images visible code=0
    [ -n "${CRITEST:-}" ] || die "CRITEST=/path/to/critest is not given"
    program=$(realpath -e "$CRITEST") || die "no file $CRITEST"
    [ -x "$program" ] || die "$program is not executable"
    images=$("$REPO/tests/images/build.sh" critest)
    # The KVM host sees the checkout, but not every directory for logs.
    mkdir -p "$LOGS" "$REPO/target"
    visible=$(mktemp -d "$REPO/target/critest.XXXXXX")
    SHARE=$(dirname "$program") HULL_TEST_IMAGES=$images HULL_CRITEST=$program HULL_FOCUS=${FOCUS:-} \
        HULL_SKIP=${SKIP:-} HULL_FLAGS=${FLAGS:-} HULL_CRITEST_LOGS=$visible \
        "$REPO/tests/host/run.sh" "$REPO/tests/critest.sh" inside || code=$?
    cp "$visible"/* "$LOGS" || true
    rm -rf "$visible"
    return "$code"
}

# In the KVM host, as root.
inside() {
    local code=0 flags=()
    DIR=$(mktemp -d /tmp/critest.XXXXXX)
    trap 'save_logs; take_down_node "$DIR"' EXIT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" registry.k8s.io gcr.io k8s.gcr.io
    # The contract calls a container without a profile unconfined, and critest asks for that; Hull's own
    # default is stricter.
    sed -i "1i seccomp_default = false\nnri.socket = \"$DIR/nri.sock\"" "$DIR/hull.toml"
    # By which critest loads AppArmor profiles; it is root.
    mkdir "$DIR/bin"
    printf '#!/bin/sh\nexec "$@"\n' >"$DIR/bin/sudo"
    chmod 755 "$DIR/bin/sudo"
    start_daemon "$DIR" || die "hull serve does not answer"
    read -ra flags <<<"$HULL_FLAGS"
    [ -z "$HULL_FOCUS" ] || flags+=(-ginkgo.focus "$HULL_FOCUS")
    [ -z "$HULL_SKIP" ] || flags+=(-ginkgo.skip "$HULL_SKIP")
    # Older ones know of no plugins.
    if "$HULL_CRITEST" -help 2>&1 | grep -e -nri-socket >/dev/null; then flags+=(-nri-socket "$DIR/nri.sock"); fi
    # Out of reach of its own configuration file; its working directory gets its scratch files.
    cd "$DIR"
    PATH=$DIR/bin:$PATH "$HULL_CRITEST" -runtime-endpoint "unix://$DIR/hull.sock" -image-endpoint "unix://$DIR/hull.sock" \
        -ginkgo.no-color -ginkgo.v -ginkgo.json-report "$DIR/report.json" "${flags[@]}" >"$DIR/critest.log" 2>&1 || code=$?
    summary || { tail -n 40 "$DIR/critest.log"; die "critest made no report (exit code $code)"; }
    return "$code"
}

# From critest's own report.
summary() {
    jq -r '
        def name: [.ContainerHierarchyTexts[]?, .LeafNodeText] | join(" ");
        def reason: .Failure.Message // "" | split("\n")[0];
        [.[].SpecReports[] | select(.LeafNodeType == "It")] as $all |
        ($all | map(select(.State == "skipped" and .Failure != null))) as $skipped |
        ($all | map(select(.State == "passed"))) as $passed |
        ($all | map(select(.State | IN("passed", "skipped", "pending") | not))) as $failed |
        ($skipped[] | "SKIPPED: \(name): \(reason)"),
        ($failed[] | "FAILED: \(name): \(reason)"),
        "critest: \($passed | length) passed (\($passed | map(select(name | contains("[Conformance]"))) | length) of them Conformance), \($failed | length) failed, \($skipped | length) skipped, \(.[0].RunTime / 1e9 | floor) s"
    ' "$DIR/report.json"
}

save_logs() { cp "$DIR"/{report.json,critest.log,hull.log} "$HULL_CRITEST_LOGS" 2>/dev/null || true; }

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

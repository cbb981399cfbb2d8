#!/bin/bash
# node-conformance.sh: runs the Kubernetes node suite against `hull serve` in the KVM host: the suite brings an API
# server and etcd, and starts a kubelet whose only runtime is Hull. Stand-ins are made for the images that it pulls.
#
#   E2E         directory with `kubelet`, `e2e_node.test`, `ginkgo` and `agnhost`, built without cgo of one Kubernetes
#   FOCUS       only the specs whose names match this regular expression (\[NodeConformance\]);
#   SKIP        not those that match this (\[Flaky\]|\[Slow\]|\[Serial\])
#   REST=1      nor those that an earlier run found to pass or to skip themselves
#   DELEGATE=1  pods that ask for namespaces of the host go to Debian's containerd, beside Hull; else they are refused
#   PROCS       so many specs at a time (3)
#   MINUTES     ends the suite after so long; what was not run is left for another run
#   NODE_CONFORMANCE_LOGS  where logs and outcomes go (target/node-conformance)
#
# A whole run takes hours in emulation, so runs add up: `outcomes` there has a line of JSON for each spec that ever
# ran, which its last run wrote; remove the file to begin anew. The last lines tell of all of them: the reason of each
# that skipped itself or failed, and the counts. Each run's logs are in a directory of their own.
#
# Exit code: the suite's.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/host/lib.sh"
. "$REPO/tests/node.sh"
LOGS=${NODE_CONFORMANCE_LOGS:-$TARGET/node-conformance}
PROGRAMS=(kubelet e2e_node.test ginkgo agnhost)
# Beside what every KVM host has: what kubelet and specs run on the node.
PACKAGES=conntrack,ethtool,socat,psmisc

outside() {
    local dir name images run visible code=0
    [ -n "${E2E:-}" ] || die "E2E=DIR with ${PROGRAMS[*]} is not given"
    dir=$(realpath -e "$E2E") || die "no directory $E2E"
    for name in "${PROGRAMS[@]}"; do [ -x "$dir/$name" ] || die "no program $dir/$name"; done
    images=$("$REPO/tests/images/build.sh" conformance "$dir")
    run=$(date +%Y%m%d-%H%M%S)
    mkdir -p "$LOGS/$run" "$REPO/target"
    # The KVM host sees the checkout, but not every directory for logs.
    visible=$(mktemp -d "$REPO/target/node-conformance.XXXXXX")
    [ -z "${REST:-}" ] || done_before >"$visible/done"
    [ -z "${DELEGATE:-}" ] || PACKAGES+=,containerd,runc
    # With two CPUs the emulator breaks guests; the suite and its pods take more memory than other tests.
    SHARE=$dir KVM_HOST_CPUS=${KVM_HOST_CPUS:-1} KVM_HOST_MEMORY=${KVM_HOST_MEMORY:-8192} \
        KVM_HOST_PACKAGES=$PACKAGES${KVM_HOST_PACKAGES:+,$KVM_HOST_PACKAGES} \
        HULL_TEST_IMAGES=$images HULL_E2E=$dir HULL_FOCUS=${FOCUS:-'\[NodeConformance\]'} \
        HULL_SKIP=${SKIP:-'\[Flaky\]|\[Slow\]|\[Serial\]'} HULL_PROCS=${PROCS:-3} HULL_MINUTES=${MINUTES:-} \
        HULL_DELEGATE=${DELEGATE:-} HULL_PACKAGES=$PACKAGES \
        HULL_LOGS=$visible "$REPO/tests/host/run.sh" "$REPO/tests/node-conformance.sh" inside || code=$?
    cp -r "$visible"/* "$LOGS/$run" || true
    rm -rf "$visible"
    [ -f "$LOGS/$run/report.json" ] || { tail -n 40 "$LOGS/$run/log" || true; die "the suite made no report (exit code $code)"; }
    outcomes "$run"
    summary
    around "$run"
    return "$code"
}

# The names of the specs that need not run again, as regular expressions.
done_before() {
    [ -f "$LOGS/outcomes" ] || return 0
    jq -r 'select(.state != "failed") | .name | gsub("(?<c>[].*+?^$(){}|\\\\[])"; "\\" + .c)' "$LOGS/outcomes"
}

# outcomes RUN: adds what the run found. Specs that were left out have no failure, and those that its end cut off, no
# outcome. Specs that share a name count as one, which failed if one did.
outcomes() {
    [ -f "$LOGS/outcomes" ] || : >"$LOGS/outcomes"
    jq -c --arg run "$1" '
        [.[].SpecReports[] | select(.LeafNodeType == "It")
            | select(.State != "interrupted" and .State != "pending" and (.State != "skipped" or .Failure != null))
            | select((.State == "timedout" and (.Failure.Message | startswith("A suite timeout"))) | not)
            | {name: ([.ContainerHierarchyTexts[]?, .LeafNodeText] | join(" ")),
               state: (if .State | IN("passed", "skipped") then .State else "failed" end),
               reason: (.Failure.Message // "" | gsub("\\s+"; " ") | .[:400]), seconds: (.RunTime / 1e9 | floor), run: $run}]
        | group_by(.name)[] | map(select(.state == "failed"))[0] // .[0]
    ' "$LOGS/$1/report.json" >"$LOGS/$1/outcomes"
    jq -cn '[inputs] | reduce .[] as $spec ({}; .[$spec.name] = $spec) | .[]' "$LOGS/outcomes" "$LOGS/$1/outcomes" >"$LOGS/outcomes.new"
    mv "$LOGS/outcomes.new" "$LOGS/outcomes"
}

# Of all runs.
summary() {
    jq -rn '
        [inputs] as $all | ($all | map(select(.state == "passed"))) as $passed |
        ($all | map(select(.state == "failed"))) as $failed | ($all | map(select(.state == "skipped"))) as $skipped |
        ($skipped[] | "SKIPPED: \(.name): \(.reason)"), ($failed[] | "FAILED: \(.name): \(.reason) (\(.run))"),
        "node-conformance: \($passed | length) passed, \($failed | length) failed, \($skipped | length) skipped"
    ' "$LOGS/outcomes"
}

# What failed around the specs of a run, as the start of the kubelet.
around() {
    jq -r '.[].SpecReports[] | select(.LeafNodeType != "It" and (.State | IN("passed", "skipped") | not))
        | "FAILED: \(.LeafNodeType): \(.Failure.Message | gsub("\\s+"; " ") | .[:400])"' "$LOGS/$1/report.json"
}

# In the KVM host, as root.
inside() {
    local code=0 flags=() name
    # shellcheck disable=SC2086
    install_packages ${HULL_PACKAGES//,/ }
    DIR=$(mktemp -d /tmp/node.XXXXXX)
    trap 'save_logs; [ -z "$HULL_DELEGATE" ] || take_down_containerd "$DIR"; take_down_node "$DIR"' EXIT
    set_up_node "$DIR" "$HULL_TEST_IMAGES" registry.k8s.io
    # Specs want a container without a profile to be unconfined; Hull's own default is stricter.
    sed -i '1i seccomp_default = false' "$DIR/hull.toml"
    if [ -n "$HULL_DELEGATE" ]; then
        set_up_delegate "$DIR" "registry.k8s.io/$(awk '/^pause:/ {print $1; exit}' "$HULL_TEST_IMAGES/images")"
    fi
    start_daemon "$DIR" || die "hull serve does not answer"
    prepare_host
    kubelet_configuration >"$DIR/kubelet.yaml"
    mkdir "$DIR"/{bin,work,tmp,report}
    # Running them from a shared directory takes far longer.
    for name in kubelet e2e_node.test ginkgo; do cp "$HULL_E2E/$name" "$DIR/bin"; done
    if [ -f "$HULL_LOGS/done" ]; then while read -r name; do flags+=("--skip=$name"); done <"$HULL_LOGS/done"; fi
    # The suite leaves files in both.
    cd "$DIR/work"
    TMPDIR=$DIR/tmp PATH=$DIR/bin:$PATH ginkgo --procs="$HULL_PROCS" -v --no-color --randomize-all --timeout="${HULL_MINUTES:-1440}m" \
        --focus="$HULL_FOCUS" --skip="$HULL_SKIP" "${flags[@]}" --output-dir="$DIR/report" --json-report=report.json \
        "$DIR/bin/e2e_node.test" -- \
        --report-dir="$DIR/report" --k8s-bin-dir="$DIR/bin" --prepull-images=false --node-name="$(hostname)" \
        --kubelet-config-file="$DIR/kubelet.yaml" --container-runtime-endpoint="unix://$DIR/hull.sock" \
        --image-service-endpoint="unix://$DIR/hull.sock" --server-start-timeout=1800s --restart-kubelet=true \
        >"$HULL_LOGS/log" 2>&1 || code=$?
    return "$code"
}

# What the suite's validation of the system and kubelet look for, where the machine lacks it.
prepare_host() {
    local config
    config=/boot/config-$(uname -r)
    [ -e "$config" ] || [ -e /proc/config.gz ] || die "no $config"
    [ -s /etc/machine-id ] || tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
    mkdir -p /etc/kubernetes /var/lib/kubelet
}

kubelet_configuration() {
    cat <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: /
failSwapOn: false
featureGates: {PodAndContainerStatsFromCRI: true}
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}
Y
}

save_logs() {
    cp "$DIR/hull.log" "$HULL_LOGS" || true
    cp "$DIR/containerd/log" "$HULL_LOGS/containerd.log" 2>/dev/null || true
    cp -r "$DIR/report"/* "$HULL_LOGS" 2>/dev/null || true
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

#!/bin/bash
# pods.sh: what a pod costs whose VM is a clone of a template, one whose VM boots, and one of Debian's containerd and
# runc. Three runtimes in the same KVM host, ROUNDS pods of each, in turn, one at a time, by the same client.
# NETWORK=bridge is CNI's usual plugin; NETWORK=none one that makes an interface which leads nowhere.
# Lines are
#   bench pods-NAME hull=… peer=… ratio=… target=… ok|short
# of medians, times in ms.
#
#   RunPodSandbox, CreateContainer, StartContainer, ExecSync (of `true`), StopContainer, StopPodSandbox,
#   RemovePodSandbox, life (all of these)
#                     hull is the clone, peer containerd;  cold-NAME: hull boots
#   stage-NAME        the parts of RunPodSandbox as the daemon measures them, hull the clone and peer a pod that boots:
#                     network, spawn (the VMM's process until it answers) and scratch are side by side; vm
#                     (configured, or restored, and started), agent (until it answers, or was woken and has its cards)
#                     and configure follow
#   exits             likewise: exits to KVM until the pod is up;  faults  page faults of the VMM's process (minor)
#   private           likewise: what the VMM has written and shares with nobody, KiB, 3 s after it was up;  mapped  with
#                     what it shares or could (RSS);  template  what the template of all clones has, once
set -euo pipefail
. "$(dirname "$(realpath "$0")")/../host/lib.sh"
. "$REPO/tests/node.sh"
. "$REPO/tests/bench/lib.sh"
. "$REPO/tests/bench/modes.sh"
ROUNDS=${ROUNDS:-5} BENCH=pods
NETWORK=${NETWORK:-bridge}
CALLS=(RunPodSandbox CreateContainer StartContainer ExecSync StopContainer StopPodSandbox RemovePodSandbox)

outside() {
    HULL_ROUNDS=$ROUNDS HULL_NETWORK=$NETWORK run_in_host tests/bench/pods.sh
}

# In the KVM host, as root.
inside() {
    set_up_modes
    local mode number
    [ "$HULL_NETWORK" = bridge ] || lead_nowhere
    start_modes
    for ((number = 1; number <= HULL_ROUNDS; number++)); do
        for mode in "${MODES[@]}"; do measure "$mode" "$number"; done
    done
    [ "$(at clone info | jq '.info.info | fromjson.templates.clones')" = "$HULL_ROUNDS" ] || die "not all are clones"
    note clone template $(($(stat -L -c %b "$(template)") / 2))
    report
}

# Has the pods' only plugin be one that does next to nothing: containerd and Hull want an interface.
lead_nowhere() {
    PLUGINS=$DIR/plugins
    mkdir "$PLUGINS"
    ln -s /usr/lib/cni/loopback "$PLUGINS"
    cat >"$PLUGINS/nowhere" <<'S'
#!/bin/sh
case $CNI_COMMAND in
    VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}' ;;
    ADD)
        nsenter --net="$CNI_NETNS" ip -batch - <<B
link add $CNI_IFNAME type veth peer name nowhere
addr add 10.87.0.2/24 dev $CNI_IFNAME
link set $CNI_IFNAME up
B
        echo '{"cniVersion":"1.0.0","interfaces":[{"name":"'"$CNI_IFNAME"'","sandbox":"'"$CNI_NETNS"'"}],' \
            '"ips":[{"interface":0,"address":"10.87.0.2/24"}]}'
        ;;
esac
S
    chmod 755 "$PLUGINS/nowhere"
    echo '{"cniVersion": "1.0.0", "name": "node", "plugins": [{"type": "nowhere"}]}' >"$DIR/net.d/10-node.conflist"
    sed -i "s|^bin_dirs = .*|bin_dirs = [\"$PLUGINS\"]|" "$DIR/hull.toml"
}

measure() {
    local mode=$1 number=$2 container
    timed "$mode" RunPodSandbox pod "$mode" "$number"
    [ "$mode" = containerd ] || look_at_vm "$mode"
    describe "$mode-$number" sleep 1000
    timed "$mode" CreateContainer at "$mode" create "$POD" "$DIR/container.json" "$DIR/$mode-$number.pod" >"$DIR/container"
    container=$(cat "$DIR/container")
    timed "$mode" StartContainer at "$mode" start "$container" >/dev/null
    timed "$mode" ExecSync at "$mode" exec --sync "$container" -- true
    timed "$mode" StopContainer at "$mode" stop "$container" >/dev/null
    timed "$mode" StopPodSandbox at "$mode" stopp "$POD" >/dev/null
    timed "$mode" RemovePodSandbox at "$mode" rmp "$POD" >/dev/null
    note "$mode" life "$(tail -n 200 "$DIR/$mode.figures" | awk -v calls="${CALLS[*]}" '
        BEGIN { n = split(calls, name, " ") } { last[$1] = $2 }
        END { for (i = 1; i <= n; i++) sum += last[name[i]]; printf "%.1f", sum }')"
}

# What the VM of POD has taken.
look_at_vm() {
    local mode=$1 vmm info
    vmm=$(pgrep -f "hull-vmm.*$POD")
    note "$mode" exits "$(cat /sys/kernel/debug/kvm/"$vmm"-*/exits)"
    note "$mode" faults "$(sed 's/.*) //' "/proc/$vmm/stat" | cut -d ' ' -f 8)"
    info=$(at "$mode" inspectp "$POD")
    jq -r '.info.info | fromjson.bootMicroseconds | to_entries[] | "stage-\(.key) \(.value / 1000)"' \
        <<<"$info" >>"$DIR/$mode.figures"
    sleep 3
    # What is mapped of the template counts as private while no other clone is there, so it is not that.
    note "$mode" private "$(awk '$1 == "Anonymous:" { print $2 }' "/proc/$vmm/smaps_rollup")"
    note "$mode" mapped "$(awk '$1 == "Rss:" { print $2 }' "/proc/$vmm/smaps_rollup")"
}

report() {
    local call figure
    declare -A targets=([RunPodSandbox]=0.5 [CreateContainer]=1.0 [StartContainer]=0.2 [ExecSync]=0.4 [life]=0.5)
    [ "$HULL_NETWORK" = bridge ] || targets[RunPodSandbox]=0.2
    for call in "${CALLS[@]}" life; do
        at_most "$call" "$(median clone "$call")" "$(median containerd "$call")" "${targets[$call]:-}"
    done
    for call in "${CALLS[@]}" life; do at_most "cold-$call" "$(median cold "$call")" "$(median containerd "$call")"; done
    for figure in $(cut -d ' ' -f 1 "$DIR/clone.figures" | grep -xv -f <(printf '%s\n' "${CALLS[@]}" life) | sort -u); do
        at_most "$figure" "$(median clone "$figure")" "$(median cold "$figure")"
    done
    held clone-private "$(median clone private)" 8192
    return $SHORT
}

case ${1:-} in
    '') outside ;;
    inside) inside ;;
    *) die "no arguments" ;;
esac

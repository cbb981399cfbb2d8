#!/bin/sh
# node.sh install | remove: gives the node whose systemd this is Hull beside the runtime that it has, or takes it away.
# Layouts: a unit kubelet (kubeadm's and others'), or k3s and k3s-agent. Pods go on: the runtime that kubelet had becomes
# Hull's delegate, and has all pods but those whose RuntimeClass is hull. When kubelet does not get well with Hull, it
# gets back what it had.
# KUBELET_ARGS: more for kubelet, as `feature-gates=X=true,Y=true v=4`. remove: FORCE=1 also ends pods in microVMs.
# Exit codes: 2, wrong arguments; 69, kubelet or the daemon does not get well; 71, this node lacks something; 75, pods in
# microVMs are running, or what is installed can't be taken over.
set -eu
# Not that of the pod.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

here=$(cd "$(dirname "$0")" && pwd)
version=$(cat "$here/root/usr/lib/hull/version")
hull=unix:///run/hull/hull.sock
ours=/etc/hull/config.d/10-node.toml

say() { echo "node.sh: $*"; }
# die CODE WORDS
die() { code=$1; shift; say "$*" >&2; exit "$code"; }

# Sets `unit`, which runs kubelet, `ours_of_kubelet`, the file that leads it to Hull, and where its runtime and networks are.
find_layout() {
    for unit in k3s k3s-agent kubelet ''; do
        case $(systemctl show -P ActiveState "${unit:-none}.service") in active | activating | reloading) break ;; esac
    done
    case $unit in
        '') die 71 "none of kubelet.service, k3s.service and k3s-agent.service is running" ;;
        kubelet) ours_of_kubelet=/etc/systemd/system/kubelet.service.d/90-hull.conf ;;
        *)
            ours_of_kubelet=/etc/rancher/k3s/config.yaml.d/90-hull.yaml
            runtime=/run/k3s/containerd/containerd.sock
            networks=/var/lib/rancher/k3s/agent/etc/cni/net.d
            plugins=/var/lib/rancher/k3s/data/cni:/var/lib/rancher/k3s/data/current/bin
            ;;
    esac
}

# The commands that the unit starts kubelet with, a line each, without what is ours.
commands() {
    for file in $(systemctl show -P FragmentPath kubelet.service) $(systemctl show -P DropInPaths kubelet.service); do
        [ "$file" = "$ours_of_kubelet" ] || cat "$file"
    done | awk '
        /\\$/ { sub(/\\$/, ""); line = line $0; next }
        { line = line $0 }
        line ~ /^ExecStart=[[:space:]]*$/ { n = 0 }
        line ~ /^ExecStart=[[:space:]]*[^[:space:]]/ { sub(/^ExecStart=/, "", line); command[n++] = line }
        { line = "" }
        END { for (i = 0; i < n; i++) print command[i] }'
}

# flag PID NAME: the value of a flag that a process was started with; the last one counts.
flag() {
    tr '\0' '\n' <"/proc/$1/cmdline" | awk -v name="--$2" '
        index($0, name "=") == 1 { value = substr($0, length(name) + 2) }
        previous == name { value = $0 }
        { previous = $0 }
        END { print value }'
}

# Sets `runtime`, the socket that kubelet has now, where its networks are as everybody's.
find_runtime() {
    [ "$unit" = kubelet ] || return 0
    pid=$(systemctl show -P MainPID kubelet.service)
    [ "$pid" != 0 ] || die 71 "kubelet is not running"
    named=$(flag "$pid" container-runtime-endpoint)
    if [ -z "$named" ]; then
        file=$(flag "$pid" config)
        [ -z "$file" ] || named=$(sed -n 's/^containerRuntimeEndpoint:[[:space:]]*//p' "$file" | tr -d "\"'")
    fi
    runtime=${named#unix://}
    runtime=${runtime:-/run/containerd/containerd.sock}
    networks='' plugins=''
}

# toml_list A:B: as a list.
toml_list() { printf '%s' "$1" | sed 's/:/", "/g; s/.*/["&"]/'; }

configuration() {
    cat <<T
# Written by Hull's installer; the file goes with it.
default_handler = "runc"
delegate_host_pods = "runc"
[handlers.runc]
delegate = "$runtime"
T
    [ -n "$networks" ] || return 0
    cat <<T
[cni]
conf_dir = "$networks"
bin_dirs = $(toml_list "$plugins")
T
}

# The file that leads kubelet to Hull.
# shellcheck disable=SC2086 # Arguments are words.
leading() {
    args="container-runtime-endpoint=$hull image-service-endpoint=$hull ${KUBELET_ARGS:-}"
    echo "# Written by Hull's installer; the file goes with it."
    if [ "$unit" = kubelet ]; then
        command=$(commands)
        [ "$(printf '%s\n' "$command" | grep -c .)" = 1 ] || die 71 "kubelet.service does not start one command"
        cat <<T
[Unit]
Wants=hull.service
After=hull.service
[Service]
ExecStart=
ExecStart=$command$(printf ' --%s' $args)
T
    else
        echo "kubelet-arg+:"
        printf '  - %s\n' $args
    fi
}

# Whether kubelet is well: it is the same process for half a minute. One that can't use its runtime ends sooner.
restart_kubelet() {
    systemctl daemon-reload
    systemctl reset-failed "$unit.service" 2>/dev/null || true
    systemctl restart "$unit.service" || return 1
    pid=$(systemctl show -P MainPID "$unit.service") seconds=0
    while [ $seconds -lt 30 ]; do
        sleep 2
        seconds=$((seconds + 2))
        [ "$(systemctl is-active "$unit.service")" = active ] || return 1
        [ "$(systemctl show -P MainPID "$unit.service")" = "$pid" ] || return 1
    done
}

install_all() {
    find_layout
    if [ -e "$ours_of_kubelet" ]; then
        # It was led here before: kubelet's runtime is in the file.
        runtime=$(sed -n 's/^delegate = "\(.*\)"/\1/p' "$ours")
    else
        find_runtime
    fi
    [ -S "$runtime" ] || die 71 "the runtime that kubelet has is not there: no socket $runtime"
    if [ ! -e "$ours" ]; then
        mkdir -p "${ours%/*}"
        configuration >"$ours.new"
        mv "$ours.new" "$ours"
    fi
    if [ "$(cat /usr/lib/hull/version 2>/dev/null)" != "$version" ] || [ "$(systemctl is-active hull.service)" != active ]; then
        "$here/install.sh" || exit $?
    fi
    missing=$(/usr/bin/hull check 2>&1) || { printf '%s\n' "$missing" >&2; die 71 "this node can't run microVMs; kubelet has what it had"; }
    mkdir -p "${ours_of_kubelet%/*}"
    leading >"$ours_of_kubelet.new"
    if cmp -s "$ours_of_kubelet.new" "$ours_of_kubelet"; then
        rm "$ours_of_kubelet.new"
        say "Hull $version is installed, and kubelet is led to it"
        return
    fi
    mv "$ours_of_kubelet.new" "$ours_of_kubelet"
    if ! restart_kubelet; then
        why=$(journalctl -u "$unit" -n 3 -o cat)
        rm -f "$ours_of_kubelet"
        restart_kubelet || true
        printf '%s\n' "$why" >&2
        die 69 "kubelet did not get well with Hull; it has what it had"
    fi
    say "installed $version: kubelet asks Hull, which asks $runtime for all pods without the RuntimeClass"
}

remove() {
    find_layout
    pods=$(find /run/hull/pods -mindepth 2 -maxdepth 2 -name vmm.process 2>/dev/null | wc -l)
    [ "$pods" = 0 ] || [ "${FORCE:-}" = 1 ] || die 75 "pods in microVMs run here ($pods): end them first, or set FORCE=1"
    if [ -e "$ours_of_kubelet" ]; then
        rm -f "$ours_of_kubelet"
        restart_kubelet || die 69 "kubelet does not get well: $(journalctl -u "$unit" -n 1 -o cat)"
    fi
    rm -f "$ours"
    "$here/install.sh" --purge
    say "removed; kubelet has the runtime that it had"
}

case ${1:-} in
    install) install_all ;;
    remove) remove ;;
    *) die 2 "install or remove, not: ${1:-nothing}" ;;
esac

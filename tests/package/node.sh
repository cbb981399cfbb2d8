# shellcheck shell=bash
# The installer of Kubernetes nodes, as its pod does it, in the layouts of kubeadm and of k3s: kubelet (KUBELET) runs a
# pod by Debian's containerd and runc, and is led to Hull under it; put back when it does not get well; a pod in a
# microVM runs beside the other; removed, and nothing is left. There is no API server: the pod of the DaemonSet is one
# of kubelet's static pods. k3s itself is a stand-in, which reads k3s' configuration and runs the same two programs.

NODE_IMAGE=bench.registry/bench/busybox:latest

try_node() {
    boot "$1" "$KEPT"/{installer.tar,kubelet,hull.yaml} "$(command -v hull-cri)"
    set_up_kubernetes
    local layout
    for layout in ${HULL_LAYOUTS:-kubeadm k3s}; do
        case $layout in
            kubeadm) try_layout kubeadm kubelet /run/containerd/containerd.sock ;;
            k3s) try_layout k3s k3s /run/k3s/containerd/containerd.sock ;;
            *) fail "unknown layout: $layout" ;;
        esac
    done
}

# What both layouts have.
set_up_kubernetes() {
    in_it systemctl disable -q --now containerd
    in_it install -m 755 /packages/kubelet /usr/local/bin/kubelet
    in_it mkdir -p /etc/kubernetes/manifests /var/lib/kubelet /etc/containerd /etc/registries/bench.registry /opt
    in_it tee /etc/registries/bench.registry/hosts.toml >/dev/null <<<"[host.\"http://127.0.0.1:$(cat "$DIR/registry/port")\"]"
    # kubelet gives it to pods.
    in_it tee /etc/resolv.conf >/dev/null <<<"nameserver 127.0.0.1"
    in_it tee /var/lib/kubelet/config.yaml >/dev/null <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: systemd
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
staticPodPath: /etc/kubernetes/manifests
failSwapOn: false
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}
fileCheckFrequency: 2s
Y
    in_it tee /etc/kubernetes/web.yaml >/dev/null <<Y
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - {name: main, image: "$NODE_IMAGE", command: [sh, -c, "sleep 100000"]}
Y
    # The template of the DaemonSet, as a pod.
    awk '/^  template:/ { on = 1; next } on { print substr($0, 5) }' "$KEPT/hull.yaml" \
        | sed -e '1i apiVersion: v1\nkind: Pod' -e 's/^metadata:/metadata:\n  name: installer\n  namespace: kube-system/' \
        | in_it tee /etc/kubernetes/installer.yaml >/dev/null
    set_up_kubeadm
    set_up_k3s
}

# containerd_of_systemd SOCKET NETWORKS DIR: the configuration of a containerd whose cgroups are systemd's.
containerd_of_systemd() {
    containerd_config "$3/lib" "$3/run" "$1" "$2" /etc/registries bench.registry/bench/pause:latest native
    cat <<T
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = true
T
}

network() {
    cat <<J
{"cniVersion": "1.0.0", "name": "node", "plugins": [
  {"type": "bridge", "bridge": "node0", "isGateway": true, "ipMasq": false,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.89.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
J
}

# As kubeadm's package has its unit.
set_up_kubeadm() {
    in_it mkdir -p /usr/lib/systemd/system/kubelet.service.d /etc/cni/net.d
    network | in_it tee /etc/kubernetes/10-node.conflist >/dev/null
    containerd_of_systemd /run/containerd/containerd.sock /etc/cni/net.d /var/lib/containerd \
        | in_it tee /etc/containerd/config.toml >/dev/null
    in_it tee /usr/lib/systemd/system/kubelet.service >/dev/null <<'U'
[Unit]
Description=kubelet: The Kubernetes Node Agent
Wants=network-online.target
[Service]
ExecStart=/usr/local/bin/kubelet
Restart=always
StartLimitInterval=0
RestartSec=2
U
    in_it tee /usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf >/dev/null <<'U'
[Service]
Environment="KUBELET_CONFIG_ARGS=--config=/var/lib/kubelet/config.yaml"
EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env
EnvironmentFile=-/etc/default/kubelet
ExecStart=
ExecStart=/usr/local/bin/kubelet $KUBELET_CONFIG_ARGS $KUBELET_KUBEADM_ARGS $KUBELET_EXTRA_ARGS
U
    in_it tee /var/lib/kubelet/kubeadm-flags.env >/dev/null <<<'KUBELET_KUBEADM_ARGS="--hostname-override=node1 --node-labels=hull=true"'
}

set_up_k3s() {
    local data=/var/lib/rancher/k3s
    in_it mkdir -p $data/agent/etc/cni/net.d $data/agent/etc/containerd $data/data/cni /etc/rancher/k3s
    in_it sh -c "ln -s /usr/lib/cni/* $data/data/cni"
    network | in_it tee $data/agent/etc/cni/net.d/10-flannel.conflist >/dev/null
    containerd_of_systemd /run/k3s/containerd/containerd.sock $data/agent/etc/cni/net.d $data/agent/containerd \
        | in_it tee $data/agent/etc/containerd/config.toml >/dev/null
    in_it install -m 755 /dev/stdin /usr/local/bin/k3s <<S
#!/bin/sh
# A stand-in for k3s: its containerd, its kubelet, and the kubelet-args of its configuration.
containerd --config $data/agent/etc/containerd/config.toml &
exec kubelet --config=/var/lib/kubelet/config.yaml --hostname-override=node1 --node-labels=hull=true \\
    --container-runtime-endpoint=unix:///run/k3s/containerd/containerd.sock \\
    \$(cat /etc/rancher/k3s/config.yaml.d/*.yaml 2>/dev/null | sed -n 's/^ *- /--/p')
S
    in_it tee /etc/systemd/system/k3s.service >/dev/null <<'U'
[Service]
ExecStart=/usr/local/bin/k3s server
KillMode=process
Delegate=yes
Restart=always
RestartSec=2
U
}

# try_layout NAME UNIT SOCKET
try_layout() {
    local name=$1 web kubelet
    UNIT=$2 SOCKET=$3
    step "$name: a node with containerd"
    if [ "$UNIT" = kubelet ]; then
        in_it cp /etc/kubernetes/10-node.conflist /etc/cni/net.d
        in_it systemctl start containerd
    else
        # One layout at a time.
        in_it mv /usr/lib/systemd/system/kubelet.service /etc/kubernetes
    fi
    in_it systemctl daemon-reload
    # Plugins of CNI leave them, whose ever pods they were for.
    in_it mkdir -p /var/lib/cni/{networks,results}
    left >"$DIR/before"
    in_it cp /etc/kubernetes/web.yaml /etc/kubernetes/manifests
    show systemctl start "$UNIT"
    eventually running "$SOCKET" main
    web=$(container "$SOCKET" main)
    in_it ctr --address "$SOCKET" -n k8s.io images import /packages/installer.tar

    step "$name: a kubelet that does not come up with Hull"
    in_it mkdir -p "/run/systemd/system/$UNIT.service.d"
    in_it tee "/run/systemd/system/$UNIT.service.d/refuse.conf" >/dev/null <<'U'
[Service]
ExecStartPre=/bin/sh -c '[ ! -e /etc/systemd/system/kubelet.service.d/90-hull.conf ] && [ ! -e /etc/rancher/k3s/config.yaml.d/90-hull.yaml ]'
U
    in_it systemctl daemon-reload
    in_it cp /etc/kubernetes/installer.yaml /etc/kubernetes/manifests
    eventually said "kubelet did not get well with Hull; it has what it had"
    [ "$(container "$SOCKET" main)" = "$web" ] || fail "the pod was made anew"
    in_it rm -r "/run/systemd/system/$UNIT.service.d"
    in_it systemctl daemon-reload

    step "$name: install, by the pod"
    eventually led
    eventually ready
    eventually running /run/hull/hull.sock main
    [ "$(container /run/hull/hull.sock main)" = "$web" ] || fail "the pod was made anew"
    in_it cat /etc/hull/config.d/10-node.toml
    mirror bench.registry

    step "$name: a pod in a microVM beside it"
    # Without an API server kubelet knows no RuntimeClass.
    in_it tee /etc/hull/config.d/20-test.toml >/dev/null <<<'default_handler = "hull"'
    in_it systemctl reload hull
    in_it sh -c "sed -e 's/name: web/name: vm/' -e 's/name: main/name: vm/' /etc/kubernetes/web.yaml >/etc/kubernetes/manifests/vm.yaml"
    CRI=/run/hull/hull.sock
    eventually running /run/hull/hull.sock vm
    [[ $(cri_exec vm uname -r) = *-hull ]] || fail "the pod is in no microVM"
    [ "$(cri_exec main uname -r)" = "$(uname -r)" ] || fail "the pod is in a microVM"
    kubelet=$(processes kubelet)

    step "$name: the pod again, on a node that is installed"
    in_it rm /etc/kubernetes/manifests/installer.yaml
    eventually gone installer
    in_it cp /etc/kubernetes/installer.yaml /etc/kubernetes/manifests
    eventually ready
    said "is installed, and kubelet is led to it" || fail "no such word"
    [ "$(processes kubelet)" = "$kubelet" ] || fail "kubelet was restarted"

    step "$name: remove"
    in_it sed -i 's/value: install/value: remove/' /etc/kubernetes/installer.yaml
    in_it cp /etc/kubernetes/installer.yaml /etc/kubernetes/manifests
    eventually said "pods in microVMs run here (1)"
    in_it rm /etc/kubernetes/manifests/vm.yaml
    eventually said "removed; kubelet has the runtime that it had"
    removed || fail "something is still there, or kubelet is not led back"
    CRI=$SOCKET
    eventually running "$SOCKET" main
    [ "$(container "$SOCKET" main)" = "$web" ] || fail "the pod was made anew"
    in_it sed -i 's/value: remove/value: install/' /etc/kubernetes/installer.yaml
    in_it sh -c 'rm /etc/kubernetes/manifests/*'
    eventually gone main
    eventually gone installer
    in_it systemctl stop "$UNIT"
    # Kubelet mounts its directory on itself.
    in_it umount /var/lib/kubelet
    # And takes its time over sandboxes that are empty.
    eventually no_sandboxes
    in_it systemctl stop containerd
    # That of k3s goes on when its unit ends.
    kill $(processes containerd) 2>/dev/null || true
    in_it rm -rf /var/log/pods /var/log/containers /var/lib/cni/networks/node
    ip link del node0
    left >"$DIR/after"
    diff "$DIR/before" "$DIR/after" || fail "something is left"
    echo "nothing is left"
}

eventually() {
    local i
    # Rarely: in emulation a look takes a second of a processor, too.
    for i in {1..200}; do if "$@" 2>/dev/null; then return 0; fi; sleep 3; done
    in_it journalctl --no-pager -n 60 -u hull -u "$UNIT" | cut -c 1-300
    in_it sh -c 'tail -n 30 /var/log/pods/*/*/*.log' || true
    fail "not within ten minutes: $*"
}
no_sandboxes() {
    local sandbox
    for sandbox in $(cri pods --quiet); do cri stopp "$sandbox" && cri rmp "$sandbox" || return 1; done >/dev/null
}
# cri ARG...: of the runtime whose socket is $CRI.
cri() { in_it /packages/hull-cri -r "$CRI" "$@"; }
# running SOCKET NAME, container SOCKET NAME: the id of the running container.
container() { in_it /packages/hull-cri -r "$1" ps | awk -v name="$2" '$3 == name { print $1 }'; }
running() { [ -n "$(container "$1" "$2")" ]; }
gone() { ! running "${CRI:-/run/hull/hull.sock}" "$1"; }
cri_exec() {
    local name=$1; shift
    in_it /packages/hull-cri -r /run/hull/hull.sock exec --sync "$(container /run/hull/hull.sock "$name")" -- "$@"
}
led() { tr '\0' '\n' <"/proc/$(processes kubelet)/cmdline" | grep -qx -- '--container-runtime-endpoint=unix:///run/hull/hull.sock'; }
ready() { CRI=/run/hull/hull.sock cri exec --sync "$(container /run/hull/hull.sock installer)" -- test -e /done; }
said() { in_it sh -c 'cat /var/log/pods/kube-system_installer*/installer/*.log' | grep -qF "$1"; }
removed() { ! in_it test -e /usr/bin/hull && in_it systemctl is-active "$UNIT" >/dev/null && ! led; }

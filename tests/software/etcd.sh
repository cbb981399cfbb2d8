# A Go program (etcd): keeps its data through a restart of its container, and knows how many CPUs it has.
PACKAGES="etcd-server etcd-client"
CONFIG='{"Cmd": ["etcd", "--data-dir", "/data", "--logger", "zap"], "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "ETCDCTL_API=3"]}'
steps() {
    mkdir -m 700 "$DIR/data"
    local mount='.mounts = [{container_path: "/data", host_path: "'"$DIR/data"'"}]'
    pod '.linux.resources = {memory_limit_in_bytes: 268435456}'
    container first "$mount"
    ready etcdctl endpoint health
    says OK inside etcdctl put greeting "hello from a microVM"
    says "hello from a microVM" inside etcdctl get greeting
    stops 0
    container second "$mount"
    ready etcdctl endpoint health
    says "hello from a microVM" inside etcdctl get greeting
    stops 0
}

# Redis as its image on Docker Hub is: a user of its own, a declared volume as working directory; here with a
# read-only root too. Its file of changes outlives the container in an emptyDir, and not in the declared volume.
PACKAGES="redis-server redis-tools"
CONFIG='{"Cmd": ["redis-server", "--appendonly", "yes", "--protected-mode", "no"],
    "User": "redis", "WorkingDir": "/data", "Volumes": {"/data": {}}, "ExposedPorts": {"6379/tcp": {}}}'
prepare() {
    mkdir "$1/data"
    chroot "$1" chown redis:redis /data
}
steps() {
    local read_only='.linux.security_context = {readonly_rootfs: true}'
    local dir=$DIR/pods/$NAME-uid/volumes/kubernetes.io~empty-dir/data
    pod '.linux.resources = {memory_limit_in_bytes: 268435456}'
    container declared "$read_only"
    ready redis-cli ping
    says OK inside redis-cli set key value
    says OK inside redis-cli save
    says dump.rdb inside ls /data
    stops 0
    met "a declared volume under a read-only root"

    mkdir -p "$dir"
    chmod 777 "$dir"
    local kept="$read_only | .mounts = [{container_path: \"/data\", host_path: \"$dir\"}]"
    container first "$kept"
    ready redis-cli ping
    says '(nil)' inside redis-cli --no-raw get key
    says 'requests per second' inside redis-benchmark -q -n 100000 -r 100000 -P 16 -t set
    inside redis-cli set key kept >/dev/null
    stops 0
    container second "$kept"
    # While it reads its files it answers so, and redis-cli ends with 0.
    ready sh -c 'redis-cli ping | grep -q PONG'
    says kept inside redis-cli get key
    met "$(inside redis-cli dbsize | tr -d '\r') keys read back from its log of changes after a restart"
    says Background inside redis-cli bgsave
    ready sh -c 'redis-cli info persistence | grep -q rdb_bgsave_in_progress:0 && redis-cli info persistence | grep -q rdb_last_bgsave_status:ok'
    met "saved by a fork"
    stops 0
}

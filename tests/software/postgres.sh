# PostgreSQL as its image on Docker Hub is: a user of its own, its files in a declared volume, SIGINT to end;
# here with a read-only root too. Then on an emptyDir, killed and started again.
PACKAGES="postgresql postgresql-contrib"
CONFIG='{"Entrypoint": ["/usr/local/bin/start"], "User": "postgres", "StopSignal": "SIGINT",
    "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/lib/postgresql/bin", "PGDATA=/var/lib/postgresql/data"],
    "Volumes": {"/var/lib/postgresql/data": {}, "/var/run/postgresql": {}, "/tmp": {}}, "ExposedPorts": {"5432/tcp": {}}}'
prepare() {
    ln -s "$(chroot "$1" sh -c 'echo /usr/lib/postgresql/*/bin')" "$1/usr/lib/postgresql/bin"
    mkdir -p "$1/var/lib/postgresql/data" "$1/run/postgresql"
    chroot "$1" chown postgres:postgres /var/lib/postgresql/data /run/postgresql
    chmod 700 "$1/var/lib/postgresql/data"
    cat >"$1/usr/local/bin/start" <<'S'
#!/bin/sh
set -e
[ -s "$PGDATA/PG_VERSION" ] || initdb --auth=trust >/dev/null
exec postgres
S
    chmod 755 "$1/usr/local/bin/start"
}
steps() {
    local read_only='.linux.security_context = {readonly_rootfs: true}'
    local dir=$DIR/pods/$NAME-uid/volumes/kubernetes.io~empty-dir/data
    pod '.linux.resources = {memory_limit_in_bytes: 536870912}'
    container declared "$read_only"
    ready pg_isready -q
    # In parallel, by shared memory in /dev/shm.
    says 'CREATE TABLE' inside psql -c 'create table t as select g as n, md5(g::text) as text from generate_series(1, 200000) g' -c 'create table u()'
    says 200000 inside psql -Atc 'set max_parallel_workers_per_gather = 2; set parallel_setup_cost = 0; select count(*) from t'
    stops 0
    met "a declared volume under a read-only root"

    mkdir -p "$dir"
    chmod 777 "$dir"
    local kept="$read_only | .envs = [{key: \"PGDATA\", value: \"/kept/data\"}] | .mounts = [{container_path: \"/kept\", host_path: \"$dir\"}]"
    container first "$kept"
    ready pg_isready -q
    inside pgbench -qi -s 2 postgres >/dev/null 2>&1
    met "$(inside pgbench -c 4 -t 50 postgres 2>&1 | grep -o 'number of transactions actually processed: .*')"
    inside psql -qc "create table kept as select 'kept' as text"
    # As when a node loses power: no clean end, and the log of changes is gone through at the next start.
    cri stop --timeout 0 "$CTR" >/dev/null
    container second "$kept"
    ready pg_isready -q
    says kept inside psql -Atc 'select text from kept'
    says 'automatic recovery in progress' cri logs "$CTR"
    met "recovered after SIGKILL"
    stops 0
    says 'database system is shut down' cri logs "$CTR"
}

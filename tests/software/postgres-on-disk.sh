# PostgreSQL on a block device of its own, as a StatefulSet with a volume of the mode Block has it: the first
# container makes a file system there, and both mount it. The device is a loop device of the node.
PACKAGES="postgresql util-linux e2fsprogs"
CONFIG='{"Entrypoint": ["/usr/local/bin/start"], "StopSignal": "SIGINT",
    "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:/usr/lib/postgresql/bin", "PGDATA=/disk/data"]}'
prepare() {
    ln -s "$(chroot "$1" sh -c 'echo /usr/lib/postgresql/*/bin')" "$1/usr/lib/postgresql/bin"
    mkdir -p "$1/disk" "$1/run/postgresql"
    chroot "$1" chown postgres:postgres /run/postgresql
    cat >"$1/usr/local/bin/start" <<'S'
#!/bin/sh
set -e
blkid /dev/database >/dev/null || mkfs.ext4 -q /dev/database
mount /dev/database /disk
install -d -o postgres -m 700 /disk/data
postgres="setpriv --reuid postgres --regid postgres --init-groups --inh-caps=-all"
[ -s "$PGDATA/PG_VERSION" ] || $postgres initdb --auth=trust >/dev/null
exec $postgres postgres
S
    chmod 755 "$1/usr/local/bin/start"
}
steps() {
    local disk
    truncate -s 512M "$DIR/disk"
    disk=$(losetup --find --show "$DIR/disk")
    # shellcheck disable=SC2064
    trap "losetup -d $disk" EXIT
    local privileged='.linux.security_context = {privileged: true}
        | .devices = [{container_path: "/dev/database", host_path: "'"$disk"'", permissions: "rwm"}]'
    pod '.linux = {security_context: {privileged: true}, resources: {memory_limit_in_bytes: 536870912}}'
    container first "$privileged"
    ready pg_isready -q
    inside psql -U postgres -qc "create table kept as select g as n, md5(g::text) as text from generate_series(1, 200000) g"
    stops 0
    cri rm "$CTR" >/dev/null
    says data sh -c "mount -o ro $disk /mnt && ls /mnt; umount /mnt"
    met "made, filled, and found on the node's device"
    container second "$privileged"
    ready pg_isready -q
    says 200000 inside psql -U postgres -Atc 'select count(*) from kept'
    met "200000 rows read back by the next container"
    stops 0
}

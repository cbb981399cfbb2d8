# systemd as the init of a privileged pod: units with limits, the journal, timers, a login session.
PACKAGES="systemd systemd-sysv dbus libpam-systemd"
CONFIG='{"Cmd": ["/sbin/init"], "StopSignal": "SIGRTMIN+3",
    "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "container=oci"]}'
prepare() {
    cat >"$1/etc/systemd/system/app.service" <<'UNIT'
[Service]
Type=notify
NotifyAccess=all
MemoryMax=48M
TasksMax=20
StateDirectory=app
ExecStart=/bin/sh -c 'trap "echo stopped >/data/stopped; exit 0" TERM; echo data >/var/lib/app/file; systemd-notify --ready; while :; do sleep 1; done'
[Install]
WantedBy=multi-user.target
UNIT
    ln -s /etc/systemd/system/app.service "$1/etc/systemd/system/multi-user.target.wants/app.service"
}
steps() {
    mkdir -m 777 "$DIR/data"
    pod '.linux.security_context = {privileged: true}'
    container init '.linux.security_context = {privileged: true} | .mounts = [{container_path: "/data", host_path: "'"$DIR/data"'"}]'
    ready systemctl is-active app.service
    inside systemctl is-system-running --wait >"$DIR/state" || true
    says running cat "$DIR/state"
    says "0 loaded units" inside systemctl --failed
    says 50331648 inside cat /sys/fs/cgroup/system.slice/app.service/memory.max
    says 20 inside cat /sys/fs/cgroup/system.slice/app.service/pids.max
    says data inside cat /var/lib/app/file
    # A limit that systemd sets holds: the service is ended, and its init goes on.
    inside systemd-run --wait --collect --quiet --property=MemoryMax=32M --property=MemorySwapMax=0 tail /dev/zero && fail "a limit of memory does not hold"
    says oom inside journalctl --no-pager --grep oom-kill
    inside systemctl restart app.service
    says "Started" inside journalctl --no-pager --unit app.service
    says running inside systemctl is-system-running
    # systemd has its pid namespace ended like a machine (reboot(2)): by SIGINT.
    stops 130
    says stopped cat "$DIR/data/stopped"
}

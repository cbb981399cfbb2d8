# shellcheck shell=bash
# The Debian package: installed, used, restarted, upgraded and killed under a running pod, refused as a downgrade,
# removed and purged. Nothing of it is left then.

try_deb() {
    local daemon
    boot "$1" "$KEPT"/{old,new}.deb
    left >"$DIR/before"

    step "Install"
    in_it apt-get install -y -qq /packages/old.deb >"$DIR/apt.log" 2>&1 || { cat "$DIR/apt.log"; fail "apt"; }
    active
    show systemctl show -p Type -p WatchdogUSec -p KillMode -p OOMScoreAdjust -p Delegate hull
    expect 72 "install -Dm644 /usr/share/hull/99-hull.conflist -t /etc/cni/net.d" hull check
    show install -Dm644 /usr/share/hull/99-hull.conflist -t /etc/cni/net.d
    expect 0 "a small guest ran" hull check
    mirror demo.registry
    [ "$(in_it stat -c '%a %U' /run/hull/hull.sock)" = "600 root" ] || fail "mode of the socket"

    step "Use"
    expect 0 "-hull" hull run $IMAGE uname -r
    show hull run -d --name web $IMAGE sleep 10000
    VM=$(vms)
    [ -n "$VM" ] || fail "no VM"
    [ "$(cat "/proc/$VM/oom_score_adj")" = 0 ] || fail "the VM is spared when memory runs out"
    alive

    step "Restart, kill, upgrade under a running pod"
    show systemctl restart hull
    active; alive
    daemon=$(main_pid)
    show systemctl kill -s KILL --kill-who main hull
    sleep 3
    active; alive
    [ "$(main_pid)" != "$daemon" ] || fail "no new daemon"
    in_it mkdir -p /etc/hull/config.d /run/systemd/system/hull.service.d
    in_it tee /etc/hull/config.d/10-test.toml >/dev/null <<<'vm.overhead_mib = 80'
    daemon=$(main_pid)
    expect 0 "" apt-get install -y -qq /packages/new.deb
    active; alive
    [ "$(main_pid)" != "$daemon" ] || fail "the daemon was not restarted"
    expect 0 "/etc/hull/config.d/10-test.toml" hull config show
    daemon=$(main_pid)
    in_it tee /etc/hull/config.d/20-test.toml >/dev/null <<<'handlers.late.vcpus = 1'
    show systemctl reload hull
    sleep 1
    expect 0 "late" journalctl -u hull --no-pager -n 3
    in_it rm /etc/hull/config.d/20-test.toml
    alive
    [ "$(main_pid)" = "$daemon" ] || fail "a reload is no restart"
    echo "from $(dpkg-deb -f "$KEPT/old.deb" Version) to $(dpkg-deb -f "$KEPT/new.deb" Version)"

    step "A daemon that hangs is started anew"
    in_it tee /run/systemd/system/hull.service.d/short.conf >/dev/null <<<$'[Service]\nWatchdogSec=15'
    show systemctl daemon-reload
    show systemctl restart hull
    active
    daemon=$(main_pid)
    show systemctl kill -s STOP --kill-who main hull
    local i
    for i in {1..120}; do [ "$(main_pid)" = "$daemon" ] || break; sleep 0.5; done
    active; alive
    [ "$(main_pid)" != "$daemon" ] || fail "the watchdog did nothing"
    in_it systemctl show -P NRestarts hull

    step "A wrong configuration"
    in_it tee /etc/hull/config.d/10-test.toml >/dev/null <<<'vm.overhead_mb = 80'
    expect 78 "did you mean vm.overhead_mib?" hull config check
    in_it rm /etc/hull/config.d/10-test.toml

    step "A downgrade that can't be"
    in_it cp /usr/lib/hull/formats /root/formats
    in_it sed -i 's/^records .*/records 99/' /usr/lib/hull/formats
    expect 100 "hull reset -f" apt-get install -y -qq --allow-downgrades --reinstall /packages/new.deb
    in_it cp /root/formats /usr/lib/hull/formats
    active; alive

    step "Remove"
    expect 0 "hull-run/web" apt-get remove -y -qq hull
    [ -z "$(vms)" ] || fail "VMs are left"
    in_it test -e /etc/hull/config.toml || fail "the configuration is gone"
    in_it test -e /var/lib/hull/hull.redb || fail "the records are gone"
    step "Purge"
    in_it apt-get purge -y -qq hull >"$DIR/apt.log" 2>&1 || { cat "$DIR/apt.log"; fail "apt"; }
    in_it rm -f /root/formats
    in_it rm -rf /run/systemd/system/hull.service.d
    left >"$DIR/after"
    diff "$DIR/before" "$DIR/after" || fail "something is left"
    echo "nothing is left"
}

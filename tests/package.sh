#!/bin/bash
# package.sh: the Debian package as an administrator has it: installed on a fresh Debian under systemd, used,
# restarted, upgraded and killed under a running pod, refused as a downgrade, removed and purged. Nothing of it
# is left then. In the KVM host, in a container of its own, whose system is a tree of Debian packages alone.
#
# The package that is upgraded is that of an earlier commit: PREVIOUS=FILE, or the newest of those before HEAD
# that was built once (packaging/build-deb keeps them), or else HEAD~1, which takes a whole build.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/host/lib.sh"

KEPT=$HULL_CACHE/package
IMAGE=demo.registry/demo/busybox:latest

outside() {
    local images tree new old
    new=$("$REPO/packaging/build-deb" "$KEPT/new.deb")
    old=${PREVIOUS:-$(previous)}
    tree=$(fresh_tree)
    images=$("$REPO/tests/images/build.sh")
    mkdir -p "$KEPT"
    cp "$old" "$KEPT/old.deb"
    HULL_TEST_IMAGES=$images "$REPO/tests/host/run.sh" "$REPO/tests/package.sh" inside "$tree"
}

previous() {
    local commit file source
    for commit in $(git -C "$REPO" rev-list --max-count=100 HEAD~1); do
        file=$KEPT/$commit.deb
        if [ -e "$file" ]; then echo "$file"; return; fi
    done
    commit=$(git -C "$REPO" rev-parse HEAD~1) source=$KEPT/source
    say "building the package of $commit"
    rm -rf "$source"; git -C "$REPO" worktree prune
    git -C "$REPO" worktree add --quiet --detach "$source" "$commit" >&2
    (cd "$source" && CARGO_TARGET_DIR=$KEPT/target make --no-print-directory deb) >&2
    git -C "$REPO" worktree remove --force "$source"
    echo "$KEPT/$commit.deb"
}

# A Debian with systemd, and in apt's cache what our package depends on and recommends, as there is no network.
fresh_tree() {
    local suite tree packages=systemd-sysv,ca-certificates
    suite=$(debian_suite)
    tree=$KEPT/$suite-$(sed -n '/^fresh_tree/,/^}/p' "$0" | sha256sum | cut -c 1-12)
    if [ ! -d "$tree" ]; then
        need_root "make a fresh Debian"
        "$REPO/tests/host/install.sh" emulator
        say "debootstrap $suite"
        rm -rf "$tree.new"
        debootstrap --variant=minbase --include=$packages "$suite" "$tree.new" "$MIRROR" >"$KEPT/debootstrap.log" 2>&1
        chroot "$tree.new" apt-get -qq update >&2
        chroot "$tree.new" apt-get -qq -y --download-only install containernetworking-plugins >&2
        rm -f "$tree.new/etc/resolv.conf"
        # Waits for a terminal or device that is not there.
        ln -sf /dev/null "$tree.new/etc/systemd/system/console-getty.service"
        mv "$tree.new" "$tree"
    fi
    echo "$tree"
}

# --- in the KVM host ---------------------------------------------------------------------------

BEGIN=${EPOCHREALTIME/./}
step() { printf '\n\033[1m%6.1f s  %s\033[0m\n' "$(((${EPOCHREALTIME/./} - BEGIN) / 100000))e-1" "$*"; }
fail() { echo "package: $*"; exit 1; }
# Runs a command in the container.
in_it() { nsenter -t "$INIT" -m -p -C -u -i -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive "$@"; }
show() { printf '+ %s\n' "$*"; in_it "$@"; }
# Its output must have this text, and its exit code be this.
expect() {
    local code=$1 text=$2 rc=0; shift 2
    printf '+ %s\n' "$*"
    in_it "$@" >"$DIR/out" 2>&1 || rc=$?
    cat "$DIR/out"
    [ "$rc" = "$code" ] || fail "exit code $rc, not $code: $*"
    grep -qF -- "$text" "$DIR/out" || fail "no \"$text\" from: $*"
}
main_pid() { in_it systemctl show -P MainPID hull; }
active() {
    local i
    for i in {1..300}; do
        [ "$(in_it systemctl is-active hull)" != active ] || return 0
        sleep 0.2
    done
    in_it journalctl -u hull --no-pager | tail -n 30
    fail "hull is not active"
}
# Its processes of the name.
processes() {
    local pid
    find /sys/fs/cgroup/package -name cgroup.procs -exec cat {} + | while read -r pid; do
        if grep -qsx "$1" "/proc/$pid/comm"; then echo "$pid"; fi
    done | sort | paste -s -d ' '
}
# The first thread's name is its task's.
vms() { processes 'hull-vmm.*'; }
# The pod goes on: the same process, and a command in its container answers.
alive() {
    local i
    [ "$(vms)" = "$VM" ] || fail "the VM was $VM and is $(vms)"
    for i in {1..50}; do
        if in_it hull exec web echo alive 2>/dev/null | grep -qx alive; then return 0; fi
        sleep 0.3
    done
    in_it hull ps -a; fail "no answer in the pod"
}

inside() {
    local tree=$1 daemon
    DIR=$(mktemp -d /tmp/hull-package.XXXXXX)
    trap clean_up EXIT
    "$REPO/tests/images/registry.sh" start "$HULL_TEST_IMAGES" 0 "$DIR/registry"
    step "Boot a fresh Debian"
    boot "$tree"
    left >"$DIR/before"

    step "Install"
    in_it apt-get install -y -qq /packages/old.deb >"$DIR/apt.log" 2>&1 || { cat "$DIR/apt.log"; fail "apt"; }
    active
    show systemctl show -p Type -p WatchdogUSec -p KillMode -p OOMScoreAdjust -p Delegate hull
    expect 71 "install -Dm644 /usr/share/hull/99-hull.conflist -t /etc/cni/net.d" hull check
    show install -Dm644 /usr/share/hull/99-hull.conflist -t /etc/cni/net.d
    expect 0 "a small guest ran" hull check
    in_it mkdir /etc/hull/certs.d/demo.registry
    in_it tee /etc/hull/certs.d/demo.registry/hosts.toml >/dev/null <<<"[host.\"http://127.0.0.1:$(cat "$DIR/registry/port")\"]"
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
    in_it kill -9 "$daemon"
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
    echo "from $(dpkg-deb -f "$KEPT/old.deb" Version) to $(dpkg-deb -f "$KEPT/new.deb" Version)"

    step "A daemon that hangs is started anew"
    in_it tee /run/systemd/system/hull.service.d/short.conf >/dev/null <<<$'[Service]\nWatchdogSec=15'
    show systemctl daemon-reload
    show systemctl restart hull
    active
    daemon=$(main_pid)
    in_it kill -STOP "$daemon"
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
    step "Done"
}

# What the package, its daemon and pods may leave anywhere.
left() {
    in_it find / -xdev '(' -path /proc -o -path /sys -o -path /var/lib/dpkg -o -path /packages -o -path /var/cache ')' -prune -o -iname '*hull*' -print | sort
    in_it find /run /var/lib/cni /etc/cni -xdev 2>/dev/null | grep -E 'hull|netns|cni' | sort || true
    in_it find /sys/fs/cgroup -name '*hull*' | sort
    in_it dpkg-query -W -f '${Package} ${db:Status-Status}\n' 'hull*' 2>/dev/null | grep -v not-installed || true
    find /sys/class/net -mindepth 1 -printf '%f\n' | sort
    nft list ruleset 2>/dev/null | grep -c -i hull || true
    processes 'hull.*'
    grep -c hull "/proc/$INIT/mounts" || true
}

# boot TREE: systemd as the first process of a container: namespaces of its own but for the network.
boot() {
    local root=$DIR/root i
    mkdir -p "$DIR"/{up,work,root}
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$DIR/up,workdir=$DIR/work" "$root"
    mkdir -p "$root/packages" "$DIR/cgroup"
    cp "$KEPT"/{old,new}.deb "$root/packages"
    # Its cgroup is the root of its hierarchy.
    for i in cpu memory pids io cpuset; do echo "+$i" >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || true; done
    mkdir -p /sys/fs/cgroup/package
    # shellcheck disable=SC2016 # expands there
    sh -c 'echo $$ >/sys/fs/cgroup/package/cgroup.procs; exec unshare -p -f -m -C -u -i --propagation slave "$@"' sh \
        bash -c 'set -e; cd "$0"
            mount -t proc proc proc; mount -t sysfs sysfs sys; mount -t cgroup2 cgroup2 sys/fs/cgroup
            mount --rbind /dev dev; mount -t tmpfs tmpfs run; mount -t tmpfs tmpfs tmp
            mkdir -p mnt; pivot_root . mnt; umount -l /mnt
            exec env -i container=package /sbin/init --unit=multi-user.target' "$root" \
        >"$DIR/init.log" 2>&1 </dev/null &
    UNSHARE=$!
    for i in {1..100}; do INIT=$(pgrep -P $UNSHARE || true); [ -z "$INIT" ] || break; sleep 0.1; done
    for i in {1..300}; do
        case $(in_it systemctl is-system-running 2>/dev/null) in running | degraded) break ;; esac
        [ "$i" -lt 300 ] || { cat "$DIR/init.log"; in_it systemctl list-jobs; fail "systemd did not come up"; }
        sleep 0.3
    done
    in_it systemctl --failed --no-legend --plain || true
}

clean_up() {
    local code=$?
    if [ $code != 0 ]; then
        echo "package: failed with exit code $code"
        in_it journalctl -u hull --no-pager 2>/dev/null | tail -n 40 || true
    fi
    "$REPO/tests/images/registry.sh" stop "$DIR/registry" || true
    # All its processes; with the first one its namespaces go.
    [ ! -e /sys/fs/cgroup/package ] || echo 1 >/sys/fs/cgroup/package/cgroup.kill
    exit $code
}

case ${1:-} in
    '') outside ;;
    inside) inside "$2" ;;
    *) die "no arguments" ;;
esac

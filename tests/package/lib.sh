# shellcheck shell=bash
# What the parts of package.sh have in common: a fresh Debian under systemd, in a container of the KVM host. Source
# it after host/lib.sh.

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

# boot TREE FILE...: systemd as the first process of a container: namespaces of its own but for the network. It has
# the files in /packages.
boot() {
    local root=$DIR/root tree=$1 i; shift
    mkdir -p "$DIR"/{up,work,root}
    mount -t overlay overlay -o "lowerdir=$tree,upperdir=$DIR/up,workdir=$DIR/work" "$root"
    mkdir -p "$root/packages"
    cp -- "$@" "$root/packages"
    # Its cgroup is the root of its hierarchy.
    for i in cpu memory pids io cpuset hugetlb; do echo "+$i" >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || true; done
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
    # What is in the cgroup itself keeps systemd from giving its units controllers.
    echo $UNSHARE >/sys/fs/cgroup/cgroup.procs
    for i in {1..300}; do
        case $(in_it systemctl is-system-running 2>/dev/null) in running | degraded) break ;; esac
        [ "$i" -lt 300 ] || { cat "$DIR/init.log"; in_it systemctl list-jobs; fail "systemd did not come up"; }
        sleep 0.3
    done
    in_it systemctl --failed --no-legend --plain || true
}


# Ends the container and all its processes; with the first one its namespaces go.
unboot() {
    [ -e /sys/fs/cgroup/package ] || return 0
    echo 1 >/sys/fs/cgroup/package/cgroup.kill
    wait "$UNSHARE" 2>/dev/null || true
    umount -l "$DIR/root" 2>/dev/null || true
    find /sys/fs/cgroup/package -depth -type d -exec rmdir {} + 2>/dev/null || true
    for i in hull0 node0; do ip link del $i 2>/dev/null || true; done
    rm -rf "${DIR:?}"/{up,work,root}
}

# mirror HOST: Hull in the container finds the registry of the test by that name.
mirror() {
    in_it mkdir -p "/etc/hull/certs.d/$1"
    in_it tee "/etc/hull/certs.d/$1/hosts.toml" >/dev/null <<<"[host.\"http://127.0.0.1:$(cat "$DIR/registry/port")\"]"
}

# What the package, its daemon and pods may leave anywhere.
left() {
    in_it find / -xdev '(' -path /proc -o -path /sys -o -path /var/lib/dpkg -o -path /packages -o -path /var/cache -o -name 'io.containerd.*' ')' -prune -o -iname '*hull*' -print | sort
    in_it find /run /var/lib/cni /etc/cni -xdev 2>/dev/null | grep -E 'hull|netns/|cni' | sort || true
    in_it find /sys/fs/cgroup -name '*hull*' | sort
    in_it dpkg-query -W -f '${Package} ${db:Status-Status}\n' 'hull*' 2>/dev/null | grep -v not-installed || true
    find /sys/class/net -mindepth 1 -printf '%f\n' | sort
    nft list ruleset 2>/dev/null | grep -c -i hull || true
    processes 'hull.*'
    awk '/hull/ { print "mounted: " $2 }' "/proc/$INIT/mounts" | sort
}

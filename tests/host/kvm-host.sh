#!/bin/bash
# kvm-host.sh: the emulated KVM host, a machine with a real, unpatched /dev/kvm (QEMU in software,
# emulating an AMD CPU with SVM) for where the developer's machine has none that can run our guest.
#
#   kvm-host.sh exec [CMD [ARG...]]   runs CMD (one word: shell text) as root in the machine, in the
#                                     checkout, with the built binaries in PATH; stdin, stdout,
#                                     stderr and exit code pass through. Starts the machine if need
#                                     be. Without CMD: a shell.
#   kvm-host.sh start | stop | status
#   kvm-host.sh run CMD [ARG...]      exec in a fresh machine, which is stopped afterwards
#   kvm-host.sh build                 only makes the machine's root tree and kernel
#
# The checkout is visible at its own path, read-write; so is the directory $SHARE if set; the cache
# is read-only. Built binaries are copied to /opt/hull (HULL_ASSETS there), which is memory, because
# running them from a shared directory takes three times as long. State in /var/lib/hull and /run
# is memory too, and gone when the machine stops.
#
# There is one machine per checkout and KVM_HOST_NAME. It turns itself off after two idle hours.
# Exit code 125: the machine did not start or died. Environment:
#   KVM_HOST_NAME      more than one machine per checkout        KVM_HOST_MEMORY  MiB (6144)
#   KVM_HOST_PACKAGES  more Debian packages, comma-separated     KVM_HOST_CPUS    (2)
#   KVM_HOST_IDLE      minutes until it turns itself off, 0 = never (120)
#   KVM_HOST_APPARMOR  0: off, as on machines without it
#   KVM_HOST_QEMU, KVM_HOST_VIRTIOFSD   other programs;  KVM_HOST_APPEND  kernel arguments
set -euo pipefail
. "$(dirname "$0")/lib.sh"

HERE=$REPO/tests/host
PACKAGES=busybox-static,kmod,procps,util-linux,iproute2,iptables,nftables,iputils-ping,strace,socat,\
openssh-server,jq,curl,ca-certificates,e2fsprogs,erofs-utils,containernetworking-plugins,\
attr,docker-registry,tar,zstd,apparmor${KVM_HOST_PACKAGES:+,$KVM_HOST_PACKAGES}
MEMORY=${KVM_HOST_MEMORY:-6144} CPUS=${KVM_HOST_CPUS:-2} IDLE=${KVM_HOST_IDLE:-120}
QEMU=${KVM_HOST_QEMU:-$TOOLS/emulator/bin/qemu-system-x86_64}
VIRTIOFSD=${KVM_HOST_VIRTIOFSD:-$TOOLS/emulator/bin/virtiofsd}
SHARE=${SHARE:+$(realpath "$SHARE")}

# name_machine NAME: sets the paths of the machine of that name.
name_machine() {
    local key; key=$(printf '%s\n' "$REPO" "$1" | sha256sum | cut -c 1-12)
    RUN=/run/hull-kvm-host/$key           # pids, sockets, console.log: short, for socket names
    STAGE=$HULL_CACHE/kvm-host/stage/$key # binaries on their way into the machine
    SSH=(ssh -F none -q -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR
        -o IdentityFile="$RUN/id" -o IdentitiesOnly=yes -o ControlPath="$RUN/ssh"
        -o ServerAliveInterval=20 -o ServerAliveCountMax=6 -o ConnectTimeout=60)
}

# The root tree is keyed by what goes in.
tree() {
    local suite; suite=$(debian_suite)
    echo "$HULL_CACHE/kvm-host/$(cat "$HERE/build-root.sh" - <<<"$suite $PACKAGES" | sha256sum | cut -c 1-16)"
}
# The kernel argument that says whether AppArmor is on.
apparmor() { echo "apparmor=${KVM_HOST_APPARMOR:-1}"; }
recipe() { cat "$HERE/build-root.sh" "$HERE/init" "$HERE/install.sh" - <<<"$PACKAGES" | sha256sum | cut -c 1-16; }

build() {
    local tree; tree=$(tree)
    if [ ! -f "$tree/vmlinuz" ]; then
        need_root "build the emulated KVM host"
        mkdir -p "${tree%/*}"
        (
            flock 7
            [ -f "$tree/vmlinuz" ] || "$HERE/build-root.sh" "$tree" "$PACKAGES"
        ) 7>"$tree.lock"
        # Trees that no machine has started from for a month.
        find "${tree%/*}" -maxdepth 1 -type d -name '????????????????' -mtime +30 -exec rm -rf {} +
    fi
    touch "$tree"
}

# --- processes -------------------------------------------------------------------------------

# ours PID: is it still the process that we started? Its command line names the run directory.
ours() { { tr '\0' ' ' <"/proc/$1/cmdline" | grep -qF "$RUN/"; } 2>/dev/null; }

# Prints the recorded processes that still exist.
live_pids() {
    local pid
    [ -f "$RUN/pids" ] || return 0
    while read -r pid; do if ours "$pid"; then echo "$pid"; fi; done <"$RUN/pids"
}

# Up, all its processes there, and it answers. (A minute: the machine may be very busy.)
alive() {
    [ -f "$RUN/up" ] && [ "$(live_pids)" = "$(cat "$RUN/pids")" ] \
        && timeout 60 "${SSH[@]}" -p "$(cat "$RUN/port")" root@127.0.0.1 true </dev/null
}
ssh_() { "${SSH[@]}" -p "$(cat "$RUN/port")" root@127.0.0.1 "$@"; }

# spawn LOG CMD...: starts CMD in a session of its own, without our locks, and records its pid.
spawn() {
    local log=$1; shift
    setsid "$@" >"$log" 2>&1 </dev/null 7>&- 8>&- 9>&- &
    echo $! >>"$RUN/pids"
}

# serve TAG DIR CACHE [MOUNT-OPTIONS]: offers DIR to the machine, which mounts it at the same path
# (the root tree, tag "root", is mounted by the kernel).
serve() {
    local tag=$1 dir=$2 cache=$3 options=${4:-}
    spawn "$RUN/$tag.log" "$VIRTIOFSD" --socket-path="$RUN/$tag.sock" --shared-dir="$dir" \
        --cache="$cache" --xattr --sandbox=chroot --announce-submounts --inode-file-handles=prefer
    DEVICES+=(-chardev "socket,id=$tag,path=$RUN/$tag.sock" -device "vhost-user-fs-pci,chardev=$tag,tag=$tag")
    if [ "$tag" != root ]; then
        echo "$tag ${dir// /\\040} virtiofs defaults,X-mount.mkdir${options:+,$options}" >>"$RUN/fstab"
        echo "$dir" >>"$RUN/shares"
    fi
    local i
    for i in {1..500}; do [ ! -S "$RUN/$tag.sock" ] || return 0; sleep 0.02; done
    die "virtiofsd for $dir did not start: $(tail -n 3 "$RUN/$tag.log")"
}

qemu() {
    local init=$1 tree=$2
    # thread=single hangs nested guests. Of the kernel arguments, those about mitigations and the timer
    # only save time. AppArmor is on, as it is on Debian's machines, and so it is in guests.
    spawn "$RUN/qemu.log" "$QEMU" -name "hull-kvm-host,process=hull-kvm-host" \
        -accel tcg,thread=multi,tb-size=512 -M q35,memory-backend=mem,hpet=off \
        -cpu EPYC,+svm -smp "$CPUS" -m "$MEMORY" \
        -object memory-backend-memfd,id=mem,size="${MEMORY}M",share=on \
        -nodefaults -no-user-config -display none -no-reboot \
        -serial file:"$RUN/console.log" "${DEVICES[@]}" -device virtio-rng-pci \
        -device virtio-serial-pci -chardev file,id=ctl,path="$RUN/ctl" -device virtserialport,chardev=ctl,name=hull.ctl \
        -netdev user,id=n0,hostfwd=tcp:127.0.0.1:"$PORT"-:22 -device virtio-net-pci,netdev=n0,romfile= \
        -fw_cfg name=opt/hull/fstab,file="$RUN/fstab" -fw_cfg name=opt/hull/idle,string="$IDLE" \
        -kernel "$tree/vmlinuz" \
        -append "root=root rootfstype=virtiofs ro init=$init console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off $(apparmor) tsc=reliable $(tsc_frequency) no_timer_check ${KVM_HOST_APPEND:-}"
    tail -n 1 "$RUN/pids" >"$RUN/qemu.pid"
}

# Prints the kernel argument that names the rate of the time-stamp counter, which is this machine's.
# A kernel that measures it on a busy machine gets a wrong one, and its clock then runs several times
# too fast.
tsc_frequency() {
    local mhz
    mhz=$(dmesg 2>/dev/null | sed -n 's/.*tsc: Detected \([0-9.]*\) MHz processor.*/\1/p' | tail -n 1)
    [ -n "$mhz" ] || mhz=$(awk -F ': ' '/^cpu MHz/ { print $2; exit }' /proc/cpuinfo)
    [ -z "$mhz" ] || awk -v mhz="$mhz" 'BEGIN { printf "tsc_early_khz=%d", mhz * 1000 }'
}

# --- start and stop (the caller holds the lock) ------------------------------------------------

start() {
    need_root "start the emulated KVM host"
    "$HERE/install.sh" emulator
    build
    local attempt
    for attempt in 1 2 3 4 5; do
        if boot; then return 0; fi
        say "the port was taken, once more ($attempt)"
    done
    die "no free port found"
}

# Returns 1 if the port was taken in the meantime.
boot() {
    local tree init begin=$SECONDS
    tree=$(tree)
    halt
    mkdir -p "$RUN"; chmod 700 "$RUN"
    cp "$tree/id" "$RUN/id"
    recipe >"$RUN/recipe"; echo "$PACKAGES" >"$RUN/packages"; apparmor >"$RUN/apparmor"; : >"$RUN/ctl"
    # The init of this checkout, under a name that another checkout's does not have.
    init=/sbin/hull-init-$(sha256sum "$HERE/init" | cut -c 1-12)
    if [ ! -x "$tree/root$init" ]; then
        cp "$HERE/init" "$tree/root$init.$$"; chmod 755 "$tree/root$init.$$"; mv "$tree/root$init.$$" "$tree/root$init"
    fi
    say "starting the emulated KVM host (about 10 s; it stays up for the next command, 'make host-stop' ends it)"
    DEVICES=() PORT=$(free_port)
    echo "$PORT" >"$RUN/port"
    mkdir -p "$HULL_CACHE"
    serve root "$tree/root" always
    serve checkout "$REPO" auto
    # SHARE before the cache: a mount must not hide one inside it.
    if [ -n "$SHARE" ]; then serve share "$SHARE" auto; fi
    serve cache "$HULL_CACHE" auto ro
    qemu "$init" "$tree"
    local i
    for i in {1..1800}; do
        if grep -qs '^up' "$RUN/ctl"; then break; fi
        if grep -qs '^nokvm' "$RUN/ctl"; then died "has no /dev/kvm"; fi
        if ! ours "$(cat "$RUN/qemu.pid")"; then
            if grep -q 'host forwarding' "$RUN/qemu.log"; then return 1; fi
            died "died while it started"
        fi
        sleep 0.1
    done
    # One connection that all commands share: a session in it costs 60 ms, a new one a second.
    "${SSH[@]}" -o ControlMaster=yes -o ControlPersist=yes -N -f -p "$PORT" root@127.0.0.1 \
        >/dev/null 2>&1 </dev/null 7>&- 8>&- 9>&- || died "cannot be reached"
    touch "$RUN/up"
    say "the emulated KVM host is up after $((SECONDS - begin)) s"
}

free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        if ! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then echo "$port"; return; fi
    done
}

died() {
    { say "the emulated KVM host $1; its console and QEMU's messages:"; oops || tail -n 40 "$RUN/console.log"; cat "$RUN"/qemu.log; } >&2 || true
    exit 125
}

# Its kernel's first complaint, if there is one.
oops() { grep -m 1 -A 60 -E 'Oops|BUG:|kernel panic|Kernel panic|Out of memory' "$RUN/console.log"; }

halt() {
    local pids pid i
    if [ -S "$RUN/ssh" ]; then "${SSH[@]}" -O exit root@127.0.0.1 2>/dev/null || true; fi
    mapfile -t pids < <(live_pids)
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for i in {1..100}; do
        [ -n "$(live_pids)" ] || break
        [ "$i" != 60 ] || for pid in $(live_pids); do kill -9 "$pid" 2>/dev/null || true; done
        sleep 0.05
    done
    rm -rf "$RUN" "$STAGE"
}

# Prints why the running machine does not do, nothing if it does.
mismatch() {
    if [ "$(cat "$RUN/recipe" 2>/dev/null)" != "$(recipe)" ]; then echo "was built from other scripts"; fi
    if [ -n "$SHARE" ] && ! visible "$SHARE"; then echo "does not show $SHARE"; fi
    if [ "$(cat "$RUN/apparmor" 2>/dev/null)" != "$(apparmor)" ]; then echo "was not booted with $(apparmor)"; fi
    local p
    for p in ${KVM_HOST_PACKAGES:+${KVM_HOST_PACKAGES//,/ }}; do
        case ",$(cat "$RUN/packages")," in *",$p,"*) ;; *) echo "lacks the package $p" ;; esac
    done
}
visible() {
    local dir
    while read -r dir; do case $1/ in "$dir"/*) return 0 ;; esac; done <"$RUN/shares"
    return 1
}

# Locks: 9 is held to start or stop; 8 is shared by the commands that run in the machine, so that
# it is not replaced under one of them.
lock() { mkdir -p "${RUN%/*}"; exec 9>"$RUN.lock"; flock 9; }
unlock() { exec 9>&-; }

# Sees to it that a machine that does is up, and holds lock 8.
enter() {
    need_root "use the emulated KVM host"
    mkdir -p "${RUN%/*}"
    while :; do
        exec 8>"$RUN.users"; flock -s 8
        if alive && [ -z "$(mismatch)" ]; then return 0; fi
        exec 8>&-
        lock
        local why
        if ! alive; then
            [ ! -d "$RUN" ] || say "the emulated KVM host is gone"
            start
        elif why=$(mismatch | head -n 1); [ -n "$why" ]; then
            exec 8>"$RUN.users"
            if flock -n 8; then
                exec 8>&-
                say "the running emulated KVM host $why: replacing it"
                start
            elif [ "$(mismatch)" = "was built from other scripts" ]; then
                say "the running emulated KVM host $why, but is in use: using it as it is"
                flock -s 8; unlock; return 0
            else
                die "the running emulated KVM host $why, and is in use: wait, stop it, or set KVM_HOST_NAME"
            fi
        fi
        unlock
    done
}

# --- commands ----------------------------------------------------------------------------------

# Copies those built files into the machine that changed since the last time. Each waits in the
# stage under a name that it alone ever has, so that no cache on the way can be out of date.
sync_assets() {
    [ -d "$ASSETS" ] || return 0
    local wanted
    wanted=$(cd "$ASSETS" && find -L . -maxdepth 1 -type f ! -name '.*' ! -name '*.new' -printf '%f %f-%s-%T@-%i\n' | sort)
    if [ "$wanted" = "$(cat "$RUN/assets" 2>/dev/null)" ]; then return 0; fi
    (
        flock 7
        local name stamp script=''
        rm -rf "$STAGE"; mkdir -p "$STAGE"
        while read -r name stamp; do
            if [ -z "$name" ] || grep -qsxF "$name $stamp" "$RUN/assets"; then continue; fi
            ln -L "$ASSETS/$name" "$STAGE/$stamp" 2>/dev/null || cp -pL "$ASSETS/$name" "$STAGE/$stamp"
            script+=$(printf 'cp -p %q %q && mv -f %q %q || exit 1' "$STAGE/$stamp" "/opt/hull/.$name" "/opt/hull/.$name" "/opt/hull/$name")$'\n'
        done <<<"$wanted"
        ssh_ "$script" </dev/null
        printf '%s\n' "$wanted" >"$RUN/assets"
        rm -rf "$STAGE"
    ) 7>"$RUN/sync.lock" || die "cannot copy $ASSETS into the emulated KVM host"
}

execute() {
    local id=$$-$RANDOM command prefix variable tty=()
    sync_assets
    case $# in 0) command='exec bash -i' ;; 1) command=$1 ;; *) command=$(printf '%q ' "$@") ;; esac
    prefix="echo \$\$ >/run/commands/$id; trap 'rm -f /run/commands/$id' EXIT; cd $(printf %q "$REPO")"
    for variable in "${!HULL_@}" "${!RUST_@}"; do prefix+="; export $variable=$(printf %q "${!variable}")"; done
    prefix+="; export PATH=/opt/hull:\$PATH HULL_ASSETS=/opt/hull HULL_HOST=direct${SHARE:+ SHARE=$(printf %q "$SHARE")}"
    if [ -t 0 ] && [ -t 1 ]; then tty=(-t); prefix+="; export TERM=$(printf %q "${TERM:-dumb}")"; fi

    # In the background, so that a signal to us reaches the command at once. Not with a terminal:
    # there the command itself gets the keys.
    local rc=0
    if [ ${#tty[@]} -gt 0 ]; then
        ssh_ "${tty[@]}" "$prefix"$'\n'"$command" || rc=$?
    else
        ssh_ "$prefix"$'\n'"$command" <&0 & local child=$!
        trap 'interrupt "$id" 130' INT; trap 'interrupt "$id" 143' TERM; trap 'interrupt "$id" 129' HUP
        wait "$child" || rc=$?
        trap - INT TERM HUP
    fi
    # ssh's own failures are 255 too.
    if [ "$rc" = 255 ] && ! alive; then died "died under the command"; fi
    return "$rc"
}
interrupt() {
    ssh_ "kill -TERM -- -\$(cat /run/commands/$1)" 2>/dev/null </dev/null || true
    exit "$2"
}

status() {
    if ! alive; then echo "no emulated KVM host is running for $REPO"; return 3; fi
    echo "emulated KVM host of $REPO: QEMU pid $(cat "$RUN/qemu.pid"), ssh port $(cat "$RUN/port"), console $RUN/console.log"
    sed 's/^/shows /' "$RUN/shares"
    # shellcheck disable=SC2016 # expands there
    ssh_ 'read -r up _ </proc/uptime; echo "up $up s, $(uname -r), $(ls /run/commands | wc -l) commands running"; free -m | sed -n 1,2p' </dev/null
}

name_machine "${KVM_HOST_NAME:-}"
verb=${1:-}; [ $# = 0 ] || shift
case $verb in
    build) "$HERE/install.sh" emulator; build ;;
    start) enter ;;
    exec) enter; execute "$@" ;;
    run)
        [ $# -gt 0 ] || die "no command"
        name_machine "run-$$"
        trap 'lock; halt; rm -f "$RUN.lock" "$RUN.users"' EXIT
        enter; execute "$@" ;;
    stop) lock; halt ;;
    status) status ;;
    *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac

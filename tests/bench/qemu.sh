# shellcheck shell=bash
# Shared by the benchmarks that run tests/diskload in a guest of QEMU, too: its microvm with KVM, the kernel
# of Hull's guests, one vCPU. Source it after lib.sh of the host and of the benchmarks; DIR is the benchmark's.
# QEMU and virtiofsd are those of Debian that the emulated host runs on, see tests/host/install.sh.
QEMU=$TOOLS/emulator/bin/qemu-system-x86_64 VIRTIOFSD=$TOOLS/emulator/bin/virtiofsd
GUESTS=()

# start_guest NAME MIB COMMANDS QEMU-ARGUMENT...: COMMANDS are what init does first, which has busybox alone.
# Then the guest takes steps of the load, see in_guest, until stop_guests. Its figure `boot` is the time from the start
# of QEMU until init has done that, ms.
start_guest() {
    local name=$1 mib=$2 commands=$3 root=$DIR/$1.root begin; shift 3
    mkdir -p "$root"/{bin,dev,proc,sys,tmp,data}
    cp /bin/busybox "$root/bin/busybox"; [ -z "${HULL_DISKLOAD:-}" ] || cp "$HULL_DISKLOAD" "$root/diskload"
    cat >"$root/init" <<I
#!/bin/busybox sh
for name in mount stty; do eval "\$name() { /bin/busybox \$name \"\\\$@\"; }"; done
mount -t proc proc /proc
mount -t devtmpfs dev /dev
stty -F /dev/ttyS0 raw -echo icanon
exec </dev/ttyS0 >/dev/ttyS0 2>&1
set -e
$commands
echo ready
while read -r steps; do
    /diskload \$steps && echo "over 0" || echo "over 1"
done
I
    chmod +x "$root/init"
    mkfs.erofs "$root.erofs" "$root" >/dev/null 2>&1
    rm -rf "$root"
    mkfifo "$DIR/$name.serial.in" "$DIR/$name.serial.out"
    begin=$(now)
    "$QEMU" -M microvm,x-option-roms=off,rtc=on,acpi=off,pit=off,pic=off,memory-backend=mem -accel kvm -cpu host \
        -smp 1 -m "$mib" -object memory-backend-memfd,id=mem,size="${mib}M",share=on \
        -nodefaults -no-user-config -display none -no-reboot \
        -chardev pipe,id=serial,path="$DIR/$name.serial" -serial chardev:serial \
        -kernel "$HULL_ASSETS/vmlinux" \
        -append "console=ttyS0 quiet loglevel=1 panic=-1 root=/dev/vda rootfstype=erofs ro init=/init" \
        -drive file="$root.erofs",format=raw,if=none,id=root,readonly=on -device virtio-blk-device,drive=root \
        "$@" >"$DIR/$name.log" 2>&1 &
    GUESTS+=($!)
    # For both, or opening would wait for a QEMU that may have ended.
    exec {TO_GUEST}<>"$DIR/$name.serial.in" {FROM_GUEST}<>"$DIR/$name.serial.out"
    says "$name" ready
    note "$name" boot $((($(now) - begin) / 1000000))
}

# serve_files NAME DIRECTORY CACHE: virtiofsd for one guest; SHARE is QEMU's arguments, the tag is `data`.
serve_files() {
    "$VIRTIOFSD" --socket-path "$DIR/$1.fs" --shared-dir "$2" --cache "$3" >"$DIR/$1.fs.log" 2>&1 &
    GUESTS+=($!)
    for _ in {1..100}; do [ ! -S "$DIR/$1.fs" ] || break; sleep 0.1; done
    SHARE=(-chardev socket,id=fs,path="$DIR/$1.fs" -device vhost-user-fs-device,chardev=fs,tag=data)
}

# in_guest NAME STEP...: the load in the guest that was started last.
in_guest() {
    local name=$1; shift
    echo "$*" >&"$TO_GUEST"
    says "$name" 'over 0'
}

# says NAME WORD: until the guest says it; what else it says are figures.
says() {
    local line
    while read -r -t 900 line <&"$FROM_GUEST"; do
        line=${line%$'\r'}
        case $line in
            *"$2") return 0 ;;
            'over 1') break ;;
        esac
        if [[ $line =~ ^[a-z-]+\ [0-9.]+$ ]]; then echo "$line" >>"$DIR/$1.figures"; else echo "$line" >>"$DIR/$1.log"; fi
    done
    tail -n 20 "$DIR/$1.log" "$DIR/$1.fs.log" 2>/dev/null || true
    die "the guest $1 does not say $2"
}

# All guests, and what serves them.
stop_guests() {
    [ ${#GUESTS[@]} = 0 ] || { kill "${GUESTS[@]}" 2>/dev/null; wait "${GUESTS[@]}" 2>/dev/null; } || true
    GUESTS=()
    [ -z "${TO_GUEST:-}" ] || exec {TO_GUEST}>&- {FROM_GUEST}<&-
    unset TO_GUEST FROM_GUEST
    rm -f "$DIR"/*.serial.in "$DIR"/*.serial.out "$DIR"/*.fs
}

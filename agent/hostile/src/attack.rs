//! The attacks.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    process, thread,
    time::{SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
    sys::{
        ptrace,
        reboot::set_cad_enabled,
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket,
        },
        stat::{Mode, SFlag, makedev, mknod},
        time::TimeSpec,
        wait::waitpid,
    },
    time::{ClockId, clock_settime},
    unistd::Pid,
};

/// One attack: what it is called and done by.
type Attack = (&'static str, fn() -> io::Result<()>);

/// `VMADDR_CID_LOCAL`, `_HOST` and `_ANY` of vsock(7); the guest's own is always this.
const LOCAL: u32 = 1;
const HOST: u32 = 2;
const OWN: u32 = 3;
const ANY: u32 = u32::MAX;
/// The agent's ports.
const RPC: u32 = 1024;
const STREAMS: u32 = 1025;

pub(crate) const ALL: &[Attack] = &[
    // The agent, and the host.
    ("vsock-agent-rpc", || dial(OWN, RPC)),
    ("vsock-agent-streams", || dial(OWN, STREAMS)),
    ("vsock-agent-local", || dial(LOCAL, RPC)),
    ("vsock-host", || dial(HOST, RPC)),
    ("vsock-host-other-port", || dial(HOST, 1)),
    ("vsock-within", within),
    ("vsock-be-the-agent", || offer(ANY, RPC).map(drop)),
    ("vsock-be-the-agents-streams", || {
        offer(OWN, STREAMS).map(drop)
    }),
    ("agent-seen", agent_seen),
    ("first-traced", first_traced),
    ("first-memory", || {
        of_another(1).and_then(|()| writable("/proc/1/mem"))
    }),
    ("first-root", || {
        fs::read_dir("/proc/1/root/run/hull").map(drop)
    }),
    ("first-descriptors", || {
        fs::read_link("/proc/1/fd/3").map(drop)
    }),
    ("first-namespaces", first_namespaces),
    ("abstract-sockets", abstract_sockets),
    // Memory and devices of the guest.
    ("physical-memory", || device(SFlag::S_IFCHR, 1, 1)),
    ("kernel-memory", || device(SFlag::S_IFCHR, 1, 2)),
    ("ports", || device(SFlag::S_IFCHR, 1, 4)),
    ("kernel-log", || device(SFlag::S_IFCHR, 1, 11)),
    ("kcore", || {
        fs::File::open("/proc/kcore").and_then(read_some)
    }),
    ("disks", disks),
    ("io-ports", || call(libc::SYS_ioperm, [0x70, 1, 1, 0, 0])),
    // The kernel.
    ("perf", perf),
    ("bpf", bpf),
    ("userfaultfd", || call(libc::SYS_userfaultfd, [0; 5])),
    ("module", || call(libc::SYS_init_module, [0; 5])),
    ("kexec", || call(libc::SYS_kexec_load, [0; 5])),
    ("syslog", || call(libc::SYS_syslog, [10, 0, 0, 0, 0])),
    ("keys", keys),
    ("handles", handles),
    ("clock", clock),
    ("reboot", || Ok(set_cad_enabled(false)?)),
    ("core-pattern", || writable("/proc/sys/kernel/core_pattern")),
    ("panic", || writable("/proc/sys/kernel/panic")),
    ("sysrq", || writable("/proc/sysrq-trigger")),
    ("never-killed", || {
        fs::write("/proc/self/oom_score_adj", "-1000")
    }),
    // Its devices and cgroups, by their files.
    ("device-probe", || {
        writable("/sys/bus/platform/drivers_probe")
    }),
    ("device-unbind", || {
        writable("/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/unbind")
    }),
    ("sysfs-again", || mounted("sysfs", "")),
    ("sysfs-writable", sysfs_writable),
    ("cgroup-own", || writable("/sys/fs/cgroup/cgroup.procs")),
    ("cgroup-again", || mounted("cgroup2", "")),
    ("cgroup-of-version-1", || mounted("cgroup", "none,name=x")),
    ("cgroup-limits", cgroup_limits),
    ("fuse", fuse),
    ("tun", tun),
];

fn vsock() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

fn dial(cid: u32, port: u32) -> io::Result<()> {
    Ok(connect(vsock()?.as_raw_fd(), &VsockAddr::new(cid, port))?)
}

fn offer(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = vsock()?;
    let address = VsockAddr::new(cid, port);
    bind(socket.as_raw_fd(), &address)?;
    listen(&socket, Backlog::new(1)?)?;
    Ok(socket)
}

/// From one process of the guest to another.
fn within() -> io::Result<()> {
    let _listener = offer(ANY, 77_777)?;
    dial(OWN, 77_777).or_else(|_| dial(LOCAL, 77_777))
}

/// Whether the guest's first process is in sight.
fn agent_seen() -> io::Result<()> {
    let name = fs::read_to_string("/proc/1/comm")?;
    if name.trim() == "init" {
        return Ok(());
    }
    Err(Errno::ESRCH.into())
}

/// Traces what is process 1 here, unless it is its own container's.
fn first_traced() -> io::Result<()> {
    of_another(1)?;
    let first = Pid::from_raw(1);
    ptrace::attach(first)?;
    let _ = waitpid(first, None);
    Ok(ptrace::detach(first, None)?)
}

fn first_namespaces() -> io::Result<()> {
    of_another(1)?;
    let namespace = fs::File::open("/proc/1/ns/net")?;
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

/// An error if process `pid` has this one's root.
fn of_another(pid: u32) -> io::Result<()> {
    let root = |pid: &str| fs::metadata(format!("/proc/{pid}/root/")).map(|m| (m.dev(), m.ino()));
    match root(&pid.to_string()) {
        Ok(other) if other == root("self")? => Err(Errno::ESRCH.into()),
        _ => Ok(()),
    }
}

/// Names of sockets that are not files. Those of other containers are to be seen: pods share a
/// network.
fn abstract_sockets() -> io::Result<()> {
    let table = fs::read_to_string("/proc/net/unix")?;
    if table.lines().any(|line| line.contains(" @")) {
        return Ok(());
    }
    Err(Errno::ENOENT.into())
}

/// Opens a device by its number, and reads from it.
fn device(kind: SFlag, major: u64, minor: u64) -> io::Result<()> {
    let path = Path::new("/tmp").join(format!("device-{}-{major}-{minor}", process::id()));
    let _ = fs::create_dir("/tmp");
    mknod(&path, kind, Mode::S_IRUSR, makedev(major, minor))?;
    let opened = fs::File::open(&path);
    fs::remove_file(&path)?;
    // The log has its next line when there is one.
    if (major, minor) == (1, 11) {
        return opened.map(drop);
    }
    opened.and_then(read_some)
}

fn read_some(mut file: fs::File) -> io::Result<()> {
    file.read(&mut [0; 512]).map(drop)
}

/// Any block device.
fn disks() -> io::Result<()> {
    let mut result = Err(Errno::ENOENT.into());
    for disk in fs::read_dir("/sys/block")? {
        let number = fs::read_to_string(disk?.path().join("dev"))?;
        let (major, minor) = number.trim().split_once(':').unwrap_or_default();
        let number = |text: &str| text.parse().map_err(io::Error::other);
        result = device(SFlag::S_IFBLK, number(major)?, number(minor)?);
        if result.is_ok() {
            break;
        }
    }
    result
}

fn writable(path: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path).map(drop)
}

/// Mounts a file system, and takes it away again.
fn mounted(fstype: &str, options: &str) -> io::Result<()> {
    let at = Path::new("/tmp/mounted");
    fs::create_dir_all(at)?;
    mount(
        Some(fstype),
        at,
        Some(fstype),
        MsFlags::empty(),
        Some(options),
    )?;
    Ok(umount2(at, MntFlags::MNT_DETACH)?)
}

fn sysfs_writable() -> io::Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    Ok(mount(
        None::<&str>,
        "/sys",
        None::<&str>,
        flags,
        None::<&str>,
    )?)
}

/// Limits above its own: with its cgroup namespace there is nothing above.
fn cgroup_limits() -> io::Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    if own.contains("/..") {
        writable("/sys/fs/cgroup/../pids.max")
    } else {
        writable("/sys/fs/cgroup/pids.max")
    }
}

/// Mounts a file system that it serves itself, and asks it for a file.
fn fuse() -> io::Result<()> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    let at = Path::new("/tmp/served");
    fs::create_dir_all(at)?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        device.as_raw_fd()
    );
    mount(
        Some("fuse"),
        at,
        Some("fuse"),
        MsFlags::empty(),
        Some(options.as_str()),
    )?;
    let server = thread::spawn(move || serve(device));
    let looked = fs::metadata(at.join("file"));
    // Its server ends with it.
    umount2(at, MntFlags::MNT_DETACH)?;
    let _ = server.join();
    match looked?.len() {
        FUSE_SIZE => Ok(()),
        _ => Err(Errno::EIO.into()),
    }
}

/// The size of each file of the file system.
const FUSE_SIZE: u64 = 4711;

/// Answers requests of the kernel until the file system is not mounted any more (`linux/fuse.h`).
fn serve(mut device: fs::File) -> io::Result<()> {
    const LOOKUP: u32 = 1;
    const GETATTR: u32 = 3;
    const INIT: u32 = 26;
    let mut request = vec![0; 256 << 10];
    loop {
        let length = device.read(&mut request)?;
        let Some((head, _)) = request
            .get(..length)
            .and_then(|r| r.split_first_chunk::<24>())
        else {
            return Err(Errno::EIO.into());
        };
        // `struct fuse_in_header`: length, opcode, unique, node.
        let words: Vec<u32> = head
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default()))
            .collect();
        let node = u64::from(words[4]) | u64::from(words[5]) << 32;
        let body = match words[1] {
            // `struct fuse_init_out`: version 7.31, nothing else.
            INIT => [7u32, 31].into_iter().chain([0; 14]).collect(),
            // `struct fuse_entry_out`: the node, how long name and attributes are good, and these.
            LOOKUP => [[2, 0, 0, 0, 0, 0, 0, 0, 0, 0].as_slice(), &attributes(2)].concat(),
            GETATTR => [[0; 4].as_slice(), &attributes(node)].concat(),
            _ => Vec::new(),
        };
        let error = if body.is_empty() { -libc::ENOSYS } else { 0 };
        let length = u32::try_from(16 + 4 * body.len()).unwrap_or(0);
        let head = [length, error.cast_unsigned(), words[2], words[3]];
        let answer: Vec<u8> = head
            .iter()
            .chain(&body)
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        // A request that was interrupted is not answered.
        let _ = device.write(&answer);
    }
}

/// `struct fuse_attr` of a node: the root, or a file.
fn attributes(node: u64) -> [u32; 22] {
    let mut words = [0; 22];
    let is_root = node == 1;
    words[0] = if is_root { 1 } else { 2 };
    words[2] = u32::try_from(FUSE_SIZE).unwrap_or(0);
    words[15] = if is_root {
        libc::S_IFDIR | 0o755
    } else {
        libc::S_IFREG | 0o644
    };
    words[16] = 1;
    words
}

/// Makes a network interface that it has the other end of.
fn tun() -> io::Result<()> {
    // `linux/if_tun.h`: _IOW('T', 202, int); IFF_TUN | IFF_NO_PI.
    const TUNSETIFF: usize = 0x4004_54ca;
    const FLAGS: u16 = 0x1001;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // `struct ifreq`: a name, which the kernel fills in, and the flags.
    let mut request = [0u16; 20];
    request[8] = FLAGS;
    let fd = usize::try_from(device.as_raw_fd()).map_err(io::Error::other)?;
    let request = request.as_mut_ptr().expose_provenance();
    call(libc::SYS_ioctl, [fd, TUNSETIFF, request, 0, 0])
}

fn clock() -> io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = TimeSpec::from_duration(now.map_err(io::Error::other)?);
    Ok(clock_settime(ClockId::CLOCK_REALTIME, now)?)
}

/// Counts how long a processor runs, whoever uses it.
fn perf() -> io::Result<()> {
    // `struct perf_event_attr` of its first version: type 1 (the kernel's own counters, which any
    // machine has), size 64; event 0 is the clock of the processor.
    let mut attr = [0u64; 8];
    attr[0] = 1 | 64 << 32;
    let any_process = usize::MAX;
    let no_group = usize::MAX;
    call(
        libc::SYS_perf_event_open,
        [
            attr.as_ptr().expose_provenance(),
            any_process,
            0,
            no_group,
            0,
        ],
    )
}

/// Loads the shortest program for packets of a cgroup: `r0 = 1; exit`.
fn bpf() -> io::Result<()> {
    const PROG_LOAD: usize = 5;
    const CGROUP_SKB: u64 = 8;
    let program: [u64; 2] = [0x1_0000_00b7, 0x95];
    let license = *b"GPL\0";
    let mut attr = [0u64; 16];
    attr[0] = CGROUP_SKB | 2 << 32;
    attr[1] = program.as_ptr().expose_provenance() as u64;
    attr[2] = license.as_ptr().expose_provenance() as u64;
    call(
        libc::SYS_bpf,
        [
            PROG_LOAD,
            attr.as_ptr().expose_provenance(),
            size_of_val(&attr),
            0,
            0,
        ],
    )
}

/// Leaves a key where other containers of its user look: the keyring of that user.
fn keys() -> io::Result<()> {
    const USER_KEYRING: usize = (-4_isize).cast_unsigned();
    let (kind, name, value) = (c"user", c"hull-hostile", [1u8]);
    call(
        libc::SYS_add_key,
        [
            kind.as_ptr().expose_provenance(),
            name.as_ptr().expose_provenance(),
            value.as_ptr().expose_provenance(),
            1,
            USER_KEYRING,
        ],
    )
}

/// Opens a file by a handle, past all directories.
fn handles() -> io::Result<()> {
    // `struct file_handle`: room for 128 bytes.
    let (mut handle, mut mount) = ([0u32; 34], 0u32);
    handle[0] = 128;
    let (path, opened) = (c"/dev", fs::File::open("/dev")?);
    let dir = usize::try_from(opened.as_raw_fd()).map_err(io::Error::other)?;
    let handle = handle.as_mut_ptr().expose_provenance();
    let mount = (&raw mut mount).expose_provenance();
    call(
        libc::SYS_name_to_handle_at,
        // By the path, which is absolute.
        [dir, path.as_ptr().expose_provenance(), handle, mount, 0],
    )?;
    call(libc::SYS_open_by_handle_at, [dir, handle, 0, 0, 0])
}

/// Makes a system call whose addresses, if any, are those of the caller's data.
fn call(number: libc::c_long, args: [usize; 5]) -> io::Result<()> {
    let [a, b, c, d, e] = args;
    // SAFETY: the addresses that this program gives to its calls are of values that outlive the call,
    // are large enough for it, and mutable where it writes.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    if result >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

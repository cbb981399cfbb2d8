//! The few system calls that no crate wraps safely.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Most entropy that one call credits, in bytes.
const ENTROPY_MAX: usize = 512;

/// `struct rand_pool_info` of `linux/random.h` with room for its data.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    length: libc::c_int,
    bytes: [u8; ENTROPY_MAX],
}

nix::ioctl_write_ptr_bad!(
    rnd_add_entropy,
    nix::request_code_write!(b'R', 0x03, 2 * size_of::<libc::c_int>()),
    PoolInfo
);
nix::ioctl_none!(rnd_reseed_crng, b'R', 0x07);

/// Adds `bytes` to the kernel's pool through `random` (`/dev/random`) and
/// credits all of their bits (random(4), `RNDADDENTROPY`).
pub(crate) fn add_entropy(random: &File, bytes: &[u8]) -> io::Result<()> {
    for chunk in bytes.chunks(ENTROPY_MAX) {
        let length = libc::c_int::try_from(chunk.len()).map_err(io::Error::other)?;
        let mut info = PoolInfo {
            entropy_bits: length * 8,
            length,
            bytes: [0; ENTROPY_MAX],
        };
        info.bytes[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: the fd is open; the kernel reads the two integers and then
        // `length` bytes, which lie inside `info`, and keeps no pointer.
        unsafe { rnd_add_entropy(random.as_raw_fd(), &raw const info) }?;
    }
    Ok(())
}

/// Makes the kernel's generator take a new key from its pool now
/// (random(4), `RNDRESEEDCRNG`), so that clones of one memory image part.
pub(crate) fn reseed(random: &File) -> io::Result<()> {
    // SAFETY: the fd is open and the call has no argument.
    unsafe { rnd_reseed_crng(random.as_raw_fd()) }?;
    Ok(())
}

/// Moves CLOCK_REALTIME by `by_ns` at once (clock_adjtime(2), `ADJ_SETOFFSET`).
pub(crate) fn step_clock(by_ns: i64) -> io::Result<()> {
    const SECOND_NS: i64 = 1_000_000_000;
    let mut change = no_change();
    change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    change.time.tv_sec = by_ns.div_euclid(SECOND_NS);
    // Nanoseconds, as the mode says; never negative.
    change.time.tv_usec = by_ns.rem_euclid(SECOND_NS);
    adjust_clock(change)
}

/// Has CLOCK_REALTIME run faster or slower, by 0.5 ms a second, until it has gained `by_us`
/// (adjtimex(2), `ADJ_OFFSET_SINGLESHOT`). It replaces what is left of an earlier call.
pub(crate) fn slew_clock(by_us: i64) -> io::Result<()> {
    let mut change = no_change();
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = by_us;
    adjust_clock(change)
}

fn no_change() -> libc::timex {
    // SAFETY: it has only integers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

fn adjust_clock(mut change: libc::timex) -> io::Result<()> {
    // SAFETY: the kernel reads and writes `change`, which has its layout, and keeps no pointer.
    let state = unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, &raw mut change) };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `struct fstrim_range` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct TrimRange {
    start: u64,
    length: u64,
    shortest: u64,
}

nix::ioctl_readwrite!(fitrim, b'X', 121, TrimRange);

/// Discards what a file system does not use; returns how many bytes that were, as far as it knows.
pub(crate) fn trim(root: &File) -> io::Result<u64> {
    let mut range = TrimRange {
        start: 0,
        length: u64::MAX,
        shortest: 0,
    };
    // SAFETY: the fd is open; the kernel reads and writes the structure during the call and keeps
    // no pointer.
    unsafe { fitrim(root.as_raw_fd(), &raw mut range) }?;
    Ok(range.length)
}

/// Gives all signals their default actions back: execve(2) hands on to the program what is ignored. That is
/// SIGPIPE by Rust's start-up code, and by `posix_spawn` two that the C library has for itself.
pub(crate) fn default_signals() {
    /// `SIGRTMAX` of the kernel.
    const LAST: libc::c_int = 64;
    // The kernel's `struct sigaction`, since the C library's function refuses its own two: SIG_DFL, no flag.
    let default = [0_u64; 4];
    for signal in 1..=LAST {
        // SAFETY: no handler is installed, so none can run in a bad place. The kernel reads an action of 32 bytes
        // with a mask of eight, and writes none; SIGKILL and SIGSTOP are refused.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
}

/// Puts a seccomp filter in force for the calling thread (seccomp(2), `SECCOMP_SET_MODE_FILTER`).
pub(crate) fn load_filter(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<()> {
    let length = u16::try_from(program.len());
    let program = libc::sock_fprog {
        len: length.map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads `len` instructions, which are there, writes none, and keeps no pointer. What
    // the filter refuses is an error of calls, as others are.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        // The id of a thread that has another filter.
        _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

/// Closes all descriptors but the standard streams (close_range(2)). Only for the first
/// moment of a program.
pub(crate) fn keep_standard_streams() -> io::Result<()> {
    // SAFETY: no other memory is used. The caller's program has opened nothing yet, so none of
    // these descriptors is owned by a value in it.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes a process that goes on here (fork(2)). Only for a program that has started no thread: in
/// the new one there is but this.
pub(crate) fn fork() -> io::Result<nix::unistd::ForkResult> {
    // SAFETY: the caller's program has one thread, so no lock is held by another, and the child may do
    // what its parent may.
    Ok(unsafe { nix::unistd::fork() }?)
}

/// `struct mount_attr` of `linux/mount.h`: what to change of a mount.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MountAttr {
    /// `MOUNT_ATTR_*` to set.
    pub(crate) set: u64,
    /// Those to clear.
    pub(crate) clear: u64,
    /// `MS_PRIVATE` and its like; 0: it stays.
    pub(crate) propagation: u64,
    /// A descriptor, for `MOUNT_ATTR_IDMAP`.
    pub(crate) user_namespace: u64,
}

impl MountAttr {
    /// Sets a flag.
    pub(crate) fn add(&mut self, flag: u64) {
        self.set |= flag;
        self.clear &= !flag;
    }

    /// Takes a flag back that was to be set.
    pub(crate) fn remove(&mut self, flag: u64) {
        self.set &= !flag;
    }

    /// Clears a flag that the mount may have.
    pub(crate) fn clear(&mut self, flag: u64) {
        self.remove(flag);
        self.clear |= flag;
    }

    /// Sets those bits that `mask` has to `value`.
    pub(crate) fn choose(&mut self, mask: u64, value: u64) {
        self.set = (self.set & !mask) | value;
        self.clear |= mask;
    }
}

const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// Makes a copied mount show owners as the user namespace `user` has them (mount_setattr(2)).
pub(crate) fn map_mount(tree: impl AsFd, user: impl AsFd) -> io::Result<()> {
    let user = u64::try_from(user.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let attr = MountAttr {
        set: MOUNT_ATTR_IDMAP,
        user_namespace: user,
        ..MountAttr::default()
    };
    change_mount(tree, attr, false)
}

/// Changes a mount, with all below it if so wanted (mount_setattr(2)).
pub(crate) fn change_mount(mount: impl AsFd, attr: MountAttr, recursive: bool) -> io::Result<()> {
    let below = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptor is open during the call; the path is an empty C string; the
    // kernel reads `size_of::<MountAttr>()` bytes of `attr` and keeps no pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | below,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sends `signal`, real-time ones too, to the process behind `pidfd`
/// (pidfd_send_signal(2)).
pub(crate) fn send_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open during the call; a null siginfo is allowed
    // and makes the kernel fill it in as kill(2) does; no memory is touched.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Registers `fd` with the event loop.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, stays so until it is dropped, and always
    // gives the same number; the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// One instruction of a BPF program (`struct bpf_insn`), of the few kinds that
/// device rules need. Comparisons and arithmetic are on 32 bits.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u8,
    /// Destination in the low, source in the high four bits.
    registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

impl Instruction {
    const fn new(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Self {
        Self {
            code,
            registers: dst | (src << 4),
            offset,
            immediate,
        }
    }

    /// dst = the word at `offset` of the context (r1).
    pub(crate) const fn load(dst: u8, offset: i16) -> Self {
        Self::new(0x61, dst, 1, offset, 0)
    }

    /// dst = src.
    pub(crate) const fn copy(dst: u8, src: u8) -> Self {
        Self::new(0xbc, dst, src, 0, 0)
    }

    /// dst >>= by.
    pub(crate) const fn shift_right(dst: u8, by: i32) -> Self {
        Self::new(0x74, dst, 0, 0, by)
    }

    /// dst &= mask.
    pub(crate) const fn and(dst: u8, mask: i32) -> Self {
        Self::new(0x54, dst, 0, 0, mask)
    }

    /// dst = value.
    pub(crate) const fn set(dst: u8, value: i32) -> Self {
        Self::new(0xb7, dst, 0, 0, value)
    }

    /// Jumps, to where [`Self::aim`] says, if dst != value.
    pub(crate) const fn jump_if_not(dst: u8, value: i32) -> Self {
        Self::new(0x56, dst, 0, 0, value)
    }

    /// Jumps if dst == value.
    pub(crate) const fn jump_if(dst: u8, value: i32) -> Self {
        Self::new(0x16, dst, 0, 0, value)
    }

    /// Returns r0.
    pub(crate) const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }

    /// Returns whether it jumps.
    pub(crate) const fn is_jump(self) -> bool {
        matches!(self.code, 0x56 | 0x16)
    }

    /// Makes a jump skip `count` instructions, which are few.
    pub(crate) fn aim(&mut self, count: usize) {
        self.offset = i16::try_from(count).unwrap_or(i16::MAX);
    }

    #[cfg(test)]
    pub(crate) const fn dst(self) -> u8 {
        self.registers & 15
    }

    #[cfg(test)]
    pub(crate) const fn src(self) -> u8 {
        self.registers >> 4
    }
}

/// The part of `union bpf_attr` that BPF_PROG_LOAD needs.
#[repr(C)]
struct LoadProgram {
    kind: u32,
    length: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that BPF_PROG_ATTACH needs.
#[repr(C)]
struct AttachProgram {
    target: i32,
    program: i32,
    kind: u32,
    flags: u32,
}

/// Loads a program that decides on device accesses (bpf(2), BPF_PROG_LOAD).
pub(crate) fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    const COMMAND: libc::c_int = 5;
    const CGROUP_DEVICE: u32 = 15;
    let request = LoadProgram {
        kind: CGROUP_DEVICE,
        length: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: `request` has the layout of bpf_attr and lives through the call,
    // as do the instructions and the string that it points to; the kernel reads
    // `length` instructions, checks them and keeps no pointer.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            COMMAND,
            &raw const request,
            size_of::<LoadProgram>(),
        )
    };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made this descriptor for us; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes `program` decide for the cgroup whose directory is open as `cgroup`
/// (BPF_PROG_ATTACH). It ends with the cgroup.
pub(crate) fn attach_device_program(cgroup: &File, program: &OwnedFd) -> io::Result<()> {
    const COMMAND: libc::c_int = 8;
    const CGROUP_DEVICE: u32 = 6;
    const ALLOW_MULTI: u32 = 2;
    let request = AttachProgram {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: `request` has the layout of bpf_attr and lives through the call;
    // both descriptors are open; no other memory is touched.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            COMMAND,
            &raw const request,
            size_of::<AttachProgram>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

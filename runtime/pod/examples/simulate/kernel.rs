//! The host's kernel as a simulation sees it: functions of the C library that take the place of the real
//! ones in this program, so that the code of the daemon stays what it is.
//!
//! | call | what it does here |
//! |---|---|
//! | `getrandom` | numbers of the seed: ids, orders of hash maps, branches of `select!` |
//! | `clock_gettime` | the simulation's time |
//! | `epoll_wait` | ends the daemon's slice: tokio calls it after each poll of a task (`event_interval(1)`) |
//! | `write`, `pwrite64`, `copy_file_range`, `ftruncate64`, `fsync`, `fdatasync`, `open64`, `mkdir`, `rename`, `unlink`, `rmdir` | fails as on a full or broken disk; ends the daemon in between; has no effect once it has ended |
//! | `accept4`, `close` | notes the connections to a pod's processes, for those that are lost |
//!
//! The state is the thread's: other threads have the real kernel.

use std::{
    cell::{Cell, RefCell},
    task::Waker,
    time::Duration,
};

use libc::{
    c_char, c_int, c_uint, c_void, clockid_t, epoll_event, mode_t, off_t, size_t, sockaddr,
    socklen_t, ssize_t, timespec,
};
use nix::{
    errno::Errno,
    sys::socket::{Shutdown, UnixAddr, getsockname, shutdown},
};

/// The sockets of pods whose connections end without the end of a process: that of a VMM's control socket is
/// its own.
const CUT: [&str; 2] = ["vsock.sock", "fs.sock"];
/// Unix time at the beginning, seconds.
const EPOCH_S: i64 = 1_700_000_000;
/// Monotonic time at the beginning, seconds.
const UPTIME_S: i64 = 1000;
/// Time that passes at each look at the wall clock, so that no two moments are one.
const LOOK_NS: u64 = 1000;

/// Whose code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The simulation's own.
    Nobody,
    Daemon,
    /// A process of a pod, of this number.
    Process(u32),
}

/// What goes wrong at calls of the daemon that change files.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disk {
    /// All of them fail with this.
    pub broken: Option<Errno>,
    /// The daemon is killed at the call after so many.
    pub kill_after: Option<u64>,
    /// One call fails with [`Errno::EIO`], after so many.
    pub fail_after: Option<u64>,
    /// It is full after so many calls, for so long.
    pub full: Option<(u64, Duration)>,
    /// It is full until then.
    pub full_until: Option<Duration>,
}

/// What a call of the daemon does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// It changes a file or directory, and needs room for that.
    Writes,
    /// The same, without.
    Changes,
    /// It sends something.
    Sends,
}

struct Kernel {
    is_simulated: Cell<bool>,
    random: Cell<u64>,
    now_ns: Cell<u64>,
    /// How much the wall clock was set forward or back.
    jumped_ns: Cell<i64>,
    who: Cell<Who>,
    is_dead: Cell<bool>,
    disk: Cell<Disk>,
    /// Polls of tasks that are left of this slice.
    polls_left: Cell<u64>,
    is_idle: Cell<bool>,
    root: RefCell<Option<Waker>>,
    accepted: RefCell<Vec<(u32, c_int)>>,
    /// Processes of pods that ended by themselves.
    ended: RefCell<Vec<u32>>,
}

thread_local! {
    static KERNEL: Kernel = const {
        Kernel {
            is_simulated: Cell::new(false),
            random: Cell::new(0),
            now_ns: Cell::new(0),
            jumped_ns: Cell::new(0),
            who: Cell::new(Who::Nobody),
            is_dead: Cell::new(false),
            disk: Cell::new(Disk { broken: None, kill_after: None, fail_after: None, full: None, full_until: None }),
            polls_left: Cell::new(0),
            is_idle: Cell::new(false),
            root: RefCell::new(None),
            accepted: RefCell::new(Vec::new()),
            ended: RefCell::new(Vec::new()),
        }
    };
}

/// Lets this thread have a simulated kernel from now on. Nothing that needs randomness may have run on it.
pub fn simulate(seed: u64) {
    KERNEL.with(|kernel| {
        kernel.random.set(seed);
        kernel.is_simulated.set(true);
    });
}

/// Lets time pass.
pub fn advance(time: Duration) {
    KERNEL.with(|kernel| {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        kernel.now_ns.set(kernel.now_ns.get().saturating_add(time));
    });
}

/// Time since the beginning.
pub fn now() -> Duration {
    KERNEL.with(|kernel| Duration::from_nanos(kernel.now_ns.get()))
}

/// Sets the wall clock forward, or back.
pub fn jump(ns: i64) {
    KERNEL.with(|kernel| kernel.jumped_ns.set(kernel.jumped_ns.get() + ns));
}

/// What goes wrong from now on.
pub fn set_disk(disk: Disk) {
    KERNEL.with(|kernel| kernel.disk.set(disk));
}

/// Whether the daemon was killed.
pub fn is_dead() -> bool {
    KERNEL.with(|kernel| kernel.is_dead.get())
}

/// Kills the daemon: nothing that it does has an effect any more; or begins a new one.
pub fn set_dead(is_dead: bool) {
    KERNEL.with(|kernel| kernel.is_dead.set(is_dead));
}

/// Whose code runs.
pub fn who() -> Who {
    KERNEL.with(|kernel| kernel.who.get())
}

/// Runs `work` as somebody's code.
pub fn run_as<T>(who: Who, work: impl FnOnce() -> T) -> T {
    let before = KERNEL.with(|kernel| kernel.who.replace(who));
    let result = work();
    KERNEL.with(|kernel| kernel.who.set(before));
    result
}

/// Begins a slice of so many polls.
pub fn begin_slice(polls: u64) {
    KERNEL.with(|kernel| {
        kernel.polls_left.set(polls);
        kernel.is_idle.set(false);
    });
}

/// Whether the slice is over; else `waker` is woken when it is.
pub fn is_slice_over(waker: &Waker) -> bool {
    KERNEL.with(|kernel| {
        let is_over = kernel.polls_left.get() == 0 || kernel.is_idle.get() || is_dead();
        if !is_over {
            *kernel.root.borrow_mut() = Some(waker.clone());
        }
        is_over
    })
}

/// The polls that are left of the slice, and whether it ended because there was nothing to do.
pub fn end_slice() -> (u64, bool) {
    KERNEL.with(|kernel| {
        kernel.root.borrow_mut().take();
        (kernel.polls_left.get(), kernel.is_idle.get())
    })
}

/// Ends the slice: no task can go on.
pub fn idle() {
    KERNEL.with(|kernel| kernel.is_idle.set(true));
    wake();
}

fn wake() {
    let root = KERNEL.with(|kernel| kernel.root.borrow_mut().take());
    if let Some(root) = root {
        root.wake();
    }
}

/// Ends the process of a pod whose code calls this.
pub fn exit() {
    KERNEL.with(|kernel| {
        if let Who::Process(vm) = kernel.who.get() {
            kernel.ended.borrow_mut().push(vm);
        }
    });
}

/// Whether a process of a pod has ended by itself.
pub fn has_exited(vm: u32) -> bool {
    KERNEL.with(|kernel| kernel.ended.borrow().contains(&vm))
}

/// The connections to the guest of a VM, or to a file server.
pub fn connections(vm: u32) -> Vec<c_int> {
    KERNEL.with(|kernel| {
        let accepted = kernel.accepted.borrow();
        let of = accepted
            .iter()
            .filter(|(owner, fd)| *owner == vm && may_be_cut(*fd));
        of.map(|(_, fd)| *fd).collect()
    })
}

/// Cuts a connection.
pub fn cut(fd: c_int) {
    // It may just have ended.
    let _ = shutdown(fd, Shutdown::Both);
}

fn may_be_cut(fd: c_int) -> bool {
    let name = getsockname::<UnixAddr>(fd).ok();
    let path = name.as_ref().and_then(UnixAddr::path);
    path.is_some_and(|path| CUT.iter().any(|socket| path.ends_with(socket)))
}

impl Disk {
    /// What becomes of the next call: the daemon is killed before it, or it fails.
    fn next(&mut self, call: Call) -> Result<(), Option<Errno>> {
        let is_over = |left: &mut Option<u64>| match left {
            Some(0) => left.take().is_some(),
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        if let Some((calls, time)) = &mut self.full {
            match calls {
                0 => {
                    self.full_until = Some(now() + *time);
                    self.full = None;
                }
                calls => *calls -= 1,
            }
        }
        let is_full = call == Call::Writes && self.full_until.is_some_and(|until| now() < until);
        let (kill, fail) = (is_over(&mut self.kill_after), is_over(&mut self.fail_after));
        match self.broken {
            _ if kill => Err(None),
            _ if fail => Err(Some(Errno::EIO)),
            Some(errno) => Err(Some(errno)),
            None if is_full => Err(Some(Errno::ENOSPC)),
            None => Ok(()),
        }
    }
}

/// Whether a call of the daemon may be made.
fn gate(call: Call) -> Result<(), Errno> {
    KERNEL.with(|kernel| {
        if kernel.who.get() != Who::Daemon {
            return Ok(());
        }
        if kernel.is_dead.get() {
            return Err(Errno::EIO);
        }
        if call == Call::Sends {
            return Ok(());
        }
        let mut disk = kernel.disk.get();
        let next = disk.next(call);
        kernel.disk.set(disk);
        next.map_err(|errno| {
            errno.unwrap_or_else(|| {
                kernel.is_dead.set(true);
                wake();
                Errno::EIO
            })
        })
    })
}

/// What a descriptor's file is, as `S_IFMT` tells it.
fn kind(fd: c_int) -> mode_t {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: `stat` is large enough for what is written to it, and all zeros are one.
    let stat = unsafe {
        libc::fstat(fd, stat.as_mut_ptr());
        stat.assume_init()
    };
    stat.st_mode & libc::S_IFMT
}

fn gate_fd(fd: c_int, call: Call) -> Result<(), Errno> {
    let daemon = KERNEL.with(|kernel| kernel.who.get() == Who::Daemon);
    // What is shown on standard error is no file of the daemon's.
    match (daemon && fd > 2).then(|| kind(fd)) {
        Some(libc::S_IFREG) => gate(call),
        Some(libc::S_IFSOCK) => gate(Call::Sends),
        _ => Ok(()),
    }
}

fn refused<T: From<i8>>(errno: Errno) -> T {
    errno.set();
    T::from(-1)
}

/// Defines a function that calls the kernel unless the gate is closed.
macro_rules! gated {
    ($($name:ident, $number:ident, $gate:expr, ($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {$(
        // SAFETY: the name is that of a function of the C library with these arguments, for which it stands.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $kind),*) -> $result {
            let gate: Result<(), Errno> = $gate;
            match gate {
                // SAFETY: the caller's arguments are those of the call, unchanged.
                Ok(()) => unsafe { libc::syscall(libc::$number, $($argument),*) as $result },
                Err(errno) => refused(errno),
            }
        }
    )*};
}

gated! {
    write, SYS_write, gate_fd(fd, Call::Writes), (fd: c_int, bytes: *const c_void, count: size_t) -> ssize_t;
    pwrite64, SYS_pwrite64, gate_fd(fd, Call::Writes),
        (fd: c_int, bytes: *const c_void, count: size_t, at: off_t) -> ssize_t;
    ftruncate64, SYS_ftruncate, gate_fd(fd, Call::Changes), (fd: c_int, length: off_t) -> c_int;
    copy_file_range, SYS_copy_file_range, gate_fd(to, Call::Writes),
        (from: c_int, from_at: *mut off_t, to: c_int, to_at: *mut off_t, length: size_t, flags: c_uint)
        -> ssize_t;
    fsync, SYS_fsync, gate_fd(fd, Call::Changes), (fd: c_int) -> c_int;
    fdatasync, SYS_fdatasync, gate_fd(fd, Call::Changes), (fd: c_int) -> c_int;
    mkdir, SYS_mkdir, gate(Call::Writes), (path: *const c_char, mode: mode_t) -> c_int;
    rename, SYS_rename, gate(Call::Writes), (from: *const c_char, to: *const c_char) -> c_int;
    unlink, SYS_unlink, gate(Call::Changes), (path: *const c_char) -> c_int;
    rmdir, SYS_rmdir, gate(Call::Changes), (path: *const c_char) -> c_int;
    open64, SYS_open, gate_open(flags), (path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    sendmsg, SYS_sendmsg, gate(Call::Sends),
        (fd: c_int, message: *const libc::msghdr, flags: c_int) -> ssize_t;
}

fn gate_open(flags: c_int) -> Result<(), Errno> {
    if flags & libc::O_CREAT == 0 {
        return Ok(());
    }
    gate(Call::Writes)
}

// SAFETY: it is a function of the C library with these arguments, for which it stands.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: size_t, flags: c_uint) -> ssize_t {
    let is_simulated = KERNEL.with(|kernel| kernel.is_simulated.get());
    if !is_simulated || buffer.is_null() || length == 0 {
        // SAFETY: the caller's arguments are those of the call, unchanged.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as ssize_t };
    }
    // SAFETY: the caller has `length` bytes there.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
    KERNEL.with(|kernel| {
        let mut state = kernel.random.get();
        for chunk in bytes.chunks_mut(8) {
            let word = crate::dice::mix(&mut state).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
        kernel.random.set(state);
    });
    length as ssize_t
}

// SAFETY: it is a function of the C library with these arguments, for which it stands.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    let is_simulated = KERNEL.with(|kernel| kernel.is_simulated.get());
    if !is_simulated {
        // SAFETY: the caller's arguments are those of the call, unchanged.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as c_int };
    }
    let ns = KERNEL.with(|kernel| {
        let is_wall = matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE);
        if !is_wall {
            return UPTIME_S * 1_000_000_000 + kernel.now_ns.get() as i64;
        }
        kernel.now_ns.set(kernel.now_ns.get() + LOOK_NS);
        EPOCH_S * 1_000_000_000 + kernel.now_ns.get() as i64 + kernel.jumped_ns.get()
    });
    let told = timespec {
        tv_sec: ns.div_euclid(1_000_000_000),
        tv_nsec: ns.rem_euclid(1_000_000_000),
    };
    // SAFETY: the caller has room for a time there.
    unsafe { time.write(told) };
    0
}

// SAFETY: it is a function of the C library with these arguments, for which it stands.
#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_wait(
    fd: c_int,
    events: *mut epoll_event,
    most: c_int,
    timeout_ms: c_int,
) -> c_int {
    let is_simulated = KERNEL.with(|kernel| kernel.is_simulated.get());
    let timeout_ms = if is_simulated { 0 } else { timeout_ms };
    // SAFETY: the caller's arguments are those of the call, but for the time, which is any.
    let result =
        unsafe { libc::syscall(libc::SYS_epoll_wait, fd, events, most, timeout_ms) as c_int };
    if is_simulated {
        let left = KERNEL.with(|kernel| {
            let left = kernel.polls_left.get().saturating_sub(1);
            kernel.polls_left.set(left);
            left
        });
        if left == 0 {
            wake();
        }
    }
    result
}

// SAFETY: it is a function of the C library with these arguments, for which it stands.
#[unsafe(no_mangle)]
unsafe extern "C" fn accept4(
    fd: c_int,
    address: *mut sockaddr,
    length: *mut socklen_t,
    flags: c_int,
) -> c_int {
    // SAFETY: the caller's arguments are those of the call, unchanged.
    let accepted = unsafe { libc::syscall(libc::SYS_accept4, fd, address, length, flags) as c_int };
    KERNEL.with(|kernel| {
        if let (Who::Process(vm), true) = (kernel.who.get(), accepted >= 0) {
            kernel.accepted.borrow_mut().push((vm, accepted));
        }
    });
    accepted
}

// SAFETY: it is a function of the C library with these arguments, for which it stands.
#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    KERNEL.with(|kernel| {
        if let Ok(mut accepted) = kernel.accepted.try_borrow_mut() {
            accepted.retain(|(_, other)| *other != fd);
        }
    });
    // SAFETY: the caller's argument is that of the call, unchanged.
    unsafe { libc::syscall(libc::SYS_close, fd) as c_int }
}

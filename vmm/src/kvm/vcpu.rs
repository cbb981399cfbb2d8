//! A vCPU and its thread: runs the guest, answers its register accesses, counts its exits.
//!
//! ```text
//!           ┌────────── pause ──────────┐
//! running ──┤                           ▼
//!    ▲      └──▶ stopped ◀── stop ── paused ──┐
//!    └────────────────── resume ──────────────┘
//! ```
//! A thread in `KVM_RUN` is called back by a signal whose handler sets the vCPU's `immediate_exit`, so
//! that a signal just before `KVM_RUN` is not lost. A thread parks only after `KVM_RUN` took note of
//! the last exit's result, because the vCPU's registers are not complete before.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::memory::Memory;
use crate::seccomp::VCPU;
use crate::sync::{lock, try_lock};

/// The stack of a vCPU thread. Only what is touched costs memory.
const STACK: usize = 256 << 10;
/// How long a vCPU may take to leave the guest. It takes microseconds, or, when it resets a disk that
/// is in the middle of a request, as long as that.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The devices that a guest's accesses reach.
pub trait Bus: Send + Sync + 'static {
    /// Reads guest-physical memory that is not RAM.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// Writes guest-physical memory that is not RAM.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// Reads from a port.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// Writes to a port; true asks for a reset of the machine.
    fn pio_write(&self, port: u16, data: &[u8]) -> bool;
}

/// Why a machine's processors stopped by themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Power off, reset or triple fault.
    Shutdown(&'static str),
    /// KVM can't go on; says why.
    Kvm(String),
}

/// Reasons to leave the guest, as counted.
#[derive(Debug, Clone, Copy)]
enum Exit {
    MmioRead,
    MmioWrite,
    PioRead,
    PioWrite,
    Hlt,
    Signal,
    Shutdown,
    Other,
}

const EXITS: [&str; 8] = [
    "mmio_read",
    "mmio_write",
    "pio_read",
    "pio_write",
    "hlt",
    "signal",
    "shutdown",
    "other",
];

#[derive(Debug, Default)]
struct Counters([AtomicU64; EXITS.len()]);

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// The state that vCPU threads share with who controls them.
#[derive(Debug)]
struct Shared {
    mode: AtomicU8,
    threads: Mutex<Threads>,
    changed: Condvar,
    end: Mutex<Option<End>>,
    ended: EventFd,
    first_entry: OnceLock<Instant>,
}

#[derive(Debug, Default)]
struct Threads {
    live: usize,
    parked: usize,
}

impl Shared {
    /// Waits while paused.
    fn park(&self) {
        let mut threads = lock(&self.threads);
        threads.parked += 1;
        self.changed.notify_all();
        while self.mode.load(Ordering::SeqCst) == PAUSE {
            threads = self
                .changed
                .wait(threads)
                .unwrap_or_else(PoisonError::into_inner);
        }
        threads.parked -= 1;
    }

    fn report(&self, end: End) {
        lock(&self.end).get_or_insert(end);
        let _ = self.ended.write(1);
    }
}

/// All vCPUs of a running machine.
#[derive(Debug)]
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    counters: Vec<Arc<Counters>>,
    /// Each is its thread's own unless that is parked.
    fds: Vec<Arc<Mutex<VcpuFd>>>,
}

impl Vcpus {
    /// Starts a thread per vCPU. `memory` is kept as long as one of them lives.
    ///
    /// # Errors
    /// When the host has no more threads or descriptors.
    pub fn start(fds: Vec<VcpuFd>, bus: &Arc<impl Bus>, memory: &Memory) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_signal)?;
        let shared = Arc::new(Shared {
            mode: AtomicU8::new(RUN),
            threads: Mutex::default(),
            changed: Condvar::new(),
            end: Mutex::new(None),
            ended: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            first_entry: OnceLock::new(),
        });
        let mut vcpus = Self {
            shared,
            threads: Vec::new(),
            counters: Vec::new(),
            fds: Vec::new(),
        };
        for (id, fd) in fds.into_iter().enumerate() {
            let counters = Arc::new(Counters::default());
            let fd = Arc::new(Mutex::new(fd));
            vcpus.fds.push(Arc::clone(&fd));
            let vcpu = Vcpu {
                fd,
                bus: Arc::clone(bus),
                shared: Arc::clone(&vcpus.shared),
                counters: Arc::clone(&counters),
                _memory: memory.clone(),
            };
            lock(&vcpus.shared.threads).live += 1;
            let thread = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(STACK)
                .spawn(move || {
                    VCPU.apply_or_abort();
                    vcpu.run();
                });
            match thread {
                Ok(thread) => vcpus.threads.push(thread),
                Err(error) => {
                    lock(&vcpus.shared.threads).live -= 1;
                    vcpus.stop();
                    return Err(error);
                }
            }
            vcpus.counters.push(counters);
        }
        Ok(vcpus)
    }

    /// Returns what becomes readable when the vCPUs have ended by themselves.
    #[must_use]
    pub fn ended(&self) -> &EventFd {
        &self.shared.ended
    }

    /// Returns why they ended.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        lock(&self.shared.end).clone()
    }

    /// Returns when the guest was entered for the first time.
    #[must_use]
    pub fn first_entry(&self) -> Option<Instant> {
        self.shared.first_entry.get().copied()
    }

    /// Returns the exits by reason, of all vCPUs.
    #[must_use]
    pub fn exits(&self) -> Vec<(String, u64)> {
        EXITS
            .iter()
            .enumerate()
            .map(|(index, name)| {
                let sum = self
                    .counters
                    .iter()
                    .map(|c| c.0[index].load(Ordering::Relaxed))
                    .sum();
                ((*name).to_owned(), sum)
            })
            .collect()
    }

    /// Has all vCPUs stand still. False: one of them does not come back.
    pub fn pause(&self) -> bool {
        self.command(PAUSE, PAUSE_TIMEOUT, |threads| {
            threads.parked == threads.live
        })
    }

    /// Gives each vCPU to `look`, with the first one first, while [`Vcpus::pause`] has them stand still.
    ///
    /// # Errors
    /// What `look` says; none: they don't stand still.
    pub fn look_at<T, E>(
        &self,
        mut look: impl FnMut(&VcpuFd) -> Result<T, E>,
    ) -> Result<Vec<T>, Option<E>> {
        let look = |fd: &Arc<Mutex<VcpuFd>>| look(&*try_lock(fd).ok_or(None)?).map_err(Some);
        self.fds.iter().map(look).collect()
    }

    /// Has them run again.
    pub fn resume(&self) {
        let _threads = lock(&self.shared.threads);
        self.shared.mode.store(RUN, Ordering::SeqCst);
        self.shared.changed.notify_all();
    }

    /// Ends all threads. False: one of them does not come back.
    pub fn stop(&self) -> bool {
        self.command(STOP, STOP_TIMEOUT, |threads| threads.live == 0)
    }

    fn command(&self, mode: u8, timeout: Duration, done: impl Fn(&Threads) -> bool) -> bool {
        let mut threads = lock(&self.shared.threads);
        self.shared.mode.store(mode, Ordering::SeqCst);
        self.shared.changed.notify_all();
        for thread in &self.threads {
            // A thread that ended already needs no signal.
            let _ = thread.kill(SIGRTMIN());
        }
        let deadline = Instant::now() + timeout;
        while !done(&threads) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            threads = self
                .shared
                .changed
                .wait_timeout(threads, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

struct Vcpu<B> {
    fd: Arc<Mutex<VcpuFd>>,
    bus: Arc<B>,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    _memory: Memory,
}

impl<B: Bus> Vcpu<B> {
    fn run(self) {
        let run = std::ptr::from_mut(lock(&self.fd).get_kvm_run());
        CURRENT.set(run);
        self.shared.first_entry.get_or_init(Instant::now);
        if let Some(end) = self.run_until_end() {
            self.shared.report(end);
        }
        CURRENT.set(std::ptr::null_mut());
        let mut threads = lock(&self.shared.threads);
        threads.live -= 1;
        self.shared.changed.notify_all();
    }

    /// Returns why the guest ended, or none when told to stop.
    fn run_until_end(&self) -> Option<End> {
        let mut fd = lock(&self.fd);
        loop {
            // In this order: a command given after the load comes with a signal that sets it again.
            fd.set_kvm_immediate_exit(0);
            let mode = self.shared.mode.load(Ordering::SeqCst);
            if mode == STOP {
                return None;
            }
            if mode == PAUSE {
                fd.set_kvm_immediate_exit(1);
            }
            match self.enter(&mut fd) {
                Step::Continue => {}
                Step::Interrupted if mode == PAUSE => {
                    drop(fd);
                    self.shared.park();
                    fd = lock(&self.fd);
                }
                Step::Interrupted => {}
                Step::End(end) => return Some(end),
            }
        }
    }

    fn enter(&self, fd: &mut VcpuFd) -> Step {
        let bus = &self.bus;
        let count = |exit: Exit| self.counters.0[exit as usize].fetch_add(1, Ordering::Relaxed);
        match fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(Exit::MmioRead);
                bus.mmio_read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(Exit::MmioWrite);
                bus.mmio_write(address, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(Exit::PioRead);
                bus.pio_read(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(Exit::PioWrite);
                if bus.pio_write(port, data) {
                    return Step::End(End::Shutdown("the guest asked for a reset"));
                }
            }
            Ok(VcpuExit::Hlt) => {
                // KVM keeps halted vCPUs to itself, so this is one of a KVM that can't.
                count(Exit::Hlt);
            }
            Ok(VcpuExit::Intr) => {
                count(Exit::Signal);
                return Step::Interrupted;
            }
            Ok(VcpuExit::Shutdown) => {
                count(Exit::Shutdown);
                return Step::End(End::Shutdown(
                    "the guest reset itself or died of a triple fault",
                ));
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                count(Exit::Shutdown);
                crate::log::note(&format!("KVM system event {kind}"));
                return Step::End(End::Shutdown(
                    "the guest asked KVM for a reset or power-off",
                ));
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                count(Exit::Other);
                return Step::End(End::Kvm(format!(
                    "KVM_EXIT_FAIL_ENTRY: hardware reason {reason:#x} on host CPU {cpu}"
                )));
            }
            Ok(VcpuExit::InternalError) => {
                count(Exit::Other);
                return Step::End(End::Kvm(internal_error(fd)));
            }
            Ok(exit) => {
                let exit = format!("unexpected exit from KVM: {exit:?}");
                count(Exit::Other);
                return Step::End(End::Kvm(exit));
            }
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                count(Exit::Signal);
                return if error.errno() == libc::EINTR {
                    Step::Interrupted
                } else {
                    Step::Continue
                };
            }
            Err(error) if error.errno() == libc::EFAULT => {
                return Step::End(End::Kvm(format!(
                    "KVM_RUN: {error}: the guest's memory can't be had: an image's file was cut or \
                     can't be read, or the host has no page for it"
                )));
            }
            Err(error) => return Step::End(End::Kvm(format!("KVM_RUN: {error}"))),
        }
        Step::Continue
    }
}

enum Step {
    Continue,
    /// The vCPU's state is complete and it is not in the guest.
    Interrupted,
    End(End),
}

fn internal_error(fd: &mut VcpuFd) -> String {
    // SAFETY: KVM fills this variant for the exit reason KVM_EXIT_INTERNAL_ERROR; any bit
    // pattern is a value of it.
    let (suberror, count, data) = unsafe {
        let internal = fd.get_kvm_run().__bindgen_anon_1.internal;
        (internal.suberror, internal.ndata, internal.data)
    };
    let meaning = match suberror {
        1 => "instruction emulation failed",
        2 => "simultaneous exceptions",
        3 => "exception while delivering an event",
        4 => "unexpected VM exit",
        _ => "unknown",
    };
    let mut text = format!("KVM_EXIT_INTERNAL_ERROR {suberror} ({meaning})");
    for word in data.iter().take(count as usize) {
        text.push_str(&format!(" {word:#x}"));
    }
    if let Ok(registers) = fd.get_regs() {
        text.push_str(&format!(", rip {:#x}", registers.rip));
    }
    text
}

thread_local! {
    /// The `kvm_run` of the vCPU that this thread runs.
    static CURRENT: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn on_signal(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let run = CURRENT.get();
    if !run.is_null() {
        // SAFETY: the pointer is set only while the thread has its `VcpuFd`, which owns the mapping,
        // or a share in it. The kernel and this thread are the only others to access the byte.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}

//! Hull's VMM: one process, one KVM virtual machine, one pod.
//!
//! Read in this order: [`machine`] (how a VM is put together), [`event_loop`] (the main thread: I/O and
//! answers to the daemon), [`kvm::vcpu`] (the threads that run the guest), [`slots`], [`service`]
//! and [`virtio`] (devices), [`windows`] (files as memory), then what a guest finds when it starts: [`layout`], [`boot`], [`legacy`].
//!
//! ```text
//!   daemon ── control socket ──▶ event loop ──▶ machine ──▶ slots ──▶ device   (block, net, …)
//!                                    ▲                        ▲         │
//!   taps, sockets, doorbells ────────┘        vCPU threads ───┘         ▼
//!                                                  ▲                  IOAPIC
//!                                                  └───── KVM ◀─────────┘ messages
//! ```
//!
//! Deliberately not here: PCI, ACPI, PIT, PIC, a keyboard; vhost-user and any other memory that is
//! shared with a second process; async runtimes; opening of files by name (the daemon sends
//! descriptors, so a VMM can be locked in).

pub mod boot;
pub mod control;
pub mod devices;
pub mod event_loop;
pub mod exit;
pub mod fds;
pub mod kvm;
pub mod layout;
pub mod legacy;
pub mod log;
pub mod machine;
pub mod memory;
pub mod probe;
pub mod service;
pub mod slots;
pub mod virtio;
pub mod windows;

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

/// Locks a mutex. A panic ends the process, so there is no poison to look at.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks, if nobody has the lock now.
pub(crate) fn try_lock<T: ?Sized>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Locks, if nobody keeps the lock for longer than it takes to handle a register or a short request.
pub(crate) fn lock_briefly<T: ?Sized>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    const TRIES: u32 = 100;
    const PAUSE: Duration = Duration::from_micros(100);
    (0..TRIES).find_map(|_| {
        let guard = try_lock(mutex);
        if guard.is_none() {
            thread::sleep(PAUSE);
        }
        guard
    })
}

//! Hull's VMM: one process, one KVM virtual machine, one pod.

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
pub mod slots;
pub mod virtio;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex. A panic ends the process, so there is no poison to look at.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

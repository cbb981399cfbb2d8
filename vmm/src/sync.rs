//! Locks, as all of the VMM takes them.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

/// Locks a mutex. A panic ends the process, so there is no poison to look at.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks, if nobody has the lock now.
pub fn try_lock<T: ?Sized>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Locks, if nobody keeps the lock for longer than it takes to handle a register or a short request.
pub fn lock_briefly<T: ?Sized>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
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

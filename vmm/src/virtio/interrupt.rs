//! How a device raises an interrupt.

use std::fmt::Debug;

/// The interrupt of one device.
pub trait Interrupt: Debug + Send + Sync {
    /// Tells the driver that a used ring changed.
    fn signal_queue(&self);
    /// Tells the driver that the configuration is `config` now.
    fn signal_config(&self, config: &[u8]);
    /// Lets the driver read that the configuration is `config` now, by what it asked for itself.
    fn show_config(&self, config: &[u8]);
}

/// An interrupt that only counts, for tests.
#[cfg(any(test, fuzzing))]
#[derive(Debug, Default)]
pub struct CountingInterrupt {
    /// Calls of [`Interrupt::signal_queue`].
    pub queue: std::sync::atomic::AtomicU64,
    /// Calls of [`Interrupt::signal_config`].
    pub config: std::sync::atomic::AtomicU64,
}

#[cfg(any(test, fuzzing))]
impl Interrupt for CountingInterrupt {
    fn signal_queue(&self) {
        self.queue.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }

    fn signal_config(&self, _: &[u8]) {
        self.config
            .fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }

    fn show_config(&self, _: &[u8]) {}
}

//! The guest's clocks in nanoseconds.

use std::io;

use nix::time::{ClockId, clock_gettime};

use crate::sys;

/// The largest difference that is mended by another pace of the clock, which takes ten seconds for it.
/// Programs then never see it run backward.
const SLEW_NS: u64 = 5_000_000;

/// Sets the time since the epoch `by_ns` forward, or back: at once when it is far off.
pub(crate) fn adjust_real(by_ns: i64) -> io::Result<()> {
    match by_ns.unsigned_abs() {
        0 => Ok(()),
        1..=SLEW_NS => sys::slew_clock(by_ns / 1000),
        _ => sys::step_clock(by_ns),
    }
}

/// Returns the time since the kernel started.
pub(crate) fn boot_ns() -> u64 {
    read(ClockId::CLOCK_BOOTTIME)
}

/// Returns the time since the epoch.
pub(crate) fn real_ns() -> u64 {
    read(ClockId::CLOCK_REALTIME)
}

fn read(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |t| {
        let seconds = u64::try_from(t.tv_sec()).unwrap_or(0);
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::try_from(t.tv_nsec()).unwrap_or(0))
    })
}

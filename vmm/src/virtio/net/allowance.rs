//! How often a driver may have the host change its end of the cable.
//!
//! What frames a tap may hand out and which of its queues take part are changed under a lock of the
//! host's kernel that all who set up networks need (RTNL), and whoever follows the tap's namespace is
//! told of it. So a change is made only if it is one, and a driver may have so many of them at once and
//! one more from time to time, of whichever kind. A driver of Linux needs two when it starts. One that
//! asks for more is told no, by an error of the command or by NEEDS_RESET: nothing waits for it.

use std::time::{Duration, Instant};

/// How many changes a driver may make at once.
const CHANGES: u32 = 8;
/// How long it waits for each one more.
const INTERVAL: Duration = Duration::from_secs(1);

/// What a driver may still change.
#[derive(Debug)]
pub(super) struct Allowance {
    left: u32,
    /// When the last one was added.
    filled: Instant,
}

impl Allowance {
    pub fn new(now: Instant) -> Self {
        Self {
            left: CHANGES,
            filled: now,
        }
    }

    /// Takes one. False: there is none.
    pub fn take(&mut self, now: Instant) -> bool {
        while self.left < CHANGES && now.duration_since(self.filled) >= INTERVAL {
            self.left += 1;
            self.filled += INTERVAL;
        }
        if self.left == CHANGES {
            self.filled = now;
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

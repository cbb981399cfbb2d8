//! A rate limit for what a driver has the host change at its end of the cable.
//!
//! What frames a tap may hand out and which of its queues take part are changed under a lock of the
//! host's kernel that all who set up networks need (RTNL), and whoever follows the tap's namespace is
//! told of it. So a change is made only if it is one, and a driver may have so many of them at once and
//! one more from time to time, of whichever kind. A driver of Linux needs two when it starts. One that
//! asks for more is told no, by an error of the command or by NEEDS_RESET: nothing waits for it.

use std::time::{Duration, Instant};

/// How many changes a driver may make at once.
const BURST: u32 = 8;
/// How long a driver waits for each further change.
const INTERVAL: Duration = Duration::from_secs(1);

/// The changes that a driver may still make: a token bucket.
#[derive(Debug)]
pub(super) struct RateLimit {
    tokens: u32,
    /// When the last token was added.
    refilled: Instant,
}

impl RateLimit {
    pub fn new(now: Instant) -> Self {
        Self {
            tokens: BURST,
            refilled: now,
        }
    }

    /// Takes a token. False: there is none.
    pub fn take(&mut self, now: Instant) -> bool {
        while self.tokens < BURST && now.duration_since(self.refilled) >= INTERVAL {
            self.tokens += 1;
            self.refilled += INTERVAL;
        }
        if self.tokens == BURST {
            self.refilled = now;
        }
        let may = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        may
    }
}

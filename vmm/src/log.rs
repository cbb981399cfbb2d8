//! What the VMM says on standard error, at a bounded rate: a guest must not fill the host's disk.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::sync::lock;

/// Lines allowed per [`PERIOD`].
const BURST: u32 = 20;
/// How long the allowed burst lasts.
const PERIOD: Duration = Duration::from_secs(60);
/// Lines allowed in all: the file is as old as the VM. How that ended is in the exit report.
const LINES: u32 = 2000;
/// Bytes of a line.
const LINE: usize = 500;

#[derive(Debug)]
struct RateLimit {
    since: Option<Instant>,
    used: u32,
    dropped: u64,
    /// Lines in all until now.
    lines: u32,
}

impl RateLimit {
    /// Tells whether a line may be written, and how many were not before it.
    fn take(&mut self, now: Instant) -> Option<u64> {
        if self
            .since
            .is_none_or(|since| now.duration_since(since) >= PERIOD)
        {
            self.since = Some(now);
            self.used = 0;
        }
        if self.used == BURST || self.lines == LINES {
            self.dropped += 1;
            return None;
        }
        self.used += 1;
        self.lines += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

static RATE_LIMIT: Mutex<RateLimit> = Mutex::new(RateLimit {
    since: None,
    used: 0,
    dropped: 0,
    lines: 0,
});

/// Writes a line, cut if it is long, or drops it when there were too many.
pub fn note(line: &str) {
    let line = cut(line);
    let dropped = lock(&RATE_LIMIT).take(Instant::now());
    let mut error = std::io::stderr().lock();
    // Nobody is left to tell when standard error is gone.
    let _ = match dropped {
        None => Ok(()),
        Some(0) => writeln!(error, "hull-vmm: {line}"),
        Some(dropped) => writeln!(
            error,
            "hull-vmm: {line} ({dropped} lines before it dropped)"
        ),
    };
}

/// Returns as much of a line as is written.
fn cut(line: &str) -> &str {
    line.get(..line.floor_char_boundary(LINE)).unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> RateLimit {
        RateLimit {
            since: None,
            used: 0,
            dropped: 0,
            lines: 0,
        }
    }

    #[test]
    fn a_flood_is_dropped_and_counted() {
        let mut limit = fresh();
        let start = Instant::now();
        assert_eq!(
            (0..100).filter(|_| limit.take(start).is_some()).count(),
            BURST as usize
        );
        assert_eq!(limit.take(start + PERIOD), Some(80));
        assert_eq!(limit.take(start + PERIOD), Some(0));
    }

    #[test]
    fn a_flood_without_end_fills_no_disk() {
        let mut limit = fresh();
        let start = Instant::now();
        let written = (0..1_000_000)
            .filter(|second| {
                let now = start + Duration::from_secs(*second);
                limit.take(now).is_some()
            })
            .count();
        assert_eq!(written, LINES as usize);
        assert_eq!(cut("short"), "short");
        let long = "\u{e9}".repeat(LINE);
        assert!((LINE - 1..=LINE).contains(&cut(&long).len()));
    }
}

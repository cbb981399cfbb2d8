//! What a guest may keep of a file between two times that it opens it (FOPEN_KEEP_CACHE).
//!
//! A guest's kernel drops what it has of a file whenever a process opens it, also what others use that
//! have it open, unless it is told not to. It is told so if the file's change time (ctime: not even
//! its owner can set it) is that of the last time, and was by then too old for another change within
//! the same tick of the file system's clock. What is written on the host through a mapping has no
//! time of its own: it is seen when the host's kernel writes it back, as on a network file system.
//!
//! What was asked last is remembered for as long as the guest knows the file: it keeps what it read of a
//! closed file too, until it wants the memory for something else.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Ticks of all file systems are shorter: FAT's are of two seconds.
const TICK: Duration = Duration::from_secs(3);

/// When a file was changed last, since the epoch.
pub type ChangeTime = Duration;

/// Whether a file that changed at `changed` is what it was when this was asked last, which `last`
/// remembers.
pub fn is_same(
    last: &mut Option<ChangeTime>,
    changed: Option<ChangeTime>,
    now: SystemTime,
) -> bool {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    // A time to come is that of another machine's clock, or one that was set back.
    let settled = changed.filter(|at| now.checked_sub(*at).is_some_and(|age| age >= TICK));
    std::mem::replace(last, settled) == settled && settled.is_some()
}

/// Reads a file's change time; none before the epoch.
pub fn change_time(attributes: &libc::stat64) -> Option<ChangeTime> {
    let seconds = u64::try_from(attributes.st_ctime).ok()?;
    let nanoseconds = u32::try_from(attributes.st_ctime_nsec).ok()?;
    Some(Duration::new(seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_kept_once_its_change_is_older_than_a_tick() {
        let mut last = None;
        let second = |count| Duration::from_secs(count);
        let mut ask = |changed: Option<u64>, now| {
            is_same(&mut last, changed.map(second), UNIX_EPOCH + second(now))
        };
        assert!(!ask(Some(100), 101), "never seen, and new");
        assert!(
            !ask(Some(100), 110),
            "it may have changed within a tick of the last time"
        );
        assert!(ask(Some(100), 110));
        assert!(!ask(Some(120), 130), "changed since");
        assert!(ask(Some(120), 131));
        assert!(!ask(Some(131), 131), "changed just now");
        assert!(!ask(Some(131), 140));
        assert!(!ask(Some(1000), 140), "a time to come");
        assert!(!ask(Some(1000), 140));
        assert!(!ask(None, 140), "no time at all");
        assert!(!ask(Some(100), 140));
        assert!(ask(Some(100), 140));
    }
}

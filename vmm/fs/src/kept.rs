//! What a guest may keep of a file between two times that it opens it (FOPEN_KEEP_CACHE).
//!
//! A guest's kernel drops what it has of a file whenever a process opens it, also what others use that
//! have it open, unless it is told not to. It is told so if the file's change time (ctime: not even
//! its owner can set it) is that of the last time, and was by then too old for another change within
//! the same tick of the file system's clock. What is written on the host through a mapping has no
//! time of its own: it is seen when the host's kernel writes it back, as on a network file system.
//!
//! A file that nobody has open is read anew: with entries that are not to be believed (see
//! [`crate::files`]) the guest lets go of it. If it did not, this server would hold it open, and
//! what the host deletes would occupy the host's disk until the pod ends.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::api::Vfs;
use fuse_backend_rs::api::filesystem::{Context, FileSystem};

use crate::filter::{double_word, word};

/// Ticks of all file systems are shorter: FAT's are of two seconds.
const TICK: Duration = Duration::from_secs(3);
/// FOPEN_KEEP_CACHE of `fuse_open_out`.
const KEEP_CACHE: u32 = 1 << 1;
/// Where the answer to FUSE_OPEN has its flags.
const OPEN_FLAGS: usize = 16 + 8;

/// When a file was changed last, since the epoch.
type ChangeTime = Duration;

/// The change times of files when they were opened last, by node. There are no more than the file
/// systems have nodes.
#[derive(Debug, Default)]
pub struct Kept(Mutex<HashMap<u64, ChangeTime>>);

impl Kept {
    /// Forgets all.
    pub fn clear(&self) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *times = HashMap::new();
    }

    /// Adds to the answer to a request, which opened a file, that the guest may keep what it has of it.
    pub fn tell(&self, vfs: &Vfs, request: &[u8], answer: &mut [u8]) {
        let (Some(0), Some(flags), Some(node)) = (
            word(answer, 4),
            word(answer, OPEN_FLAGS),
            double_word(request, 16),
        ) else {
            return;
        };
        if self.is_same(node, change_time(vfs, node), SystemTime::now()) {
            let flags = flags | KEEP_CACHE;
            answer[OPEN_FLAGS..OPEN_FLAGS + 4].copy_from_slice(&flags.to_le_bytes());
        }
    }

    /// Whether a file is what it was when this was asked last.
    fn is_same(&self, node: u64, changed: Option<ChangeTime>, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        // A time to come is that of another machine's clock, or one that was set back.
        let settled = changed.filter(|at| now.checked_sub(*at).is_some_and(|age| age >= TICK));
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match settled {
            Some(at) => times.insert(node, at) == Some(at),
            None => {
                times.remove(&node);
                false
            }
        }
    }
}

fn change_time(vfs: &Vfs, node: u64) -> Option<ChangeTime> {
    let (attributes, _) = vfs.getattr(&Context::default(), node.into(), None).ok()?;
    let seconds = u64::try_from(attributes.st_ctime).ok()?;
    let nanoseconds = u32::try_from(attributes.st_ctime_nsec).ok()?;
    Some(Duration::new(seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_kept_once_its_change_is_older_than_a_tick() {
        let kept = Kept::default();
        let second = |count| Duration::from_secs(count);
        let ask = |changed: Option<u64>, now| {
            kept.is_same(1, changed.map(second), UNIX_EPOCH + second(now))
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
        assert!(!kept.is_same(2, Some(second(100)), UNIX_EPOCH + second(140)));
        kept.clear();
        assert!(!ask(Some(100), 140));
    }
}

//! How long a guest may believe what it was told of files, and what becomes of changes meanwhile.
//!
//! Entries and attributes have a life of a second, as virtiofsd gives them by default (`cache=auto`);
//! that there is no file of a name is not believed at all. So a walk of a path that was walked just now
//! asks nothing, a file that is listed needs no lookup (FUSE_READDIRPLUS), and a file that is closed
//! stays in the guest's page cache. What the guest changes it knows at once, what the host changes
//! within that second. Listings are not cached (FOPEN_CACHE_DIR): one that is asked for again renews
//! the life of all that it lists, a cached one would have each of them looked up by itself.
//!
//! Who opens a file sees all that was there when it was opened (close-to-open). A guest that opens a
//! file within that second asks for no attributes, and would read with the size of before, or open a
//! file that another has replaced. So the server remembers which version of a file it told of, and
//! refuses to open another (ESTALE). The guest's kernel then walks the path once more and believes
//! nothing on the way: it opens the file that is there, with its attributes.

use std::time::{Duration, Instant};

use crate::keep_cache::ChangeTime;

/// The life of an entry, and that of attributes.
pub const LIFE: Duration = Duration::from_secs(1);
/// When it has surely ended: in the guest it begins when the answer arrives.
const OVER: Duration = Duration::from_secs(3);

/// What tells two versions of a file apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// When it was changed last. Its name's end is a change, too.
    pub changed: Option<ChangeTime>,
    /// Its size, in bytes.
    pub size: i64,
}

/// The version of a file that a guest was told of, and when.
#[derive(Debug)]
pub struct Told {
    version: Version,
    at: Instant,
}

impl Told {
    /// Tells of a version now.
    #[must_use]
    pub fn now(version: Version) -> Self {
        let at = Instant::now();
        Self { version, at }
    }

    /// Whether a guest may still believe in this version, though it is another by now.
    #[must_use]
    pub fn belies(&self, version: Version) -> bool {
        self.version != version && self.at.elapsed() < OVER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_believed_in_for_its_life() {
        let version = |seconds, size| Version {
            changed: Some(Duration::from_secs(seconds)),
            size,
        };
        let told = Told::now(version(5, 7));
        assert!(!told.belies(version(5, 7)));
        assert!(told.belies(version(6, 7)));
        assert!(told.belies(version(5, 8)));
        let Some(at) = told.at.checked_sub(OVER) else {
            return;
        };
        assert!(!Told { at, ..told }.belies(version(6, 8)));
    }
}

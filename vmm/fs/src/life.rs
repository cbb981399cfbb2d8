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
//! nothing on the way: it opens the file that is there, with its attributes. It tries no third time, so
//! the second is let pass, whatever the file has become meanwhile.

use std::time::{Duration, Instant};

use crate::keep_cache::ChangeTime;

/// The life of an entry, and that of attributes.
pub const LIFE: Duration = Duration::from_secs(1);
/// When it has surely ended: in the guest it begins when the answer arrives.
const OVER: Duration = Duration::from_secs(3);

/// When a guest that was told of a version has just come to open it. Far longer than that takes, and too
/// short for the host to tell the guest by another way that there is another.
const FRESH: Duration = Duration::from_millis(10);

/// What tells two versions of a file apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// When it was changed last. Its name's end is a change, too.
    pub changed: Option<ChangeTime>,
    /// Its size, in bytes.
    pub size: i64,
}

/// What a guest believes of a file, as far as it matters to who opens it.
#[derive(Debug, Default)]
pub struct Belief {
    /// The version that it was told of last, and when.
    told: Option<(Version, Instant)>,
    /// When it was last refused to open another.
    refused: Option<Instant>,
    /// How many of those that were refused have not come back.
    owed: u32,
}

impl Belief {
    /// Notes which version the guest is told of; none if it changes the file itself.
    pub fn tell(&mut self, version: Option<Version>, now: Instant) {
        self.told = version.map(|version| (version, now));
    }

    /// Whether the guest is to be refused to open this version, because it may believe in another. Who
    /// comes back is not refused again: a file that the host goes on changing may be another each time.
    pub fn refuses(&mut self, version: Version, now: Instant) -> bool {
        let age = |at| now.saturating_duration_since(at);
        let refused = self.refused.filter(|at| age(*at) < OVER);
        let Some((told, at)) = self.told.filter(|(_, at)| age(*at) < OVER) else {
            return false;
        };
        if refused.is_none() {
            self.owed = 0;
        }
        let may_be_back = self.owed > 0 && refused.is_some_and(|refused| refused <= at);
        if may_be_back {
            self.owed -= 1;
        }
        let refuses = told != version && !may_be_back && age(at) >= FRESH;
        if refuses {
            self.refused = Some(now);
            self.owed = self.owed.saturating_add(1);
        }
        refuses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_millis(50);

    fn version(seconds: u64, size: i64) -> Version {
        let changed = Some(Duration::from_secs(seconds));
        Version { changed, size }
    }

    #[test]
    fn another_version_is_refused_while_one_is_believed_in() {
        let begin = Instant::now();
        for (told, opened, age, expected) in [
            (Some(version(5, 7)), version(5, 7), MOMENT, false),
            (Some(version(5, 7)), version(6, 7), MOMENT, true),
            (Some(version(5, 7)), version(5, 8), MOMENT, true),
            (Some(version(5, 7)), version(5, 8), LIFE, true),
            (Some(version(5, 7)), version(5, 8), OVER, false),
            (Some(version(5, 7)), version(5, 8), FRESH / 2, false),
            (None, version(5, 7), MOMENT, false),
        ] {
            let mut belief = Belief::default();
            belief.tell(told, begin);
            let refuses = belief.refuses(opened, begin + age);
            assert_eq!(refuses, expected, "{told:?} {opened:?} {age:?}");
        }
    }

    #[test]
    fn who_was_refused_is_not_refused_again() {
        let mut belief = Belief::default();
        let mut now = Instant::now();
        let mut size = 0;
        // The file is another each time that somebody looks.
        let mut next = |later: Duration| {
            (now, size) = (now + later, size + 1);
            (version(5, size), now)
        };
        for _ in 0..3 {
            let (told, at) = next(MOMENT);
            belief.tell(Some(told), at);
            for _ in 0..2 {
                let (opened, at) = next(MOMENT);
                assert!(belief.refuses(opened, at));
            }
            for _ in 0..2 {
                let (told, at) = next(MOMENT);
                belief.tell(Some(told), at);
            }
            for refuses in [false, false, true] {
                let (opened, at) = next(MOMENT);
                assert_eq!(belief.refuses(opened, at), refuses);
            }
            // The last never comes back.
            let (told, at) = next(OVER);
            belief.tell(Some(told), at);
            let (opened, at) = next(MOMENT);
            assert!(belief.refuses(opened, at));
            next(OVER);
        }
    }
}

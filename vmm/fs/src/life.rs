//! How long a guest may believe what it was told of files, and what becomes of changes meanwhile.
//!
//! Entries and attributes have a life of a second, as virtiofsd gives them by default (`cache=auto`);
//! that there is no file of a name is not believed at all. So a walk of a path that was walked just now
//! asks nothing, a file that is listed needs no lookup (FUSE_READDIRPLUS), and a file that is closed
//! stays in the guest's page cache. What the guest changes it knows at once, what the host changes
//! within that second. Listings are not cached (FOPEN_CACHE_DIR): one that is asked for again renews
//! the life of all that it lists, a cached one would have each of them looked up by itself.
//!
//! What only the pod itself changes it may believe for a minute, also that there is no file of a name, and
//! what a directory lists: volumes of a pod that no other has ([`crate::private`]). For as long as the pod
//! has it would be too long, as there is no way to tell a guest that another pod has the volume, too.
//!
//! Who opens a file sees all that was there when it was opened (close-to-open). A guest that opens a
//! file within that time asks for no attributes, and would read with the size of before, or open a
//! file that another has replaced. So the server remembers which version of a file it told of, and
//! refuses to open another (ESTALE). The guest's kernel then walks the path once more and believes
//! nothing on the way: it opens the file that is there, with its attributes. It tries no third time, so
//! the second is let pass, whatever the file has become meanwhile.

use std::time::{Duration, Instant};

use crate::keep_cache::ChangeTime;

/// The life of an entry, and that of attributes.
pub const LIFE: Duration = Duration::from_secs(1);
/// The same in a volume that no other pod has.
pub const PRIVATE_LIFE: Duration = Duration::from_secs(60);
/// How long after it a life has surely ended: in the guest it begins when the answer arrives.
const MARGIN: Duration = Duration::from_secs(2);
/// How long a guest that was refused takes at most to come back.
const BACK: Duration = Duration::from_secs(3);

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
    /// The version that it was told of last, when, and when it surely believes in it no more.
    told: Option<(Version, Instant, Instant)>,
    /// When it was last refused to open another.
    refused: Option<Instant>,
    /// How many of those that were refused have not come back.
    owed: u32,
}

impl Belief {
    /// Notes which version the guest is told of, and for how long it may believe that.
    pub fn tell(&mut self, version: Version, life: Duration, now: Instant) {
        self.told = Some((version, now, now + life + MARGIN));
    }

    /// Notes that the guest changes the file itself.
    pub fn change(&mut self) {
        self.told = None;
    }

    /// Whether the guest was refused to open a version just now, and may be back.
    pub fn was_refused(&self, now: Instant) -> bool {
        let age = |at| now.saturating_duration_since(at);
        self.refused.is_some_and(|at| age(at) < BACK)
    }

    /// Whether the guest is to be refused to open this version, because it may believe in another. Who
    /// comes back is not refused again: a file that the host goes on changing may be another each time.
    pub fn refuses(&mut self, version: Version, now: Instant) -> bool {
        let age = |at| now.saturating_duration_since(at);
        let refused = self.refused.filter(|at| age(*at) < BACK);
        let Some((told, at, _)) = self.told.filter(|(_, _, over)| now < *over) else {
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
    const OVER: Duration = Duration::from_secs(3);

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
            belief.tell(version(4, 7), LIFE, begin);
            match told {
                Some(told) => belief.tell(told, LIFE, begin),
                None => belief.change(),
            }
            let refuses = belief.refuses(opened, begin + age);
            assert_eq!(refuses, expected, "{told:?} {opened:?} {age:?}");
            assert_eq!(belief.was_refused(begin + age + MOMENT), expected);
            assert!(!belief.was_refused(begin + age + BACK));
        }
        let mut belief = Belief::default();
        belief.tell(version(5, 7), PRIVATE_LIFE, begin);
        assert!(belief.refuses(version(6, 7), begin + PRIVATE_LIFE));
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
            belief.tell(told, LIFE, at);
            for _ in 0..2 {
                let (opened, at) = next(MOMENT);
                assert!(belief.refuses(opened, at));
            }
            for _ in 0..2 {
                let (told, at) = next(MOMENT);
                belief.tell(told, LIFE, at);
            }
            for refuses in [false, false, true] {
                let (opened, at) = next(MOMENT);
                assert_eq!(belief.refuses(opened, at), refuses);
            }
            // The last never comes back.
            let (told, at) = next(OVER);
            belief.tell(told, LIFE, at);
            let (opened, at) = next(MOMENT);
            assert!(belief.refuses(opened, at));
            next(OVER);
        }
    }
}

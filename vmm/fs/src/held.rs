//! What a guest holds of a share, and how much of it there may be.
//!
//! A file that the guest's kernel knows is a descriptor of this process until that kernel forgets it
//! (FUSE_FORGET), and so is one that it has open until it is released. All shares of a pod have them
//! from one process, which has so many and no more. So none gets more of them than are left for the
//! others: then the guest is refused (ENFILE), and the other shares go on.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::keep_cache::{self, ChangeTime};

/// A number of files that all shares of a server have together.
#[derive(Debug)]
pub struct Budget {
    total: u64,
    taken: AtomicU64,
}

impl Budget {
    /// Creates a budget of `total` files.
    #[must_use]
    pub fn new(total: u64) -> Arc<Self> {
        let taken = AtomicU64::new(0);
        Arc::new(Self { total, taken })
    }
}

/// A share's part of a budget, which is given back when this is dropped.
#[derive(Debug)]
struct Part {
    budget: Arc<Budget>,
    taken: u64,
}

impl Part {
    fn new(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Arc::clone(budget),
            taken: 0,
        }
    }

    /// Whether one more leaves as many for the others. Threads that ask at the same time may take one
    /// too many each.
    fn has_room(&self) -> bool {
        let taken = self.budget.taken.load(Ordering::Relaxed);
        self.taken < self.budget.total.saturating_sub(taken)
    }

    fn take(&mut self, count: u64) {
        self.taken = self.taken.saturating_add(count);
        self.budget.taken.fetch_add(count, Ordering::Relaxed);
    }

    fn give_back(&mut self, count: u64) {
        let count = count.min(self.taken);
        self.taken -= count;
        self.budget.taken.fetch_sub(count, Ordering::Relaxed);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.give_back(self.taken);
    }
}

/// How a share's file system numbers what it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// By the host's inode numbers. Nothing is kept of a file that is forgotten.
    Hosts,
    /// By counting, with the same number when a forgotten file is looked up again: the file system
    /// remembers each file that it ever saw.
    Own,
}

/// A file that the guest knows.
#[derive(Debug, Default)]
struct Node {
    /// How many times the guest was told of the file, less how many times it forgot it.
    lookups: u64,
    /// See [`keep_cache`].
    changed: Option<ChangeTime>,
}

#[derive(Debug)]
struct State {
    nodes: HashMap<u64, Node>,
    /// Files that are known, and files that are open.
    files: Part,
    /// Numbers that the file system remembers.
    numbers: Part,
}

/// What the guest holds of a share.
///
/// With threads that serve it at once, a count may be higher than what the file system has, never
/// lower: what is looked up or opened is counted after the file system did it, what is forgotten
/// before.
#[derive(Debug)]
pub struct Held {
    numbering: Numbers,
    state: Mutex<State>,
}

impl Held {
    /// Creates the count of a share of which the guest holds nothing.
    #[must_use]
    pub fn new(numbering: Numbers, files: &Arc<Budget>, numbers: &Arc<Budget>) -> Self {
        let state = State {
            nodes: HashMap::new(),
            files: Part::new(files),
            numbers: Part::new(numbers),
        };
        Self {
            numbering,
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for room for one more file.
    ///
    /// # Errors
    /// ENFILE: there is none.
    pub fn room(&self) -> io::Result<()> {
        let state = self.state();
        if state.files.has_room() && state.numbers.has_room() {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ENFILE))
        }
    }

    /// Notes a file's number that the file system came across.
    pub fn saw(&self, number: u64) {
        if self.numbering == Numbers::Own {
            let numbers = &mut self.state().numbers;
            numbers.take(number.saturating_sub(numbers.taken));
        }
    }

    /// Notes that the guest was told of a file.
    pub fn looked_up(&self, number: u64) {
        self.saw(number);
        let state = &mut *self.state();
        let node = state.nodes.entry(number).or_default();
        if node.lookups == 0 {
            state.files.take(1);
        }
        node.lookups = node.lookups.saturating_add(1);
    }

    /// Notes that the guest forgot a file so many times.
    pub fn forgotten(&self, number: u64, count: u64) {
        let state = &mut *self.state();
        if let Some(node) = state.nodes.get_mut(&number) {
            node.lookups = node.lookups.saturating_sub(count);
            if node.lookups == 0 {
                state.nodes.remove(&number);
                state.files.give_back(1);
            }
        }
    }

    /// Notes that a file was opened.
    pub fn opened(&self) {
        self.state().files.take(1);
    }

    /// Notes that an open file was released.
    pub fn released(&self) {
        self.state().files.give_back(1);
    }

    /// Whether the guest may keep what it has of a file that it opens, see [`keep_cache`].
    pub fn keeps(&self, number: u64, changed: Option<ChangeTime>, now: SystemTime) -> bool {
        let mut state = self.state();
        let node = state.nodes.get_mut(&number);
        node.is_some_and(|node| keep_cache::is_same(&mut node.changed, changed, now))
    }

    /// Notes that the guest holds nothing any more.
    pub fn clear(&self) {
        let state = &mut *self.state();
        state.nodes = HashMap::new();
        state.files.give_back(u64::MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn held(files: &Arc<Budget>) -> Held {
        Held::new(Numbers::Hosts, files, &Budget::new(10))
    }

    /// Looks up new files until it is refused; returns how many those were.
    fn fill(held: &Held, from: u64) -> u64 {
        (from..from + 1000)
            .take_while(|number| held.room().map(|()| held.looked_up(*number)).is_ok())
            .count() as u64
    }

    #[test]
    fn a_share_gets_no_more_than_is_left_for_others() {
        let files = Budget::new(100);
        let (first, second) = (held(&files), held(&files));
        assert_eq!(fill(&first, 1), 50);
        assert_eq!(first.room().unwrap_err().raw_os_error(), Some(libc::ENFILE));
        assert_eq!(fill(&second, 1), 25);
        let third = held(&files);
        assert!(third.room().is_ok());
        drop((second, third));
        assert_eq!(fill(&held(&files), 1), 25, "what a share had goes with it");
        first.clear();
        assert_eq!(fill(&held(&files), 1), 50);
    }

    #[test]
    fn a_file_is_one_however_often_it_is_looked_up_until_that_often_forgotten() {
        let files = Budget::new(10);
        let held = held(&files);
        let taken = || files.taken.load(Ordering::Relaxed);
        for _ in 0..3 {
            held.looked_up(7);
        }
        held.opened();
        assert_eq!(taken(), 2);
        held.forgotten(7, 2);
        held.forgotten(8, 1);
        assert_eq!(taken(), 2);
        held.forgotten(7, u64::MAX);
        held.forgotten(7, 1);
        assert_eq!(taken(), 1);
        held.released();
        held.released();
        assert_eq!(taken(), 0);
        assert!(held.state().nodes.is_empty());
    }

    #[test]
    fn numbers_that_are_remembered_are_bounded() {
        let (files, numbers) = (Budget::new(1000), Budget::new(10));
        let (own, hosts) = (Numbers::Own, Numbers::Hosts);
        let [own, hosts] = [own, hosts].map(|kind| Held::new(kind, &files, &numbers));
        for number in [2, 3, 4, 3, 5] {
            own.room().unwrap();
            own.looked_up(number);
            own.forgotten(number, 1);
            hosts.looked_up(number << 47);
        }
        assert!(own.room().is_err());
        // A new session has the same numbers.
        own.clear();
        assert!(own.room().is_err());
        assert!(hosts.room().is_ok());
    }

    #[test]
    fn nothing_is_kept_of_a_file_that_was_forgotten() {
        let held = held(&Budget::new(10));
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let changed = Some(Duration::from_secs(1));
        assert!(!held.keeps(7, changed, now), "it is not known");
        held.looked_up(7);
        assert!(!held.keeps(7, changed, now));
        assert!(held.keeps(7, changed, now));
        held.forgotten(7, 1);
        held.looked_up(7);
        assert!(!held.keeps(7, changed, now));
    }
}

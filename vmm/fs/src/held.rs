//! What a guest holds of a share, and how much of it there may be.
//!
//! A file that the guest's kernel knows is a descriptor of this process until that kernel forgets it
//! (FUSE_FORGET), and so is one that it has open until it is released. All shares of a pod have them
//! from one process, which has so many and no more. So none gets more of them than are left for the
//! others: then the guest is refused (ENFILE), and the other shares go on.
//!
//! A guest keeps entries that it may believe for a while ([`crate::life`]), and with them their files,
//! until it wants the memory for something else. So only the first [`KEPT`] get such a life, and a file
//! that the host deleted is let go of here without the guest ([`Held::let_go`]): its descriptor is
//! closed, the disk has its space again, and who asks for it by its number is told that it is stale.
//! The number is remembered until the guest forgets it. A new file that gets it meanwhile is another
//! generation, by which the guest tells them apart.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::keep_cache::{self, ChangeTime};
use crate::life::{Belief, Version};

/// Files that all shares together may have before no more of them get a life in the guest. Each pins an
/// inode of the host's kernel, some 2 KiB in all.
const KEPT: u64 = 32 << 10;

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

    /// Whether so little is taken that guests may keep more than they use.
    fn is_plenty(&self) -> bool {
        self.taken.load(Ordering::Relaxed) <= KEPT.min(self.total / 4)
    }
}

/// What all shares of a server have together.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Files that guests know or have open.
    pub files: Arc<Budget>,
    /// Numbers of files that the file systems remember, see [`Numbers::Own`].
    pub numbers: Arc<Budget>,
    /// Files that were let go of, and that the guest did not forget yet.
    pub gone: Arc<Budget>,
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

/// What a file is to its share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Kind {
    /// The share itself. Containers have it mounted and do not look it up again: it gets no life, and
    /// is never let go of.
    Share,
    /// A directory. It has little space to give back, and may be where a process is: it is never let go
    /// of.
    Directory,
    /// All else.
    #[default]
    File,
}

/// A file that the guest knows.
#[derive(Debug, Default)]
struct Node {
    /// How many times the guest was told of the file, less how many times it forgot it.
    lookups: u64,
    /// The part of those that the file system counts: the rest is of files that had this number before.
    served: u64,
    /// How many files had this number before, of which the guest still knew when it got this one.
    generation: u64,
    /// How many times the file is open.
    open: u64,
    kind: Kind,
    /// See [`keep_cache`].
    changed: Option<ChangeTime>,
    /// See [`crate::life`].
    belief: Belief,
}

impl Node {
    /// Whether it could be let go of.
    fn is_idle(&self) -> bool {
        self.open == 0 && self.kind == Kind::File
    }
}

/// An open file or directory, as it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// The file's number.
    pub number: u64,
    /// Of open(2).
    pub flags: u32,
    /// Whether it is a directory.
    pub directory: bool,
}

/// A file that was let go of.
#[derive(Debug)]
struct Gone {
    /// As [`Node::lookups`].
    lookups: u64,
    /// That of the next file of this number.
    generation: u64,
}

#[derive(Debug)]
struct State {
    nodes: HashMap<u64, Node>,
    gone: HashMap<u64, Gone>,
    /// By their handles.
    open: HashMap<u64, Open>,
    /// Files that are known, and files that are open.
    files: Part,
    /// Numbers that the file system remembers.
    numbers: Part,
    /// As many as `gone` has.
    let_go: Part,
}

/// What a guest is to be told of a file that it comes to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Tells the file from others that had its number.
    pub generation: u64,
    /// Whether the guest may believe in the entry for a while.
    pub lives: bool,
}

/// What the guest holds of a share.
///
/// With threads that serve it at once, a count may be higher than what the file system has, never
/// lower: what is looked up is counted after the file system did it, what is forgotten before, and what
/// is opened before.
#[derive(Debug)]
pub struct Held {
    numbering: Numbers,
    state: Mutex<State>,
}

impl Held {
    /// Creates the count of a share of which the guest holds nothing.
    #[must_use]
    pub fn new(numbering: Numbers, limits: &Limits) -> Self {
        let state = State {
            nodes: HashMap::new(),
            gone: HashMap::new(),
            open: HashMap::new(),
            files: Part::new(&limits.files),
            numbers: Part::new(&limits.numbers),
            let_go: Part::new(&limits.gone),
        };
        Self {
            numbering,
            state: Mutex::new(state),
        }
    }

    /// How the file system numbers its files.
    #[must_use]
    pub fn numbering(&self) -> Numbers {
        self.numbering
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
        let parts = [&state.files, &state.numbers, &state.let_go];
        if parts.into_iter().all(Part::has_room) {
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

    /// Notes that the guest is told of a file, of which version of it, and for how long it may believe that.
    pub fn looked_up(&self, number: u64, version: Version, life: Duration, kind: Kind) -> Known {
        self.saw(number);
        let state = &mut *self.state();
        let is_new = !state.nodes.contains_key(&number);
        let node = state.nodes.entry(number).or_default();
        let lives = kind != Kind::Share && (!is_new || state.files.budget.is_plenty());
        if is_new {
            state.files.take(1);
            if let Some(before) = state.gone.remove(&number) {
                state.let_go.give_back(1);
                (node.lookups, node.generation) = (before.lookups, before.generation);
            }
        }
        node.lookups = node.lookups.saturating_add(1);
        node.served = node.served.saturating_add(1);
        node.kind = kind;
        node.belief.tell(version, life, Instant::now());
        Known {
            generation: node.generation,
            lives,
        }
    }

    /// Notes that the guest forgot a file so many times. Returns how many times the file system is to
    /// forget it: no sooner than all that the guest still knows can be of files that were let go of.
    #[must_use]
    pub fn forgotten(&self, number: u64, count: u64) -> u64 {
        let state = &mut *self.state();
        if let Some(gone) = state.gone.get_mut(&number) {
            gone.lookups = gone.lookups.saturating_sub(count);
            if gone.lookups == 0 {
                state.gone.remove(&number);
                state.let_go.give_back(1);
            }
            return 0;
        }
        let Some(node) = state.nodes.get_mut(&number) else {
            return 0;
        };
        node.lookups = node.lookups.saturating_sub(count);
        let forgotten = node.served.saturating_sub(node.lookups);
        node.served -= forgotten;
        if node.lookups == 0 {
            state.nodes.remove(&number);
            state.files.give_back(1);
        }
        forgotten
    }

    /// Takes back one [`Held::looked_up`] that the guest is not told of, and that the file system takes
    /// back itself.
    pub fn not_told(&self, number: u64) {
        let state = &mut *self.state();
        if let Some(node) = state.nodes.get_mut(&number) {
            node.lookups = node.lookups.saturating_sub(1);
            node.served = node.served.saturating_sub(1);
            if node.lookups == 0 {
                state.nodes.remove(&number);
                state.files.give_back(1);
            }
        }
    }

    /// Asks for room to open a file, and takes it: to be given back with [`Held::released`], or
    /// [`Held::not_opened`].
    ///
    /// # Errors
    /// ENFILE: there is none. ESTALE: the file was let go of.
    pub fn opening(&self, number: u64) -> io::Result<()> {
        self.room()?;
        let state = &mut *self.state();
        if state.gone.contains_key(&number) {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        if let Some(node) = state.nodes.get_mut(&number) {
            node.open = node.open.saturating_add(1);
        }
        state.files.take(1);
        Ok(())
    }

    /// Notes by which handle a file is open.
    pub fn opened(&self, handle: Option<u64>, open: Open) {
        if let Some(handle) = handle {
            self.state().open.insert(handle, open);
        }
    }

    /// Notes that an open file was released.
    pub fn released(&self, handle: u64, number: u64) {
        self.state().open.remove(&handle);
        self.not_opened(number);
    }

    /// Notes that a file could not be opened.
    pub fn not_opened(&self, number: u64) {
        let state = &mut *self.state();
        if let Some(node) = state.nodes.get_mut(&number) {
            node.open = node.open.saturating_sub(1);
        }
        state.files.give_back(1);
    }

    /// Notes that a file was made, of which the guest is told, and that it is open.
    pub fn created(&self, number: u64, version: Version, life: Duration) -> Known {
        let known = self.looked_up(number, version, life, Kind::File);
        // It is the guest's, whatever is left.
        let state = &mut *self.state();
        if let Some(node) = state.nodes.get_mut(&number) {
            node.open = node.open.saturating_add(1);
        }
        state.files.take(1);
        known
    }

    /// All files that the guest knows: their numbers, generations, and how many times it was told of them.
    #[must_use]
    pub fn known(&self) -> Vec<(u64, u64, u64)> {
        let state = self.state();
        let nodes = state.nodes.iter();
        let known = nodes.map(|(number, node)| (*number, node.generation, node.lookups));
        known.collect()
    }

    /// All files that are open, by their handles.
    #[must_use]
    pub fn all_open(&self) -> Vec<(u64, Open)> {
        let state = self.state();
        state
            .open
            .iter()
            .map(|(handle, open)| (*handle, *open))
            .collect()
    }

    /// Whether a file was let go of.
    #[must_use]
    pub fn is_gone(&self, number: u64) -> bool {
        self.state().gone.contains_key(&number)
    }

    /// The files that could be let go of: nobody has them open.
    #[must_use]
    pub fn idle(&self) -> Vec<u64> {
        let state = self.state();
        let idle = state.nodes.iter().filter(|(_, node)| node.is_idle());
        idle.map(|(number, _)| *number).collect()
    }

    /// Lets go of a file that was deleted, unless it is in use by now. Returns how many times the file
    /// system is to forget it.
    #[must_use]
    pub fn let_go(&self, number: u64) -> u64 {
        let state = &mut *self.state();
        let node = state.nodes.get(&number).filter(|node| node.is_idle());
        let Some(node) = node else {
            return 0;
        };
        let gone = Gone {
            lookups: node.lookups,
            generation: node.generation.wrapping_add(1),
        };
        let served = node.served;
        state.nodes.remove(&number);
        state.files.give_back(1);
        state.gone.insert(number, gone);
        state.let_go.take(1);
        served
    }

    /// Whether the guest may keep what it has of a file that it opens, see [`keep_cache`].
    pub fn keeps(&self, number: u64, changed: Option<ChangeTime>, now: SystemTime) -> bool {
        let mut state = self.state();
        let node = state.nodes.get_mut(&number);
        node.is_some_and(|node| keep_cache::is_same(&mut node.changed, changed, now))
    }

    /// Notes which version of a file the guest is told of, and for how long it may believe that.
    pub fn told(&self, number: u64, version: Version, life: Duration) {
        if let Some(node) = self.state().nodes.get_mut(&number) {
            node.belief.tell(version, life, Instant::now());
        }
    }

    /// Notes that the guest changes a file itself.
    pub fn changed(&self, number: u64) {
        if let Some(node) = self.state().nodes.get_mut(&number) {
            node.belief.change();
        }
    }

    /// Whether the guest was just refused to open a version of a file.
    pub fn was_refused(&self, number: u64) -> bool {
        let state = self.state();
        let node = state.nodes.get(&number);
        node.is_some_and(|node| node.belief.was_refused(Instant::now()))
    }

    /// Whether the guest is to be refused to open this version of a file, see [`crate::life`].
    pub fn refuses(&self, number: u64, version: Version) -> bool {
        let mut state = self.state();
        let node = state.nodes.get_mut(&number);
        node.is_some_and(|node| node.belief.refuses(version, Instant::now()))
    }

    /// Notes that the guest holds nothing any more.
    pub fn clear(&self) {
        let state = &mut *self.state();
        state.nodes = HashMap::new();
        state.gone = HashMap::new();
        state.open = HashMap::new();
        state.files.give_back(u64::MAX);
        state.let_go.give_back(u64::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(files: &Arc<Budget>) -> Limits {
        Limits {
            files: Arc::clone(files),
            numbers: Budget::new(10),
            gone: Budget::new(10),
        }
    }

    fn held(files: &Arc<Budget>) -> Held {
        Held::new(Numbers::Hosts, &limits(files))
    }

    /// Looks up a file that is no share.
    fn look_up(held: &Held, number: u64) -> Known {
        look_up_as(held, number, Kind::File)
    }

    fn look_up_as(held: &Held, number: u64, kind: Kind) -> Known {
        let version = Version {
            changed: None,
            size: 0,
        };
        held.looked_up(number, version, Duration::ZERO, kind)
    }

    /// Looks up new files until it is refused; returns how many those were.
    fn fill(held: &Held, from: u64) -> u64 {
        (from..from + 1000)
            .take_while(|number| held.room().map(|()| look_up(held, *number)).is_ok())
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
            look_up(&held, 7);
        }
        held.opening(7).unwrap();
        assert_eq!(taken(), 2);
        assert_eq!(held.forgotten(7, 2), 2);
        assert_eq!(held.forgotten(8, 1), 0);
        assert_eq!(taken(), 2);
        assert_eq!(held.forgotten(7, u64::MAX), 1);
        assert_eq!(held.forgotten(7, 1), 0);
        assert_eq!(taken(), 1);
        held.released(1, 7);
        held.not_opened(7);
        assert_eq!(taken(), 0);
        assert!(held.state().nodes.is_empty());
    }

    #[test]
    fn numbers_that_are_remembered_are_bounded() {
        let limits = limits(&Budget::new(1000));
        let (own, hosts) = (Numbers::Own, Numbers::Hosts);
        let [own, hosts] = [own, hosts].map(|kind| Held::new(kind, &limits));
        for number in [2, 3, 4, 3, 5] {
            own.room().unwrap();
            look_up(&own, number);
            assert_eq!(own.forgotten(number, 1), 1);
            look_up(&hosts, number << 47);
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
        look_up(&held, 7);
        assert!(!held.keeps(7, changed, now));
        assert!(held.keeps(7, changed, now));
        assert_eq!(held.forgotten(7, 1), 1);
        look_up(&held, 7);
        assert!(!held.keeps(7, changed, now));
    }

    #[test]
    fn so_many_files_get_a_life_and_known_ones_keep_it() {
        let files = Budget::new(100);
        let held = held(&files);
        let lives = |number| look_up(&held, number).lives;
        assert!((1..=26).all(lives));
        assert!(!lives(27));
        assert!(lives(1), "it is held anyway");
        assert_eq!(held.forgotten(1, 2) + held.forgotten(2, 1), 3);
        assert!(lives(28));
        assert!(!look_up_as(&held, 29, Kind::Share).lives, "a share");
    }

    #[test]
    fn a_deleted_file_is_let_go_of_unless_it_is_in_use() {
        let files = Budget::new(10);
        let held = held(&files);
        let taken = || files.taken.load(Ordering::Relaxed);
        look_up_as(&held, 1, Kind::Share);
        look_up_as(&held, 2, Kind::Directory);
        for _ in 0..2 {
            assert_eq!(look_up(&held, 7).generation, 0);
        }
        held.opening(7).unwrap();
        assert_eq!((held.idle(), taken()), (vec![], 4));
        assert_eq!([1, 2, 7, 8].map(|number| held.let_go(number)), [0; 4]);
        held.released(1, 7);
        assert_eq!(held.idle(), [7]);
        assert_eq!(held.let_go(7), 2, "all that the file system counts");
        assert_eq!(held.let_go(7), 0);
        assert!(held.is_gone(7) && held.idle().is_empty());
        assert_eq!(taken(), 2);
        let stale = held.opening(7).unwrap_err().raw_os_error();
        assert_eq!(stale, Some(libc::ESTALE));
        assert_eq!(held.forgotten(7, 1), 0, "the file system has forgotten it");
        assert!(held.is_gone(7));
        assert_eq!(held.forgotten(7, 1), 0);
        assert!(!held.is_gone(7));
        assert_eq!(look_up(&held, 7).generation, 0, "the guest knows no other");
    }

    #[test]
    fn a_number_that_is_used_again_is_another_generation() {
        let held = held(&Budget::new(10));
        for _ in 0..5 {
            look_up(&held, 7);
        }
        assert_eq!(held.let_go(7), 5);
        for _ in 0..3 {
            assert_eq!(look_up(&held, 7).generation, 1);
        }
        assert!(!held.is_gone(7));
        // In any order, the new file is not forgotten before the guest knows of neither.
        assert_eq!(held.forgotten(7, 5), 0);
        held.opening(7).unwrap();
        held.released(1, 7);
        assert_eq!(held.forgotten(7, 3), 3);
        for _ in 0..2 {
            look_up(&held, 7);
        }
        assert_eq!(held.let_go(7), 2);
        assert_eq!(look_up(&held, 7).generation, 1);
        assert_eq!(held.forgotten(7, 1), 0);
        assert_eq!(held.let_go(7), 1, "though the guest may mean the first");
        assert_eq!(held.forgotten(7, 1), 0);
        assert_eq!(held.forgotten(7, 1), 0);
        assert!(held.state().nodes.is_empty() && held.state().gone.is_empty());
    }

    #[test]
    fn a_guest_that_never_forgets_what_was_let_go_of_is_refused() {
        let held = held(&Budget::new(100));
        for number in 1..=5 {
            held.room().unwrap();
            look_up(&held, number);
            assert_eq!(held.let_go(number), 1);
        }
        assert!(held.room().is_err(), "half of what all shares have");
        assert_eq!(held.forgotten(1, 1), 0);
        assert!(held.room().is_ok());
        held.clear();
        assert_eq!(held.state().let_go.taken, 0);
    }

    #[test]
    fn what_is_listed_and_not_told_is_not_held() {
        let files = Budget::new(10);
        let held = held(&files);
        look_up(&held, 7);
        look_up(&held, 7);
        held.not_told(7);
        assert_eq!(held.forgotten(7, 9), 1);
        look_up(&held, 8);
        held.not_told(8);
        assert_eq!(files.taken.load(Ordering::Relaxed), 0);
    }
}

//! What containers' own directories occupy: writable layers and volumes of their own.
//!
//! That takes a walk through a directory tree which the container makes as large as
//! it likes. So there is one walk at a time, on a thread of its own; a request waits
//! a moment for it and otherwise gets the last result with its age. A tree is walked
//! again only after a pause that grows with the time that its walk took.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hull_proto_agent::agent::FilesystemStats;
use rustix::fs::statvfs;

/// How long a result is good at least.
const FRESH: Duration = Duration::from_secs(1);
/// A walk takes at most this part of the time: one in so many.
const REST: u32 = 20;
/// How long a request waits for a walk.
const PATIENCE: Duration = Duration::from_millis(100);
/// The same for a layer of which nothing is known yet.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);
/// The longest walk, after which what was counted stands for the whole.
const LONGEST: Duration = Duration::from_secs(30);
/// How many hard links are told apart in one walk.
const LINKS: usize = 1 << 20;

/// The layers that were asked about.
#[derive(Debug, Default)]
pub(super) struct Disks {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    known: BTreeMap<PathBuf, Layer>,
    /// There is a thread that walks.
    walking: bool,
}

#[derive(Debug, Default)]
struct Layer {
    wanted: bool,
    last: Option<Measured>,
}

#[derive(Debug, Clone, Copy)]
struct Measured {
    bytes: u64,
    inodes: u64,
    at: Instant,
    took: Duration,
}

impl Measured {
    fn is_fresh(&self) -> bool {
        self.at.elapsed() < FRESH.max(self.took * REST)
    }
}

impl Disks {
    /// Has all layers measured that were not for a while, and waits a moment for it.
    pub(super) fn refresh(self: &Arc<Self>, dirs: &[&Path]) {
        let mut state = self.lock();
        for dir in dirs {
            let layer = state.known.entry((*dir).to_owned()).or_default();
            layer.wanted |= !layer.last.is_some_and(|last| last.is_fresh());
        }
        if !state.walking && state.known.values().any(|layer| layer.wanted) {
            let this = Arc::clone(self);
            let started = std::thread::Builder::new().spawn(move || this.walk());
            // Without a thread the last results stand.
            state.walking = started.is_ok();
        }
        let new = dirs.iter().any(|dir| {
            let layer = state.known.get(*dir);
            layer.is_some_and(|layer| layer.last.is_none())
        });
        let patience = if new { FIRST_PATIENCE } else { PATIENCE };
        let busy = |state: &mut State| state.walking;
        // What is known by then is told; a poisoned lock changes nothing about that.
        drop(self.changed.wait_timeout_while(state, patience, busy));
    }

    /// Tells what is below `dir`; none as long as it was not measured.
    pub(super) fn usage(&self, dir: &Path) -> Option<FilesystemStats> {
        let last = self.lock().known.get(dir)?.last?;
        Some(FilesystemStats {
            used_bytes: last.bytes,
            used_inodes: last.inodes,
            age_ms: u64::try_from(last.at.elapsed().as_millis()).unwrap_or(u64::MAX),
            ..filesystem(dir).unwrap_or_default()
        })
    }

    /// Forgets all layers but these.
    pub(super) fn keep_only(&self, dirs: &[PathBuf]) {
        self.lock().known.retain(|path, _| dirs.contains(path));
    }

    /// Walks what is wanted, until nothing is.
    fn walk(&self) {
        loop {
            let path = {
                let mut state = self.lock();
                let next = state.known.iter().find(|(_, layer)| layer.wanted);
                let Some((path, _)) = next else {
                    state.walking = false;
                    self.changed.notify_all();
                    return;
                };
                path.clone()
            };
            let begin = Instant::now();
            let (bytes, inodes) = tree(&path, begin + LONGEST);
            let mut state = self.lock();
            // Absent: its container was removed meanwhile.
            if let Some(layer) = state.known.get_mut(&path) {
                layer.wanted = false;
                layer.last = Some(Measured {
                    bytes,
                    inodes,
                    at: begin,
                    took: begin.elapsed(),
                });
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds up a directory tree of one file system, as du(1) does, until the deadline.
fn tree(dir: &Path, deadline: Instant) -> (u64, u64) {
    let (mut bytes, mut inodes) = (0_u64, 0_u64);
    let mut seen = HashSet::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if Instant::now() > deadline {
                return (bytes, inodes);
            }
            // It may be gone already; the container is at work.
            let Ok(meta) = entry.metadata() else {
                continue;
            };
            if meta.is_dir() {
                todo.push(entry.path());
            } else if meta.nlink() > 1 && seen.len() < LINKS && !seen.insert(meta.ino()) {
                continue;
            }
            bytes += meta.blocks() * 512;
            inodes += 1;
        }
    }
    (bytes, inodes)
}

/// What a whole file system has.
pub(super) fn filesystem(path: &Path) -> Option<FilesystemStats> {
    let fs = statvfs(path).ok()?;
    Some(FilesystemStats {
        used_bytes: fs.f_blocks.saturating_sub(fs.f_bfree) * fs.f_frsize,
        used_inodes: fs.f_files.saturating_sub(fs.f_ffree),
        capacity_bytes: fs.f_blocks * fs.f_frsize,
        capacity_inodes: fs.f_files,
        // To those without the right to use the reserve.
        free_bytes: fs.f_bavail * fs.f_frsize,
        free_inodes: fs.f_favail,
        ..FilesystemStats::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn far() -> Instant {
        Instant::now() + LONGEST
    }

    #[test]
    fn a_hard_link_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![1; 8192]).unwrap();
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        let (bytes, inodes) = tree(dir.path(), far());
        assert_eq!(inodes, 2);
        assert!(bytes >= 8192);
    }

    #[test]
    fn a_walk_ends_at_its_deadline() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "x").unwrap();
        let past = Instant::now() - Duration::from_secs(1);
        assert_eq!(tree(dir.path(), past), (0, 0));
    }

    #[test]
    fn a_layer_is_measured_once_for_a_while_and_forgotten_with_its_container() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "x").unwrap();
        let disks = Arc::new(Disks::default());
        // The first answer may come before the walk's end.
        let first = loop {
            disks.refresh(&[dir.path()]);
            if let Some(usage) = disks.usage(dir.path()) {
                break usage;
            }
        };
        assert_eq!(first.used_inodes, 1);
        assert!(first.capacity_bytes > 0);
        let walked = |disks: &Disks| disks.lock().known[dir.path()].last.unwrap().at;
        let at = walked(&disks);
        // As after a walk that took long: it is not repeated soon.
        let mut state = disks.lock();
        let layer = state.known.get_mut(dir.path()).unwrap();
        layer.last.as_mut().unwrap().took = LONGEST;
        drop(state);
        fs::write(dir.path().join("b"), "x").unwrap();
        disks.refresh(&[dir.path()]);
        assert_eq!(disks.usage(dir.path()).unwrap().used_inodes, 1);
        assert_eq!(walked(&disks), at);
        disks.keep_only(&[]);
        assert!(disks.lock().known.is_empty());
    }
}

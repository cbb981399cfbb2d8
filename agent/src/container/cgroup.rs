//! A container's cgroup (v2 only), by its files.

use std::{
    fs, io,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use crate::pidfd::Process;

/// The kernel's list of files that go with a cgroup that others may divide.
const DELEGATED: &str = "/sys/kernel/cgroup/delegate";
/// Most levels of cgroups that a container may make below its own: what is deep has no path to remove it by.
const DEPTH: u32 = 64;
/// Longest wait for killed processes to leave.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);

/// A cgroup directory. Dropping it leaves the directory.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Its processes are to stand still, whoever else stops them for a moment.
    held: Arc<AtomicBool>,
}

impl Cgroup {
    /// Names the cgroup at `path`.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self {
            path,
            held: Arc::default(),
        }
    }

    /// Makes the directory; one that exists is fine.
    pub(crate) fn create(path: PathBuf) -> io::Result<Self> {
        match fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(Self::at(path)),
        }
    }

    /// Bounds how deep cgroups below it are.
    pub(crate) fn limit_depth(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.max.depth"), DEPTH.to_string())
    }

    /// Lets another user make cgroups below it, and move processes there; its limits are not theirs to
    /// change (cgroup v2, "Delegation").
    pub(crate) fn delegate(&self, uid: u32, gid: u32) -> io::Result<()> {
        let files = fs::read_to_string(DELEGATED)?;
        chown(&self.path, Some(uid), Some(gid))?;
        for file in files.lines() {
            match chown(self.path.join(file), Some(uid), Some(gid)) {
                // Of a controller that is not there.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Returns its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Kills every process in it and below. Absent is as good as empty.
    pub(crate) fn kill(&self) -> io::Result<()> {
        absent_is_fine(fs::write(self.path.join("cgroup.kill"), "1"))
    }

    /// Stops all processes in it and below where they are, or lets them go on. It does not wait until they stand.
    /// Those that are held stay.
    pub(crate) fn freeze(&self, frozen: bool) -> io::Result<()> {
        if self.held.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.write_freeze(frozen)
    }

    /// Has all processes in it and below stand still until [`Self::let_go`]; tells whether they were free.
    pub(crate) fn hold(&self) -> io::Result<bool> {
        let was_free = !self.held.swap(true, Ordering::Relaxed);
        self.write_freeze(true)?;
        Ok(was_free)
    }

    /// Lets processes go on that are held.
    pub(crate) fn let_go(&self) -> io::Result<()> {
        if self.held.swap(false, Ordering::Relaxed) {
            self.write_freeze(false)?;
        }
        Ok(())
    }

    /// Returns whether all processes in it and below stand still. One that is gone has none.
    pub(crate) fn is_still(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events"))
            .map_or(true, |text| value(&text, "frozen") != Some(0))
    }

    fn write_freeze(&self, frozen: bool) -> io::Result<()> {
        let value = if frozen { "1" } else { "0" };
        absent_is_fine(fs::write(self.path.join("cgroup.freeze"), value))
    }

    /// Opens the processes in it and below.
    pub(crate) fn members(&self) -> io::Result<Vec<Process>> {
        let opened = self.processes()?.into_iter();
        let mut opened: Vec<_> = opened
            .filter_map(|pid| Process::open(Pid::from_raw(pid)).ok())
            .collect();
        // A pid that is still listed meant the process that has it now.
        let still = self.processes()?;
        opened.retain(|process| still.contains(&process.pid().as_raw()) && process.is_there());
        Ok(opened)
    }

    /// Returns the pids of the processes in it and below.
    pub(crate) fn processes(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        let mut todo = vec![self.path.clone()];
        while let Some(dir) = todo.pop() {
            let text = match fs::read_to_string(dir.join("cgroup.procs")) {
                Ok(text) => text,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
            todo.extend(children(&dir));
        }
        Ok(pids)
    }

    /// Returns whether there is a process in it or below.
    pub(crate) fn populated(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events"))
            .is_ok_and(|text| value(&text, "populated") == Some(1))
    }

    /// Waits, with a limit, until its processes are gone.
    pub(crate) async fn empty(&self) -> bool {
        let deadline = Instant::now() + EMPTY_TIMEOUT;
        let mut pause = Duration::from_millis(1);
        while self.populated() {
            if Instant::now() > deadline {
                return false;
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        true
    }

    /// Removes it and all below it; its processes must be gone.
    pub(crate) fn remove(&self) -> io::Result<()> {
        remove_tree(&self.path)
    }

    /// Returns how many of its processes the kernel killed for lack of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        fs::read_to_string(self.path.join("memory.events"))
            .ok()
            .and_then(|text| value(&text, "oom_kill"))
            .unwrap_or(0)
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    for child in children(dir) {
        remove_tree(&child)?;
    }
    absent_is_fine(fs::remove_dir(dir))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
        result => result,
    }
}

/// Returns the number after `key` in a "flat keyed" file such as `cpu.stat`.
pub(crate) fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, number) = line.split_once(' ')?;
        (name == key).then(|| number.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_keyed_files_are_read_by_whole_keys() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\nbad x\n";
        assert_eq!(value(text, "oom_kill"), Some(2));
        assert_eq!(value(text, "oom"), Some(3));
        assert_eq!(value(text, "bad"), None);
        assert_eq!(value(text, "none"), None);
    }

    #[test]
    fn who_is_held_is_not_let_go_by_others() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::at(dir.path().to_owned());
        let frozen = || fs::read_to_string(dir.path().join("cgroup.freeze")).unwrap();
        cgroup.freeze(true).unwrap();
        cgroup.freeze(false).unwrap();
        assert_eq!(frozen(), "0");
        assert!(cgroup.hold().unwrap());
        assert!(!cgroup.clone().hold().unwrap());
        cgroup.freeze(true).unwrap();
        cgroup.clone().freeze(false).unwrap();
        assert_eq!(frozen(), "1");
        cgroup.let_go().unwrap();
        assert_eq!(frozen(), "0");
        // The kernel says when all of them stand.
        assert!(cgroup.is_still());
        for (text, still) in [("populated 1\nfrozen 0\n", false), ("frozen 1\n", true)] {
            fs::write(dir.path().join("cgroup.events"), text).unwrap();
            assert_eq!(cgroup.is_still(), still);
        }
    }

    #[test]
    fn an_absent_cgroup_is_empty_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::at(dir.path().join("none"));
        assert!(!cgroup.populated());
        cgroup.kill().unwrap();
        cgroup.remove().unwrap();
        assert!(cgroup.processes().unwrap().is_empty());
        assert_eq!(cgroup.oom_kills(), 0);
    }
}

//! What tells a process of a pod from all others: from a later process with the same pid, and from
//! another user's process with the same command line.

use std::{
    fs::{self, Metadata},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::unistd::geteuid;
use rustix::fs::{OFlags, renameat};
use serde::{Deserialize, Serialize};

use hull_base::beneath;

/// Longest file that is read as an identity, in bytes.
const RECORD_MAX: u64 = 4096;

/// A process that can't be mistaken for another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The process's id, which may be another's once the process has ended.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of proc_pid_stat(5).
    pub start_ticks: u64,
    /// The first half of the kernel's boot id (random(4)). 0: not known, and no process matches.
    #[serde(default)]
    boot: u64,
    /// The program that it executes. None: not known, and no process matches.
    #[serde(default)]
    exe: Option<FileId>,
}

/// Tells a file from all others, whatever name it has, even without any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    fn at(path: impl AsRef<Path>) -> Option<Self> {
        Some(Self::of(&fs::metadata(path).ok()?))
    }
}

impl Identity {
    /// The identity of the process that has this pid now, dead or alive; none: no process has it.
    pub fn of(pid: u32) -> Option<Self> {
        Some(Self {
            pid,
            start_ticks: start_ticks(pid)?,
            boot: boot(),
            // A zombie executes no program.
            exe: FileId::at(format!("/proc/{pid}/exe")),
        })
    }

    /// Whether the process that has this pid now is the one that is meant.
    pub(crate) fn is_there(&self) -> bool {
        self.boot != 0 && self.exe.is_some() && Self::of(self.pid).as_ref() == Some(self)
    }

    /// Writes the identity to a file, whole or not at all.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let (run, name) = beneath::split(path)?;
        let unfinished = name.with_added_extension("new");
        let mut file = run.replace(&unfinished, OFlags::WRONLY, 0o600)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        Ok(renameat(&run, unfinished, &run, name)?)
    }

    /// Reads what [`Identity::write`] wrote. None: the file is absent, unreadable or another user's.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        let (run, name) = beneath::split(path).ok()?;
        let file = run.file(name, OFlags::RDONLY).ok()?;
        if file.metadata().ok()?.uid() != geteuid().as_raw() {
            return None;
        }
        let mut text = String::new();
        file.take(RECORD_MAX).read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }
}

/// When a process started, in clock ticks since boot.
fn start_ticks(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so fields count from the last one: the first here
    // is field 3.
    let rest = text.rsplit_once(')')?.1;
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// The first 64 bits of the kernel's boot id; 0: not known.
fn boot() -> u64 {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = id
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(16)
        .collect();
    u64::from_str_radix(&digits, 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_process_is_itself_and_nobody_else() {
        let me = Identity::of(std::process::id()).unwrap();
        assert!(me.is_there());
        let others = [
            Identity {
                start_ticks: me.start_ticks + 1,
                ..me
            },
            Identity {
                boot: me.boot + 1,
                ..me
            },
            Identity {
                exe: FileId::at("/"),
                ..me
            },
            // As an older daemon recorded it.
            serde_json::from_str(&format!(
                r#"{{"pid":{},"start_ticks":{}}}"#,
                me.pid, me.start_ticks
            ))
            .unwrap(),
        ];
        for other in others {
            assert!(!other.is_there(), "{other:?}");
        }
    }

    #[test]
    fn an_identity_is_read_from_the_daemons_own_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.process");
        assert_eq!(Identity::read(&path), None);
        let me = Identity::of(std::process::id()).unwrap();
        me.write(&path).unwrap();
        me.write(&path).unwrap();
        assert_eq!(Identity::read(&path), Some(me));
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        assert_eq!(Identity::read(&link), None);
        if geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            assert_eq!(Identity::read(&path), None);
        }
        fs::write(dir.path().join("half"), "{\"pid\":").unwrap();
        assert_eq!(Identity::read(&dir.path().join("half")), None);
    }
}

//! What is shared: a file system for each owner's shares, and the two requests that the file
//! systems' own code would get wrong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::{fs, io};

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use fuse_backend_rs::api::{BackFileSystem, Vfs, VfsIndex, VfsOptions};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use crate::bounded::Bounded;
use crate::held::{Budget, Held, Limits, Numbers};
use crate::life::LIFE;
use crate::packet::{IN_HEADER, INDEX_SHIFT, double_word, owner_index, word};
use crate::private::Devices;
use crate::renumber::Renumbered;

/// Descriptors for all else than what a guest holds: two for each of 255 owners, and what a request
/// has open meanwhile.
const OTHER_DESCRIPTORS: u64 = 1024;
/// Files whose numbers are remembered ([`Numbers::Own`]). One takes some 60 bytes, of what
/// [`crate::jail`] allows.
const REMEMBERED: u64 = 10 << 20;
/// Files that were let go of and that the guest may not have forgotten yet. One takes some 60 bytes, too.
const GONE: u64 = 1 << 20;
/// Mounts of an owner whose files can be numbered as on the host. The file system tells 254 mounts, and
/// devices in them, apart.
const MOUNTS: usize = 128;
/// File systems of the host that number files in few bits, and whose mounts are of one device, or of
/// few.
const PLAIN: [&str; 12] = [
    "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "squashfs", "tmpfs", "vfat", "xfs",
    "zfs",
];

/// All owners' file systems, under one root.
pub struct Files {
    /// Finds the file system of a request.
    pub vfs: Arc<Vfs>,
    /// What the guest may hold of all owners' files.
    limits: Limits,
    /// The path of each, by its number.
    paths: RwLock<BTreeMap<VfsIndex, String>>,
    /// The devices of volumes that no other pod has.
    pub private: Arc<Devices>,
    session: Mutex<Session>,
}

/// How the guest's kernel speaks with the server.
#[derive(Debug, Default)]
struct Session {
    /// How it began (FUSE_INIT); empty: it did not.
    init: Vec<u8>,
    /// Its numbers, if it began with another server.
    renumbered: Option<Arc<Renumbered>>,
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Files")
            .field("paths", &self.paths)
            .finish_non_exhaustive()
    }
}

impl Default for Files {
    fn default() -> Self {
        let mut vfs = Vfs::new(VfsOptions {
            no_open: false,
            no_opendir: false,
            no_writeback: true,
            killpriv_v2: true,
            out_opts: FsOptions::ASYNC_READ
                | FsOptions::PARALLEL_DIROPS
                | FsOptions::BIG_WRITES
                | FsOptions::ASYNC_DIO
                | FsOptions::AUTO_INVAL_DATA
                | FsOptions::ATOMIC_O_TRUNC
                | FsOptions::DO_READDIRPLUS
                | FsOptions::READDIRPLUS_AUTO
                | FsOptions::HANDLE_KILLPRIV_V2
                // The guest's kernel asks for ACLs and obeys them, and leaves it to the host's what
                // those of a directory make of a mask.
                | FsOptions::POSIX_ACL
                | FsOptions::DONT_MASK,
            ..VfsOptions::default()
        });
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        // An owner that is gone is not listed.
        vfs.set_remove_pseudo_root();
        Self {
            vfs: Arc::new(vfs),
            limits: Limits {
                files: Budget::new(descriptors.saturating_sub(OTHER_DESCRIPTORS)),
                numbers: Budget::new(REMEMBERED),
                gone: Budget::new(GONE),
            },
            paths: RwLock::default(),
            private: Arc::default(),
            session: Mutex::default(),
        }
    }
}

impl Files {
    /// Begins to serve what is mounted at `/<owner>`.
    ///
    /// # Errors
    /// The reason, in words for the manager.
    pub fn add(&self, owner: &str) -> Result<(), String> {
        let path = format!("/{owner}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| e.to_string())?;
        let numbers = numbers(&mounts, &path);
        let config = Config {
            root_dir: path.clone(),
            do_import: false,
            use_host_ino: numbers == Numbers::Hosts,
            entry_timeout: LIFE,
            attr_timeout: LIFE,
            cache_policy: CachePolicy::Auto,
            xattr: true,
            killpriv_v2: true,
            ..Config::default()
        };
        let share = PassthroughFs::<()>::new(config).map_err(|e| e.to_string())?;
        share.import().map_err(|e| e.to_string())?;
        let held = Held::new(numbers, &self.limits);
        let private = Arc::clone(&self.private);
        let mounted = self
            .vfs
            .mount(Box::new(Bounded::new(share, held, private)), &path);
        let index = mounted.map_err(|e| e.to_string())?;
        let mut paths = self.paths.write().unwrap_or_else(PoisonError::into_inner);
        paths.insert(index, path);
        Ok(())
    }

    /// Stops serving an owner's shares. Nothing happens if they are not served.
    ///
    /// # Errors
    /// The reason, in words for the manager.
    pub fn remove(&self, owner: &str) -> Result<(), String> {
        let path = format!("/{owner}");
        match self.vfs.get_rootfs(&path) {
            Ok(Some(_)) => {
                self.vfs.umount(&path).map_err(|e| e.to_string())?;
                let mut paths = self.paths.write().unwrap_or_else(PoisonError::into_inner);
                paths.retain(|_, other| *other != path);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a session begins with this FUSE_INIT. One that was not ended goes with the guest's kernel that
    /// had it.
    pub fn begin(&self, init: &[u8]) {
        self.vfs.destroy();
        let mut session = self.session();
        session.init = init.to_vec();
        session.renumbered = None;
    }

    /// How the session began.
    #[must_use]
    pub fn begun(&self) -> Vec<u8> {
        self.session().init.clone()
    }

    /// The numbers of a guest that began with another server.
    #[must_use]
    pub fn renumbered(&self) -> Option<Arc<Renumbered>> {
        self.session().renumbered.clone()
    }

    /// Notes the numbers of a guest that began with another server.
    pub fn renumber(&self, numbers: Renumbered) {
        self.session().renumbered = Some(Arc::new(numbers));
    }

    /// The file system of each owner, with its index and path.
    #[must_use]
    pub fn all(&self) -> Vec<(VfsIndex, PathBuf, Arc<BackFileSystem>)> {
        let paths = self.paths.read().unwrap_or_else(PoisonError::into_inner);
        let all = paths.iter().filter_map(|(index, path)| {
            let (share, _) = self.vfs.get_rootfs(path).ok().flatten()?;
            Some((*index, path.into(), share))
        });
        all.collect()
    }

    /// Lets go of files that the host deleted, so that their space is the host's again.
    pub fn let_go_of_deleted(&self) {
        for (_, _, share) in self.all() {
            if let Some(share) = share.as_any().downcast_ref::<Bounded>() {
                share.let_go_of_deleted();
            }
        }
    }

    /// Finds data or a hole (FUSE_LSEEK), which [`Vfs`] does not hand on.
    ///
    /// # Errors
    /// An error number. None of them is ENOSYS, or the guest's kernel would not ask again.
    pub fn seek(&self, packet: &[u8]) -> Result<u64, i32> {
        let (Some(node), Some(handle), Some(offset), Some(whence)) = (
            double_word(packet, 16),
            double_word(packet, IN_HEADER),
            double_word(packet, IN_HEADER + 8),
            word(packet, IN_HEADER + 16),
        ) else {
            return Err(libc::EINVAL);
        };
        // All that a kernel does not do by itself.
        if ![libc::SEEK_DATA, libc::SEEK_HOLE].contains(&whence.cast_signed()) {
            return Err(libc::EINVAL);
        }
        let index = owner_index(node);
        let share = {
            let paths = self.paths.read().unwrap_or_else(PoisonError::into_inner);
            let path = paths.get(&index).ok_or(libc::EBADF)?;
            self.vfs.get_rootfs(path).ok().flatten()
        };
        let (share, _) = share.filter(|found| found.1 == index).ok_or(libc::EBADF)?;
        let inode = node & ((1 << INDEX_SHIFT) - 1);
        let found = share.lseek(&Context::default(), inode, handle, offset, whence);
        found.map_err(|error| match error.raw_os_error() {
            None | Some(libc::ENOSYS) => libc::EINVAL,
            Some(errno) => errno,
        })
    }
}

/// How files below `path` can be numbered, with these mounts, as proc_pid_mountinfo(5) tells them.
///
/// As on the host, so that the file system remembers nothing of what the guest forgot; if it can't tell
/// them apart by that, or others may be mounted later, it numbers them itself.
fn numbers(mounts: &str, path: &str) -> Numbers {
    let mut count = 0;
    for mount in mounts.lines() {
        let (first, last) = mount.split_once(" - ").unwrap_or((mount, ""));
        let mut fields = first.split(' ').skip(4);
        if !fields
            .next()
            .is_some_and(|at| Path::new(at).starts_with(path))
        {
            continue;
        }
        count += 1;
        let follows = fields.skip(1).any(|field| field.starts_with("master:"));
        let kind = last.split(' ').next().unwrap_or_default();
        if follows || count > MOUNTS || !PLAIN.contains(&kind) {
            return Numbers::Own;
        }
    }
    Numbers::Hosts
}

/// Takes this thread's power to change files that are run as another user, without that they no
/// longer are, until it is dropped.
///
/// Of other changes the guest's kernel says whether that is to happen, and the file system has it
/// happen; of FUSE_FALLOCATE it does not.
#[derive(Debug)]
pub struct WithoutFsetid(CapabilitySets);

impl WithoutFsetid {
    /// Takes the capability away.
    ///
    /// # Errors
    /// Of capset(2), none is known.
    pub fn begin() -> io::Result<Self> {
        let before = capabilities(None)?;
        let effective = before.effective.difference(CapabilitySet::FSETID);
        set_capabilities(
            None,
            CapabilitySets {
                effective,
                ..before
            },
        )?;
        Ok(Self(before))
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        // What is permitted may be had again at any time.
        let _ = set_capabilities(None, self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_numbered_as_on_the_host_where_that_tells_them_apart() {
        let line = |at: &str, peers: &str, kind: &str| {
            format!("36 35 98:0 /dir {at} rw,noatime{peers} - {kind} /dev/root rw\n")
        };
        let plain = line("/o/0", "", "ext4");
        for (mounts, expected) in [
            (plain.clone(), Numbers::Hosts),
            (
                plain.clone() + &line("/o/0/deep\\040er", "", "tmpfs"),
                Numbers::Hosts,
            ),
            (
                plain.clone() + &line("/o/0/slave", " master:1", "ext4"),
                Numbers::Own,
            ),
            (
                plain.clone() + &line("/o/1", " shared:2 master:1", "ext4"),
                Numbers::Own,
            ),
            (plain.clone() + &line("/o/1", "", "nfs4"), Numbers::Own),
            (plain.clone() + &line("/o", "", "overlay"), Numbers::Own),
            (
                plain.clone() + &line("/other/0", " master:1", "nfs4"),
                Numbers::Hosts,
            ),
            (plain.repeat(MOUNTS), Numbers::Hosts),
            (plain.repeat(MOUNTS + 1), Numbers::Own),
            ("nonsense\n\n".to_owned(), Numbers::Hosts),
        ] {
            assert_eq!(numbers(&mounts, "/o"), expected, "{mounts}");
        }
    }
}

//! What is shared: a file system for each owner's shares, and the two requests that the file
//! systems' own code would get wrong.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use fuse_backend_rs::api::filesystem::Context;
use fuse_backend_rs::api::{Vfs, VfsIndex, VfsOptions};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use crate::filter::{IN_HEADER, double_word, word};
use crate::kept::Kept;

/// How long a guest may believe in attributes.
const ATTRIBUTES: Duration = Duration::from_secs(1);
/// Where a node's number has that of its file system.
const INDEX_SHIFT: u32 = 56;

/// All owners' file systems, under one root.
pub struct Files {
    /// Finds the file system of a request.
    pub vfs: Arc<Vfs>,
    /// What a guest may keep of files that it opens again.
    pub kept: Kept,
    /// The path of each, by its number.
    paths: RwLock<BTreeMap<VfsIndex, String>>,
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
        // An owner that is gone is not listed.
        vfs.set_remove_pseudo_root();
        Self {
            vfs: Arc::new(vfs),
            kept: Kept::default(),
            paths: RwLock::default(),
        }
    }
}

impl Files {
    /// Begins to serve what is mounted at `/<owner>`.
    ///
    /// # Errors
    /// Why not.
    pub fn add(&self, owner: &str) -> Result<(), String> {
        let path = format!("/{owner}");
        let config = Config {
            root_dir: path.clone(),
            do_import: false,
            // Every walk of a path asks here, and brings fresh attributes along: what the host
            // changes is seen at once. An open file's are kept for a moment, or each read would
            // ask for them.
            entry_timeout: Duration::ZERO,
            attr_timeout: ATTRIBUTES,
            cache_policy: CachePolicy::Auto,
            xattr: true,
            killpriv_v2: true,
            ..Config::default()
        };
        let share = PassthroughFs::<()>::new(config).map_err(|e| e.to_string())?;
        share.import().map_err(|e| e.to_string())?;
        let mounted = self.vfs.mount(Box::new(share), &path);
        let index = mounted.map_err(|e| e.to_string())?;
        let mut paths = self.paths.write().unwrap_or_else(PoisonError::into_inner);
        paths.insert(index, path);
        Ok(())
    }

    /// Ends it; an owner who was never added, or removed before, is fine.
    ///
    /// # Errors
    /// Why not.
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
        let index = (node >> INDEX_SHIFT) as VfsIndex;
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

/// Takes this thread's power to change files that are run as another user, without that they no
/// longer are, until it is dropped.
///
/// Of other changes the guest's kernel says whether that is to happen, and the file system has it
/// happen; of FUSE_FALLOCATE it does not.
#[derive(Debug)]
pub struct WithoutFsetid(CapabilitySets);

impl WithoutFsetid {
    /// Takes it.
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

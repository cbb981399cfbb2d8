//! A file system of the host of which a guest holds no more than it may, see [`crate::held`], and
//! believes nothing for longer than it may, see [`crate::life`] and [`crate::private`].

use std::any::Any;
use std::ffi::CStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::BackendFileSystem;
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::PassthroughFs;

use crate::held::{Held, Kind, Known, Numbers, Open};
use crate::keep_cache;
use crate::life::{LIFE, PRIVATE_LIFE, Version};
use crate::packet::ROOT;
use crate::private::Devices;

/// An opened file: its handle, and how the guest is to use it.
type Opened = (Option<u64>, OpenOptions, Option<u32>);

/// What is closed has nothing to flush (FOPEN_NOFLUSH), a flag of open files that the library lacks.
const NO_FLUSH: u32 = 1 << 5;
/// Follows the path of a descriptor whose name is gone (`d_path`).
const DELETED: &[u8] = b" (deleted)";
/// How many times a file is looked for and made, while the host makes and removes it.
const ATTEMPTS: u32 = 8;

/// A file that the guest knows.
#[derive(Debug)]
pub struct Named {
    /// Its number.
    pub number: u64,
    /// Tells it from others that had its number.
    pub generation: u64,
    /// How many times the guest was told of it, less how many times it forgot it.
    pub lookups: u64,
    /// Its type (S_IFMT).
    pub kind: u32,
    /// Where it is in the server's root.
    pub path: PathBuf,
}

/// A file system that counts what the guest holds of it.
pub struct Bounded {
    host: PassthroughFs<()>,
    held: Held,
    private: Arc<Devices>,
}

impl std::fmt::Debug for Bounded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bounded")
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

impl Bounded {
    /// Counts in `held` what a guest gets of `host`, which it may believe for longer on the devices that are
    /// `private`.
    #[must_use]
    pub fn new(host: PassthroughFs<()>, held: Held, private: Arc<Devices>) -> Self {
        Self {
            host,
            held,
            private,
        }
    }

    /// For how long the guest may believe what it is told of a file.
    fn life(&self, attributes: &stat64) -> Duration {
        if self.private.has(attributes.st_dev) {
            PRIVATE_LIFE
        } else {
            LIFE
        }
    }

    /// Whether closing a file that was written does anything (FUSE_FLUSH). To the file systems that number
    /// files plainly it does not: they have told of errors before.
    fn flushes(&self) -> bool {
        self.held.numbering() == Numbers::Own
    }

    /// Whether a file is of a volume that no other pod has.
    fn is_private(&self, context: &Context, inode: u64) -> bool {
        !self.private.is_empty()
            && self
                .host
                .getattr(context, inode, None)
                .is_ok_and(|(attributes, _)| self.private.has(attributes.st_dev))
    }

    /// Notes that the guest is told of a file in `parent`; returns the entry as it is told.
    fn tell(&self, parent: u64, entry: Entry) -> Entry {
        let attributes = &entry.attr;
        let (version, life) = (version(attributes), self.life(attributes));
        let kind = kind(parent, attributes);
        let known = self.held.looked_up(entry.inode, version, life, kind);
        told(entry, known, life)
    }

    fn find(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.entry(parent, || self.host.lookup(context, parent, name))
    }

    /// Runs a request whose answer makes a file in `parent` known to the guest, and counts that.
    fn entry(&self, parent: u64, request: impl FnOnce() -> io::Result<Entry>) -> io::Result<Entry> {
        self.held.room()?;
        let entry = request()?;
        Ok(self.tell(parent, entry))
    }

    /// Tells of a request that failed because the file was let go of that this is so.
    fn or_stale<T>(&self, inode: u64, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| match error.raw_os_error() {
            Some(libc::EBADF) if self.held.is_gone(inode) => {
                io::Error::from_raw_os_error(libc::ESTALE)
            }
            _ => error,
        })
    }

    /// Lets go of what the host deleted: else the guest, which may not hear of it, would keep the space
    /// of each such file from the host.
    pub fn let_go_of_deleted(&self) {
        let context = Context::default();
        for inode in self.held.idle() {
            if self.is_deleted(&context, inode) {
                let count = self.held.let_go(inode);
                if count > 0 {
                    self.host.forget(&context, inode, count);
                }
            }
        }
    }

    /// All that the guest knows, with where it is; what was deleted is nowhere.
    pub fn known(&self) -> Vec<Named> {
        let context = Context::default();
        let known = self.held.known().into_iter().filter_map(|known| {
            let (number, generation, lookups) = known;
            let path = self.host.readlinkat_proc_file(number).ok()?;
            if self.is_deleted_at(&context, number, &path) {
                return None;
            }
            let (attributes, _) = self.host.getattr(&context, number, None).ok()?;
            Some(Named {
                number,
                generation,
                lookups,
                kind: attributes.st_mode & libc::S_IFMT,
                path,
            })
        });
        known.collect()
    }

    /// All files that are open, by their handles.
    pub fn all_open(&self) -> Vec<(u64, Open)> {
        self.held.all_open()
    }

    /// Whether a file was deleted, or at least the name by which it is held. Does not wait for the server
    /// of a network file system.
    fn is_deleted(&self, context: &Context, inode: u64) -> bool {
        let path = self.host.readlinkat_proc_file(inode);
        path.is_ok_and(|path| self.is_deleted_at(context, inode, &path))
    }

    /// The same of a file whose descriptor has this path.
    fn is_deleted_at(&self, context: &Context, inode: u64, path: &Path) -> bool {
        let is_unlinked = path.as_os_str().as_bytes().ends_with(DELETED);
        // Another name of a local file may be left, and a name may look like that.
        is_unlinked
            && match self.held.numbering() {
                Numbers::Own => true,
                Numbers::Hosts => {
                    let now = self.host.getattr(context, inode, None);
                    now.is_ok_and(|(now, _)| now.st_nlink == 0)
                }
            }
    }

    /// Whether the host's kernel makes a file when it is read, as those of /proc: they have no size, by
    /// which a guest would read nothing.
    fn is_made_when_read(&self, context: &Context, inode: u64, attributes: &stat64) -> bool {
        let is_empty =
            attributes.st_mode & libc::S_IFMT == libc::S_IFREG && attributes.st_size == 0;
        // Their file systems have no room for any.
        let no_room = |fs: statvfs64| fs.f_blocks == 0 && fs.f_files == 0;
        is_empty && self.host.statfs(context, inode).is_ok_and(no_room)
    }

    fn open_file(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<Opened> {
        self.held.opening(inode)?;
        let opened = self.host.open(context, inode, flags, fuse_flags);
        let opened = opened.inspect_err(|_| self.held.not_opened(inode))?;
        self.held.opened(opened.0, file(inode, flags));
        Ok(opened)
    }
}

/// A file as it is opened.
fn file(number: u64, flags: u32) -> Open {
    Open {
        number,
        flags,
        directory: false,
    }
}

fn no_flush() -> OpenOptions {
    // SAFETY: the type is a word, and any word is a value of it; the answer has it as it is.
    unsafe { OpenOptions::from_bits_unchecked(NO_FLUSH) }
}

/// What tells this version of a file from others.
fn version(attributes: &stat64) -> Version {
    Version {
        changed: keep_cache::change_time(attributes),
        size: attributes.st_size,
    }
}

/// What a file is that is found in `parent`.
fn kind(parent: u64, attributes: &stat64) -> Kind {
    // The entries of an owner's root are its shares.
    if parent == ROOT {
        Kind::Share
    } else if attributes.st_mode & libc::S_IFMT == libc::S_IFDIR {
        Kind::Directory
    } else {
        Kind::File
    }
}

/// An entry as the guest is told of it.
fn told(entry: Entry, known: Known, life: Duration) -> Entry {
    Entry {
        generation: known.generation,
        attr_timeout: life,
        entry_timeout: if known.lives { life } else { Duration::ZERO },
        ..entry
    }
}

impl BackendFileSystem for Bounded {
    fn mount(&self) -> io::Result<(Entry, u64)> {
        // Owners come and go.
        self.host.mount().map(|(mut entry, last)| {
            entry.entry_timeout = Duration::ZERO;
            (entry, last)
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl FileSystem for Bounded {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.host.init(capable)
    }

    fn destroy(&self) {
        self.held.clear();
        self.host.destroy();
    }

    fn lookup(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let found = self.find(context, parent, name);
        let is_absent = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
        if found.as_ref().is_err_and(is_absent) && self.is_private(context, parent) {
            // An entry without a file is believed, an error is not.
            return Ok(Entry {
                entry_timeout: PRIVATE_LIFE,
                ..Entry::default()
            });
        }
        found
    }

    fn forget(&self, context: &Context, inode: u64, count: u64) {
        let count = self.held.forgotten(inode, count);
        if count > 0 {
            self.host.forget(context, inode, count);
        }
    }

    fn getattr(
        &self,
        context: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let (now, _) = self.or_stale(inode, self.host.getattr(context, inode, handle))?;
        let life = self.life(&now);
        self.held.told(inode, version(&now), life);
        Ok((now, life))
    }

    fn setattr(
        &self,
        context: &Context,
        inode: u64,
        attributes: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let set = self.host.setattr(context, inode, attributes, handle, valid);
        self.held.changed(inode);
        let (now, _) = self.or_stale(inode, set)?;
        let life = self.life(&now);
        self.held.told(inode, version(&now), life);
        Ok((now, life))
    }

    fn readlink(&self, context: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.or_stale(inode, self.host.readlink(context, inode))
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.entry(parent, || self.host.symlink(context, target, parent, name))
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        mask: u32,
    ) -> io::Result<Entry> {
        self.entry(parent, || {
            self.host.mknod(context, parent, name, mode, device, mask)
        })
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        mask: u32,
    ) -> io::Result<Entry> {
        self.entry(parent, || {
            self.host.mkdir(context, parent, name, mode, mask)
        })
    }

    fn unlink(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.host.unlink(context, parent, name)
    }

    fn rmdir(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.host.rmdir(context, parent, name)
    }

    fn rename(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.host
            .rename(context, parent, name, new_parent, new_name, flags)
    }

    fn link(&self, context: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.entry(parent, || {
            self.or_stale(inode, self.host.link(context, inode, parent, name))
        })
    }

    fn open(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<Opened> {
        // What the guest itself is about to change, it does not believe in afterwards.
        if flags & libc::O_TRUNC as u32 != 0 {
            self.held.changed(inode);
        } else if let Ok((now, _)) = self.host.getattr(context, inode, None)
            && self.held.refuses(inode, version(&now))
        {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        let (handle, mut options, backing) = self.open_file(context, inode, flags, fuse_flags)?;
        let now = self.host.getattr(context, inode, None);
        let now = now.ok().map(|(now, _)| now);
        let changed = now.as_ref().and_then(keep_cache::change_time);
        let is_private = now.is_some_and(|now| self.private.has(now.st_dev));
        if self.held.keeps(inode, changed, SystemTime::now())
            || is_private && !self.held.was_refused(inode)
        {
            options |= OpenOptions::KEEP_CACHE;
        }
        if now.is_some_and(|now| self.is_made_when_read(context, inode, &now)) {
            options |= OpenOptions::DIRECT_IO;
        }
        if !self.flushes() || flags & libc::O_ACCMODE as u32 == libc::O_RDONLY as u32 {
            options |= no_flush();
        }
        Ok((handle, options, backing))
    }

    /// Here, because [`PassthroughFs`] counts a file as looked up also if it is there already and can't
    /// be opened, of which the guest is not told.
    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        arguments: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let exclusive = libc::O_EXCL as u32;
        let may_exist = arguments.flags & exclusive == 0;
        for _ in 0..ATTEMPTS {
            if may_exist {
                match self.find(context, parent, name) {
                    Ok(entry) => {
                        let (flags, fuse_flags) = (arguments.flags, arguments.fuse_flags);
                        let opened = self.open_file(context, entry.inode, flags, fuse_flags);
                        if opened.is_err() {
                            self.forget(context, entry.inode, 1);
                        }
                        let (handle, options, backing) = opened?;
                        return Ok((entry, handle, options, backing));
                    }
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => return Err(error),
                }
            }
            self.held.room()?;
            let arguments = CreateIn {
                flags: arguments.flags | exclusive,
                ..arguments
            };
            match self.host.create(context, parent, name, arguments) {
                Err(error) if may_exist && error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(error) => return Err(error),
                Ok((entry, handle, mut options, backing)) => {
                    let life = self.life(&entry.attr);
                    let version = version(&entry.attr);
                    let known = self.held.created(entry.inode, version, life);
                    self.held.opened(handle, file(entry.inode, arguments.flags));
                    if !self.flushes() {
                        options |= no_flush();
                    }
                    return Ok((told(entry, known, life), handle, options, backing));
                }
            }
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    fn read(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.host.read(
            context, inode, handle, writer, size, offset, lock_owner, flags,
        )
    }

    fn write(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.held.changed(inode);
        self.host.write(
            context, inode, handle, reader, size, offset, lock_owner, delayed, flags, fuse_flags,
        )
    }

    fn flush(&self, context: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.host.flush(context, inode, handle, lock_owner)
    }

    fn fsync(&self, context: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.host.fsync(context, inode, data_only, handle)
    }

    fn fallocate(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.held.changed(inode);
        self.host
            .fallocate(context, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.host
            .release(context, inode, flags, handle, flush, flock, lock_owner)
            .inspect(|()| self.held.released(handle, inode))
    }

    fn statfs(&self, context: &Context, inode: u64) -> io::Result<statvfs64> {
        self.or_stale(inode, self.host.statfs(context, inode))
    }

    fn setxattr(
        &self,
        context: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.held.changed(inode);
        self.or_stale(
            inode,
            self.host.setxattr(context, inode, name, value, flags),
        )
    }

    fn getxattr(
        &self,
        context: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.or_stale(inode, self.host.getxattr(context, inode, name, size))
    }

    fn listxattr(&self, context: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.or_stale(inode, self.host.listxattr(context, inode, size))
    }

    fn removexattr(&self, context: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.held.changed(inode);
        self.or_stale(inode, self.host.removexattr(context, inode, name))
    }

    fn opendir(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.held.opening(inode)?;
        let opened = self.host.opendir(context, inode, flags);
        let (handle, mut options) = opened.inspect_err(|_| self.held.not_opened(inode))?;
        let directory = Open {
            directory: true,
            ..file(inode, flags)
        };
        self.held.opened(handle, directory);
        if self.is_private(context, inode) {
            options |= OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE;
        }
        Ok((handle, options))
    }

    fn readdir(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        // It looks up what it lists, and forgets it again.
        self.held.room()?;
        let mut add = |entry: DirEntry<'_>| {
            self.held.saw(entry.ino);
            add_entry(entry)
        };
        self.host
            .readdir(context, inode, handle, size, offset, &mut add)
    }

    fn readdirplus(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.held.room()?;
        let mut refused = None;
        let mut is_empty = true;
        let mut add = |listed: DirEntry<'_>, entry: Entry| {
            let number = entry.inode;
            let added = self.held.room().and_then(|()| {
                let added = add_entry(listed, self.tell(inode, entry));
                // An entry of which nothing was added is forgotten there.
                if !matches!(added, Ok(length) if length > 0) {
                    self.held.not_told(number);
                }
                added
            });
            match added {
                Ok(length) => {
                    is_empty &= length == 0;
                    Ok(length)
                }
                Err(error) => {
                    self.held.saw(number);
                    refused = Some(error);
                    Ok(0)
                }
            }
        };
        self.host
            .readdirplus(context, inode, handle, size, offset, &mut add)?;
        match refused {
            // Nothing would mean that the directory has no more.
            Some(error) if is_empty => Err(error),
            _ => Ok(()),
        }
    }

    fn fsyncdir(
        &self,
        context: &Context,
        inode: u64,
        data_only: bool,
        handle: u64,
    ) -> io::Result<()> {
        self.host.fsyncdir(context, inode, data_only, handle)
    }

    fn releasedir(&self, context: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.host
            .releasedir(context, inode, flags, handle)
            .inspect(|()| self.held.released(handle, inode))
    }

    fn access(&self, context: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.or_stale(inode, self.host.access(context, inode, mask))
    }

    fn lseek(
        &self,
        context: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.host.lseek(context, inode, handle, offset, whence)
    }
}

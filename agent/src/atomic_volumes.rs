//! Copies in memory of atomic volumes, which kubelet replaces as a whole (its `AtomicWriter`): config
//! maps, secrets, projected and downward-API volumes. A change on the host is no operation of this kernel, so nobody in the guest
//! could watch for it. It is repeated here, in kubelet's own steps, on what containers have mounted:
//!
//! ```text
//! <volume>/key      -> ..data/key
//! <volume>/..data   -> ..2025_11_25     replaced by one rename
//! <volume>/..2025_11_25/key             there as a whole before that, gone after it
//! ```

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs::{self, File, FileTimes, Permissions},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, chown, lchown, symlink},
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use error_reporter::Report;
use nix::mount::{MsFlags, mount};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, openat, readlinkat, statat};
use tracing::warn;

use crate::ident::Id;

/// The link to the present content.
const DATA: &str = "..data";
/// Most bytes that a volume has to have a copy.
const BYTES_MAX: u64 = 4 << 20;
/// Most files and directories that it has.
const ENTRIES_MAX: u64 = 1000;
/// How much of the guest's memory all copies may take, the next ones of an update among them.
const MEMORY: &str = "size=6%,mode=0700";
/// How often a volume is read that changes meanwhile.
const ATTEMPTS: usize = 5;

/// Why there is no copy of a volume, or an old one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("it has {0:?}, which kubelet makes in no such volume")]
    Layout(OsString),
    #[error("it has more than {BYTES_MAX} bytes or {ENTRIES_MAX} files")]
    TooLarge,
    #[error("it changes while it is read")]
    Changing,
    #[error("copy it")]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for CopyError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

/// Volumes whose copies are behind; they stay as they were.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub(crate) struct Behind(Vec<String>);

/// All copies.
#[derive(Debug)]
pub(crate) struct AtomicVolumes {
    dir: PathBuf,
    copies: Mutex<Copies>,
}

#[derive(Debug, Default)]
struct Copies {
    is_mounted: bool,
    /// How many there were.
    count: u64,
    by_source: HashMap<PathBuf, Copy>,
}

#[derive(Debug)]
struct Copy {
    /// What the host calls the volume.
    name: String,
    path: PathBuf,
    users: BTreeSet<Id>,
}

impl AtomicVolumes {
    /// Starts without copies, which will be below `dir`.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            copies: Mutex::default(),
        }
    }

    fn copies(&self) -> MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the copy of `source`, as it is now, for the container `user`; none when there can't
    /// be one.
    pub(crate) fn add(&self, name: &str, source: &Path, user: &Id) -> Option<PathBuf> {
        match self.try_add(name, source, user) {
            Ok(path) => Some(path),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                warn!(volume = name, error, "a volume is mounted without a copy");
                None
            }
        }
    }

    fn try_add(&self, name: &str, source: &Path, user: &Id) -> Result<PathBuf, CopyError> {
        let mut copies = self.copies();
        if let Some(copy) = copies.by_source.get_mut(source) {
            update(source, &copy.path)?;
            copy.users.insert(user.clone());
            return Ok(copy.path.clone());
        }
        if !copies.is_mounted {
            fs::create_dir_all(&self.dir)?;
            let flags = MsFlags::empty();
            mount(
                Some("volumes"),
                &self.dir,
                Some("tmpfs"),
                flags,
                Some(MEMORY),
            )
            .map_err(io::Error::from)?;
            copies.is_mounted = true;
        }
        copies.count += 1;
        let path = self.dir.join(copies.count.to_string());
        fs::create_dir(&path)?;
        if let Err(error) = update(source, &path) {
            let _ = fs::remove_dir_all(&path);
            return Err(error);
        }
        let copy = Copy {
            name: name.to_owned(),
            path: path.clone(),
            users: BTreeSet::from([user.clone()]),
        };
        copies.by_source.insert(source.to_owned(), copy);
        Ok(path)
    }

    /// Removes the copies that the container `user` was the last to have.
    pub(crate) fn remove(&self, user: &Id) {
        self.copies().by_source.retain(|_, copy| {
            let was_user = copy.users.remove(user);
            let unused = was_user && copy.users.is_empty();
            if unused && let Err(error) = fs::remove_dir_all(&copy.path) {
                warn!(volume = copy.name, %error, "remove the copy of a volume");
            }
            !unused
        });
    }

    /// Makes all copies what their volumes are now.
    pub(crate) fn refresh(&self) -> Result<(), Behind> {
        let copies = self.copies();
        let results = copies.by_source.iter().map(|(source, copy)| {
            let error = update(source, &copy.path).err()?;
            Some(format!("{}: {}", copy.name, Report::new(&error)))
        });
        let behind: Vec<_> = results.flatten().collect();
        if behind.is_empty() {
            Ok(())
        } else {
            Err(Behind(behind))
        }
    }
}

/// Makes `copy` what the volume `source` is. After a failure it is what it was.
fn update(source: &Path, copy: &Path) -> Result<(), CopyError> {
    let staged = copy.with_extension("new");
    let mut result = Err(CopyError::Changing);
    for _ in 0..ATTEMPTS {
        result = read(source, copy, &staged)
            .and_then(|volume| volume.apply(copy, &staged).map_err(CopyError::from));
        let _ = fs::remove_dir_all(&staged);
        let again = match &result {
            Err(CopyError::Changing) => true,
            // The version was replaced.
            Err(CopyError::Io(error)) => error.kind() == io::ErrorKind::NotFound,
            _ => false,
        };
        if !again {
            break;
        }
    }
    result
}

/// What a volume has besides its versions.
#[derive(Debug)]
struct Volume {
    stat: Stat,
    /// The name of its present version.
    version: OsString,
    data: Link,
    links: BTreeMap<OsString, Link>,
    /// What other volumes are mounted on: directories, and nothing but.
    mount_points: Vec<PathBuf>,
}

/// Reads a volume; its version goes to `staged` when `copy` has another one.
fn read(source: &Path, copy: &Path, staged: &Path) -> Result<Volume, CopyError> {
    let from = open(CWD, source.as_os_str(), OFlags::DIRECTORY)?;
    let data = Link::read(&from, OsStr::new(DATA))?;
    let mut volume = Volume {
        stat: rustix::fs::fstat(&from)?,
        version: data.version()?,
        data,
        links: BTreeMap::new(),
        mount_points: Vec::new(),
    };
    let mut left = Left::default();
    if fs::read_link(copy.join(DATA)).ok().as_deref() != Some(Path::new(&volume.version)) {
        copy_dir(
            &open(&from, &volume.version, OFlags::DIRECTORY)?,
            staged,
            &mut left,
        )?;
    }
    for name in names(&from)? {
        if name.as_bytes().starts_with(b"..") {
            continue;
        }
        left.take_entry()?;
        match file_type(&from, &name)? {
            FileType::Symlink => {
                let link = Link::read(&from, &name)?;
                volume.links.insert(name, link);
            }
            FileType::Directory => {
                let dir = open(&from, &name, OFlags::DIRECTORY)?;
                mount_points(&dir, name.into(), &mut volume.mount_points, &mut left)?;
            }
            _ => return Err(CopyError::Layout(name)),
        }
    }
    let now = Link::read(&from, OsStr::new(DATA))?;
    if now.target == volume.data.target {
        Ok(volume)
    } else {
        Err(CopyError::Changing)
    }
}

impl Volume {
    fn apply(&self, copy: &Path, staged: &Path) -> io::Result<()> {
        own(copy, &self.stat)?;
        if staged.exists() {
            let (version, link) = (copy.join(&self.version), copy.join("..data_tmp"));
            // Of an attempt that failed.
            absent_is_fine(fs::remove_dir_all(&version))?;
            absent_is_fine(fs::remove_file(&link))?;
            fs::rename(staged, version)?;
            self.data.make(&link)?;
            fs::rename(&link, copy.join(DATA))?;
        }
        for dir in &self.mount_points {
            fs::create_dir_all(copy.join(dir))?;
        }
        for (name, link) in &self.links {
            let at = copy.join(name);
            if fs::read_link(&at).ok().as_deref() != Some(Path::new(&link.target)) {
                absent_is_fine(fs::remove_file(&at))?;
                link.make(&at)?;
            }
        }
        for entry in fs::read_dir(copy)? {
            let (entry, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
            let is_dir = fs::symlink_metadata(&entry)?.is_dir();
            match name.as_bytes().starts_with(b"..") {
                true if name == DATA || name == self.version => {}
                true if is_dir => fs::remove_dir_all(entry)?,
                // Mount points stay: another container may have something there.
                false if is_dir || self.links.contains_key(&name) => {}
                _ => fs::remove_file(entry)?,
            }
        }
        Ok(())
    }
}

/// A symbolic link, which is copied and never followed.
#[derive(Debug)]
struct Link {
    target: OsString,
    uid: u32,
    gid: u32,
}

impl Link {
    fn read(dir: &File, name: &OsStr) -> Result<Self, CopyError> {
        let stat = stat(dir, name)?;
        let target = readlinkat(dir, name, Vec::new())?;
        Ok(Self {
            target: OsStr::from_bytes(target.as_bytes()).to_owned(),
            uid: stat.st_uid,
            gid: stat.st_gid,
        })
    }

    fn make(&self, at: &Path) -> io::Result<()> {
        symlink(&self.target, at)?;
        lchown(at, Some(self.uid), Some(self.gid))
    }

    /// The version that it names: a directory beside it that is none of the volume's files.
    fn version(&self) -> Result<OsString, CopyError> {
        let name = self.target.as_bytes();
        let plain = name.starts_with(b"..") && name.len() > 2 && !name.contains(&b'/');
        if plain && self.target != DATA {
            Ok(self.target.clone())
        } else {
            Err(CopyError::Layout(DATA.into()))
        }
    }
}

/// Finds the directories at and below `path`, which is `dir`.
fn mount_points(
    dir: &File,
    path: PathBuf,
    found: &mut Vec<PathBuf>,
    left: &mut Left,
) -> Result<(), CopyError> {
    for name in names(dir)? {
        left.take_entry()?;
        if file_type(dir, &name)? != FileType::Directory {
            return Err(CopyError::Layout(path.into()));
        }
        let below = open(dir, &name, OFlags::DIRECTORY)?;
        mount_points(&below, path.join(&name), found, left)?;
    }
    found.push(path);
    Ok(())
}

/// What a volume may still have.
#[derive(Debug)]
struct Left {
    bytes: u64,
    entries: u64,
}

impl Default for Left {
    fn default() -> Self {
        Self {
            bytes: BYTES_MAX,
            entries: ENTRIES_MAX,
        }
    }
}

impl Left {
    fn take_entry(&mut self) -> Result<(), CopyError> {
        self.entries = self.entries.checked_sub(1).ok_or(CopyError::TooLarge)?;
        Ok(())
    }
}

/// Copies all below `from`, with owners and modes. No link is followed.
fn copy_dir(from: &File, to: &Path, left: &mut Left) -> Result<(), CopyError> {
    fs::create_dir(to)?;
    for name in names(from)? {
        left.take_entry()?;
        let at = to.join(&name);
        match file_type(from, &name)? {
            FileType::Directory => copy_dir(&open(from, &name, OFlags::DIRECTORY)?, &at, left)?,
            FileType::RegularFile => copy_file(&open(from, &name, OFlags::NONBLOCK)?, &at, left)?,
            FileType::Symlink => Link::read(from, &name)?.make(&at)?,
            _ => return Err(CopyError::Layout(name)),
        }
    }
    own(to, &rustix::fs::fstat(from)?)?;
    Ok(())
}

fn copy_file(from: &File, to: &Path, left: &mut Left) -> Result<(), CopyError> {
    let new = File::create_new(to)?;
    let copied = io::copy(&mut from.take(left.bytes + 1), &mut &new)?;
    left.bytes = left.bytes.checked_sub(copied).ok_or(CopyError::TooLarge)?;
    new.set_times(FileTimes::new().set_modified(from.metadata()?.modified()?))?;
    own(to, &rustix::fs::fstat(from)?)?;
    Ok(())
}

/// Gives `path`, which is no link, owner and mode. What is so already gets no event.
fn own(path: &Path, wanted: &Stat) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if (meta.uid(), meta.gid()) != (wanted.st_uid, wanted.st_gid) {
        chown(path, Some(wanted.st_uid), Some(wanted.st_gid))?;
    }
    // After the owner: chown(2) clears set-id bits.
    let mode = wanted.st_mode & 0o7777;
    if fs::symlink_metadata(path)?.mode() & 0o7777 != mode {
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    Ok(())
}

fn open(dir: impl std::os::fd::AsFd, name: &OsStr, flags: OFlags) -> Result<File, CopyError> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(dir, name, flags, Mode::empty())?.into())
}

fn names(dir: &File) -> Result<Vec<OsString>, CopyError> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
        if names.len() as u64 > ENTRIES_MAX + 2 {
            return Err(CopyError::TooLarge);
        }
    }
    Ok(names)
}

fn stat(dir: &File, name: &OsStr) -> Result<Stat, CopyError> {
    Ok(statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn file_type(dir: &File, name: &OsStr) -> Result<FileType, CopyError> {
    Ok(FileType::from_raw_mode(stat(dir, name)?.st_mode))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A volume, as kubelet writes it, and the place of its copy.
    struct Both {
        dir: tempfile::TempDir,
        volume: PathBuf,
        copy: PathBuf,
    }

    impl Both {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (volume, copy) = (dir.path().join("v"), dir.path().join("1"));
            for dir in [&volume, &copy] {
                fs::create_dir(dir).unwrap();
            }
            Self { dir, volume, copy }
        }

        fn with(files: &[(&str, &str)]) -> Self {
            let both = Self::new();
            both.replace("..1", files);
            update(&both.volume, &both.copy).unwrap();
            both
        }

        /// Writes a version; the one before stays.
        fn replace(&self, version: &str, files: &[(&str, &str)]) {
            let dir = self.volume.join(version);
            fs::create_dir(&dir).unwrap();
            for (path, text) in files {
                fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
                fs::write(dir.join(path), text).unwrap();
                let key = Path::new(path).iter().next().unwrap();
                let _ = symlink(Path::new(DATA).join(key), self.volume.join(key));
            }
            self.link(version);
        }

        fn link(&self, version: &str) {
            let link = self.volume.join("..data_tmp");
            symlink(version, &link).unwrap();
            fs::rename(link, self.volume.join(DATA)).unwrap();
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.copy).unwrap();
            let mut names: Vec<_> = entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }

        fn text(&self, path: &str) -> String {
            fs::read_to_string(self.copy.join(path)).unwrap()
        }
    }

    #[test]
    fn a_copy_has_all_that_its_volume_has() {
        let both = Both::new();
        both.replace("..1", &[("a", "1"), ("sub/b", "2")]);
        let version = both.volume.join("..1");
        symlink("/etc/passwd", version.join("link")).unwrap();
        let modes = [(".", 0o2775), ("..1", 0o2750), ("..1/a", 0o440)];
        for (path, mode) in modes {
            fs::set_permissions(both.volume.join(path), Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir_all(both.volume.join("nested/point")).unwrap();
        update(&both.volume, &both.copy).unwrap();
        assert_eq!(both.names(), ["..1", "..data", "a", "nested", "sub"]);
        assert_eq!(
            (both.text("a"), both.text("sub/b")),
            ("1".into(), "2".into())
        );
        assert!(both.copy.join("nested/point").is_dir());
        let link = fs::read_link(both.copy.join("..1/link")).unwrap();
        assert_eq!(link, Path::new("/etc/passwd"));
        for (path, mode) in modes {
            let meta = fs::metadata(both.copy.join(path)).unwrap();
            assert_eq!(meta.mode() & 0o7777, mode, "{path}");
        }
        let modified = |dir: &Path| fs::metadata(dir.join("a")).unwrap().modified().unwrap();
        assert_eq!(modified(&both.copy), modified(&both.volume));
    }

    #[test]
    fn a_copy_follows_and_keeps_its_directories() {
        let both = Both::with(&[("a", "1"), ("gone", "1")]);
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let root = inode(&both.copy);
        fs::create_dir(both.copy.join("mounted")).unwrap();
        both.replace("..2", &[("a", "2"), ("new", "2")]);
        fs::remove_file(both.volume.join("gone")).unwrap();
        update(&both.volume, &both.copy).unwrap();
        assert_eq!(both.names(), ["..2", "..data", "a", "mounted", "new"]);
        assert_eq!((both.text("a"), both.text("new")), ("2".into(), "2".into()));
        assert_eq!(inode(&both.copy), root);
        // Nothing new: nothing is done.
        let version = inode(&both.copy.join("..2"));
        update(&both.volume, &both.copy).unwrap();
        assert_eq!(inode(&both.copy.join("..2")), version);
        // What an attempt left that failed is in nobody's way.
        fs::create_dir(both.copy.join("..3")).unwrap();
        fs::write(both.copy.join("..3/old"), "").unwrap();
        both.replace("..3", &[]);
        update(&both.volume, &both.copy).unwrap();
        assert_eq!(fs::read_dir(both.copy.join("..3")).unwrap().count(), 0);
    }

    #[test]
    fn what_kubelet_does_not_make_is_not_copied() {
        type Change = fn(&Both);
        let changes: [Change; 9] = [
            |both| both.link("/etc"),
            |both| both.link(".."),
            |both| both.link("..data"),
            |both| both.link("..1/sub"),
            |both| both.link("plain"),
            |both| fs::remove_file(both.volume.join(DATA)).unwrap(),
            |both| fs::write(both.volume.join("file"), "").unwrap(),
            |both| {
                fs::create_dir(both.volume.join("dir")).unwrap();
                fs::write(both.volume.join("dir/file"), "").unwrap();
            },
            |both| {
                both.replace("..2", &[]);
                UnixListener::bind(both.volume.join("..2/socket")).unwrap();
            },
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let both = Both::with(&[("sub/a", "1")]);
            change(&both);
            update(&both.volume, &both.copy).unwrap_err();
            assert_eq!(both.names(), ["..1", "..data", "sub"], "{number}");
            assert_eq!(both.text("sub/a"), "1");
            assert!(!both.copy.with_extension("new").exists());
        }
        // A version that is a link leads out of the volume.
        let both = Both::with(&[("a", "1")]);
        symlink("/etc", both.volume.join("..2")).unwrap();
        both.link("..2");
        update(&both.volume, &both.copy).unwrap_err();
        assert_eq!(both.text("a"), "1");
    }

    #[test]
    fn a_volume_that_is_too_large_keeps_its_last_copy() {
        let both = Both::with(&[("a", "1")]);
        let half = "x".repeat(BYTES_MAX as usize / 2);
        both.replace("..2", &[("a", &half), ("b", &half)]);
        update(&both.volume, &both.copy).unwrap();
        both.replace("..3", &[("a", &half), ("b", &half), ("c", "y")]);
        let names: Vec<_> = (0..ENTRIES_MAX).map(|n| n.to_string()).collect();
        let many: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
        let refused = || update(&both.volume, &both.copy).unwrap_err();
        assert!(matches!(refused(), CopyError::TooLarge));
        both.replace("..4", &many);
        assert!(matches!(refused(), CopyError::TooLarge));
        assert_eq!(both.names(), ["..2", "..data", "a", "b"]);
        assert_eq!(both.text("b"), half);
    }

    #[test]
    fn a_copy_lives_as_long_as_one_of_its_users() {
        let both = Both::with(&[("a", "1")]);
        let live = AtomicVolumes::new(both.dir.path().join("live"));
        // Where nothing can be mounted.
        fs::create_dir(&live.dir).unwrap();
        live.copies().is_mounted = true;
        let [one, two] = ["one", "two"].map(|name| Id::parse("id", name).unwrap());
        let path = live.add("v", &both.volume, &one).unwrap();
        both.replace("..2", &[("a", "2")]);
        assert_eq!(live.add("v", &both.volume, &two), Some(path.clone()));
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "2");
        live.remove(&one);
        live.remove(&one);
        both.replace("..3", &[("a", "3")]);
        live.refresh().unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "3");
        fs::write(both.volume.join("odd"), "").unwrap();
        let error = live.refresh().unwrap_err().to_string();
        assert!(error.starts_with("v: it has \"odd\""), "{error}");
        assert_eq!(live.add("v", &both.volume, &one), None);
        live.remove(&two);
        assert!(!path.exists());
        live.refresh().unwrap();
    }
}

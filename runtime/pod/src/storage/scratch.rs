//! Sparse ext4 images, as large as a pod's quota: the scratch disk for writable layers, and the
//! disks of volumes that the guest keeps.
//!
//! Each kind is formatted once for each size and then copied, holes left out: a copy costs the few
//! blocks that a fresh file system has.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::fs::ioctl_ficlone;

use hull_base::faults::{self, Point};
use hull_spec::config::PodsConfig;

use super::{StorageError, holes};

/// What an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Never outlives its VM: it needs no journal.
    Scratch,
    /// A VM may be killed that has it, and the next one has it again.
    Volume,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Scratch => "scratch",
            Self::Volume => "volume",
        }
    }

    /// Options of mkfs.ext4.
    fn features(self) -> &'static [&'static str] {
        match self {
            Self::Scratch => &["-O", "^has_journal,^resize_inode"],
            Self::Volume => &["-O", "^resize_inode", "-J", "size=4"],
        }
    }
}

/// Whether it is a template that was not finished.
pub(crate) fn is_unfinished(name: &str) -> bool {
    let kinds = [Kind::Scratch, Kind::Volume].map(Kind::name);
    let kind = name.split_once('-').map(|(kind, _)| kind);
    kind.is_some_and(|kind| kinds.contains(&kind)) && name.ends_with(".tmp")
}

/// Makes a pod's scratch disk at `path`, where nothing is yet. Blocks.
pub(crate) fn create(config: &PodsConfig, path: &Path) -> Result<File, StorageError> {
    let template = open_template(config, Kind::Scratch)?;
    let disk = open_new(path)?;
    copy_sparse(&template, &disk).map_err(failed("copy", path))?;
    Ok(disk)
}

/// Copies a disk to an empty file: its blocks are shared if the file system can do that, and holes are left
/// out if not. Blocks.
pub(crate) fn copy(from: &Path, to: &File) -> Result<(), StorageError> {
    let disk = File::open(from).map_err(failed("open", from))?;
    copy_file(&disk, to).map_err(failed("copy", from))
}

/// As [`copy`], of an open file. Blocks.
pub(crate) fn copy_file(from: &File, to: &File) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    copy_sparse(from, to)
}

/// As [`copy`], of an open file to `path`, where nothing is yet. Blocks.
pub(crate) fn copy_new(from: &File, path: &Path) -> Result<File, StorageError> {
    let disk = open_new(path)?;
    copy_file(from, &disk).map_err(failed("copy to", path))?;
    Ok(disk)
}

/// Makes an empty file the disk of a volume; `path` is where it will be. Blocks.
pub(super) fn fill_volume(
    config: &PodsConfig,
    disk: &File,
    path: &Path,
) -> Result<(), StorageError> {
    let template = open_template(config, Kind::Volume)?;
    copy_sparse(&template, disk).map_err(failed("copy", path))
}

fn open_template(config: &PodsConfig, kind: Kind) -> Result<File, StorageError> {
    let path = template(config, kind)?;
    File::open(&path).map_err(failed("open", &path))
}

fn template(config: &PodsConfig, kind: Kind) -> Result<PathBuf, StorageError> {
    let name = format!("{}-{}", kind.name(), config.scratch_bytes);
    let path = config.root.join(format!("{name}.template"));
    if path.exists() {
        return Ok(path);
    }
    // Two pods may get here at once: each formats its own file, the last rename wins.
    let random = rand::random::<u64>();
    let work = config.root.join(format!("{name}.{random:x}.tmp"));
    let result = format(&work, kind, config.scratch_bytes)
        .and_then(|()| fs::rename(&work, &path).map_err(failed("rename", &work)));
    if result.is_err() {
        let _ = fs::remove_file(&work);
    }
    result.map(|()| path)
}

fn format(path: &Path, kind: Kind, bytes: u64) -> Result<(), StorageError> {
    let file = open_new(path)?;
    file.set_len(bytes).map_err(failed("size", path))?;
    let mut child = Command::new("mkfs.ext4")
        .args([
            "-q",
            "-F",
            "-m",
            "0",
            "-L",
            &format!("hull-{}", kind.name()),
        ])
        .args(kind.features())
        // Inode tables are holes and read as zeros; nothing is left to initialise later.
        .args(["-E", "lazy_itable_init=0,lazy_journal_init=1"])
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => StorageError::NoMkfs,
            _ => failed("run mkfs.ext4 for", path)(source),
        })?;
    let mut message = String::new();
    if let Some(stderr) = &mut child.stderr {
        // What it said is only for the message.
        let _ = stderr.take(4096).read_to_string(&mut message);
    }
    let status = child.wait().map_err(failed("format", path))?;
    if !status.success() {
        return Err(StorageError::Mkfs {
            path: path.to_owned(),
            message: format!("{} ({status})", message.trim()),
        });
    }
    file.sync_all().map_err(failed("sync", path))
}

fn open_new(path: &Path) -> Result<File, StorageError> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("create", path))
}

/// Copies the parts of `from` that are not holes.
fn copy_sparse(mut from: &File, mut to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut at = 0;
    faults::write(Point::ScratchWrite)?;
    while let Some(data) = holes::data(from, at, length)? {
        from.seek(SeekFrom::Start(data.start))?;
        to.seek(SeekFrom::Start(data.start))?;
        let size = data.end - data.start;
        if io::copy(&mut from.take(size), &mut to)? != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = data.end;
    }
    to.flush()
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> StorageError + 'a {
    move |source| StorageError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn config(root: &Path, bytes: u64) -> PodsConfig {
        PodsConfig {
            scratch_bytes: bytes,
            ..PodsConfig::new(root, root, root)
        }
    }

    #[test]
    fn a_scratch_disk_is_large_and_costs_little() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), 10 << 30);
        for name in ["a", "b"] {
            let path = dir.path().join(name);
            let mut file = create(&config, &path).unwrap();
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!(metadata.len(), 10 << 30);
            let used = metadata.blocks() * 512;
            assert!(used < 1 << 20, "{used} bytes");
            // The magic number of ext4, in its superblock.
            let mut magic = [0; 2];
            file.seek(SeekFrom::Start(1024 + 56)).unwrap();
            file.read_exact(&mut magic).unwrap();
            assert_eq!(magic, [0x53, 0xef]);
        }
        let check = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(dir.path().join("b"))
            .output()
            .unwrap();
        assert!(check.status.success(), "{check:?}");
    }

    #[test]
    fn a_size_that_cannot_be_formatted_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), 4096);
        let path = dir.path().join("disk");
        assert!(matches!(
            create(&config, &path),
            Err(StorageError::Mkfs { .. })
        ));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

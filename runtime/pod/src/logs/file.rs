//! A container's log file and the note of how far it is written.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use super::LogError;
use crate::guest::stdio::OutputKind;

/// The position file: log's inode, its length, bytes of stdout, bytes of stderr; each a
/// little-endian u64. One write, so that a killed daemon leaves it whole.
const POSITION_BYTES: usize = 32;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Position {
    inode: u64,
    length: u64,
    stdout: u64,
    stderr: u64,
}

impl Position {
    fn encode(self) -> [u8; POSITION_BYTES] {
        let mut bytes = [0; POSITION_BYTES];
        let fields = [self.inode, self.length, self.stdout, self.stderr];
        for (field, slot) in fields.iter().zip(bytes.chunks_exact_mut(8)) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; POSITION_BYTES] = bytes.try_into().ok()?;
        let field = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[i * 8..i * 8 + 8]);
            u64::from_le_bytes(word)
        };
        Some(Self {
            inode: field(0),
            length: field(1),
            stdout: field(2),
            stderr: field(3),
        })
    }
}

/// A log file that is written by this process alone. All methods block.
#[derive(Debug)]
pub(crate) struct LogFile {
    /// None: the container has no log file; only the position is kept.
    log: Option<(PathBuf, File)>,
    position_path: PathBuf,
    position_file: File,
    position: Position,
}

impl LogFile {
    /// Opens a log where it was left, or begins it. Missing directories are made.
    ///
    /// # Errors
    /// When a file can't be opened or cut back.
    pub(crate) fn open(log: Option<&Path>, position_path: &Path) -> Result<Self, LogError> {
        let position_file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(position_path)
            .map_err(failed("open", position_path))?;
        let noted = fs::read(position_path)
            .ok()
            .and_then(|bytes| Position::decode(&bytes));
        let mut file = Self {
            log: None,
            position_path: position_path.to_owned(),
            position_file,
            position: noted.unwrap_or_default(),
        };
        if let Some(path) = log {
            let (opened, inode, length) = open_log(path)?;
            match noted {
                Some(noted) if noted.inode == inode => {
                    if length > noted.length {
                        opened
                            .set_len(noted.length)
                            .map_err(failed("cut back", path))?;
                    } else {
                        file.position.length = length;
                    }
                }
                other => {
                    if let Some(noted) = other {
                        cut_back_renamed(path, noted)?;
                    }
                    (file.position.inode, file.position.length) = (inode, length);
                }
            }
            file.log = Some((path.to_owned(), opened));
        }
        file.note()?;
        Ok(file)
    }

    /// Goes on in a new file at the log's path, after the old one was renamed.
    ///
    /// # Errors
    /// When that can't be opened or noted; then the old file is gone on with.
    pub(crate) fn reopen(&mut self) -> Result<(), LogError> {
        let Some((path, file)) = &mut self.log else {
            return Ok(());
        };
        let (opened, inode, length) = open_log(path)?;
        let old = (std::mem::replace(file, opened), self.position);
        (self.position.inode, self.position.length) = (inode, length);
        self.note().inspect_err(|_| {
            self.position = old.1;
            if let Some((_, file)) = &mut self.log {
                *file = old.0;
            }
        })
    }

    /// How many bytes of an output are in the log.
    pub(crate) fn written(&self, output: OutputKind) -> u64 {
        match output {
            OutputKind::Stdout => self.position.stdout,
            OutputKind::Stderr => self.position.stderr,
        }
    }

    /// Appends whole lines that hold the next `bytes` bytes of an output: all of them, or none.
    ///
    /// # Errors
    /// When they can't be written or noted; the call may be repeated.
    pub(crate) fn append(
        &mut self,
        lines: &[u8],
        output: OutputKind,
        bytes: u64,
    ) -> Result<(), LogError> {
        let before = self.position;
        if let Some((path, file)) = &mut self.log {
            if let Err(error) = file.write_all(lines) {
                // Without this, a part of a line would stay and the next attempt follow it.
                let cut = file.set_len(before.length);
                cut.map_err(failed("cut back", path))?;
                return Err(failed("write", path)(error));
            }
            self.position.length += lines.len() as u64;
        }
        match output {
            OutputKind::Stdout => self.position.stdout += bytes,
            OutputKind::Stderr => self.position.stderr += bytes,
        }
        self.note().inspect_err(|_| {
            self.position = before;
            if let Some((_, file)) = &self.log {
                let _ = file.set_len(before.length);
            }
        })
    }

    fn note(&self) -> Result<(), LogError> {
        self.position_file
            .write_all_at(&self.position.encode(), 0)
            .map_err(failed("write", &self.position_path))
    }
}

/// Cuts a batch that was not noted out of a log that was renamed while nobody wrote it: a file
/// beside it, whose name begins with the log's own.
fn cut_back_renamed(path: &Path, noted: Position) -> Result<(), LogError> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    let entries = fs::read_dir(directory).map_err(failed("read", directory))?;
    for entry in entries.flatten() {
        let is_ours = entry.file_name().as_bytes().starts_with(name.as_bytes());
        let (true, Ok(metadata)) = (is_ours, entry.metadata()) else {
            continue;
        };
        if metadata.is_file() && metadata.ino() == noted.inode && metadata.len() > noted.length {
            let path = entry.path();
            let file = OpenOptions::new().write(true).open(&path);
            let cut = file.and_then(|file| file.set_len(noted.length));
            cut.map_err(failed("cut back", &path))?;
        }
    }
    Ok(())
}

/// Opens or begins a log; returns its inode and length too.
fn open_log(path: &Path) -> Result<(File, u64, u64), LogError> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed("make", directory))?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)
        .map_err(failed("open", path))?;
    let metadata = file.metadata().map_err(failed("look at", path))?;
    Ok((file, metadata.ino(), metadata.len()))
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> LogError + 'a {
    move |source| LogError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_was_not_noted_is_cut_out() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("logs/0.log"), dir.path().join("p"));
        let mut file = LogFile::open(Some(&log), &position).unwrap();
        file.append(b"one\n", OutputKind::Stdout, 4).unwrap();
        file.append(b"two\n", OutputKind::Stderr, 4).unwrap();
        drop(file);
        // The daemon is killed between the write and the note.
        let mut raw = OpenOptions::new().append(true).open(&log).unwrap();
        raw.write_all(b"three\n").unwrap();

        let mut file = LogFile::open(Some(&log), &position).unwrap();
        assert_eq!(file.written(OutputKind::Stdout), 4);
        assert_eq!(file.written(OutputKind::Stderr), 4);
        file.append(b"three\n", OutputKind::Stdout, 6).unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"one\ntwo\nthree\n");
    }

    #[test]
    fn a_batch_that_was_not_noted_is_cut_out_of_a_renamed_log_too() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("0.log"), dir.path().join("p"));
        let renamed = dir.path().join("0.log.20300101-000000");
        let mut file = LogFile::open(Some(&log), &position).unwrap();
        file.append(b"one\n", OutputKind::Stdout, 4).unwrap();
        drop(file);
        let mut raw = OpenOptions::new().append(true).open(&log).unwrap();
        raw.write_all(b"two\n").unwrap();
        fs::rename(&log, &renamed).unwrap();

        let mut file = LogFile::open(Some(&log), &position).unwrap();
        assert_eq!(file.written(OutputKind::Stdout), 4);
        file.append(b"two\n", OutputKind::Stdout, 4).unwrap();
        assert_eq!(fs::read(&renamed).unwrap(), b"one\n");
        assert_eq!(fs::read(&log).unwrap(), b"two\n");
    }

    #[test]
    fn a_reopened_log_goes_on_in_a_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("d/0.log"), dir.path().join("p"));
        let renamed = dir.path().join("d/0.log.1");
        let mut file = LogFile::open(Some(&log), &position).unwrap();
        file.append(b"one\n", OutputKind::Stdout, 4).unwrap();
        fs::rename(&log, &renamed).unwrap();
        file.append(b"two\n", OutputKind::Stdout, 4).unwrap();
        file.reopen().unwrap();
        file.append(b"three\n", OutputKind::Stdout, 6).unwrap();
        // Nothing was renamed: nothing is lost.
        file.reopen().unwrap();
        file.append(b"four\n", OutputKind::Stdout, 5).unwrap();
        drop(file);
        assert_eq!(fs::read(&renamed).unwrap(), b"one\ntwo\n");
        let again = LogFile::open(Some(&log), &position).unwrap();
        assert_eq!(again.written(OutputKind::Stdout), 19);
        assert_eq!(fs::read(&log).unwrap(), b"three\nfour\n");
    }

    #[test]
    fn a_log_that_can_not_be_reopened_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("0.log"), dir.path().join("p"));
        let renamed = dir.path().join("0.log.1");
        let mut file = LogFile::open(Some(&log), &position).unwrap();
        fs::rename(&log, &renamed).unwrap();
        fs::create_dir(&log).unwrap();
        assert!(file.reopen().is_err());
        file.append(b"one\n", OutputKind::Stdout, 4).unwrap();
        assert_eq!(fs::read(&renamed).unwrap(), b"one\n");
    }

    #[test]
    fn a_log_that_was_there_is_continued() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("0.log"), dir.path().join("p"));
        fs::write(&log, "older\n").unwrap();
        let mut file = LogFile::open(Some(&log), &position).unwrap();
        file.append(b"new\n", OutputKind::Stdout, 4).unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"older\nnew\n");
    }

    #[test]
    fn without_a_log_file_the_position_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let position = dir.path().join("p");
        let mut file = LogFile::open(None, &position).unwrap();
        file.append(b"x\n", OutputKind::Stdout, 2).unwrap();
        drop(file);
        let file = LogFile::open(None, &position).unwrap();
        assert_eq!(file.written(OutputKind::Stdout), 2);
    }

    #[test]
    fn a_failed_write_leaves_no_part_of_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let position = dir.path().join("p");
        // Every write to it fails with ENOSPC, as on a full disk.
        let mut file = LogFile::open(Some(Path::new("/dev/full")), &position).unwrap();
        assert!(file.append(b"x\n", OutputKind::Stdout, 2).is_err());
        assert_eq!(file.written(OutputKind::Stdout), 0);
    }
}

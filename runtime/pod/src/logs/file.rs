//! A container's log file and the note of how far it is written.
//!
//! Others may write where they are: a pod that collects logs in the log directory, a VMM that is
//! lost in the run directory. So both are opened as [`hull_base::beneath`] does, and the log's directory
//! is looked up anew each time, since a rotator renames.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FileType, OFlags, fstat};

use hull_base::{
    beneath::{self, Directory},
    faults::{self, Point},
};
use hull_spec::spec::{ContainerSpec, SandboxSpec};
use hull_vm::agent::stdio::OutputKind;

use super::LogError;

/// The position file: log's inode, its length, bytes of stdout, bytes of stderr; each a
/// little-endian u64. One write, so that a killed daemon leaves it whole.
const POSITION_BYTES: usize = 32;
/// Most names of a log's directory that are looked at for one that the log was renamed to.
const MOST_NAMES: usize = 10_000;

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
        let position = Self {
            inode: field(0),
            length: field(1),
            stdout: field(2),
            stderr: field(3),
        };
        // No output is that long: what is added to them fits.
        let numbers = [position.length, position.stdout, position.stderr];
        (numbers.iter().all(|number| i64::try_from(*number).is_ok())).then_some(position)
    }
}

/// Where a log is.
#[derive(Debug, Clone)]
pub(crate) struct LogPath {
    /// The sandbox's log directory, which is no link. The way to it is the administrator's.
    pub directory: PathBuf,
    /// The file at or below it, and no link on the way.
    pub file: PathBuf,
}

impl LogPath {
    /// Opens the directory that the log is in.
    fn parent(
        &self,
        open: impl Fn(&Directory, &Path) -> io::Result<Directory>,
    ) -> io::Result<Directory> {
        let trusted = self.directory.parent().unwrap_or(&self.directory);
        let below = self
            .file
            .parent()
            .and_then(|at| at.strip_prefix(trusted).ok());
        let below = below.ok_or_else(|| io::Error::other("it is not in the log directory"))?;
        open(&Directory::open(trusted)?, below)
    }

    fn name(&self) -> &Path {
        Path::new(self.file.file_name().unwrap_or_default())
    }
}

/// Where a container's log is.
pub(crate) fn log_path(sandbox: &SandboxSpec, container: &ContainerSpec) -> Option<PathBuf> {
    let directory = &sandbox.log_directory;
    let is_there = !container.log_path.as_os_str().is_empty() && !directory.as_os_str().is_empty();
    is_there.then(|| directory.join(&container.log_path))
}

/// A log file that is written by this process alone. All methods block.
#[derive(Debug)]
pub(crate) struct LogFile {
    /// None: the container has no log file; only the position is kept.
    log: Option<(LogPath, File)>,
    position_path: PathBuf,
    position_file: File,
    position: Position,
    /// Whether the log has more than was noted, and could not be cut back.
    is_torn: bool,
}

impl LogFile {
    /// Opens a log where it was left, or begins it. Missing directories are made.
    ///
    /// # Errors
    /// When a file can't be opened or cut back.
    pub(crate) fn open(log: Option<LogPath>, position_path: &Path) -> Result<Self, LogError> {
        let position_file = beneath::split(position_path)
            .and_then(|(run, name)| run.file_or_new(name, OFlags::RDWR, 0o600))
            .map_err(failed("open", position_path))?;
        // One byte more would be something else.
        let mut bytes = [0; POSITION_BYTES + 1];
        // One that can't be read is not one that is not there: the guest would be asked again for
        // what it was told is safe.
        let length = position_file
            .read_at(&mut bytes, 0)
            .map_err(failed("read", position_path))?;
        let noted = Position::decode(&bytes[..length]);
        let mut file = Self {
            log: None,
            position_path: position_path.to_owned(),
            position_file,
            position: noted.unwrap_or_default(),
            is_torn: false,
        };
        if let Some(path) = log {
            let (opened, inode, length) = open_log(&path)?;
            match noted {
                Some(noted) if noted.inode == inode => {
                    if length > noted.length {
                        opened
                            .set_len(noted.length)
                            .map_err(failed("cut back", &path.file))?;
                    } else {
                        file.position.length = length;
                    }
                }
                other => {
                    if let Some(noted) = other {
                        cut_back_renamed(&path, noted)?;
                    }
                    (file.position.inode, file.position.length) = (inode, length);
                }
            }
            file.log = Some((path, opened));
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
            if self.is_torn {
                file.set_len(before.length)
                    .map_err(failed("cut back", &path.file))?;
                self.is_torn = false;
            }
            let written = faults::write(Point::LogWrite).and_then(|()| file.write_all(lines));
            if let Err(error) = written {
                // Without this, a part of a line would stay and the next attempt follow it.
                self.is_torn = file.set_len(before.length).is_err();
                return Err(failed("write", &path.file)(error));
            }
            self.position.length += lines.len() as u64;
            faults::point(Point::LogWritten);
        }
        match output {
            OutputKind::Stdout => self.position.stdout += bytes,
            OutputKind::Stderr => self.position.stderr += bytes,
        }
        self.note().inspect_err(|_| {
            self.position = before;
            if let Some((_, file)) = &self.log {
                self.is_torn = file.set_len(before.length).is_err();
            }
        })
    }

    fn note(&self) -> Result<(), LogError> {
        faults::write(Point::NoteWrite)
            .and_then(|()| self.position_file.write_all_at(&self.position.encode(), 0))
            .map_err(failed("write", &self.position_path))?;
        faults::point(Point::LogNoted);
        Ok(())
    }
}

/// Notes that so much of the outputs is not to be in the log that begins: another one has it. Blocks.
///
/// # Errors
/// When it can't be noted.
pub(crate) fn begin_at(position_path: &Path, stdout: u64, stderr: u64) -> Result<(), LogError> {
    let position = Position {
        stdout,
        stderr,
        ..Position::default()
    };
    let note = || -> io::Result<()> {
        let (run, name) = beneath::split(position_path)?;
        let file = run.file_or_new(name, OFlags::RDWR, 0o600)?;
        faults::write(Point::NoteWrite)?;
        file.write_all_at(&position.encode(), 0)
    };
    note().map_err(failed("write", position_path))
}

/// Cuts a batch that was not noted out of a log that was renamed while nobody wrote it: a file
/// beside it, whose name begins with the log's own.
fn cut_back_renamed(path: &LogPath, noted: Position) -> Result<(), LogError> {
    let cut = || -> io::Result<()> {
        let directory = path.parent(Directory::enter)?;
        for name in directory.names()?.take(MOST_NAMES) {
            let name = name?;
            let bytes = name.as_os_str().as_bytes();
            if !bytes.starts_with(path.name().as_os_str().as_bytes()) {
                continue;
            }
            // A rotator may have removed it meanwhile.
            let Ok(held) = directory.hold(&name) else {
                continue;
            };
            let is_log = beneath::file_type(&held)? == FileType::RegularFile;
            if !is_log || fstat(&held)?.st_ino != noted.inode {
                continue;
            }
            let file = beneath::reopen(&held, OFlags::WRONLY)?;
            if file.metadata()?.len() > noted.length {
                file.set_len(noted.length)?;
            }
        }
        Ok(())
    };
    cut().map_err(failed("cut back what was renamed from", &path.file))
}

/// Opens or begins a log; returns its inode and length too.
fn open_log(path: &LogPath) -> Result<(File, u64, u64), LogError> {
    let open = || -> io::Result<File> {
        faults::write(Point::LogOpen)?;
        if let Some(trusted) = path.directory.parent() {
            fs::create_dir_all(trusted)?;
        }
        let directory = path.parent(Directory::make)?;
        directory.file_or_new(path.name(), OFlags::WRONLY | OFlags::APPEND, 0o640)
    };
    let file = open().map_err(failed("open", &path.file))?;
    let metadata = file.metadata().map_err(failed("look at", &path.file))?;
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
    use std::os::unix::fs::symlink;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    /// Opens a log whose log directory is the one above that of the positions.
    fn open(log: &Path, position: &Path) -> Result<LogFile, LogError> {
        let path = LogPath {
            directory: position.parent().unwrap().to_owned(),
            file: log.to_owned(),
        };
        LogFile::open(Some(path), position)
    }

    #[test]
    fn a_batch_that_was_not_noted_is_cut_out() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("logs/0.log"), dir.path().join("p"));
        let mut file = open(&log, &position).unwrap();
        file.append(b"one\n", OutputKind::Stdout, 4).unwrap();
        file.append(b"two\n", OutputKind::Stderr, 4).unwrap();
        drop(file);
        // The daemon is killed between the write and the note.
        let mut raw = File::options().append(true).open(&log).unwrap();
        raw.write_all(b"three\n").unwrap();

        let mut file = open(&log, &position).unwrap();
        assert_eq!(file.written(OutputKind::Stdout), 4);
        assert_eq!(file.written(OutputKind::Stderr), 4);
        file.append(b"three\n", OutputKind::Stdout, 6).unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"one\ntwo\nthree\n");
    }

    #[test]
    fn a_log_may_begin_where_another_one_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("0.log"), dir.path().join("p"));
        begin_at(&position, 4, 7).unwrap();
        let mut file = open(&log, &position).unwrap();
        let written =
            |file: &LogFile| [OutputKind::Stdout, OutputKind::Stderr].map(|k| file.written(k));
        assert_eq!(written(&file), [4, 7]);
        file.append(b"two\n", OutputKind::Stdout, 4).unwrap();
        drop(file);
        assert_eq!(written(&open(&log, &position).unwrap()), [8, 7]);
        assert_eq!(fs::read(&log).unwrap(), b"two\n");
    }

    #[test]
    fn a_batch_that_was_not_noted_is_cut_out_of_a_renamed_log_too() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("0.log"), dir.path().join("p"));
        let renamed = dir.path().join("0.log.20300101-000000");
        let mut file = open(&log, &position).unwrap();
        file.append(b"one\n", OutputKind::Stdout, 4).unwrap();
        drop(file);
        let mut raw = File::options().append(true).open(&log).unwrap();
        raw.write_all(b"two\n").unwrap();
        fs::rename(&log, &renamed).unwrap();

        let mut file = open(&log, &position).unwrap();
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
        let mut file = open(&log, &position).unwrap();
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
        let again = open(&log, &position).unwrap();
        assert_eq!(again.written(OutputKind::Stdout), 19);
        assert_eq!(fs::read(&log).unwrap(), b"three\nfour\n");
    }

    #[test]
    fn a_log_that_can_not_be_reopened_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("0.log"), dir.path().join("p"));
        let renamed = dir.path().join("0.log.1");
        let mut file = open(&log, &position).unwrap();
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
        let mut file = open(&log, &position).unwrap();
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
        let (log, position) = (dir.path().join("0.log"), dir.path().join("p"));
        let mut file = open(&log, &position).unwrap();
        // Every write to it fails with ENOSPC, as on a full disk.
        let full = File::options().append(true).open("/dev/full").unwrap();
        file.log.as_mut().unwrap().1 = full;
        assert!(file.append(b"x\n", OutputKind::Stdout, 2).is_err());
        assert_eq!(file.written(OutputKind::Stdout), 0);
    }

    #[test]
    fn what_is_no_log_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("logs");
        fs::create_dir(&logs).unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let victim = outside.join("0.log");
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, logs.join("link")).unwrap();
        symlink(outside.join("new"), logs.join("dangling")).unwrap();
        symlink(&outside, logs.join("dir")).unwrap();
        mkfifo(&logs.join("fifo"), Mode::S_IRWXU).unwrap();
        symlink("/dev/null", logs.join("device")).unwrap();
        for (number, name) in [
            "link",
            "dangling",
            "dir/0.log",
            "dir/sub/0.log",
            "fifo",
            "device",
        ]
        .into_iter()
        .enumerate()
        {
            let position = logs.join(format!("position-{number}"));
            open(&logs.join(name), &position).unwrap_err();
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        // Neither is the log directory a link; what is above it may be.
        let position = dir.path().join("p");
        let path = |directory: PathBuf| LogPath {
            file: directory.join("sub/0.log"),
            directory,
        };
        LogFile::open(Some(path(logs.join("dir"))), &position).unwrap_err();
        LogFile::open(Some(path(logs.join("dir/pod"))), &position).unwrap();
        assert!(outside.join("pod/sub/0.log").is_file());
        // Nor what a log is renamed to, nor the note.
        let log = logs.join("0.log");
        let position = logs.join("p");
        let mut file = open(&log, &position).unwrap();
        file.append(b"one\n", OutputKind::Stdout, 4).unwrap();
        drop(file);
        fs::remove_file(&log).unwrap();
        symlink(&victim, &log).unwrap();
        open(&log, &position).unwrap_err();
        fs::remove_file(&log).unwrap();
        symlink(&victim, logs.join("0.log.1")).unwrap();
        open(&log, &position).unwrap();
        fs::remove_file(&position).unwrap();
        symlink(&victim, &position).unwrap();
        open(&log, &position).unwrap_err();
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
    }

    #[test]
    fn a_log_that_became_a_link_is_not_reopened() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("0.log"), dir.path().join("p"));
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let mut file = open(&log, &position).unwrap();
        fs::rename(&log, dir.path().join("0.log.1")).unwrap();
        symlink(&victim, &log).unwrap();
        assert!(file.reopen().is_err());
        file.append(b"one\n", OutputKind::Stdout, 4).unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
    }

    #[test]
    fn a_note_with_numbers_that_cannot_be_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (log, position) = (dir.path().join("0.log"), dir.path().join("p"));
        fs::write(&position, [0xff; POSITION_BYTES]).unwrap();
        let mut file = open(&log, &position).unwrap();
        file.append(b"one\n", OutputKind::Stdout, 4).unwrap();
        assert_eq!(file.written(OutputKind::Stdout), 4);
        fs::write(&position, vec![0; 1 << 20]).unwrap();
        assert_eq!(
            open(&log, &position).unwrap().written(OutputKind::Stdout),
            0
        );
    }
}

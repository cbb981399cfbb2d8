//! The CRI socket's file, and the directories: who may look into them, and their locks.
//!
//! What is in the directories is the daemon's user's alone: records hold the environments of
//! containers, disks their files, sockets their lives. The file mode mask sees to that for what is
//! new, [`own_directory`] for what is there.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::stat::{Mode, umask},
    unistd::geteuid,
};
use tokio::net::UnixListener;
use tracing::info;

/// How long a lock is waited for that may be a dead daemon's.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Why a daemon can't take its place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Another daemon works in the same directory.
    #[error("lock {}: another hull (process {pid}) uses this directory", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// As written in the file.
        pid: String,
    },
    /// Somebody answers on the socket.
    #[error("listen on {}: another process serves this socket", .0.display())]
    Served(PathBuf),
    /// There is a file of another kind.
    #[error("listen on {}: there is a file that is no socket", .0.display())]
    NoSocket(PathBuf),
    /// It is another user's.
    #[error("use directory {}: it belongs to user {owner}, and this is user {user}", path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who runs the daemon.
        user: u32,
    },
    /// Others can put there what the daemon would take for its own.
    #[error("use directory {}: others may write to it (mode {mode:04o}); look at what is in it, then chmod 0700", path.display())]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Makes a directory that only root may enter, unless it is there.
pub(crate) fn private_directory(path: &Path) -> Result<(), SocketError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed("create directory", path))
}

/// Makes what this process creates from now on its user's alone, unless a mode is set.
pub(crate) fn keep_private() {
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
}

/// Makes a directory the daemon's own: makes it unless it is there, and takes from others what they
/// may do with it and with what is in it.
///
/// # Errors
/// When it is another user's, or others may write to it: what is in it may be theirs then.
pub(crate) fn own_directory(path: &Path) -> Result<(), SocketError> {
    private_directory(path)?;
    let meta = fs::metadata(path).map_err(failed("look at", path))?;
    let (owner, user) = (meta.uid(), geteuid().as_raw());
    let mode = meta.permissions().mode() & 0o7777;
    if owner != user {
        let path = path.to_owned();
        return Err(SocketError::Owner { path, owner, user });
    }
    if mode & 0o022 != 0 {
        let path = path.to_owned();
        return Err(SocketError::Writable { path, mode });
    }
    close(path, mode)?;
    // Nobody reaches them any more, and would if the directory were opened again.
    for entry in fs::read_dir(path).map_err(failed("read directory", path))? {
        let path = entry.map_err(failed("read directory", path))?.path();
        let meta = fs::symlink_metadata(&path).map_err(failed("look at", &path))?;
        if !meta.is_symlink() {
            close(&path, meta.permissions().mode() & 0o7777)?;
        }
    }
    Ok(())
}

/// Takes all rights from others.
fn close(path: &Path, mode: u32) -> Result<(), SocketError> {
    if mode & 0o077 == 0 {
        return Ok(());
    }
    info!(path = %path.display(), mode = format!("{mode:04o}"), "close what others could look at");
    fs::set_permissions(path, Permissions::from_mode(mode & 0o700)).map_err(failed("close", path))
}

/// The right to work in a directory alone; given up with the value, or by the
/// kernel when the process ends.
#[derive(Debug)]
pub(crate) struct DirectoryLock {
    _file: Flock<File>,
}

impl DirectoryLock {
    /// Makes the directory if need be and takes its lock, or tells who has it.
    pub(crate) fn take(directory: &Path) -> Result<Self, SocketError> {
        own_directory(directory)?;
        let path = directory.join("hull.lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed("open", &path))?;
        let mut file = match lock(file) {
            Ok(file) => file,
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                // Only for the message; a holder that did not write it yet is named "?".
                let _ = file.read_to_string(&mut pid);
                let pid = if pid.trim().is_empty() {
                    "?"
                } else {
                    pid.trim()
                };
                return Err(SocketError::Locked {
                    pid: pid.to_owned(),
                    path,
                });
            }
            Err((_, errno)) => return Err(failed("lock", &path)(errno.into())),
        };
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(failed("write", &path))?;
        Ok(Self { _file: file })
    }
}

/// Locks `file`, for which it may have to wait a little: a process that a killed daemon was just starting
/// has the daemon's descriptors until it executes its program.
fn lock(mut file: File) -> Result<Flock<File>, (File, Errno)> {
    let begin = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((still, Errno::EWOULDBLOCK)) if begin.elapsed() < LOCK_PATIENCE => file = still,
            locked => return locked,
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Listens on `path`, mode 0600. A socket that nobody serves is replaced.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    if let Some(parent) = path.parent() {
        private_directory(parent)?;
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NoSocket(path.to_owned()));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(SocketError::Served(path.to_owned()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("look at", path)(error)),
    }
    // Bound under another name first, so that nobody can connect before the mode is set.
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(failed("listen on", path))?;
    fs::set_permissions(&fresh, Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&fresh, path))
        .map_err(|error| {
            let _ = fs::remove_file(&fresh);
            failed("listen on", path)(error)
        })?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_owner() {
        let directory = tempfile::tempdir().unwrap();
        let lock = DirectoryLock::take(directory.path()).unwrap();
        let error = DirectoryLock::take(directory.path())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(&format!("process {}", std::process::id())),
            "{error}"
        );
        drop(lock);
        DirectoryLock::take(directory.path()).unwrap();
    }

    #[test]
    fn a_lock_that_is_let_go_in_a_moment_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let lock = DirectoryLock::take(directory.path()).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let holder = std::thread::spawn(move || {
            told.recv().unwrap();
            std::thread::sleep(LOCK_PATIENCE / 10);
            drop(lock);
        });
        tell.send(()).unwrap();
        DirectoryLock::take(directory.path()).unwrap();
        holder.join().unwrap();
    }

    #[test]
    fn a_directory_that_others_could_read_is_closed_with_all_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let elsewhere = tempfile::NamedTempFile::new().unwrap();
        let open = |path: &Path, mode| {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        };
        open(elsewhere.path(), 0o644);
        fs::create_dir(path.join("cni")).unwrap();
        fs::write(path.join("hull.redb"), "").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), path.join("link")).unwrap();
        open(&path.join("cni"), 0o755);
        open(&path.join("hull.redb"), 0o644);
        open(path, 0o755);
        let _lock = DirectoryLock::take(path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let modes = ["", "cni", "hull.redb", "link"].map(|name| mode(&path.join(name)));
        assert_eq!(modes, [0o700, 0o700, 0o600, 0o644]);
    }

    #[test]
    fn a_directory_of_others_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for mode in [0o777, 0o1777, 0o720, 0o702] {
            fs::set_permissions(directory.path(), Permissions::from_mode(mode)).unwrap();
            let error = DirectoryLock::take(directory.path()).unwrap_err();
            assert!(matches!(error, SocketError::Writable { .. }), "{error}");
        }
        fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).unwrap();
        if geteuid().is_root() {
            std::os::unix::fs::chown(directory.path(), Some(65534), None).unwrap();
            let error = DirectoryLock::take(directory.path()).unwrap_err();
            assert!(matches!(error, SocketError::Owner { .. }), "{error}");
        } else {
            println!("SKIPPED: a directory of another user: not root");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hull.sock");
        let first = listen(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(listen(&path), Err(SocketError::Served(_))));
        drop(first);
        let _second = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn another_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hull.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}

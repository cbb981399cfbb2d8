//! The CRI socket's file and the locks on the directories.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use tokio::net::UnixListener;

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

/// The right to work in a directory alone; given up with the value, or by the
/// kernel when the process ends.
#[derive(Debug)]
pub(crate) struct DirectoryLock {
    _file: Flock<File>,
}

impl DirectoryLock {
    /// Makes the directory if need be and takes its lock, or tells who has it.
    pub(crate) fn take(directory: &Path) -> Result<Self, SocketError> {
        private_directory(directory)?;
        let path = directory.join("hull.lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed("open", &path))?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
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

/// Listens on `path`, mode 0660. A socket that nobody serves is replaced.
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
    fs::set_permissions(&fresh, Permissions::from_mode(0o660))
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

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hull.sock");
        let first = listen(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o660
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

//! Network namespaces kept by name, and work done inside them.

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

/// Why a namespace could not be made, entered or removed.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// A step of making it.
    #[error("{action} for network namespace {path}")]
    Create {
        /// The step.
        action: &'static str,
        /// The namespace's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It can't be entered.
    #[error("enter network namespace {path}")]
    Enter {
        /// The namespace's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It can't be removed.
    #[error("remove network namespace {path}")]
    Remove {
        /// The namespace's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The thread that works inside ended early.
    #[error("work in network namespace {path} was lost")]
    Lost {
        /// The namespace's file.
        path: PathBuf,
    },
}

/// Makes a namespace and binds it to `path`; what was there before under this
/// name is removed first. Blocks.
///
/// # Errors
/// The step that failed; nothing is left at `path`.
pub fn create(path: &Path) -> Result<(), NetnsError> {
    let failed = |action: &'static str| {
        let path = path.to_owned();
        move |source: io::Error| NetnsError::Create {
            action,
            path,
            source,
        }
    };
    remove(path)?;
    if let Some(parent) = path.parent() {
        // As ip-netns(8) makes it, whatever the mask: it is not ours alone.
        if !parent.try_exists().map_err(failed("look at directory"))? {
            fs::create_dir_all(parent)
                .and_then(|()| fs::set_permissions(parent, Permissions::from_mode(0o755)))
                .map_err(failed("make directory"))?;
        }
    }
    File::create(path).map_err(failed("make mount point"))?;
    // `unshare` moves one thread: a short-lived one of our own.
    let target = path.to_owned();
    let made = thread::spawn(move || -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        mount(
            Some("/proc/thread-self/ns/net"),
            &target,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )?;
        Ok(())
    })
    .join()
    .unwrap_or_else(|_| Err(io::Error::other("thread panicked")));
    if let Err(source) = made {
        // The failure that matters is the first one.
        let _ = fs::remove_file(path);
        return Err(failed("unshare and bind")(source));
    }
    Ok(())
}

/// Unbinds a namespace and removes its name; it is no error when it is gone.
/// What still runs inside keeps the namespace itself alive. Blocks.
///
/// # Errors
/// When it can't be unmounted or unlinked.
pub fn remove(path: &Path) -> Result<(), NetnsError> {
    let failed = |source: io::Error| NetnsError::Remove {
        path: path.to_owned(),
        source,
    };
    match umount2(path, MntFlags::MNT_DETACH) {
        // EINVAL: a plain file, left by a crash between its two steps.
        Ok(()) | Err(nix::Error::ENOENT | nix::Error::EINVAL) => {}
        Err(errno) => return Err(failed(errno.into())),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}

/// Runs `work` on a thread of its own inside the namespace.
///
/// # Errors
/// When the namespace can't be entered, and what `work` returns.
pub async fn within<T, E, F>(path: PathBuf, work: F) -> Result<T, E>
where
    T: Send + 'static,
    E: From<NetnsError> + Send + 'static,
    F: FnOnce() -> Result<T, E> + Send + 'static,
{
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let namespace = path.clone();
    // Not tokio's pool: its threads go on to do other work.
    thread::spawn(move || {
        let entered = File::open(&namespace)
            .and_then(|file| Ok(setns(file, CloneFlags::CLONE_NEWNET)?))
            .map_err(|source| {
                E::from(NetnsError::Enter {
                    path: namespace,
                    source,
                })
            });
        // A receiver that is gone no longer wants the result.
        let _ = sender.send(entered.and_then(|()| work()));
    });
    receiver
        .await
        .unwrap_or_else(|_| Err(E::from(NetnsError::Lost { path })))
}

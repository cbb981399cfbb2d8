//! What the process of a VM may see and do, from before it reads the first byte of a request or of a
//! guest's files. It has what is open by then, and what the daemon sends with requests.

use std::io;
use std::path::Path;

use hull_jail::{JailError, Reach, Root};
use rustix::process::Resource;

/// Descriptors: devices have some each, and a disk one for each layer of its image.
const FILES: u64 = 1 << 16;
/// Threads of the pod's user: 254 vCPUs, and those of devices.
const THREADS: u64 = 512;

/// Closes what the process got from who started it, and waits until that one has written down which
/// process this is: the byte on standard input says so. Else nobody would find it.
///
/// # Errors
/// When who started it is gone: the process is of no use.
pub fn wait_until_known() -> io::Result<()> {
    hull_jail::close_others().map_err(io::Error::other)?;
    io::Read::read_exact(&mut io::stdin(), &mut [0])
}

/// Locks the process in: this unprivileged user, an empty root in the place of the directory `at`, own
/// namespaces. There must be one thread, in a new pid namespace.
///
/// # Errors
/// [`JailError`]: the process is of no use.
pub fn enter(user: u32, at: &Path) -> Result<(), JailError> {
    hull_jail::drop_oom_protection()?;
    hull_jail::leave_namespaces()?;
    hull_jail::empty_root(at, Root::Empty)?;
    hull_jail::limit(&[
        (Resource::Nofile, FILES),
        (Resource::Nproc, THREADS),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ])?;
    hull_jail::become_user(user)?;
    hull_jail::hide_memory()?;
    hull_jail::confine(Reach::Nothing)?;
    Ok(())
}

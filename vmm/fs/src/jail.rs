//! What the server may see and do, from before it reads the first byte of a guest.

use std::path::Path;

use hull_jail::{JailError, Reach, Root};
use rustix::fs::Mode;
use rustix::process::{Resource, umask};
use rustix::thread::CapabilitySet;

use crate::seccomp::{MANAGER, SERVER};

/// Files that the guest may hold open, or have in its caches.
const FILES: u64 = 1 << 19;
/// Memory that the server's tables of those may take, in bytes: a guest must not eat the host's.
const DATA: u64 = 1 << 30;
/// What takes the guest's users for its own: to act for them, whatever the modes say, since the
/// guest's kernel has checked those, with groups that are not known here. CAP_DAC_READ_SEARCH is
/// there to link a file that another user opened (`linkat` with AT_EMPTY_PATH); what else it gives,
/// to open files by handle, [`SERVER`] does not. Not among it: device nodes, mounts, file capabilities.
const POWERS: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// What the manager goes on to need: to clone mounts and attach them in the server's namespace, to
/// enter that, and to find what is to be shared and make mount points whatever their modes say.
const MANAGERS: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH);

/// Leaves to the manager, once it has started the server, what mounts take. It has the host's mount
/// namespace, which is where shares come from.
///
/// # Errors
/// [`JailError`]
pub fn confine_manager() -> Result<(), JailError> {
    hull_jail::drop_oom_protection()?;
    hull_jail::leave_network()?;
    hull_jail::keep_capabilities(MANAGERS)?;
    hull_jail::hide_memory()?;
    MANAGER.apply_by_name()
}

/// Locks the process in: an empty root with nothing of the host, own namespaces, few powers. It
/// ends with its parent. There must be one thread, in a new pid namespace.
///
/// # Errors
/// [`JailError`]: the process is of no use.
pub fn enter(root: &Path) -> Result<(), JailError> {
    hull_jail::end_with_parent()?;
    hull_jail::close_others()?;
    hull_jail::drop_oom_protection()?;
    hull_jail::leave_namespaces()?;
    // The server opens files by their descriptors in /proc. In its pid namespace, it is alone.
    hull_jail::empty_root(root, Root::MountPoints)?;
    hull_jail::limit(&[(Resource::Nofile, FILES), (Resource::Data, DATA)])?;
    umask(Mode::empty());
    hull_jail::keep_capabilities(POWERS)?;
    hull_jail::hide_memory()?;
    hull_jail::confine(Reach::Files)?;
    SERVER.apply_by_name()
}

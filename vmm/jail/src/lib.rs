//! What locks a process in that handles what a guest or a registry says: each step takes something
//! away for good, and fails rather than leave it.
//!
//! All steps are for a process with one thread, since most act on the calling thread alone. The
//! order that works: [`close_others`], [`drop_oom_protection`], [`leave_namespaces`], [`empty_root`], [`limit`], then the powers
//! ([`become_user`] or [`keep_capabilities`]), [`hide_memory`], [`confine`]; and [`end_with_parent`] anywhere
//! but before [`become_user`].
//! A pid namespace is for processes to come, and so for who starts this one: [`start_apart`].

pub mod seccomp;
mod start;

pub use start::start_apart;

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::process::{
    DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, chdir, getrlimit, pivot_root,
    set_dumpable_behavior, set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};

/// The first descriptor after standard input, output and error.
const FIRST_OTHER: u32 = 3;

/// The Landlock rights that this program knows; an older kernel takes away what it knows of them.
const LANDLOCK: ABI = ABI::V6;

/// Why a process could not be locked in. It is of no use then.
#[derive(Debug, thiserror::Error)]
#[error("{action}")]
pub struct JailError {
    action: &'static str,
    #[source]
    source: io::Error,
}

impl JailError {
    /// What could not be done, as a verb, and why.
    #[must_use]
    pub fn new(action: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        Self { action, source }
    }
}

/// A root directory with nothing of the host in it.
#[derive(Debug, Clone, Copy)]
pub enum Root {
    /// Nothing can be made in it.
    Empty,
    /// It has /proc, of the process's own pid namespace, and room for mount points.
    MountPoints,
}

/// Has the process end when its parent does: the thread that started it. To become another
/// user undoes it.
///
/// # Errors
/// [`JailError`]
pub fn end_with_parent() -> Result<(), JailError> {
    step("end with the parent", || {
        set_parent_process_death_signal(Some(Signal::KILL))
    })
}

/// Closes all descriptors but standard input, output and error.
///
/// # Errors
/// [`JailError`]
pub fn close_others() -> Result<(), JailError> {
    // SAFETY: the call only closes descriptors. The caller has opened none that it goes on to use:
    // what a process inherits and does not know is not in use.
    let closed = unsafe { libc::close_range(FIRST_OTHER, u32::MAX, 0) };
    if closed != 0 {
        let error = io::Error::last_os_error();
        return Err(JailError::new("close inherited descriptors", error));
    }
    Ok(())
}

/// Gives up that the kernel spares the process when memory runs out. The daemon has that from the service
/// manager, and its children inherit it; they are to go before the node's other processes do.
///
/// # Errors
/// [`JailError`]
pub fn drop_oom_protection() -> Result<(), JailError> {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let failed = |error| JailError::new("drop the protection from running out of memory", error);
    let score = fs::read_to_string(SCORE).map_err(failed)?;
    if score.starts_with('-') {
        fs::write(SCORE, "0").map_err(failed)?;
    }
    Ok(())
}

/// Goes from the host's networks, System V objects and names to namespaces of its own.
///
/// # Errors
/// [`JailError`]
pub fn leave_network() -> Result<(), JailError> {
    unshare(UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)
}

/// [`leave_network`], and the host's mounts: what is mounted later on one side is not seen on the other.
///
/// # Errors
/// [`JailError`]
pub fn leave_namespaces() -> Result<(), JailError> {
    leave_network()?;
    unshare(UnshareFlags::NEWNS)?;
    step("keep mounts apart", || {
        let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", flags)
    })
}

fn unshare(flags: UnshareFlags) -> Result<(), JailError> {
    step("leave the host's namespaces", || {
        // SAFETY: the table of file descriptors is not among what is unshared.
        unsafe { unshare_unsafe(flags) }
    })
}

/// Makes `at`, an existing directory, the root, after [`leave_namespaces`]. The host's mounts are gone then.
///
/// # Errors
/// [`JailError`]
pub fn empty_root(at: &Path, root: Root) -> Result<(), JailError> {
    let hardened = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let (flags, options): (_, &CStr) = match root {
        Root::Empty => (
            hardened | MountFlags::RDONLY,
            c"mode=0555,size=4k,nr_inodes=2",
        ),
        Root::MountPoints => (hardened, c"mode=0755,size=4m,nr_inodes=64k"),
    };
    step("mount an empty root", || {
        mount("hull", at, "tmpfs", flags, options)?;
        chdir(at)
    })?;
    if matches!(root, Root::MountPoints) {
        step("mount /proc", || {
            rustix::fs::mkdir("proc", Mode::RWXU)?;
            mount("proc", "proc", "proc", hardened, c"")
        })?;
    }
    step("change the root", || {
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        chdir("/")
    })
}

/// Limits what the process may use, for good. A limit that is already lower stays.
///
/// # Errors
/// [`JailError`]
pub fn limit(limits: &[(Resource, u64)]) -> Result<(), JailError> {
    for (resource, wanted) in limits {
        let hard = getrlimit(*resource).maximum.unwrap_or(u64::MAX);
        let to = |limit| Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        step("limit resources", || {
            // Without CAP_SYS_RESOURCE the hard limit stays what it is.
            setrlimit(*resource, to(*wanted))
                .or_else(|_| setrlimit(*resource, to((*wanted).min(hard))))
        })?;
    }
    Ok(())
}

/// Goes over to this user and the group of the same number, without other groups, capabilities, or a
/// way to get any.
///
/// # Errors
/// [`JailError`]
pub fn become_user(id: u32) -> Result<(), JailError> {
    if id == 0 {
        let error = io::Error::other("root is not unprivileged");
        return Err(JailError::new("become another user", error));
    }
    drop_bounds(CapabilitySet::empty())?;
    step("become another user", || {
        let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
        set_thread_groups(&[])?;
        set_thread_res_gid(group, group, group)?;
        set_thread_res_uid(user, user, user)
    })?;
    drop_others(CapabilitySet::empty())
}

/// Stays root, with these capabilities alone, whatever users it acts for or programs it executes.
///
/// # Errors
/// [`JailError`]
pub fn keep_capabilities(kept: CapabilitySet) -> Result<(), JailError> {
    step("drop groups", || set_thread_groups(&[]))?;
    step("keep powers of other users", || {
        set_capabilities_secure_bits(
            CapabilitiesSecureBits::NO_SETUID_FIXUP
                | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
                | CapabilitiesSecureBits::NO_ROOT
                | CapabilitiesSecureBits::NO_ROOT_LOCKED,
        )
    })?;
    drop_bounds(kept)?;
    drop_others(kept)
}

/// Drops capabilities from what the process could ever have.
fn drop_bounds(kept: CapabilitySet) -> Result<(), JailError> {
    step("drop powers", || {
        for bit in 0..64 {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            if kept.contains(capability) {
                continue;
            }
            match remove_capability_from_bounding_set(capability) {
                // Beyond the last one that the kernel knows.
                Err(Errno::INVAL) => break,
                other => other?,
            }
        }
        Ok(())
    })
}

/// Drops capabilities that the process has.
fn drop_others(kept: CapabilitySet) -> Result<(), JailError> {
    step("drop powers", || {
        set_capabilities(
            None,
            CapabilitySets {
                effective: kept,
                permitted: kept,
                inheritable: CapabilitySet::empty(),
            },
        )
    })?;
    step("forbid new powers", || set_no_new_privs(true))
}

/// Has the kernel write no core of the process, and lets no other process of its user look into it.
///
/// # Errors
/// [`JailError`]
pub fn hide_memory() -> Result<(), JailError> {
    limit(&[(Resource::Core, 0)])?;
    step("hide memory", || {
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
    })
}

/// What a process may still reach, as far as Landlock goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// What is open.
    Nothing,
    /// Files, by paths.
    Files,
}

/// Forbids, with Landlock, to reach ports of TCP, abstract sockets and processes outside, and with
/// [`Reach::Nothing`] to open anything by a path. Returns whether the kernel has any of it.
///
/// # Errors
/// [`JailError`]
pub fn confine(reach: Reach) -> Result<bool, JailError> {
    let confine = || {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::from_all(LANDLOCK))?;
        if reach == Reach::Nothing {
            rules = rules.handle_access(AccessFs::from_all(LANDLOCK))?;
        }
        rules.create()?.restrict_self()
    };
    let status = confine()
        .map_err(|error| JailError::new("confine with Landlock", io::Error::other(error)))?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

fn step(
    action: &'static str,
    work: impl FnOnce() -> rustix::io::Result<()>,
) -> Result<(), JailError> {
    work().map_err(|error| JailError::new(action, error))
}

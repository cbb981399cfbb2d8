//! What the server may see and do, from before it reads the first byte of a guest.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::process::{
    Resource, Rlimit, Signal, chdir, getrlimit, pivot_root, set_parent_process_death_signal,
    setrlimit, umask,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
    set_no_new_privs, set_thread_groups, unshare_unsafe,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

/// Files that the guest may hold open, or have in its caches.
const FILES: u64 = 1 << 19;
/// Memory that the server's tables of those may take, in bytes: a guest must not eat the host's.
const DATA: u64 = 1 << 30;
/// Marks the calls of another ABI of the same processor, where the kernel has it.
const X32: i64 = 1 << 30;
/// Room for mount points.
const ROOT: &CStr = c"mode=0755,size=4m,nr_inodes=64k";

/// Why the server could not be locked in.
#[derive(Debug, thiserror::Error)]
#[error("{action}")]
pub struct JailError {
    action: &'static str,
    #[source]
    source: io::Error,
}

/// Locks the process in: an empty root with nothing of the host, own namespaces, few powers. It
/// ends with its parent. There must be one thread, in a new pid namespace.
///
/// # Errors
/// [`JailError`]: the process is of no use.
pub fn enter(root: &Path) -> Result<(), JailError> {
    step("end with the manager", || {
        set_parent_process_death_signal(Some(Signal::KILL))
    })?;
    step("leave the host's namespaces", || {
        let flags = UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS;
        // SAFETY: the table of file descriptors is not among what is unshared.
        unsafe { unshare_unsafe(flags) }
    })?;
    empty_root(root)?;
    limits()?;
    step("drop groups", || set_thread_groups(&[]))?;
    umask(Mode::empty());
    drop_capabilities()?;
    forbid_open_by_handle()
}

fn empty_root(root: &Path) -> Result<(), JailError> {
    let hardened = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    step("keep mounts apart", || {
        let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", flags)
    })?;
    step("mount an empty root", || {
        mount("hull-fs", root, "tmpfs", hardened, ROOT)?;
        chdir(root)
    })?;
    // The server opens files by their descriptors there. In this pid namespace, it is alone.
    step("mount /proc", || {
        rustix::fs::mkdir("proc", Mode::RWXU)?;
        mount("proc", "proc", "proc", hardened, c"")
    })?;
    step("change the root", || {
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        chdir("/")
    })
}

fn limits() -> Result<(), JailError> {
    for (resource, wanted) in [(Resource::Nofile, FILES), (Resource::Data, DATA)] {
        // Without CAP_SYS_RESOURCE the hard limit stays what it is.
        let hard = getrlimit(resource).maximum.unwrap_or(u64::MAX);
        let to = |limit| Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        step("limit resources", || {
            setrlimit(resource, to(wanted)).or_else(|_| setrlimit(resource, to(wanted.min(hard))))
        })?;
    }
    step("limit resources", || {
        let none = Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        setrlimit(Resource::Core, none)
    })
}

/// Keeps what takes the guest's users for its own: to act for them, whatever the modes say, since
/// the guest's kernel has checked those, with groups that are not known here. CAP_DAC_READ_SEARCH
/// is there to link a file that another user opened (`linkat` with AT_EMPTY_PATH); what else it
/// gives, see [`forbid_open_by_handle`]. Not among it: device nodes, mounts, file capabilities.
fn drop_capabilities() -> Result<(), JailError> {
    let kept = CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID;
    step("keep powers of other users", || {
        set_capabilities_secure_bits(
            CapabilitiesSecureBits::NO_SETUID_FIXUP
                | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
                | CapabilitiesSecureBits::NO_ROOT
                | CapabilitiesSecureBits::NO_ROOT_LOCKED,
        )
    })?;
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

/// Forbids to open files by handle, which finds those outside of a share, too.
fn forbid_open_by_handle() -> Result<(), JailError> {
    let forbid = || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let call = libc::SYS_open_by_handle_at;
        let calls = BTreeMap::from([(call, vec![]), (call | X32, vec![])]);
        let refuse = SeccompAction::Errno(Errno::PERM.raw_os_error().unsigned_abs());
        let here = std::env::consts::ARCH.try_into()?;
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, refuse, here)?;
        apply_filter(&BpfProgram::try_from(filter)?)?;
        Ok(())
    };
    forbid().map_err(|error| JailError {
        action: "forbid opening by handle",
        source: io::Error::other(error),
    })
}

fn step(
    action: &'static str,
    work: impl FnOnce() -> rustix::io::Result<()>,
) -> Result<(), JailError> {
    work().map_err(|error| JailError {
        action,
        source: error.into(),
    })
}

//! What a process of a container may do: limits, user, capabilities (OCI runtime specification,
//! "Process").

use std::io;

use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, PosixRlimit, PosixRlimitType, Process,
};
use rustix::{
    fs::Mode,
    process::{Gid, Resource, Rlimit, Uid, setrlimit, umask},
    thread::{
        CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
        configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
        set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};

use super::error::{StepError, doing};

/// The file mode mask of a process that asks for none.
const UMASK: u32 = 0o022;

/// Sets the limits of `process`. Raising them takes powers that it will not have.
pub(super) fn limit(process: &Process) -> Result<(), StepError> {
    let limits = process.rlimits().as_deref().unwrap_or_default();
    for (index, limit) in limits.iter().enumerate() {
        if limits
            .iter()
            .take(index)
            .any(|other| other.typ() == limit.typ())
        {
            return Err(StepError::Refused(format!("{} is set twice", limit.typ())));
        }
        let wanted = Rlimit {
            current: bounded(limit.soft()),
            maximum: bounded(limit.hard()),
        };
        setrlimit(resource(limit), wanted).map_err(doing(&format!("set {}", limit.typ())))?;
    }
    Ok(())
}

fn bounded(limit: u64) -> Option<u64> {
    (limit != libc::RLIM_INFINITY).then_some(limit)
}

fn resource(limit: &PosixRlimit) -> Resource {
    match limit.typ() {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

/// Becomes root of the user namespace that the process has just joined, with all powers in it.
pub(super) fn become_root() -> io::Result<()> {
    set_thread_groups(&[])?;
    become_ids(0, 0)
}

fn become_ids(uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// Becomes the user of `process` with its capabilities and no others. `before_drop` is called with all
/// powers for the last time.
pub(super) fn become_user(
    process: &Process,
    before_drop: impl FnOnce() -> Result<(), StepError>,
) -> Result<(), StepError> {
    let user = process.user();
    let wanted = process.capabilities().as_ref();
    let set = |set: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
        wanted.map_or(CapabilitySet::empty(), |wanted| capabilities(set(wanted)))
    };
    let bounding = set(LinuxCapabilities::bounding);
    let sets = CapabilitySets {
        effective: set(LinuxCapabilities::effective),
        permitted: set(LinuxCapabilities::permitted),
        inheritable: set(LinuxCapabilities::inheritable),
    };
    let ambient = set(LinuxCapabilities::ambient);
    umask(Mode::from_raw_mode(user.umask().unwrap_or(UMASK)));
    // What a process may never have again.
    for capability in (0..=63).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        match capability_is_in_bounding_set(capability) {
            // There are no more.
            Err(_) => break,
            Ok(true) if !bounding.contains(capability) => {
                remove_capability_from_bounding_set(capability)
                    .map_err(doing("drop capabilities for good"))?;
            }
            Ok(_) => {}
        }
    }
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .copied()
        .map(Gid::from_raw)
        .collect();
    set_thread_groups(&groups).map_err(doing("set the groups"))?;
    set_keep_capabilities(true).map_err(doing("keep capabilities"))?;
    become_ids(user.uid(), user.gid()).map_err(doing(&format!(
        "become user {}, group {}",
        user.uid(),
        user.gid()
    )))?;
    set_keep_capabilities(false).map_err(doing("keep no capabilities"))?;
    // A change of the user took them from those in effect.
    take_effect().map_err(doing("use capabilities"))?;
    before_drop()?;
    set_capabilities(None, sets).map_err(doing("set capabilities"))?;
    clear_ambient_capability_set().map_err(doing("clear ambient capabilities"))?;
    for capability in ambient.iter() {
        configure_capability_in_ambient_set(capability, true)
            .map_err(doing("set ambient capabilities"))?;
    }
    if process.no_new_privileges() == Some(true) {
        set_no_new_privs(true).map_err(doing("set no_new_privs"))?;
    }
    Ok(())
}

fn take_effect() -> io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective = sets.permitted;
    Ok(set_capabilities(None, sets)?)
}

fn capabilities(names: &Option<Capabilities>) -> CapabilitySet {
    let known = names.iter().flatten().map(|name| number(*name));
    known.fold(CapabilitySet::empty(), |set, number| {
        set | CapabilitySet::from_bits_retain(1 << number)
    })
}

/// `linux/capability.h`
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        let names = [
            Capability::Chown,
            Capability::SysAdmin,
            Capability::CheckpointRestore,
        ];
        let set = capabilities(&Some(names.into_iter().collect()));
        let wanted =
            CapabilitySet::CHOWN | CapabilitySet::SYS_ADMIN | CapabilitySet::CHECKPOINT_RESTORE;
        assert_eq!(set, wanted);
        assert_eq!(capabilities(&None), CapabilitySet::empty());
    }

    #[test]
    fn no_limit_is_none() {
        assert_eq!(bounded(u64::MAX), None);
        assert_eq!(bounded(1024), Some(1024));
    }
}

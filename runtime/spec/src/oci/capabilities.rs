//! Capabilities: containerd's default set, changed as asked.

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxCapabilities};

use crate::{
    error::PodError,
    field::{CapabilityList, Field},
    spec::ContainerSecurity,
};

const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// All that capabilities(7) knows.
const ALL: [Capability; 41] = [
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::AuditWrite,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Kill,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::Mknod,
    Capability::NetAdmin,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetRaw,
    Capability::Perfmon,
    Capability::Setgid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysChroot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

/// The capability sets of a container's processes.
///
/// # Errors
/// [`PodError::InvalidArgument`] for an unknown name.
pub(super) fn of(security: &ContainerSecurity) -> Result<LinuxCapabilities, PodError> {
    let asked = &security.capabilities;
    let (add_all, add) = parse(CapabilityList::Add, &asked.add)?;
    let (drop_all, drop) = parse(CapabilityList::Drop, &asked.drop)?;
    let (_, ambient) = parse(CapabilityList::AddAmbient, &asked.add_ambient)?;

    let mut set: HashSet<Capability> = if security.privileged || add_all {
        ALL.into()
    } else {
        DEFAULT.into()
    };
    if drop_all && !security.privileged {
        set.clear();
    }
    set.extend(add);
    set.extend(&ambient);
    set.retain(|c| !drop.contains(c));

    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(set.clone()));
    sets.set_effective(Some(set.clone()));
    sets.set_permitted(Some(set));
    // Only what is ambient may be inheritable: everything else would leak into programs with
    // file capabilities (CVE-2022-24769).
    sets.set_inheritable(Some(ambient.clone()));
    sets.set_ambient(Some(ambient));
    Ok(sets)
}

/// Returns whether `ALL` is among the names, and the others.
fn parse(list: CapabilityList, names: &[String]) -> Result<(bool, HashSet<Capability>), PodError> {
    let mut all = false;
    let mut set = HashSet::new();
    for name in names {
        let upper = name.to_ascii_uppercase();
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if bare == "ALL" {
            all = true;
        } else {
            let unknown = |_| {
                let reason = format!("unknown capability {name:?}");
                PodError::invalid(Field::Capabilities(list), reason)
            };
            let capability = bare.parse().map_err(unknown)?;
            set.insert(capability);
        }
    }
    Ok((all, set))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Capabilities;

    fn effective(add: &[&str], drop: &[&str], privileged: bool) -> HashSet<Capability> {
        let names = |n: &[&str]| n.iter().map(|s| (*s).to_owned()).collect();
        let security = ContainerSecurity {
            privileged,
            capabilities: Capabilities {
                add: names(add),
                drop: names(drop),
                add_ambient: Vec::new(),
            },
            ..ContainerSecurity::default()
        };
        of(&security).unwrap().effective().clone().unwrap()
    }

    #[test]
    fn asked_changes_are_made_to_the_default() {
        assert_eq!(effective(&[], &[], false), DEFAULT.into());
        let set = effective(&["CAP_NET_ADMIN", "sys_time"], &["NET_RAW"], false);
        assert!(set.contains(&Capability::NetAdmin) && set.contains(&Capability::SysTime));
        assert!(!set.contains(&Capability::NetRaw));
    }

    #[test]
    fn all_means_all() {
        assert_eq!(effective(&["ALL"], &[], false).len(), 41);
        assert_eq!(effective(&[], &["ALL"], false).len(), 0);
        assert_eq!(
            effective(&["CHOWN"], &["ALL"], false),
            [Capability::Chown].into()
        );
        assert_eq!(effective(&["ALL"], &["CHOWN"], false).len(), 40);
        assert_eq!(effective(&[], &["ALL"], true).len(), 41);
    }

    #[test]
    fn an_unknown_name_is_refused_with_its_field() {
        let security = ContainerSecurity {
            capabilities: Capabilities {
                drop: vec!["CAP_FLY".into()],
                ..Capabilities::default()
            },
            ..ContainerSecurity::default()
        };
        let error = of(&security).unwrap_err().to_string();
        assert!(error.contains("dropped capabilities") && error.contains("CAP_FLY"));
    }
}

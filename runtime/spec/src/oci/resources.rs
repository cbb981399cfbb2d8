//! Limits of a container's cgroup.

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxCpu, LinuxDeviceCgroup, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources,
};

use crate::spec::Resources;

/// Limits, and the rule for devices: none but those that every container has. A privileged
/// container may use all devices of the guest.
pub(super) fn cgroup(asked: Option<&Resources>, privileged: bool) -> LinuxResources {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(privileged);
    rule.set_access(Some("rwm".into()));
    let mut resources = LinuxResources::default();
    resources.set_devices(Some(vec![rule]));
    if let Some(asked) = asked {
        set_limits(&mut resources, asked);
    }
    resources
}

/// Limits alone, for a container that has its rules.
pub fn limits(wanted: &Resources) -> LinuxResources {
    let mut resources = LinuxResources::default();
    resources.set_devices(None);
    set_limits(&mut resources, wanted);
    resources
}

fn set_limits(resources: &mut LinuxResources, asked: &Resources) {
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive(asked.cpu_shares));
    cpu.set_period(positive(asked.cpu_period_us));
    cpu.set_quota(Some(asked.cpu_quota_us).filter(|quota| *quota != 0));
    cpu.set_cpus(Some(asked.cpuset_cpus.clone()).filter(|cpus| !cpus.is_empty()));
    cpu.set_mems(Some(asked.cpuset_mems.clone()).filter(|mems| !mems.is_empty()));
    resources.set_cpu(Some(cpu));

    let mut memory = LinuxMemory::default();
    memory.set_limit(Some(asked.memory_limit_bytes).filter(|limit| *limit != 0));
    resources.set_memory(Some(memory));

    if asked.pids_limit > 0 {
        let mut pids = LinuxPids::default();
        pids.set_limit(asked.pids_limit);
        resources.set_pids(Some(pids));
    }
    if !asked.hugepage_limits.is_empty() {
        let limits = asked.hugepage_limits.iter().map(|asked| {
            let mut limit = LinuxHugepageLimit::default();
            limit.set_page_size(asked.page_size.clone());
            limit.set_limit(i64::try_from(asked.limit_bytes).unwrap_or(i64::MAX));
            limit
        });
        resources.set_hugepage_limits(Some(limits.collect()));
    }
    let unified: HashMap<String, String> = swap(asked)
        .into_iter()
        .chain(asked.unified.clone())
        .collect();
    if !unified.is_empty() {
        resources.set_unified(Some(unified));
    }
}

/// The limit of swap alone. It is asked for together with that of memory, without which it says
/// nothing. libcgroups would leave out a limit of 0.
fn swap(asked: &Resources) -> Option<(String, String)> {
    let limit = match (asked.memory_limit_bytes, asked.memory_swap_limit_bytes) {
        (..=0, _) | (_, 0) => return None,
        (_, ..=-1) => "max".to_owned(),
        (memory, both) => (both - memory).max(0).to_string(),
    };
    Some(("memory.swap.max".to_owned(), limit))
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

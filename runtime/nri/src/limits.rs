//! Limits of a container as a plugin writes them.

use hull_proto_nri::{Field, LinuxResources};
use hull_spec::spec::{HugepageLimit, Resources};

/// A part of a container that a plugin sets; of some there are several, each with a key.
pub(crate) type Part = (Field, String);

/// What a plugin asks for and can't have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Refused {
    /// What of an adjustment or update it is.
    pub(crate) field: String,
    pub(crate) reason: String,
}

impl Refused {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

/// What is asked for, and which parts of a container that are.
///
/// # Errors
/// For what can't be in a VM, and for numbers that can't be.
pub(crate) fn limits(asked: &LinuxResources) -> Result<(Resources, Vec<Part>), Refused> {
    let mut parts = Vec::new();
    let mut limits = Resources::default();
    let mut part = |field| parts.push((field, String::new()));
    let number = |name: &str, value: u64| {
        i64::try_from(value).map_err(|_| Refused::new(name, format!("{value} is too large")))
    };
    if let Some(memory) = asked.memory.as_ref() {
        if let Some(limit) = memory.limit.as_ref() {
            part(Field::MemLimit);
            limits.memory_limit_bytes = limit.value;
        }
        if let Some(swap) = memory.swap.as_ref() {
            part(Field::MemSwapLimit);
            limits.memory_swap_limit_bytes = swap.value;
        }
        let set = [
            ("reservation", memory.reservation.value != 0),
            ("kernel", memory.kernel.value != 0),
            ("kernel_tcp", memory.kernel_tcp.value != 0),
            ("swappiness", memory.swappiness.value != 0),
            ("disable_oom_killer", memory.disable_oom_killer.value),
            ("use_hierarchy", memory.use_hierarchy.value),
        ];
        if let Some((name, _)) = set.iter().find(|(_, set)| *set) {
            let reason =
                "cgroup v2 of the guest has no such limit; a file of `unified` may be meant";
            return Err(Refused::new(format!("resources.memory.{name}"), reason));
        }
    }
    if let Some(cpu) = asked.cpu.as_ref() {
        if let Some(shares) = cpu.shares.as_ref() {
            part(Field::CPUShares);
            limits.cpu_shares = number("resources.cpu.shares", shares.value)?;
        }
        if let Some(quota) = cpu.quota.as_ref() {
            part(Field::CPUQuota);
            limits.cpu_quota_us = quota.value;
        }
        if let Some(period) = cpu.period.as_ref() {
            part(Field::CPUPeriod);
            limits.cpu_period_us = number("resources.cpu.period", period.value)?;
        }
        if cpu.realtime_runtime.value != 0 || cpu.realtime_period.value != 0 {
            let reason = "cgroup v2 of the guest has no such limit";
            return Err(Refused::new("resources.cpu.realtime_runtime", reason));
        }
        if !cpu.cpus.is_empty() {
            part(Field::CPUSetCPUs);
            limits.cpuset_cpus.clone_from(&cpu.cpus);
        }
        if !cpu.mems.is_empty() {
            part(Field::CPUSetMems);
            limits.cpuset_mems.clone_from(&cpu.mems);
        }
    }
    if let Some(pids) = asked.pids.as_ref() {
        part(Field::PidsLimit);
        limits.pids_limit = pids.limit;
    }
    for (name, class) in [
        ("blockio_class", &asked.blockio_class),
        ("rdt_class", &asked.rdt_class),
    ] {
        if !class.value.is_empty() {
            let reason =
                "classes are of the node's devices and caches, which the guest does not have";
            return Err(Refused::new(format!("resources.{name}"), reason));
        }
    }
    if !asked.devices.is_empty() {
        return Err(Refused::new("resources.devices", NODE_DEVICES));
    }
    for limit in &asked.hugepage_limits {
        parts.push((Field::HugepageLimits, limit.page_size.clone()));
        limits.hugepage_limits.push(HugepageLimit {
            page_size: limit.page_size.clone(),
            limit_bytes: limit.limit,
        });
    }
    for (file, value) in &asked.unified {
        parts.push((Field::CgroupsUnified, file.clone()));
        limits.unified.insert(file.clone(), value.clone());
    }
    Ok((limits, parts))
}

/// Why not.
pub(crate) const NODE_DEVICES: &str = "devices are the node's, and a VM has its own";

#[cfg(test)]
mod tests {
    use super::*;
    use hull_proto_nri::{LinuxCPU, LinuxMemory, OptionalInt64, OptionalString, OptionalUInt64};

    #[test]
    fn limits_are_those_of_a_container_and_name_their_parts() {
        let asked = LinuxResources {
            memory: Some(LinuxMemory {
                limit: Some(OptionalInt64 {
                    value: 5,
                    ..OptionalInt64::default()
                })
                .into(),
                ..LinuxMemory::default()
            })
            .into(),
            cpu: Some(LinuxCPU {
                shares: Some(OptionalUInt64 {
                    value: 7,
                    ..OptionalUInt64::default()
                })
                .into(),
                cpus: "0".into(),
                ..LinuxCPU::default()
            })
            .into(),
            unified: [("memory.high".to_owned(), "max".to_owned())].into(),
            ..LinuxResources::default()
        };
        let (limits, parts) = limits(&asked).unwrap();
        assert_eq!((limits.memory_limit_bytes, limits.cpu_shares), (5, 7));
        assert_eq!(
            (limits.cpuset_cpus.as_str(), limits.unified.len()),
            ("0", 1)
        );
        let fields: Vec<Field> = parts.iter().map(|(field, _)| *field).collect();
        let wanted = [
            Field::MemLimit,
            Field::CPUShares,
            Field::CPUSetCPUs,
            Field::CgroupsUnified,
        ];
        assert_eq!(fields, wanted);
    }

    #[test]
    fn what_a_vm_does_not_have_is_refused_by_name() {
        let refused = |change: &dyn Fn(&mut LinuxResources)| {
            let mut asked = LinuxResources::default();
            change(&mut asked);
            limits(&asked).unwrap_err().field
        };
        let class = || {
            Some(OptionalString {
                value: "gold".into(),
                ..OptionalString::default()
            })
        };
        assert_eq!(
            refused(&|r| r.rdt_class = class().into()),
            "resources.rdt_class"
        );
        assert_eq!(
            refused(&|r| r.blockio_class = class().into()),
            "resources.blockio_class"
        );
        assert_eq!(
            refused(&|r| r.devices.push(Default::default())),
            "resources.devices"
        );
        let memory = |r: &mut LinuxResources| {
            r.memory
                .mut_or_insert_default()
                .swappiness
                .mut_or_insert_default()
                .value = 1
        };
        assert_eq!(refused(&memory), "resources.memory.swappiness");
        let shares = |r: &mut LinuxResources| {
            r.cpu
                .mut_or_insert_default()
                .shares
                .mut_or_insert_default()
                .value = u64::MAX
        };
        assert_eq!(refused(&shares), "resources.cpu.shares");
    }
}

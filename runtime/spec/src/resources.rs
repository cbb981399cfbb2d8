//! Limits: what an update changes, and what can be.
//!
//! A field that is zero or empty is not asked for: an update leaves what it was.

use std::collections::BTreeMap;

use crate::{
    error::PodError,
    field::{Field, Limit},
    size::VmSize,
    spec::{HugepageLimit, Resources},
};

const MIB: i64 = 1 << 20;
/// The kernel's period when none is given, in microseconds (cgroup v2 `cpu.max`).
const DEFAULT_PERIOD_US: i64 = 100_000;
/// Bounds of `oom_score_adj` (proc_pid_oom_score_adj(5)).
const OOM_SCORE: std::ops::RangeInclusive<i64> = -1000..=1000;
/// More than any machine has; keeps a list of CPUs short.
const CPU_MAX: u32 = 4096;

/// What is in force after an update.
pub fn merge(now: &Resources, asked: &Resources) -> Resources {
    let number = |now, asked| if asked == 0 { now } else { asked };
    let text = |now: &String, asked: &String| {
        let text = if asked.is_empty() { now } else { asked };
        text.clone()
    };
    Resources {
        cpu_period_us: number(now.cpu_period_us, asked.cpu_period_us),
        cpu_quota_us: number(now.cpu_quota_us, asked.cpu_quota_us),
        cpu_shares: number(now.cpu_shares, asked.cpu_shares),
        cpuset_cpus: text(&now.cpuset_cpus, &asked.cpuset_cpus),
        cpuset_mems: text(&now.cpuset_mems, &asked.cpuset_mems),
        memory_limit_bytes: number(now.memory_limit_bytes, asked.memory_limit_bytes),
        memory_swap_limit_bytes: swap(now, asked),
        pids_limit: number(now.pids_limit, asked.pids_limit),
        oom_score_adj: number(now.oom_score_adj, asked.oom_score_adj),
        hugepage_limits: hugepages(&now.hugepage_limits, &asked.hugepage_limits),
        unified: {
            let mut unified = now.unified.clone();
            unified.extend(asked.unified.clone());
            unified
        },
    }
}

/// The limit of memory and swap together. A new limit of memory alone leaves the swap as it was.
fn swap(now: &Resources, asked: &Resources) -> i64 {
    let (memory, swap) = (now.memory_limit_bytes, now.memory_swap_limit_bytes);
    match asked {
        asked if asked.memory_swap_limit_bytes != 0 => asked.memory_swap_limit_bytes,
        asked if asked.memory_limit_bytes > 0 && memory > 0 && swap >= memory => {
            asked.memory_limit_bytes.saturating_add(swap - memory)
        }
        _ => swap,
    }
}

/// The limits `now` as an update that undoes `wanted`: what had no limit gets none.
pub fn restoring(now: &Resources, wanted: &Resources) -> Resources {
    let number = |now, wanted| if now == 0 && wanted != 0 { -1 } else { now };
    Resources {
        cpu_quota_us: number(now.cpu_quota_us, wanted.cpu_quota_us),
        memory_limit_bytes: number(now.memory_limit_bytes, wanted.memory_limit_bytes),
        ..now.clone()
    }
}

fn hugepages(now: &[HugepageLimit], asked: &[HugepageLimit]) -> Vec<HugepageLimit> {
    let limits: BTreeMap<&str, u64> = now
        .iter()
        .chain(asked)
        .map(|limit| (limit.page_size.as_str(), limit.limit_bytes))
        .collect();
    limits
        .into_iter()
        .map(|(size, limit_bytes)| HugepageLimit {
            page_size: size.into(),
            limit_bytes,
        })
        .collect()
}

/// Refuses limits that are wrong in themselves. `field` is what a limit is in the request.
pub fn check(limits: &Resources, field: fn(Limit) -> Field) -> Result<(), PodError> {
    let invalid = |limit, reason: String| PodError::invalid(field(limit), reason);
    for (name, value) in [
        (Limit::CpuPeriod, limits.cpu_period_us),
        (Limit::CpuShares, limits.cpu_shares),
    ] {
        if value < 0 {
            return Err(invalid(name, format!("{value} is negative")));
        }
    }
    for (name, value) in [
        (Limit::Memory, limits.memory_limit_bytes),
        (Limit::MemorySwap, limits.memory_swap_limit_bytes),
    ] {
        if value < -1 {
            let reason = format!("{value} is neither a size nor -1");
            return Err(invalid(name, reason));
        }
    }
    let (memory, swap) = (limits.memory_limit_bytes, limits.memory_swap_limit_bytes);
    if swap > 0 && memory == 0 {
        let reason = "it needs a limit of memory, which it includes";
        return Err(invalid(Limit::MemorySwap, reason.into()));
    }
    if swap > 0 && swap < memory {
        let reason = format!("{swap} is less than the limit of memory, which it includes");
        return Err(invalid(Limit::MemorySwap, reason));
    }
    if !OOM_SCORE.contains(&limits.oom_score_adj) {
        let reason = format!("{} is not within -1000 and 1000", limits.oom_score_adj);
        return Err(invalid(Limit::OomScoreAdj, reason));
    }
    highest(&limits.cpuset_cpus).map_err(|reason| invalid(Limit::CpusetCpus, reason))?;
    highest(&limits.cpuset_mems).map_err(|reason| invalid(Limit::CpusetMems, reason))?;
    for limit in &limits.hugepage_limits {
        let size = limit.page_size.strip_suffix("B").unwrap_or_default();
        let digits = size.trim_end_matches(['K', 'M', 'G']);
        let known = size.len() == digits.len() + 1
            && digits.parse().is_ok_and(|n: u64| n.is_power_of_two());
        if !known {
            let reason = format!("{:?} is no page size", limit.page_size);
            return Err(invalid(Limit::Hugepages, reason));
        }
    }
    for file in limits.unified.keys() {
        // A name in the cgroup's directory, and not one that moves or kills processes.
        if file.contains(['/', '\0']) || !file.contains('.') || file.starts_with("cgroup.") {
            return Err(invalid(Limit::Unified, format!("{file:?} is no limit")));
        }
    }
    Ok(())
}

/// Refuses limits that a VM does not reach. Limits that are in force already are not looked at:
/// a pod may have containers without limits, whose VM has the configured size.
pub fn check_fits(
    now: &Resources,
    wanted: &Resources,
    vm: VmSize,
    field: fn(Limit) -> Field,
) -> Result<(), PodError> {
    let refuse = |limit, reason: String| PodError::unsatisfiable(field(limit), reason);
    let memory = wanted.memory_limit_bytes;
    let most = vm.memory_mib.saturating_add(vm.pluggable_mib);
    if memory != now.memory_limit_bytes && memory / MIB >= i64::try_from(most).unwrap_or(i64::MAX) {
        return Err(refuse(
            Limit::Memory,
            format!("{memory} bytes are more than the pod's VM can have ({most} MiB)"),
        ));
    }
    let changed =
        (wanted.cpu_quota_us, wanted.cpu_period_us) != (now.cpu_quota_us, now.cpu_period_us);
    let period = match wanted.cpu_period_us {
        0 => DEFAULT_PERIOD_US,
        period => period,
    };
    if changed && wanted.cpu_quota_us > period.saturating_mul(vm.vcpus.into()) {
        return Err(refuse(
            Limit::CpuQuota,
            format!(
                "{} us in {period} us is more than the pod's VM has ({} CPUs), and a VM that \
                 runs does not get more",
                wanted.cpu_quota_us, vm.vcpus
            ),
        ));
    }
    check_cpuset(wanted, vm, field)
}

/// Refuses CPUs and memory nodes that a VM does not have.
fn check_cpuset(limits: &Resources, vm: VmSize, field: fn(Limit) -> Field) -> Result<(), PodError> {
    let lacks = |limit, list: &str, has: String| {
        let reason = format!("{list:?} is for the node; the pod's VM has {has}");
        PodError::unsatisfiable(field(limit), reason)
    };
    let last = u32::from(vm.vcpus).saturating_sub(1);
    if highest(&limits.cpuset_cpus).is_ok_and(|h| h.is_some_and(|h| h > last)) {
        let has = format!("CPUs 0-{last}");
        return Err(lacks(Limit::CpusetCpus, &limits.cpuset_cpus, has));
    }
    if highest(&limits.cpuset_mems).is_ok_and(|h| h.is_some_and(|h| h > 0)) {
        let has = "memory node 0".to_owned();
        return Err(lacks(Limit::CpusetMems, &limits.cpuset_mems, has));
    }
    Ok(())
}

/// The highest number of a list such as `0-3,5`; none when it is empty.
fn highest(list: &str) -> Result<Option<u32>, String> {
    if list.is_empty() {
        return Ok(None);
    }
    let wrong = || format!("{list:?} is no list of numbers");
    let number = |text: &str| match text.parse() {
        Ok(n) if n < CPU_MAX => Ok(n),
        _ => Err(wrong()),
    };
    let mut highest = 0;
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(wrong());
        }
        highest = highest.max(last);
    }
    Ok(Some(highest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn vm() -> VmSize {
        VmSize {
            vcpus: 2,
            memory_mib: 256,
            ..VmSize::UNKNOWN
        }
    }

    #[test]
    fn what_is_not_asked_for_stays() {
        let now = Resources {
            cpu_shares: 512,
            memory_limit_bytes: 64 * MIB,
            oom_score_adj: -5,
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit_bytes: 1,
            }],
            unified: [("pids.max".to_owned(), "7".to_owned())].into(),
            ..Resources::default()
        };
        assert_eq!(merge(&now, &Resources::default()), now);
        let asked = Resources {
            cpuset_cpus: "0".into(),
            memory_limit_bytes: -1,
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit_bytes: 2,
            }],
            unified: [("memory.high".to_owned(), "max".to_owned())].into(),
            ..Resources::default()
        };
        let merged = merge(&now, &asked);
        assert_eq!(merged.cpu_shares, 512);
        assert_eq!(merged.cpuset_cpus, "0");
        assert_eq!(merged.memory_limit_bytes, -1);
        assert_eq!(merged.hugepage_limits[0].limit_bytes, 2);
        assert_eq!(merged.unified.len(), 2);
        assert_eq!(merged.oom_score_adj, -5);
    }

    #[test]
    fn a_limit_of_memory_alone_leaves_the_swap() {
        let of = |memory, swap| Resources {
            memory_limit_bytes: memory,
            memory_swap_limit_bytes: swap,
            ..Resources::default()
        };
        let swap = |now, asked| merge(&now, &asked).memory_swap_limit_bytes;
        assert_eq!(swap(of(10, 15), of(20, 0)), 25);
        assert_eq!(swap(of(10, 10), of(5, 0)), 5);
        assert_eq!(swap(of(10, 15), of(20, 21)), 21);
        assert_eq!(swap(of(10, -1), of(20, 0)), -1);
        assert_eq!(swap(of(0, 0), of(20, 0)), 0);
    }

    #[test]
    fn wrong_limits_are_refused_by_field() {
        let refused = |change: &dyn Fn(&mut Resources)| {
            let mut limits = Resources::default();
            change(&mut limits);
            check(&limits, Field::NewLimit).unwrap_err().to_string()
        };
        for (field, change) in [
            (
                Limit::CpuShares,
                &(|r: &mut Resources| r.cpu_shares = -1) as &dyn Fn(&mut Resources),
            ),
            (Limit::Memory, &|r| {
                r.memory_limit_bytes = -2;
            }),
            (Limit::MemorySwap, &|r| {
                r.memory_swap_limit_bytes = 5;
            }),
            (Limit::MemorySwap, &|r| {
                (r.memory_limit_bytes, r.memory_swap_limit_bytes) = (6, 5);
            }),
            (Limit::OomScoreAdj, &|r| r.oom_score_adj = 1001),
            (Limit::CpusetCpus, &|r| r.cpuset_cpus = "3-1".into()),
            (Limit::CpusetCpus, &|r| r.cpuset_cpus = "0,,1".into()),
            (Limit::CpusetMems, &|r| r.cpuset_mems = "all".into()),
            (Limit::Hugepages, &|r| {
                r.hugepage_limits = vec![HugepageLimit {
                    page_size: "2/../B".into(),
                    limit_bytes: 0,
                }];
            }),
            (Limit::Unified, &|r| {
                r.unified = [("../memory.max".to_owned(), "1".to_owned())].into();
            }),
            (Limit::Unified, &|r| {
                r.unified = [("cgroup.kill".to_owned(), "1".to_owned())].into();
            }),
        ] {
            let error = refused(change);
            assert!(error.starts_with(&format!("{field}: ")), "{error}");
        }
        let good = Resources {
            cpu_quota_us: -1,
            cpuset_cpus: "0-3,5".into(),
            memory_limit_bytes: 5,
            memory_swap_limit_bytes: -1,
            oom_score_adj: -1000,
            hugepage_limits: vec![HugepageLimit {
                page_size: "1GB".into(),
                limit_bytes: 0,
            }],
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Resources::default()
        };
        check(&good, Field::NewLimit).unwrap();
    }

    #[test]
    fn a_vm_can_not_give_more_than_it_has() {
        let now = Resources {
            memory_limit_bytes: 512 * MIB,
            ..Resources::default()
        };
        let with = |change: &dyn Fn(&mut Resources)| {
            let mut wanted = now.clone();
            change(&mut wanted);
            check_fits(&now, &wanted, vm(), Field::NewLimit).map_err(|e| {
                assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
                e.to_string()
            })
        };
        // What was so at the start stays possible.
        with(&|r| r.cpu_quota_us = 200_000).unwrap();
        with(&|r| r.memory_limit_bytes = -1).unwrap();
        with(&|r| r.memory_limit_bytes = 255 * MIB).unwrap();
        with(&|r| r.cpuset_cpus = "0-1".into()).unwrap();
        let memory = with(&|r| r.memory_limit_bytes = 300 * MIB).unwrap_err();
        assert!(memory.contains("memory limit") && memory.contains("256 MiB"));
        let cpu = with(&|r| r.cpu_quota_us = 200_001).unwrap_err();
        assert!(cpu.contains("CPU quota") && cpu.contains("2 CPUs"));
        let cpuset = with(&|r| r.cpuset_cpus = "1-2".into()).unwrap_err();
        assert!(cpuset.contains("CPU set") && cpuset.contains("CPUs 0-1"));
        assert!(with(&|r| r.cpuset_mems = "1".into()).is_err());
    }
}

//! Limits as this guest can keep them: the host speaks of its own processors and page sizes.

use std::{fs, io, path::Path};

use oci_spec::runtime::LinuxResources;

/// Why limits can't be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LimitError {
    #[error("the guest has no huge pages of {0}")]
    PageSize(String),
}

/// Fits `resources` to the guest and to the container's cgroup at `cgroup`.
///
/// Processors and memory nodes that the guest lacks are left out, and a set of nothing else is
/// no limit: which of the host's a vCPU runs on is not the guest's to say. A limit of 0 for huge
/// pages of a size that the guest lacks is kept by itself.
pub(super) fn fit(resources: &mut LinuxResources, cgroup: &Path) -> Result<(), LimitError> {
    if let Some(cpu) = resources.cpu_mut() {
        let online = |name: &str| {
            let file = Path::new("/sys/devices/system").join(name).join("online");
            fs::read_to_string(file).unwrap_or_else(|_| "0".to_owned())
        };
        let cpus = cpu
            .cpus()
            .as_ref()
            .and_then(|set| common(set, &online("cpu")));
        cpu.set_cpus(cpus);
        let mems = cpu
            .mems()
            .as_ref()
            .and_then(|set| common(set, &online("node")));
        cpu.set_mems(mems);
    }
    if let Some(limits) = resources.hugepage_limits().clone() {
        let mut kept = Vec::with_capacity(limits.len());
        for limit in limits {
            let file = cgroup.join(format!("hugetlb.{}.max", limit.page_size()));
            if file.exists() {
                kept.push(limit);
            } else if limit.limit() != 0 {
                return Err(LimitError::PageSize(limit.page_size().clone()));
            }
        }
        resources.set_hugepage_limits((!kept.is_empty()).then_some(kept));
    }
    Ok(())
}

/// Threads that one container leaves the others of its pod.
const THREADS_FOR_OTHERS: u64 = 64;

/// Keeps a container without a limit of threads, whose cgroup is `cgroup`, from taking all of the
/// pod's, whose cgroup is `pod`: commands of the others, their probes among them, need some.
pub(super) fn leave_threads(cgroup: &Path, pod: &Path) -> io::Result<()> {
    let all = fs::read_to_string(pod.join("pids.max"));
    match all.unwrap_or_default().trim().parse::<u64>() {
        Ok(all) => {
            let own = all.saturating_sub(THREADS_FOR_OTHERS).max(all / 2);
            fs::write(cgroup.join("pids.max"), own.to_string())
        }
        // "max", or no file: a machine that is no guest.
        Err(_) => Ok(()),
    }
}

/// Returns what is in both lists (`0-3,5`); `None`: nothing.
fn common(wanted: &str, there: &str) -> Option<String> {
    let there = ranges(there);
    let both: Vec<String> = ranges(wanted)
        .into_iter()
        .flat_map(|(first, last)| {
            there.iter().filter_map(move |&(from, to)| {
                let (from, to) = (first.max(from), last.min(to));
                (from <= to).then(|| {
                    if from == to {
                        from.to_string()
                    } else {
                        format!("{from}-{to}")
                    }
                })
            })
        })
        .collect();
    (!both.is_empty()).then(|| both.join(","))
}

fn ranges(list: &str) -> Vec<(u32, u32)> {
    list.trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_that_the_guest_lacks_are_left_out() {
        assert_eq!(common("0-3,5", "0-1").as_deref(), Some("0-1"));
        assert_eq!(common("1", "0-1\n").as_deref(), Some("1"));
        assert_eq!(common("0,2-9", "0-2,4").as_deref(), Some("0,2,4"));
        assert_eq!(common("4-5", "0-1"), None);
        assert_eq!(common("x", "0"), None);
    }

    #[test]
    fn a_container_leaves_threads_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let (pod, own) = (dir.path().join("pids.max"), dir.path().join("own"));
        fs::create_dir(&own).unwrap();
        for (all, left) in [("1500\n", "1436"), ("80\n", "40")] {
            fs::write(&pod, all).unwrap();
            leave_threads(&own, dir.path()).unwrap();
            assert_eq!(fs::read_to_string(own.join("pids.max")).unwrap(), left);
        }
        fs::remove_file(own.join("pids.max")).unwrap();
        fs::write(&pod, "max\n").unwrap();
        leave_threads(&own, dir.path()).unwrap();
        assert!(!own.join("pids.max").exists());
    }

    #[test]
    fn no_pages_of_an_unknown_size_are_no_limit() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("hugetlb.2MB.max"), "").unwrap();
        let with = |one_gib: u64| -> LinuxResources {
            serde_json::from_value(serde_json::json!({"hugepageLimits": [
                {"pageSize": "2MB", "limit": 4_194_304}, {"pageSize": "1GB", "limit": one_gib}
            ]}))
            .unwrap()
        };
        let mut resources = with(0);
        fit(&mut resources, dir.path()).unwrap();
        assert_eq!(resources.hugepage_limits().as_ref().unwrap().len(), 1);
        let error = fit(&mut with(1 << 30), dir.path()).unwrap_err();
        assert!(error.to_string().contains("1GB"));
    }
}

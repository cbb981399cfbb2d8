//! Changes of a container's limits.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use libcontainer::oci_spec::runtime::LinuxResources;

use super::{cgroup::Cgroup, child::chain};
use crate::ident::Id;

/// What is to change.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) resources: LinuxResources,
    /// `None`: it stays.
    pub(crate) oom_score_adj: Option<i32>,
}

/// Changes the limits of `cgroup`, which libcgroups knows as `path`.
pub(crate) fn apply(
    id: &Id,
    path: PathBuf,
    cgroup: &Cgroup,
    change: &Change,
) -> Result<(), String> {
    let mut resources = change.resources.clone();
    drop_idle_limits(&mut resources, has_hugepages);
    let manager: AnyCgroupManager = create_cgroup_manager(CgroupConfig {
        cgroup_path: path,
        systemd_cgroup: false,
        container_name: id.to_string(),
    })
    .map_err(|e| chain(&e))?;
    let options = ControllerOpt {
        resources: &resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    manager.apply(&options).map_err(|e| chain(&e))?;
    match change.oom_score_adj {
        Some(adjustment) => adjust_oom_scores(cgroup, adjustment),
        None => Ok(()),
    }
}

fn adjust_oom_scores(cgroup: &Cgroup, adjustment: i32) -> Result<(), String> {
    let pids = cgroup.processes().map_err(|e| e.to_string())?;
    for pid in pids {
        let path = format!("/proc/{pid}/oom_score_adj");
        match fs::write(&path, adjustment.to_string()) {
            // It ended meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {}
            Err(e) => return Err(format!("write {path}: {e}")),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Drops limits that forbid huge pages of a size which this kernel does not
/// have: kubelet names all sizes of the node.
pub(crate) fn drop_idle_limits(resources: &mut LinuxResources, has: impl Fn(&str) -> bool) {
    if let Some(limits) = resources.hugepage_limits_mut() {
        limits.retain(|limit| limit.limit() != 0 || has(limit.page_size()));
    }
}

/// Returns whether the kernel has huge pages of a size, such as `2MB`.
pub(crate) fn has_hugepages(size: &str) -> bool {
    let kib = |digits: &str, scale: u64| digits.parse::<u64>().ok()?.checked_mul(scale);
    let size = size.strip_suffix('B').unwrap_or(size);
    let size = match size.split_at_checked(size.len().saturating_sub(1)) {
        Some((digits, "K")) => kib(digits, 1),
        Some((digits, "M")) => kib(digits, 1 << 10),
        Some((digits, "G")) => kib(digits, 1 << 20),
        _ => None,
    };
    size.is_some_and(|kib| {
        Path::new(&format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB")).exists()
    })
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::LinuxHugepageLimitBuilder;

    use super::*;

    #[test]
    fn a_limit_of_nothing_is_dropped() {
        let limit = |size: &str, bytes| {
            LinuxHugepageLimitBuilder::default()
                .page_size(size)
                .limit(bytes)
                .build()
                .unwrap()
        };
        let mut resources = LinuxResources::default();
        resources.set_hugepage_limits(Some(vec![
            limit("2MB", 0),
            limit("1GB", 0),
            limit("512MB", 5),
        ]));
        drop_idle_limits(&mut resources, |size| size == "2MB");
        let kept: Vec<_> = resources.hugepage_limits().clone().unwrap();
        let sizes: Vec<_> = kept.iter().map(|l| l.page_size().as_str()).collect();
        assert_eq!(sizes, ["2MB", "512MB"]);
        assert!(!has_hugepages("3MB") && !has_hugepages("") && !has_hugepages("xGB"));
    }
}

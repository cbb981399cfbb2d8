//! Changes of a container's limits.

use std::{io::ErrorKind, path::PathBuf};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use libcontainer::oci_spec::runtime::LinuxResources;

use super::{cgroup::Cgroup, child::chain, limits};
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
    limits::fit(&mut resources, cgroup.path()).map_err(|e| e.to_string())?;
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
    let failed = |e: std::io::Error| format!("set oom_score_adj: {e}");
    for process in cgroup.members().map_err(failed)? {
        match process.write("oom_score_adj", &adjustment.to_string()) {
            // It ended meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {}
            result => result.map_err(failed)?,
        }
    }
    Ok(())
}

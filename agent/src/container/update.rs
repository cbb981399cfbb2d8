//! Changes of a container's limits.

use std::{
    error::Error,
    io::{self, ErrorKind},
    path::PathBuf,
};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use oci_spec::runtime::LinuxResources;

use super::{cgroup::Cgroup, error::ContainerError, huge_pages::HugePages, limits};
use crate::ident::Id;

/// What is to change.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) resources: LinuxResources,
    /// `None`: it stays.
    pub(crate) oom_score_adj: Option<i32>,
}

/// Changes the limits of `cgroup`, which libcgroups knows as `path`.
pub(super) fn apply(
    id: &Id,
    path: PathBuf,
    cgroup: &Cgroup,
    pages: &HugePages,
    change: Change,
) -> Result<(), ContainerError> {
    limit(id, path, cgroup, pages, change.resources)?;
    match change.oom_score_adj {
        Some(adjustment) => adjust_oom_scores(cgroup, adjustment).map_err(|source| {
            let message = format!("set oom_score_adj: {source}");
            ContainerError::Update {
                id: id.clone(),
                message,
            }
        }),
        None => Ok(()),
    }
}

/// Sets the limits of `cgroup`, which libcgroups knows as `path`, as far as the guest can keep them.
pub(super) fn limit(
    id: &Id,
    path: PathBuf,
    cgroup: &Cgroup,
    pages: &HugePages,
    mut resources: LinuxResources,
) -> Result<(), ContainerError> {
    limits::fit(&mut resources, cgroup.path())?;
    let huge = resources.hugepage_limits().as_deref().unwrap_or_default();
    pages.set(id, cgroup.path(), huge)?;
    let failed = |error: &dyn Error| ContainerError::Update {
        id: id.clone(),
        message: chain(error),
    };
    let manager: AnyCgroupManager = create_cgroup_manager(CgroupConfig {
        cgroup_path: path,
        systemd_cgroup: false,
        container_name: id.to_string(),
    })
    .map_err(|e| failed(&e))?;
    let options = ControllerOpt {
        resources: &resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    manager.apply(&options).map_err(|e| failed(&e))
}

fn adjust_oom_scores(cgroup: &Cgroup, adjustment: i32) -> io::Result<()> {
    for process in cgroup.members()? {
        match process.write("oom_score_adj", &adjustment.to_string()) {
            // It ended meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Joins an error of libcgroups and its causes, each once: many of their messages hold
/// that of the cause, which is their source too.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text.trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        #[source]
        source: Option<Box<Layer>>,
    }

    #[test]
    fn causes_are_joined_without_repeating() {
        let layer = |text, source: Option<Layer>| Layer {
            text,
            source: source.map(Box::new),
        };
        let error = layer(
            "create",
            Some(layer("write /x: denied", Some(layer("denied", None)))),
        );
        assert_eq!(chain(&error), "create: write /x: denied");
    }
}

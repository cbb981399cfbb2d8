//! `RuntimeConfig`.
//!
//! Kubelet makes the cgroups of pods, and takes the way to do so from here. On a host that
//! systemd runs, that must be systemd, since two managers of one hierarchy disturb each other.
//! Hull itself only makes one cgroup below a pod's, and understands both forms of its name.

use std::path::Path;

use hull_proto_cri::v1::{CgroupDriver, LinuxRuntimeConfiguration, RuntimeConfigResponse};

use crate::cri::error::CriError;

/// Exists when systemd is the service manager (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";

/// Tells the cgroup driver.
pub(crate) fn runtime_config() -> Result<RuntimeConfigResponse, CriError> {
    Ok(RuntimeConfigResponse {
        linux: Some(LinuxRuntimeConfiguration {
            cgroup_driver: cgroup_driver().into(),
        }),
    })
}

/// The way in which kubelet is to make cgroups on this host.
pub(crate) fn cgroup_driver() -> CgroupDriver {
    of(Path::new(SYSTEMD))
}

fn of(systemd: &Path) -> CgroupDriver {
    if systemd.is_dir() {
        CgroupDriver::Systemd
    } else {
        CgroupDriver::Cgroupfs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(dir.path()), CgroupDriver::Systemd);
        assert_eq!(of(&dir.path().join("absent")), CgroupDriver::Cgroupfs);
    }
}

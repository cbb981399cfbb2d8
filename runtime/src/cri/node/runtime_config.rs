//! `RuntimeConfig`.

use hull_proto_cri::v1::{CgroupDriver, LinuxRuntimeConfiguration, RuntimeConfigResponse};

use crate::cri::error::CriError;

/// Tells the cgroup driver: Hull makes cgroups itself, without systemd.
pub(crate) fn runtime_config() -> Result<RuntimeConfigResponse, CriError> {
    Ok(RuntimeConfigResponse {
        linux: Some(LinuxRuntimeConfiguration {
            cgroup_driver: CgroupDriver::Cgroupfs.into(),
        }),
    })
}

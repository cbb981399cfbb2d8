//! `Version`.

use hull_proto_cri::v1::{VersionRequest, VersionResponse};

use crate::cri::error::CriError;

/// Names the runtime.
pub(crate) fn version(_: &VersionRequest) -> Result<VersionResponse, CriError> {
    Ok(VersionResponse {
        // The version of kubelet's API that CRI was made for; it never changed.
        version: "0.1.0".to_owned(),
        runtime_name: env!("CARGO_PKG_NAME").to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: "v1".to_owned(),
    })
}

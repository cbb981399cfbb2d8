//! `StopPodSandbox`. An unknown sandbox is stopped already.

use hull_proto_cri::v1::{StopPodSandboxRequest, StopPodSandboxResponse};

use crate::cri::{Backend, error::CriError, id};

/// Ends a sandbox's containers, VM and network.
pub(crate) async fn stop(
    backend: &Backend,
    request: StopPodSandboxRequest,
) -> Result<StopPodSandboxResponse, CriError> {
    let id = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    backend.life.stop_sandbox(id).await?;
    Ok(StopPodSandboxResponse {})
}

//! `RemovePodSandbox`. An unknown sandbox is removed already.

use hull_proto_cri::v1::{RemovePodSandboxRequest, RemovePodSandboxResponse};

use crate::cri::{Backend, error::CriError, id};

/// Stops a sandbox if it runs, and forgets it with its containers.
pub(crate) async fn remove(
    backend: &Backend,
    request: RemovePodSandboxRequest,
) -> Result<RemovePodSandboxResponse, CriError> {
    let id = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    backend.life.remove_sandbox(id).await?;
    Ok(RemovePodSandboxResponse {})
}

//! `UpdatePodSandboxResources`.

use hull_proto_cri::v1::{UpdatePodSandboxResourcesRequest, UpdatePodSandboxResourcesResponse};

use crate::cri::{Backend, convert::resources, error::CriError, id};

/// Takes new sizes of a pod when its VM has them; a VM does not grow.
pub(crate) async fn update(
    backend: &Backend,
    request: UpdatePodSandboxResourcesRequest,
) -> Result<UpdatePodSandboxResourcesResponse, CriError> {
    let id = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    let overhead = request.overhead.map(resources::from_cri);
    let limits = request.resources.map(resources::from_cri);
    backend.life.update_sandbox(id, overhead, limits).await?;
    Ok(UpdatePodSandboxResourcesResponse {})
}

//! `PodSandboxStatus`.

use hull_proto_cri::v1::{PodSandboxStatusRequest, PodSandboxStatusResponse};

use crate::cri::{Backend, convert::sandbox, error::CriError, id, info};

/// Tells about one sandbox.
pub(crate) async fn status(
    backend: &Backend,
    request: PodSandboxStatusRequest,
) -> Result<PodSandboxStatusResponse, CriError> {
    let id = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    let pod = backend.pods.sandbox(id).await?;
    Ok(PodSandboxStatusResponse {
        status: Some(sandbox::status(&pod)),
        info: if request.verbose {
            // A VM that is gone has none.
            let metrics = backend.pods.vm_metrics(id).await.ok();
            info::sandbox(&pod, metrics.as_ref())
        } else {
            Default::default()
        },
        // Read only by clients of container events, which are not served yet.
        containers_statuses: Vec::new(),
        timestamp: 0,
    })
}

//! `PodSandboxStatus`.

use hull_proto_cri::v1::{PodSandboxStatusRequest, PodSandboxStatusResponse};

use crate::cri::{
    Backend,
    convert::{container, sandbox},
    error::CriError,
    id, info, now_ns,
};

/// Tells about one sandbox.
pub(crate) async fn status(
    backend: &Backend,
    request: PodSandboxStatusRequest,
) -> Result<PodSandboxStatusResponse, CriError> {
    let id = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    let pod = backend.pods.sandbox(id).await?;
    // Before they are looked at: kubelet takes what happened since from the events.
    let timestamp = now_ns();
    let mut containers = backend.pods.containers().await;
    containers.retain(|container| container.pod == pod.id);
    Ok(PodSandboxStatusResponse {
        status: Some(sandbox::status(&pod)),
        info: if request.verbose {
            // A VM that is gone has none.
            let metrics = backend.pods.vm_metrics(id).await.ok();
            let memory = backend.pods.process_memory(id).await?;
            info::sandbox(&pod, metrics.as_ref(), memory)
        } else {
            Default::default()
        },
        containers_statuses: containers.iter().map(container::status).collect(),
        timestamp,
    })
}

//! `PodSandboxStatus`. It never waits for a VM for more than a second.

use std::collections::BTreeMap;

use error_reporter::Report;
use hull_base::clock;
use hull_proto_cri::v1::{PodSandboxStatusRequest, PodSandboxStatusResponse};
use hull_spec::{error::ErrorKind, info::SandboxInfo};

use crate::cri::{
    Backend,
    convert::{container, sandbox},
    error::CriError,
    id, info,
};

/// Tells about one sandbox.
pub(crate) async fn status(
    backend: &Backend,
    request: PodSandboxStatusRequest,
) -> Result<PodSandboxStatusResponse, CriError> {
    let id = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    // Before they are looked at: kubelet takes what happened since from the events.
    let timestamp = clock::now_ns();
    let (pod, containers) = backend.pods.sandbox_with_containers(id).await?;
    Ok(PodSandboxStatusResponse {
        status: Some(sandbox::status(&pod)),
        containers_statuses: containers.iter().map(container::status).collect(),
        timestamp,
        info: if request.verbose {
            verbose(backend, pod).await?
        } else {
            Default::default()
        },
    })
}

/// What else is known, as far as the VM tells it now; that it does not answer is a warning.
async fn verbose(
    backend: &Backend,
    mut pod: SandboxInfo,
) -> Result<BTreeMap<String, String>, CriError> {
    let id = pod.id.clone();
    let (metrics, memory) = tokio::join!(
        backend.pods.vm_metrics(id.as_str()),
        backend.pods.process_memory(id.as_str()),
    );
    if let (Err(error), Some(vm)) = (&metrics, &mut pod.vm)
        // A VM that is gone has no counters.
        && error.kind() == ErrorKind::Unavailable
    {
        if !vm.warning.is_empty() {
            vm.warning.push_str("; ");
        }
        vm.warning.push_str(&Report::new(error).to_string());
    }
    Ok(info::sandbox(&pod, metrics.as_ref().ok(), memory?))
}

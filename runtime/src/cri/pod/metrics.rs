//! `ListMetricDescriptors`, `ListPodSandboxMetrics` and `StreamPodSandboxMetrics`.

use hull_pod::stats::Scope;
use hull_proto_cri::v1::{
    ListMetricDescriptorsResponse, ListPodSandboxMetricsResponse, PodSandboxMetrics,
    StreamPodSandboxMetricsResponse,
};
use hull_spec::info::{SandboxInfo, SandboxState};

use crate::cri::{
    Backend,
    convert::metrics,
    error::CriError,
    stream::{Answer, batches},
};

/// Names all metrics.
pub(crate) fn descriptors() -> ListMetricDescriptorsResponse {
    ListMetricDescriptorsResponse {
        descriptors: metrics::descriptors(),
    }
}

/// The metrics of all sandboxes that are ready.
pub(crate) async fn list(backend: &Backend) -> Result<ListPodSandboxMetricsResponse, CriError> {
    let pod_metrics = all(backend).await;
    Ok(ListPodSandboxMetricsResponse { pod_metrics })
}

/// The same in parts.
pub(crate) async fn stream(
    backend: &Backend,
) -> Result<Answer<StreamPodSandboxMetricsResponse>, CriError> {
    let all = all(backend).await;
    Ok(batches(all, |pod_sandbox_metrics| {
        StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        }
    }))
}

async fn all(backend: &Backend) -> Vec<PodSandboxMetrics> {
    let is_ready = |pod: &SandboxInfo| pod.state == SandboxState::Ready;
    let id = |pod: &SandboxInfo| pod.id.clone();
    let wanted = backend.pods.select_sandboxes(is_ready, id).await;
    let wanted = wanted.into_iter().collect();
    let stats = backend.pods.stats(&wanted, Scope::Pods).await;
    stats.iter().map(metrics::pod).collect()
}

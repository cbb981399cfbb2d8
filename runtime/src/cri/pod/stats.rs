//! `PodSandboxStats`, `ListPodSandboxStats` and `StreamPodSandboxStats`.
//!
//! Only sandboxes that are ready use anything; others are left out of lists.

use std::collections::HashSet;

use hull_pod::stats::Scope;
use hull_proto_cri::v1::{
    ListPodSandboxStatsRequest, ListPodSandboxStatsResponse, PodSandboxFilter, PodSandboxStats,
    PodSandboxStatsFilter, PodSandboxStatsRequest, PodSandboxStatsResponse,
    StreamPodSandboxStatsRequest, StreamPodSandboxStatsResponse,
};
use hull_spec::{
    error::PodError,
    info::{SandboxInfo, SandboxState},
};

use crate::cri::{
    Backend, convert,
    error::CriError,
    filter, id,
    stream::{Answer, batches},
};

/// Tells what one sandbox uses.
pub(crate) async fn stats(
    backend: &Backend,
    request: PodSandboxStatsRequest,
) -> Result<PodSandboxStatsResponse, CriError> {
    let id = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    let pod = backend.pods.sandbox(id).await?;
    let wanted = HashSet::from([pod.id.clone()]);
    let all = backend.pods.stats(&wanted, Scope::Pods).await;
    let stats = all.iter().find(|stats| stats.host.is_some());
    let stats = stats.ok_or_else(|| PodError::FailedPrecondition {
        action: format!("count what sandbox {} uses", pod.id),
        reason: "it is not ready".into(),
    })?;
    Ok(PodSandboxStatsResponse {
        stats: Some(convert::stats::pod(stats, &backend.pods_dir)),
    })
}

/// Tells what the sandboxes use that the filter selects.
pub(crate) async fn list(
    backend: &Backend,
    request: ListPodSandboxStatsRequest,
) -> Result<ListPodSandboxStatsResponse, CriError> {
    let stats = selected(backend, request.filter).await?;
    Ok(ListPodSandboxStatsResponse { stats })
}

/// The same in parts.
pub(crate) async fn stream(
    backend: &Backend,
    request: StreamPodSandboxStatsRequest,
) -> Result<Answer<StreamPodSandboxStatsResponse>, CriError> {
    let all = selected(backend, request.filter).await?;
    Ok(batches(all, |pod_sandbox_stats| {
        StreamPodSandboxStatsResponse { pod_sandbox_stats }
    }))
}

async fn selected(
    backend: &Backend,
    filter: Option<PodSandboxStatsFilter>,
) -> Result<Vec<PodSandboxStats>, CriError> {
    let filter = filter::Sandboxes::new(filter.map(|filter| PodSandboxFilter {
        id: filter.id,
        label_selector: filter.label_selector,
        ..Default::default()
    }))?;
    let is_wanted = |pod: &SandboxInfo| pod.state == SandboxState::Ready && filter.selects(pod);
    let id = |pod: &SandboxInfo| pod.id.clone();
    let wanted = backend.pods.select_sandboxes(is_wanted, id).await;
    let wanted = wanted.into_iter().collect();
    let all = backend.pods.stats(&wanted, Scope::Pods).await;
    // Its VM may be gone meanwhile.
    let there = all.iter().filter(|stats| stats.host.is_some());
    Ok(there
        .map(|stats| convert::stats::pod(stats, &backend.pods_dir))
        .collect())
}

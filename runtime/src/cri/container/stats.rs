//! `ContainerStats`, `ListContainerStats` and `StreamContainerStats`.
//!
//! A container that does not run has the CPU time that was last seen, and nothing else. One that
//! runs in a guest that does not answer is left out of lists.

use std::{collections::HashSet, io, sync::Arc};

use hull_pod::stats::Scope;
use hull_proto_cri::v1::{
    ContainerFilter, ContainerStats, ContainerStatsFilter, ContainerStatsRequest,
    ContainerStatsResponse, ListContainerStatsRequest, ListContainerStatsResponse,
    StreamContainerStatsRequest, StreamContainerStatsResponse,
};
use hull_spec::{error::PodError, info::ContainerInfo};

use crate::cri::{
    Backend, convert,
    error::CriError,
    filter, id,
    stream::{Answer, batches},
};

/// Tells what one container uses.
pub(crate) async fn stats(
    backend: &Backend,
    request: ContainerStatsRequest,
) -> Result<ContainerStatsResponse, CriError> {
    let id = id("container_id", &request.container_id)?;
    let container = backend.pods.container(id).await?;
    let pod = HashSet::from([container.pod]);
    let all = backend.pods.stats(&pod, Scope::Containers).await;
    let mut containers = all.iter().flat_map(|pod| &pod.containers);
    let found = containers.find(|stats| stats.container.id == container.id);
    let stats = found.ok_or_else(|| PodError::Unavailable {
        action: format!("count what container {} uses", container.id),
        source: Arc::new(io::Error::new(
            io::ErrorKind::TimedOut,
            "the guest of its pod does not answer",
        )),
    })?;
    Ok(ContainerStatsResponse {
        stats: Some(convert::stats::container(stats, &backend.pods_dir)),
    })
}

/// Tells what the containers use that the filter selects.
pub(crate) async fn list(
    backend: &Backend,
    request: ListContainerStatsRequest,
) -> Result<ListContainerStatsResponse, CriError> {
    let stats = selected(backend, request.filter).await?;
    Ok(ListContainerStatsResponse { stats })
}

/// The same in parts.
pub(crate) async fn stream(
    backend: &Backend,
    request: StreamContainerStatsRequest,
) -> Result<Answer<StreamContainerStatsResponse>, CriError> {
    let all = selected(backend, request.filter).await?;
    Ok(batches(all, |container_stats| {
        StreamContainerStatsResponse { container_stats }
    }))
}

async fn selected(
    backend: &Backend,
    filter: Option<ContainerStatsFilter>,
) -> Result<Vec<ContainerStats>, CriError> {
    let filter = filter::Containers::new(filter.map(|filter| ContainerFilter {
        id: filter.id,
        pod_sandbox_id: filter.pod_sandbox_id,
        label_selector: filter.label_selector,
        ..Default::default()
    }))?;
    let selects = |info: &ContainerInfo| filter.selects(info);
    let of = |info: &ContainerInfo| info.pod.clone();
    let wanted = backend.pods.select_containers(filter.pod(), selects, of);
    // Only guests with such containers are asked.
    let wanted = wanted.await.into_iter().collect();
    let all = backend.pods.stats(&wanted, Scope::Containers).await;
    let stats = all.iter().flat_map(|pod| &pod.containers);
    Ok(stats
        .filter(|stats| filter.selects(&stats.container))
        .map(|stats| convert::stats::container(stats, &backend.pods_dir))
        .collect())
}

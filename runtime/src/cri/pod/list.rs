//! `ListPodSandbox` and `StreamPodSandboxes`.

use hull_proto_cri::v1::{
    ListPodSandboxRequest, ListPodSandboxResponse, PodSandbox, PodSandboxFilter,
    StreamPodSandboxesRequest, StreamPodSandboxesResponse,
};
use hull_spec::info::SandboxInfo;

use crate::cri::{
    Backend,
    convert::sandbox,
    error::CriError,
    filter,
    stream::{Answer, batches},
};

/// Lists the sandboxes that the filter selects.
pub(crate) async fn list(
    backend: &Backend,
    request: ListPodSandboxRequest,
) -> Result<ListPodSandboxResponse, CriError> {
    let items = selected(backend, request.filter).await?;
    Ok(ListPodSandboxResponse { items })
}

/// The same in parts.
pub(crate) async fn stream(
    backend: &Backend,
    request: StreamPodSandboxesRequest,
) -> Result<Answer<StreamPodSandboxesResponse>, CriError> {
    let all = selected(backend, request.filter).await?;
    Ok(batches(all, |pod_sandboxes| StreamPodSandboxesResponse {
        pod_sandboxes,
    }))
}

async fn selected(
    backend: &Backend,
    filter: Option<PodSandboxFilter>,
) -> Result<Vec<PodSandbox>, CriError> {
    let filter = filter::Sandboxes::new(filter)?;
    let selects = |pod: &SandboxInfo| filter.selects(pod);
    let pods = &backend.pods;
    Ok(pods.select_sandboxes(selects, sandbox::item).await)
}

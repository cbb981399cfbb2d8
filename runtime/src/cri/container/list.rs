//! `ListContainers` and `StreamContainers`.

use hull_proto_cri::v1::{
    Container, ContainerFilter, ListContainersRequest, ListContainersResponse,
    StreamContainersRequest, StreamContainersResponse,
};
use hull_spec::info::ContainerInfo;

use crate::cri::{
    Backend,
    convert::container,
    error::CriError,
    filter,
    stream::{Answer, batches},
};

/// Lists the containers that the filter selects.
pub(crate) async fn list(
    backend: &Backend,
    request: ListContainersRequest,
) -> Result<ListContainersResponse, CriError> {
    let containers = selected(backend, request.filter).await?;
    Ok(ListContainersResponse { containers })
}

/// The same in parts.
pub(crate) async fn stream(
    backend: &Backend,
    request: StreamContainersRequest,
) -> Result<Answer<StreamContainersResponse>, CriError> {
    let all = selected(backend, request.filter).await?;
    Ok(batches(all, |containers| StreamContainersResponse {
        containers,
    }))
}

async fn selected(
    backend: &Backend,
    filter: Option<ContainerFilter>,
) -> Result<Vec<Container>, CriError> {
    let filter = filter::Containers::new(filter)?;
    let selects = |container: &ContainerInfo| filter.selects(container);
    let (pods, pod) = (&backend.pods, filter.pod());
    Ok(pods.select_containers(pod, selects, container::item).await)
}

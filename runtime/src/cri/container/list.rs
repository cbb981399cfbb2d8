//! `ListContainers`.

use hull_proto_cri::v1::{ListContainersRequest, ListContainersResponse};

use crate::cri::{Backend, convert::container, error::CriError, filter};

/// Lists the containers that the filter selects.
pub(crate) async fn list(
    backend: &Backend,
    request: ListContainersRequest,
) -> Result<ListContainersResponse, CriError> {
    let filter = filter::Containers::new(request.filter)?;
    let containers = backend.pods.containers().await;
    Ok(ListContainersResponse {
        containers: containers
            .iter()
            .filter(|container| filter.selects(container))
            .map(container::item)
            .collect(),
    })
}

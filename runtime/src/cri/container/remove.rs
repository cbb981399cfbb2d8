//! `RemoveContainer`. An unknown container is removed already.

use hull_proto_cri::v1::{RemoveContainerRequest, RemoveContainerResponse};

use crate::cri::{Backend, error::CriError, id};

/// Removes a container, killing it first when it runs.
pub(crate) async fn remove(
    backend: &Backend,
    request: RemoveContainerRequest,
) -> Result<RemoveContainerResponse, CriError> {
    let id = id("container_id", &request.container_id)?;
    backend.life.remove_container(id).await?;
    Ok(RemoveContainerResponse {})
}

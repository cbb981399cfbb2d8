//! `StartContainer`.

use hull_proto_cri::v1::{StartContainerRequest, StartContainerResponse};

use crate::cri::{Backend, error::CriError, id};

/// Starts a container that was created.
pub(crate) async fn start(
    backend: &Backend,
    request: StartContainerRequest,
) -> Result<StartContainerResponse, CriError> {
    let id = id("container_id", &request.container_id)?;
    backend.life.start_container(id).await?;
    Ok(StartContainerResponse {})
}

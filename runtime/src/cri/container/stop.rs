//! `StopContainer`. An unknown container is stopped already.

use std::time::Duration;

use hull_proto_cri::v1::{StopContainerRequest, StopContainerResponse};

use crate::cri::{Backend, error::CriError, id};

/// Asks a container to end and kills it after the grace period, in seconds.
pub(crate) async fn stop(
    backend: &Backend,
    request: StopContainerRequest,
) -> Result<StopContainerResponse, CriError> {
    let id = id("container_id", &request.container_id)?;
    // A negative grace is none, as with 0.
    let grace = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
    backend.life.stop_container(id, grace).await?;
    Ok(StopContainerResponse {})
}

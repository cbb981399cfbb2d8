//! `ReopenContainerLog`.

use hull_proto_cri::v1::{ReopenContainerLogRequest, ReopenContainerLogResponse};

use crate::cri::{Backend, error::CriError, id};

/// Goes on with a running container's log in a new file, after kubelet renamed
/// the old one. A container that does not run has no more to write: that is an
/// error, and no file is made.
pub(crate) async fn reopen_log(
    backend: &Backend,
    request: ReopenContainerLogRequest,
) -> Result<ReopenContainerLogResponse, CriError> {
    let id = id("container_id", &request.container_id)?;
    backend.pods.reopen_log(id).await?;
    Ok(ReopenContainerLogResponse {})
}

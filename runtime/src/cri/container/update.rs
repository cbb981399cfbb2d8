//! `UpdateContainerResources`.

use hull_proto_cri::v1::{UpdateContainerResourcesRequest, UpdateContainerResourcesResponse};

use crate::cri::{Backend, convert::resources, error::CriError, id};

/// Changes limits of a container: those that are not zero or empty. The status
/// tells them afterwards, also of a container that has exited.
pub(crate) async fn update(
    backend: &Backend,
    request: UpdateContainerResourcesRequest,
) -> Result<UpdateContainerResourcesResponse, CriError> {
    let id = id("container_id", &request.container_id)?;
    if request.windows.is_some() {
        return Err(CriError::unsupported(
            "windows",
            "this node runs Linux pods only",
        ));
    }
    // Nothing is asked for then.
    let limits = request.linux.unwrap_or_default();
    let limits = resources::from_cri(limits);
    backend.life.update_container(id, limits).await?;
    Ok(UpdateContainerResourcesResponse {})
}

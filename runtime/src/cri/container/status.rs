//! `ContainerStatus`.

use hull_proto_cri::v1::{ContainerStatusRequest, ContainerStatusResponse};
use hull_spec::info::{ContainerInfo, ContainerState};

use crate::cri::{Backend, convert::container, error::CriError, id, info};

/// Tells about one container.
pub(crate) async fn status(
    backend: &Backend,
    request: ContainerStatusRequest,
) -> Result<ContainerStatusResponse, CriError> {
    let id = id("container_id", &request.container_id)?;
    let found = backend.pods.container(id).await?;
    let mut status = container::status(&found);
    if let (Some(image), Some(name)) = (&mut status.image, image_name(backend, &found).await?) {
        image.image = name;
    }
    let mut answer = ContainerStatusResponse {
        status: Some(status),
        info: Default::default(),
    };
    if request.verbose {
        let processes = match found.state {
            ContainerState::Running => backend.pods.processes(found.id.as_str()).await.ok(),
            _ => None,
        };
        answer.info = info::container(&found, processes.as_ref());
    }
    Ok(answer)
}

/// A name for people. Kubelet creates containers by image id, and shows users
/// the name that comes back in the status.
async fn image_name(
    backend: &Backend,
    container: &ContainerInfo,
) -> Result<Option<String>, CriError> {
    let asked = &container.spec.image;
    if !asked.user_specified.is_empty() {
        return Ok(Some(asked.user_specified.clone()));
    }
    let is_id =
        container.image_id.as_str() == asked.image || container.image_id.hex() == asked.image;
    if !is_id {
        return Ok(None);
    }
    let image = backend.images.get(container.image_id.as_str()).await?;
    Ok(image.and_then(|image| image.repo_tags.into_iter().chain(image.repo_digests).next()))
}

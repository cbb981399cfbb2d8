//! `CreateContainer`.

use hull_base::stages;
use hull_proto_cri::v1::{CreateContainerRequest, CreateContainerResponse};
use tracing::Span;

use crate::cri::{Backend, convert::container, error::CriError, id};

/// Creates a container; its process waits for `StartContainer`.
///
/// The request's copy of the sandbox's configuration is not read: the sandbox
/// has the one that it was made with.
pub(crate) async fn create(
    backend: &Backend,
    request: CreateContainerRequest,
) -> Result<CreateContainerResponse, CriError> {
    let pod = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    let metadata = request.config.as_ref().and_then(|c| c.metadata.as_ref());
    if let Some(metadata) = metadata {
        stages::attribute("k8s.container.name", &metadata.name);
    }
    let what = metadata.map(|metadata| format!("container {}", metadata.name));
    let create = async {
        let spec = container::spec(request.config)?;
        Ok(backend.life.create_container(pod, spec).await?)
    };
    let id = create.await.map_err(|error: CriError| match what {
        Some(what) => error.about(what),
        None => error,
    })?;
    Span::current().record("container", id.short());
    stages::attribute(stages::CONTAINER, id.as_str());
    Ok(CreateContainerResponse {
        container_id: id.into(),
    })
}

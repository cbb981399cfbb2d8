//! `RunPodSandbox`.

use hull_base::stages;
use hull_proto_cri::v1::{RunPodSandboxRequest, RunPodSandboxResponse};
use tracing::Span;

use super::handler;
use crate::cri::{Backend, convert::sandbox, error::CriError};

/// Starts a sandbox; answers when containers can be created in it.
pub(crate) async fn run(
    backend: &Backend,
    request: RunPodSandboxRequest,
) -> Result<RunPodSandboxResponse, CriError> {
    let metadata = request.config.as_ref().and_then(|c| c.metadata.as_ref());
    if let Some(metadata) = metadata {
        stages::attribute("k8s.namespace.name", &metadata.namespace);
        stages::attribute("k8s.pod.name", &metadata.name);
        stages::attribute("k8s.pod.uid", &metadata.uid);
    }
    let what = metadata.map(|metadata| format!("pod {}/{}", metadata.namespace, metadata.name));
    let run = async {
        let handler =
            handler::choose(&backend.handlers.borrow(), &request.runtime_handler)?.clone();
        let mut spec = sandbox::spec(request.config, request.runtime_handler)?;
        handler::apply(&handler, &mut spec);
        Ok(backend.life.run_sandbox(spec).await?)
    };
    let id = run.await.map_err(|error: CriError| match what {
        Some(what) => error.about(what),
        None => error,
    })?;
    Span::current().record("pod", id.short());
    Ok(RunPodSandboxResponse {
        pod_sandbox_id: id.into(),
    })
}

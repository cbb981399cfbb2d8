//! `RunPodSandbox`.

use hull_proto_cri::v1::{RunPodSandboxRequest, RunPodSandboxResponse};
use tracing::Span;

use super::handler;
use crate::cri::{Backend, convert::sandbox, error::CriError};

/// Starts a sandbox; answers when containers can be created in it.
pub(crate) async fn run(
    backend: &Backend,
    request: RunPodSandboxRequest,
) -> Result<RunPodSandboxResponse, CriError> {
    let handler = handler::choose(&backend.handlers, &request.runtime_handler)?;
    let mut spec = sandbox::spec(request.config, request.runtime_handler)?;
    handler::apply(handler, &mut spec);
    let id = backend.pods.run_sandbox(spec).await?;
    Span::current().record("pod", id.short());
    Ok(RunPodSandboxResponse {
        pod_sandbox_id: id.into(),
    })
}

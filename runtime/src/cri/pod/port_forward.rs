//! `PortForward`.

use hull_proto_cri::v1::{PortForwardRequest, PortForwardResponse};
use hull_spec::{error::PodError, info::SandboxState};

use crate::cri::{Backend, error::CriError, id};

/// Gives a URL for connections into a pod. Which ports, the client that opens it says; only
/// WebSocket clients of old have them here.
pub(crate) async fn port_forward(
    backend: &Backend,
    request: PortForwardRequest,
) -> Result<PortForwardResponse, CriError> {
    let id = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    let sandbox = backend.pods.sandbox(id).await?;
    if sandbox.state != SandboxState::Ready {
        let error = PodError::FailedPrecondition {
            action: format!("forward ports of sandbox {}", sandbox.id),
            reason: "it is not ready".into(),
        };
        return Err(error.into());
    }
    let ports = request.port.iter().map(|&port| {
        let number = u16::try_from(port).ok().filter(|&number| number > 0);
        number.ok_or_else(|| CriError::invalid("port", format!("{port} is no port")))
    });
    let url = backend
        .streaming
        .port_forward(hull_streaming::PortForwardRequest {
            pod_sandbox_id: sandbox.id.to_string(),
            ports: ports.collect::<Result<_, _>>()?,
        })?;
    Ok(PortForwardResponse { url })
}

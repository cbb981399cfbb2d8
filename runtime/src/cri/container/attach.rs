//! `Attach`.

use hull_proto_cri::v1::{AttachRequest, AttachResponse};

use super::running;
use crate::cri::{Backend, error::CriError};

/// Gives a URL for the streams of a running container's first process.
pub(crate) async fn attach(
    backend: &Backend,
    request: AttachRequest,
) -> Result<AttachResponse, CriError> {
    let container = running(backend, &request.container_id).await?;
    if request.tty != container.spec.tty {
        let reason = if request.tty {
            "the container has no terminal"
        } else {
            "the container has a terminal"
        };
        return Err(CriError::invalid("tty", reason));
    }
    let url = backend.streaming.attach(hull_streaming::AttachRequest {
        container_id: container.id.to_string(),
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    })?;
    Ok(AttachResponse { url })
}

//! `Attach`.

use hull_proto_cri::v1::{AttachRequest, AttachResponse};
use hull_spec::info::ContainerState;

use super::streamed;
use crate::cri::{Backend, error::CriError};

/// Gives a URL for the streams of a container's first process. It may be still to be started: who
/// attaches before that misses nothing.
pub(crate) async fn attach(
    backend: &Backend,
    request: AttachRequest,
) -> Result<AttachResponse, CriError> {
    let container = streamed(backend, &request.container_id, |state| {
        matches!(state, ContainerState::Created | ContainerState::Running)
    })
    .await?;
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

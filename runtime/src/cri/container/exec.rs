//! `Exec`.

use hull_proto_cri::v1::{ExecRequest, ExecResponse};
use hull_spec::info::ContainerState;

use super::streamed;
use crate::cri::{Backend, error::CriError};

/// Gives a URL. The command starts when a client opens it.
pub(crate) async fn exec(
    backend: &Backend,
    request: ExecRequest,
) -> Result<ExecResponse, CriError> {
    let container = streamed(backend, &request.container_id, |state| {
        state == ContainerState::Running
    })
    .await?;
    let url = backend.streaming.exec(hull_streaming::ExecRequest {
        container_id: container.id.to_string(),
        cmd: request.cmd,
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    })?;
    Ok(ExecResponse { url })
}

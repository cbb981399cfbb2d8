//! `ExecSync`.

use std::time::Duration;

use hull_proto_cri::v1::{ExecSyncRequest, ExecSyncResponse};

use crate::cri::{Backend, error::CriError, id};

/// Runs a command in a container and answers with its output. After the
/// timeout (seconds; 0: none) its processes are killed and the answer is
/// `DEADLINE_EXCEEDED`, which kubelet takes for a failed probe.
pub(crate) async fn exec_sync(
    backend: &Backend,
    request: ExecSyncRequest,
) -> Result<ExecSyncResponse, CriError> {
    let id = id("container_id", &request.container_id)?;
    if request.cmd.is_empty() {
        return Err(CriError::missing("cmd"));
    }
    let seconds = u64::try_from(request.timeout)
        .map_err(|_| CriError::invalid("timeout", format!("{} is negative", request.timeout)))?;
    let timeout = Some(Duration::from_secs(seconds)).filter(|timeout| !timeout.is_zero());
    let output = backend.pods.exec_sync(id, request.cmd, timeout).await?;
    Ok(ExecSyncResponse {
        stdout: output.stdout,
        stderr: output.stderr,
        exit_code: output.exit_code,
    })
}

//! A shell in a pod's guest itself, past its daemon, which may be what can't help.

use tokio::io::{AsyncRead, AsyncWrite};

use hull_spec::{config::PodsConfig, error::PodError, id::PodId};
use hull_vm::{
    agent::{error::GuestError, stdio},
    rundir::RunDir,
};

/// Starts a shell in the guest of a pod, with a terminal of these rows and columns or none. It ends with the
/// connection, and with it all that it started.
///
/// # Errors
/// [`PodError::FailedPrecondition`] when the guest has no shell; see [`PodError`] for others.
pub async fn shell(
    config: &PodsConfig,
    pod: &PodId,
    terminal: Option<(u16, u16)>,
) -> Result<impl AsyncRead + AsyncWrite + use<>, PodError> {
    let vsock = RunDir::of(config, pod).vsock_socket();
    let opened = stdio::open_shell(&vsock, terminal).await;
    opened.map_err(|error| match error {
        GuestError::StreamRefused { message, .. } => {
            PodError::precondition("enter the guest", message)
        }
        error => error.into(),
    })
}

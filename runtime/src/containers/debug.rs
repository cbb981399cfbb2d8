//! `hull debug`: a shell in the guest itself.

use std::io::{self, IsTerminal};

use anyhow::{Context, Result};
use hull_pod::session::shell;
use hull_spec::{config::PodsConfig, error::PodError, id::PodId};
use hull_streaming::client::relay;
use rustix::termios::tcgetwinsize;

use super::find;
use crate::{client::Client, signals::until_signal};

/// What `hull debug` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DebugArgs {
    /// Pod: its id or the start of it, NAMESPACE/NAME, or the name that `hull run` gave
    #[arg(value_name = "POD")]
    pod: String,
}

/// The guest refuses: it has no shell.
#[derive(Debug, thiserror::Error)]
#[error(
    "{pod} can't be entered: {told}; vm.debug = true in the configuration is for pods that are started later"
)]
pub(crate) struct NotToBeEntered {
    pod: String,
    /// The agent's words.
    told: String,
}

/// Runs a shell in the guest of a pod, at our terminal if we have one, until one of them has had enough.
pub(super) async fn debug(
    client: &Client,
    config: &PodsConfig,
    arguments: &DebugArgs,
) -> Result<u8> {
    let pod = find::pod(client, &arguments.pod).await?;
    let name = find::pod_name(&pod);
    let id = PodId::try_from(pod.id).context("read the pod's id")?;
    let at_terminal = io::stdin().is_terminal();
    let terminal = if at_terminal {
        let size = tcgetwinsize(io::stdin()).context("ask for the terminal's size")?;
        Some((size.ws_row, size.ws_col))
    } else {
        None
    };
    let shell = match shell(config, &id, terminal).await {
        Err(PodError::FailedPrecondition { reason, .. }) => {
            return Err(NotToBeEntered {
                pod: name,
                told: reason,
            }
            .into());
        }
        shell => shell.with_context(|| format!("open a shell in the guest of {name}"))?,
    };
    until_signal(async {
        relay(shell, at_terminal).await?;
        Ok(0)
    })
    .await
}

//! `hull exec` and `hull attach`.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hull_proto_cri::v1::{ContainerState, ContainerStatus};
use hull_streaming::client::{Detach, Left, Wants, interact};
use tonic::Code;

use super::{find, streams::Streams};
use crate::{
    client::{Client, Refusal},
    signals::until_signal,
    trailing,
};

/// How long a container may go on whose streams have ended, before it is told so.
const MOMENT: Duration = Duration::from_secs(3);
/// How often its state is asked for.
const POLL: Duration = Duration::from_millis(50);

/// What `hull exec` is asked for.
#[derive(Debug, Clone, clap::Args)]
#[command(override_usage = "hull exec [OPTIONS] CONTAINER [--] COMMAND...")]
pub(crate) struct ExecArgs {
    /// Container; then the command with its arguments
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, allow_hyphen_values = true, value_name = "CONTAINER")]
    words: Vec<String>,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal; Ctrl-P Ctrl-Q ends it
    #[arg(short, long)]
    tty: bool,
}

/// What `hull attach` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct AttachArgs {
    /// Container; Ctrl-P Ctrl-Q leaves it, if it has a terminal
    container: String,
}

/// Refuses a terminal where there is none to be passed on.
pub(crate) fn check_terminal(interactive: bool, tty: bool) -> Result<()> {
    if interactive && tty && !io::stdin().is_terminal() {
        bail!("-i with -t: standard input is no terminal");
    }
    Ok(())
}

/// Runs a command; returns its exit code.
pub(super) async fn exec(client: &Client, streams: &Streams, arguments: &ExecArgs) -> Result<u8> {
    trailing::check(&arguments.words)?;
    check_terminal(arguments.interactive, arguments.tty)?;
    let (meant, command) = trailing::split(&arguments.words);
    if command.is_empty() {
        bail!("no command for {meant}");
    }
    let found = find::one(client, meant).await?;
    let wants = Wants {
        stdin: arguments.interactive,
        stdout: true,
        stderr: !arguments.tty,
        tty: arguments.tty,
    };
    let id = &found.container.id;
    let mut session = streams.exec(id, command.to_vec(), wants).await?;
    let work = async {
        if interact(&mut session, wants, Detach::Keys).await? == Left::Detached {
            session.close().await;
            return Ok(0);
        }
        let status = session.end().await?.status;
        let status = status.context("the daemon does not tell how the command ended")?;
        match status.exit_code() {
            Some(code) => Ok(code),
            None => Err(Refusal {
                code: Code::Internal,
                exit_code: status.not_executed(),
                message: status.message,
            }
            .into()),
        }
    };
    until_signal(work).await
}

/// Connects to a container; returns its exit code, or 0 when it goes on.
pub(super) async fn attach(
    client: &Client,
    streams: &Streams,
    arguments: &AttachArgs,
) -> Result<u8> {
    let found = find::one(client, &arguments.container).await?;
    let id = &found.container.id;
    let (_, info) = find::status(client, id, true).await?;
    let has = |what: &str| {
        let config = info.as_ref().and_then(|info| info.get("config"));
        config.and_then(|config| config.get(what)) == Some(&true.into())
    };
    let wants = Wants {
        stdin: has("stdin"),
        stdout: true,
        stderr: !has("tty"),
        tty: has("tty"),
    };
    let mut session = streams.attach(id, wants).await?;
    let work = async {
        let left = interact(&mut session, wants, Detach::Keys).await?;
        session.close().await;
        if left == Left::Detached {
            return Ok(0);
        }
        match exited(client, id).await? {
            Some(status) => Ok(find::exit_code(&status)),
            None => bail!("the connection ended, and {} goes on", found.name()),
        }
    };
    until_signal(work).await
}

/// How a container ended; none when it goes on. Its streams may end a moment before it.
async fn exited(client: &Client, id: &str) -> Result<Option<ContainerStatus>> {
    let deadline = Instant::now() + MOMENT;
    loop {
        let (status, _) = find::status(client, id, false).await?;
        if status.state() == ContainerState::ContainerExited {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        tokio::time::sleep(POLL).await;
    }
}

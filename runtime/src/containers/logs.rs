//! `hull logs`.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, bail};
use hull_proto_cri::v1::ContainerState;
use tokio::sync::watch;

use super::{
    find,
    log::{self, Show},
};
use crate::client::Client;

/// How often it is asked whether a container that is followed has ended.
const POLL: Duration = Duration::from_millis(500);

/// What `hull logs` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct LogsArgs {
    /// Container
    container: String,
    /// Go on with what is written, to the container's end
    #[arg(short, long)]
    follow: bool,
    /// Begin so many lines before the end
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<u64>,
    /// Tell when each line was written
    #[arg(short, long)]
    timestamps: bool,
}

/// Prints what a container wrote.
pub(super) async fn logs(client: &Client, arguments: &LogsArgs) -> Result<()> {
    let found = find::one(client, &arguments.container).await?;
    let id = found.container.id.clone();
    let (status, _) = find::status(client, &id, false).await?;
    if status.log_path.is_empty() {
        bail!("{} has no log", found.name());
    }
    let show = Show {
        timestamps: arguments.timestamps,
        tail: arguments.tail,
    };
    let (running, ended) = watch::channel(());
    if arguments.follow {
        let client = client.clone();
        tokio::spawn(async move {
            // One that can't be asked for has been removed, or its daemon has ended.
            while let Ok((status, _)) = find::status(&client, &id, false).await
                && status.state() != ContainerState::ContainerExited
            {
                tokio::time::sleep(POLL).await;
            }
            drop(running);
        });
    } else {
        drop(running);
    }
    log::follow(PathBuf::from(status.log_path), ended, show).await
}

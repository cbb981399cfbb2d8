//! `hull stop` and `hull rm`.

use std::path::Path;

use anyhow::{Result, bail};
use hull_proto_cri::v1::{RemoveContainerRequest, StopContainerRequest};

use super::{
    find::{self, Found},
    own,
};
use crate::{
    client::{Client, refused},
    table,
};

/// What `hull stop` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StopArgs {
    /// Containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
    /// Seconds before they are killed
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    time: u32,
}

/// What `hull rm` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RmArgs {
    /// Containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
    /// Those that run, too
    #[arg(short, long)]
    force: bool,
}

/// Stops containers; returns the exit code.
pub(super) async fn stop(client: &Client, arguments: &StopArgs) -> Result<u8> {
    each(&arguments.containers, async |meant| {
        let found = find::one(client, meant).await?;
        let request = StopContainerRequest {
            container_id: found.container.id.clone(),
            timeout: arguments.time.into(),
        };
        let stopped = client.runtime.clone().stop_container(request).await;
        stopped.map_err(refused("stop"))?;
        if found.is_own() {
            // Nothing else runs in it.
            own::stop(client, &found.pod.id).await?;
        }
        Ok(())
    })
    .await
}

/// Removes containers, and the pods that `hull run` made for them; returns the exit code.
pub(super) async fn rm(client: &Client, state: &Path, arguments: &RmArgs) -> Result<u8> {
    each(&arguments.containers, async |meant| {
        let found = find::one(client, meant).await?;
        if found.is_running() && !arguments.force {
            bail!("it runs; stop it, or use -f");
        }
        remove(client, state, &found).await
    })
    .await
}

async fn remove(client: &Client, state: &Path, found: &Found) -> Result<()> {
    if found.is_own() {
        let directory = own::directory(state, &found.name());
        return own::remove(client, &found.pod.id, &directory).await;
    }
    let request = RemoveContainerRequest {
        container_id: found.container.id.clone(),
    };
    let removed = client.runtime.clone().remove_container(request).await;
    removed.map_err(refused("remove"))?;
    Ok(())
}

/// Does it to each, also when one of them fails; prints those for which it was done.
async fn each(containers: &[String], act: impl AsyncFn(&str) -> Result<()>) -> Result<u8> {
    let mut code = 0;
    for meant in containers {
        match act(meant).await {
            Ok(()) => table::print(&format!("{meant}\n"))?,
            Err(error) => {
                eprintln!("hull: {meant}: {error:#}");
                code = 1;
            }
        }
    }
    Ok(code)
}

//! `hull suspend` and `hull resume`: a pod that costs nothing but disk until it goes on as what it was.
//!
//! A checkpoint keeps it, so the two are made of what the daemon has anyway: one that is interrupted in between
//! leaves the pod, or the directory, or both, and never neither.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use hull_proto_cri::v1::{RestorePodRequest, StartContainerRequest};
use tokio::fs;
use tonic::Code;

use super::{
    checkpoint::{CheckpointArgs, checkpoint, path_of},
    own,
    volume::PathsGiven,
};
use crate::{
    client::{Client, refused},
    table,
};

/// What `hull resume` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ResumeArgs {
    /// Directory that `hull suspend` wrote; it is removed once the pod goes on
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    #[command(flatten)]
    paths: PathsGiven,
}

/// Writes a checkpoint of a pod and ends it; its containers' logs stay.
pub(super) async fn suspend(client: &Client, arguments: &CheckpointArgs) -> Result<()> {
    let pod = checkpoint(client, arguments).await?;
    let ended = own::end(client, &pod).await;
    ended.context("the checkpoint is written")
}

/// Has a pod be what it was, by all its names, and go on; removes its directory.
pub(super) async fn resume(client: &Client, arguments: &ResumeArgs) -> Result<()> {
    let request = RestorePodRequest {
        checkpoint_path: path_of(&arguments.directory)?,
        options: arguments.paths.options()?,
        ..Default::default()
    };
    let restored = client.runtime.clone().restore_pod(request).await;
    let restored = restored.map_err(|status| match status.code() {
        Code::AlreadyExists => anyhow!("the pod is there: {}", status.message()),
        _ => refused("resume the pod")(status),
    })?;
    let restored = restored.into_inner();
    let ids = restored.restored_containers.into_iter();
    let ids: Vec<String> = ids.map(|container| container.container_id).collect();
    start(client, &ids, own::end(client, &restored.pod_sandbox_id)).await?;
    let removed = fs::remove_dir_all(&arguments.directory).await;
    removed.with_context(|| {
        let directory = arguments.directory.display();
        format!("the pod goes on, and {directory} is still there: remove it")
    })?;
    ids.iter()
        .try_for_each(|id| table::print(&format!("{id}\n")))
}

/// Lets restored containers go on; if one does not, `end` is what ends their pod.
pub(crate) async fn start(
    client: &Client,
    ids: &[String],
    end: impl Future<Output = Result<()>>,
) -> Result<()> {
    let Err(error) = start_all(client, ids).await else {
        return Ok(());
    };
    match end.await {
        Ok(()) => Err(error),
        Err(removal) => Err(error.context(format!("also: {removal:#}"))),
    }
}

async fn start_all(client: &Client, ids: &[String]) -> Result<()> {
    for id in ids {
        let request = StartContainerRequest {
            container_id: id.clone(),
        };
        let started = client.runtime.clone().start_container(request).await;
        started.map_err(refused("start the container"))?;
    }
    Ok(())
}

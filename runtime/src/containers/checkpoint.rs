//! `hull checkpoint`.

use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result};
use hull_proto_cri::v1::CheckpointPodRequest;

use super::find;
use crate::{
    client::{Client, refused},
    table,
};

/// What `hull checkpoint` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CheckpointArgs {
    /// Pod: its id or the start of it, NAMESPACE/NAME, or the name that `hull run` gave
    #[arg(value_name = "POD")]
    pod: String,
    /// Where the checkpoint will be: a directory that is not there yet. It has all of the pod's memory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Writes a checkpoint of a pod, which goes on. Returns its id.
pub(super) async fn checkpoint(client: &Client, arguments: &CheckpointArgs) -> Result<String> {
    let pod = find::pod(client, &arguments.pod).await?;
    let request = CheckpointPodRequest {
        pod_sandbox_id: pod.id.clone(),
        output_path: path_of(&arguments.directory)?,
        ..Default::default()
    };
    let answer = client.runtime.clone().checkpoint_pod(request).await;
    answer.map_err(refused("write the checkpoint"))?;
    let shown = arguments.directory.display();
    table::print(&match hull_pod::checkpoint_pause(&arguments.directory) {
        Some(paused) => format!("{shown}: {} stood still for {paused:.1?}\n", arguments.pod),
        None => format!("{shown}\n"),
    })?;
    Ok(pod.id)
}

/// The path of a checkpoint, for a daemon.
pub(crate) fn path_of(directory: &Path) -> Result<String> {
    let path = absolute(directory).with_context(|| format!("find {}", directory.display()))?;
    let path = path.into_os_string().into_string();
    path.map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))
}

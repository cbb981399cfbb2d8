//! The pods that `hull run` makes: one container each, in a namespace of their own, with a directory
//! for its log.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use hull_proto_cri::v1::{RemovePodSandboxRequest, StopPodSandboxRequest};

use crate::{
    client::{Client, refused},
    socket::private_directory,
};

/// Their namespace.
pub(crate) const NAMESPACE: &str = "hull-run";
/// The name of their container.
pub(crate) const CONTAINER: &str = "run";
/// The log file's name in the pod's directory.
pub(crate) const LOG: &str = "container.log";

/// The directory of the pod of this name, in the daemon's state directory.
pub(crate) fn directory(state: &Path, name: &str) -> PathBuf {
    state.join("run").join(name)
}

/// Makes the directory of a pod that is there now; what an earlier one of the name left goes.
pub(crate) async fn make_directory(directory: &Path) -> Result<()> {
    remove_directory(directory).await?;
    Ok(private_directory(directory)?)
}

/// Stops a pod, which keeps its container's end and log.
pub(crate) async fn stop(client: &Client, pod: &str) -> Result<()> {
    let request = StopPodSandboxRequest {
        pod_sandbox_id: pod.to_owned(),
    };
    let stopped = client.runtime.clone().stop_pod_sandbox(request).await;
    stopped.map_err(refused("stop the sandbox"))?;
    Ok(())
}

/// Removes a pod with all that it has.
pub(crate) async fn remove(client: &Client, pod: &str, directory: &Path) -> Result<()> {
    end(client, pod).await?;
    remove_directory(directory).await
}

/// Stops and removes a pod.
pub(crate) async fn end(client: &Client, pod: &str) -> Result<()> {
    stop(client, pod).await?;
    let request = RemovePodSandboxRequest {
        pod_sandbox_id: pod.to_owned(),
    };
    let removed = client.runtime.clone().remove_pod_sandbox(request).await;
    removed.map_err(refused("remove the sandbox"))?;
    Ok(())
}

async fn remove_directory(directory: &Path) -> Result<()> {
    match tokio::fs::remove_dir_all(directory).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

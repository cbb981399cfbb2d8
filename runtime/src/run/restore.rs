//! `hull restore`: a pod that goes on from a checkpoint, for a person.
//!
//! It is the daemon's, as with `hull run -d`, and a pod of the namespace of `hull run` whatever the checkpoint is
//! of: `hull rm -f` removes it if it is of one container of `hull run`, which is what most are.

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use hull_proto_cri::v1::RestorePodRequest;
use tonic::Code;

use super::{arguments::RunArgs, request, session::unique_name, values};
use crate::{
    client::{self, refused},
    config::Settings,
    containers::{PathsGiven, own, path_of, start},
    table,
};

/// What `hull restore` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RestoreArgs {
    /// Directory of the checkpoint. Who may write there decides what runs in the pod
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Name to ask for it by
    #[arg(long, value_parser = values::name)]
    name: Option<String>,
    /// Leave its containers standing still where they were
    #[arg(long)]
    no_start: bool,
    #[command(flatten)]
    paths: PathsGiven,
    /// Runtime handler
    #[arg(long, alias = "handler", value_name = "NAME", default_value = "")]
    runtime: String,
}

/// Restores a pod, and lets its containers go on. Prints their ids.
pub(crate) async fn restore(settings: &Settings, arguments: &RestoreArgs) -> Result<()> {
    let daemon = client::serving(settings).await?;
    let client = daemon.client();
    let name = arguments.name.clone().unwrap_or_else(unique_name);
    let logs = own::directory(&settings.state, &name);
    let request = RestorePodRequest {
        checkpoint_path: path_of(&arguments.directory)?,
        config: Some(request::sandbox(&RunArgs::default(), &name, &logs)),
        runtime_handler: arguments.runtime.clone(),
        options: arguments.paths.options()?,
        ..Default::default()
    };
    let restored = client.runtime.clone().restore_pod(request).await;
    let restored = restored.map_err(|status| match status.code() {
        Code::AlreadyExists => anyhow!("the name {name} is taken; `hull rm {name}` frees it"),
        _ => refused("restore the pod")(status),
    })?;
    let restored = restored.into_inner();
    let pod = restored.pod_sandbox_id;
    let ids = restored.restored_containers.into_iter();
    let ids: Vec<String> = ids.map(|container| container.container_id).collect();
    if !arguments.no_start {
        start(&client, &ids, own::remove(&client, &pod, &logs)).await?;
    }
    ids.iter()
        .try_for_each(|id| table::print(&format!("{id}\n")))
}

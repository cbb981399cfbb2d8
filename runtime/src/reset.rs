//! `hull reset`: ends all pods of the node that are VMs, whoever made them.

use std::path::Path;

use anyhow::{Result, bail};
use futures::{StreamExt, stream};
use hull_proto_cri::v1::{ListPodSandboxRequest, PodSandbox};

use crate::{
    client::{self, Client, refused},
    config::{Handlers, Settings},
    containers::own,
    table,
};

/// Pods that are ended at a time.
const AT_A_TIME: usize = 8;

/// What `hull reset` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ResetArgs {
    /// Do it; without this it only tells which pods there are
    #[arg(short, long)]
    force: bool,
}

/// Ends and removes all pods, by the daemon that serves or by one of our own. Images stay.
pub(crate) async fn reset(settings: Settings, arguments: &ResetArgs) -> Result<()> {
    let state = settings.state.clone();
    let handlers = settings.handlers.clone();
    let daemon = client::connect(settings).await?;
    let result = all(&daemon.client(), &state, &handlers, arguments.force).await;
    daemon.close().await;
    result
}

async fn all(client: &Client, state: &Path, handlers: &Handlers, force: bool) -> Result<()> {
    let request = ListPodSandboxRequest::default();
    let listed = client.runtime.clone().list_pod_sandbox(request).await;
    let mut pods = listed.map_err(refused("list the pods"))?.into_inner().items;
    // Those of other runtimes outlive Hull.
    pods.retain(|pod| {
        let handler = handlers.get(&pod.runtime_handler);
        handler.is_none_or(|handler| handler.delegate.is_none())
    });
    if !force {
        table::print(&table::lines(pods.iter().map(name)))?;
        if !pods.is_empty() {
            bail!("these pods would be ended: with -f they are");
        }
        return Ok(());
    }
    let ends = pods.into_iter().map(|pod| async move {
        let ended = end(client, state, &pod).await;
        (name(&pod), ended)
    });
    let mut ends = stream::iter(ends).buffer_unordered(AT_A_TIME);
    let mut left = 0;
    while let Some((name, ended)) = ends.next().await {
        match ended {
            Ok(()) => table::print(&format!("{name}\n"))?,
            Err(error) => {
                eprintln!("hull: {name}: {error:#}");
                left += 1;
            }
        }
    }
    if left > 0 {
        bail!("{left} pods are left");
    }
    Ok(())
}

async fn end(client: &Client, state: &Path, pod: &PodSandbox) -> Result<()> {
    match &pod.metadata {
        Some(meta) if meta.namespace == own::NAMESPACE => {
            own::remove(client, &pod.id, &own::directory(state, &meta.name)).await
        }
        _ => own::end(client, &pod.id).await,
    }
}

fn name(pod: &PodSandbox) -> String {
    let meta = pod.metadata.clone().unwrap_or_default();
    format!("{}/{}", meta.namespace, meta.name)
}

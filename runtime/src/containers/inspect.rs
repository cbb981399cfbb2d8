//! `hull inspect`.

use anyhow::Result;
use hull_proto_cri::v1::{PodSandboxNetworkStatus, PodSandboxStatusRequest};
use serde_json::{Value, json};

use super::{
    find::{self, Found},
    list::state,
};
use crate::{
    client::{Client, refused},
    table::{self, time},
};

/// What `hull inspect` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct InspectArgs {
    /// Containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// Prints all that is known of containers, as one JSON array.
pub(super) async fn inspect(client: &Client, arguments: &InspectArgs) -> Result<()> {
    let mut all = Vec::new();
    for meant in &arguments.containers {
        all.push(known(client, &find::one(client, meant).await?).await?);
    }
    table::print(&format!("{:#}\n", Value::from(all)))
}

async fn known(client: &Client, found: &Found) -> Result<Value> {
    let (status, info) = find::status(client, &found.container.id, true).await?;
    let network = network(client, found).await?;
    let others = network.additional_ips.into_iter().map(|ip| ip.ip);
    let addresses = std::iter::once(network.ip).chain(others);
    let addresses: Vec<_> = addresses.filter(|ip| !ip.is_empty()).collect();
    let (pod, container) = found.names();
    Ok(json!({
        "id": status.id,
        "name": found.name(),
        "container": container,
        "pod": {
            "id": found.pod.id,
            "namespace": pod.namespace,
            "name": pod.name,
            "uid": pod.uid,
            "runtime": found.pod.runtime_handler,
            "addresses": addresses,
        },
        "image": found.image(),
        "image_id": status.image_id,
        "state": state(status.state()),
        "exit_code": status.exit_code,
        "reason": status.reason,
        "message": status.message,
        "created_at": time(status.created_at),
        "started_at": time(status.started_at),
        "finished_at": time(status.finished_at),
        "log_path": status.log_path,
        "labels": status.labels,
        "annotations": status.annotations,
        "info": info,
    }))
}

async fn network(client: &Client, found: &Found) -> Result<PodSandboxNetworkStatus> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: found.pod.id.clone(),
        verbose: false,
    };
    let status = client.runtime.clone().pod_sandbox_status(request).await;
    let status = status.map_err(refused("ask for the sandbox's state"))?;
    let network = status.into_inner().status.and_then(|status| status.network);
    Ok(network.unwrap_or_default())
}

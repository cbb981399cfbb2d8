//! `hull events`.

use anyhow::Result;
use hull_proto_cri::v1::{
    ContainerEventResponse, ContainerEventType, GetEventsRequest, PodSandbox,
};
use serde_json::json;

use super::find::Found;
use crate::{
    client::{Client, refused},
    table::{self, Format, Output},
};

/// What `hull events` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    output: Output,
}

/// Prints what happens to pods and containers from now on.
pub(super) async fn events(client: &Client, arguments: &EventsArgs) -> Result<()> {
    let mut runtime = client.runtime.clone();
    let answer = runtime.get_container_events(GetEventsRequest {});
    let mut events = answer.await.map_err(refused("follow events"))?.into_inner();
    while let Some(event) = events.message().await.map_err(refused("follow events"))? {
        table::print(&line(&event, arguments.output.format))?;
    }
    Ok(())
}

fn line(event: &ContainerEventResponse, format: Format) -> String {
    let kind = match event.container_event_type() {
        ContainerEventType::ContainerCreatedEvent => "created",
        ContainerEventType::ContainerStartedEvent => "started",
        ContainerEventType::ContainerStoppedEvent => "stopped",
        ContainerEventType::ContainerDeletedEvent => "removed",
    };
    let pod = event.pod_sandbox_status.clone().unwrap_or_default();
    // A sandbox's own events have its id where that of a container is.
    let is_pod = pod.id == event.container_id;
    let what = if is_pod { "pod" } else { "container" };
    let metadata = pod.metadata.unwrap_or_default();
    let mut statuses = event.containers_statuses.iter();
    let status = statuses.find(|status| status.id == event.container_id);
    let name = if is_pod {
        Some(format!("{}/{}", metadata.namespace, metadata.name))
    } else {
        status.map(|status| {
            let mut found = Found {
                pod: PodSandbox {
                    metadata: Some(metadata),
                    ..Default::default()
                },
                ..Default::default()
            };
            found.container.metadata.clone_from(&status.metadata);
            found.name()
        })
    };
    let exit_code = status.filter(|_| kind == "stopped").map(|s| s.exit_code);
    let at = table::time(event.created_at);
    if format == Format::Json {
        let event = json!({
            "at": at, "what": what, "event": kind, "id": event.container_id, "name": name,
            "exit_code": exit_code,
        });
        return format!("{event}\n");
    }
    let code = exit_code.map_or_else(String::new, |code| format!(" ({code})"));
    let (at, id) = (at.unwrap_or_default(), table::short(&event.container_id));
    let name = name.unwrap_or_default();
    format!("{at} {what} {kind}{code} {id} {name}\n")
}

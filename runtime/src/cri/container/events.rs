//! `GetContainerEvents`.
//!
//! A client that is connected gets every event, in order for each pod. One that reads so slowly
//! that events had to be dropped is told (`DATA_LOSS`) after those that were kept; it connects
//! again and lists. The stream ends without an error when the daemon does.

use futures::{StreamExt, stream};
use hull_pod::EventKind;
use hull_pod::Events;
use hull_pod::PodEvent;
use hull_proto_cri::v1::{ContainerEventResponse, ContainerEventType};
use tonic::Status;

use crate::{
    cri::{
        Backend,
        convert::{container, sandbox},
        error::CriError,
        stream::Answer,
    },
    shutdown::Stopping,
};

/// Sends all events from now on.
pub(crate) fn events(backend: &Backend) -> Result<Answer<ContainerEventResponse>, CriError> {
    let events = backend.pods.events()?;
    let state = (events, backend.stopping.clone());
    Ok(stream::unfold(state, next).boxed())
}

type State = (Events, Stopping);

async fn next(
    (mut events, mut stopping): State,
) -> Option<(Result<ContainerEventResponse, Status>, State)> {
    let event = tokio::select! {
        event = events.next() => event?,
        () = stopping.requested() => return None,
    };
    let answer = match event {
        Ok(event) => Ok(response(&event)),
        Err(lost) => Err(Status::data_loss(lost.to_string())),
    };
    Some((answer, (events, stopping)))
}

/// A sandbox's own events have its id where that of a container is.
fn response(event: &PodEvent) -> ContainerEventResponse {
    let kind = match event.kind() {
        EventKind::Created => ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => ContainerEventType::ContainerStoppedEvent,
        EventKind::Removed => ContainerEventType::ContainerDeletedEvent,
    };
    let container = event.container().map(ToString::to_string);
    ContainerEventResponse {
        container_id: container.unwrap_or_else(|| event.pod().to_string()),
        container_event_type: kind.into(),
        created_at: event.at_ns(),
        pod_sandbox_status: Some(sandbox::status(event.sandbox())),
        containers_statuses: event.containers().map(container::status).collect(),
    }
}

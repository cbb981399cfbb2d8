//! Containers: one file per verb.

pub(crate) mod attach;
pub(crate) mod create;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod exec_sync;
pub(crate) mod list;
pub(crate) mod remove;
pub(crate) mod reopen_log;
pub(crate) mod start;
pub(crate) mod stats;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod update;

use hull_spec::{
    error::PodError,
    info::{ContainerInfo, ContainerState},
};

use super::{Backend, error::CriError, id};

/// A container in a state in which streams can be opened.
async fn streamed(
    backend: &Backend,
    container_id: &str,
    can_be: impl FnOnce(ContainerState) -> bool,
) -> Result<ContainerInfo, CriError> {
    let container = backend
        .pods
        .container(id("container_id", container_id)?)
        .await?;
    if can_be(container.state) {
        return Ok(container);
    }
    let error = PodError::FailedPrecondition {
        action: format!("open streams of container {}", container.id),
        reason: format!("it is {:?}", container.state).to_lowercase(),
    };
    Err(error.into())
}

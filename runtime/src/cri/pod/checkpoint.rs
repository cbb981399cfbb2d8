//! `CheckpointPod` and `RestorePod`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use hull_pod::Asked;
use hull_proto_cri::RESTORE_MOUNT;

use hull_proto_cri::v1::{
    CheckpointPodRequest, CheckpointPodResponse, RestorePodRequest, RestorePodResponse,
    RestoredContainer,
};
use tracing::Span;

use super::handler;
use crate::cri::{
    Backend,
    convert::{container, sandbox},
    error::CriError,
    id,
};

/// Writes a checkpoint of a sandbox with all of its containers, which go on.
pub(crate) async fn checkpoint(
    backend: &Backend,
    request: CheckpointPodRequest,
) -> Result<CheckpointPodResponse, CriError> {
    let pod = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    let output = path("output_path", &request.output_path)?;
    if let Some(option) = request.options.keys().next() {
        return Err(no_option(option));
    }
    let (info, containers) = backend.pods.sandbox_with_containers(pod).await?;
    if !request.container_ids.is_empty() {
        let left_out = containers.iter().find(|container| {
            let mut named = request.container_ids.iter();
            !named.any(|id| !id.is_empty() && container.id.as_str().starts_with(id.as_str()))
        });
        if let Some(left_out) = left_out {
            let reason = format!(
                "a checkpoint is of all containers, and {} is not named",
                left_out.id
            );
            return Err(CriError::unsupported("container_ids", reason));
        }
    }
    backend
        .pods
        .checkpoint_sandbox(info.id.as_str(), output)
        .await?;
    Ok(CheckpointPodResponse {})
}

/// Starts a sandbox that goes on from a checkpoint, with its containers, which wait for `StartContainer`.
pub(crate) async fn restore(
    backend: &Backend,
    request: RestorePodRequest,
) -> Result<RestorePodResponse, CriError> {
    let checkpoint = path("checkpoint_path", &request.checkpoint_path)?;
    let mut paths = BTreeMap::new();
    for (option, host) in &request.options {
        let Some(inside) = option.strip_prefix(RESTORE_MOUNT) else {
            return Err(no_option(option));
        };
        let host = path(&format!("options[{option:?}]"), host)?;
        paths.insert(PathBuf::from(inside), host.to_owned());
    }
    let spec = match request.config {
        Some(config) => {
            // Its size is the checkpoint's, whatever the handler says.
            handler::choose(&backend.handlers.borrow(), &request.runtime_handler)?;
            Some(sandbox::spec(Some(config), request.runtime_handler)?)
        }
        None => None,
    };
    let configs = request.container_configs.into_iter().enumerate();
    let containers = configs.map(|(index, config)| {
        let spec = container::spec(Some(config));
        spec.map_err(|error| error.about(format!("container_configs[{index}]")))
    });
    let asked = Asked {
        containers: containers.collect::<Result<_, _>>()?,
        paths,
    };
    let restored = backend.life.restore_sandbox(checkpoint, spec, asked);
    let (pod, containers) = restored.await?;
    Span::current().record("pod", pod.short());
    let container = |(name, id)| RestoredContainer {
        name,
        container_id: String::from(id),
    };
    Ok(RestorePodResponse {
        pod_sandbox_id: pod.into(),
        restored_containers: containers.into_iter().map(container).collect(),
    })
}

fn path<'a>(field: &str, path: &'a str) -> Result<&'a Path, CriError> {
    if !path.starts_with('/') {
        let reason = format!("{path:?} is no absolute path");
        return Err(CriError::invalid(field, reason));
    }
    Ok(Path::new(path))
}

/// What an option asks for may matter, so that none is passed over.
fn no_option(name: &str) -> CriError {
    CriError::unsupported(format!("options[{name:?}]"), "there is no such option")
}

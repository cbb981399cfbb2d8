//! `Status`: conditions by what is really there, handlers, features.

use error_reporter::Report;
use hull_proto_cri::v1::{
    RuntimeCondition, RuntimeFeatures, RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus,
    StatusRequest, StatusResponse,
};

use crate::cri::{Backend, error::CriError, info};

/// Tells whether this node can run pods, and how.
pub(crate) async fn status(
    backend: &Backend,
    request: StatusRequest,
) -> Result<StatusResponse, CriError> {
    let runtime = backend.probe.ready().await;
    let network = backend.network.status().await;
    let network = network.map_err(|error| Report::new(error).to_string());
    let handlers = backend.handlers.borrow().clone();
    let handlers: Vec<&str> = handlers.names().collect();
    let mut conditions = vec![
        condition("RuntimeReady", "VmNotRunnable", runtime),
        condition("NetworkReady", "NetworkPluginNotReady", network),
    ];
    let pods = backend.pods.record_faults().iter();
    let lost: Vec<&str> = pods
        .chain(backend.images.record_faults())
        .map(String::as_str)
        .collect();
    if !lost.is_empty() {
        // Not one that kubelet acts on: the node works.
        conditions.push(condition(
            "RecordsWhole",
            "RecordsLost",
            Err(lost.join("; ")),
        ));
    }
    Ok(StatusResponse {
        status: Some(RuntimeStatus { conditions }),
        runtime_handlers: handlers
            .iter()
            .map(|name| RuntimeHandler {
                name: (*name).to_owned(),
                // Each becomes true with the feature.
                features: Some(RuntimeHandlerFeatures {
                    recursive_read_only_mounts: true,
                    user_namespaces: true,
                }),
            })
            .collect(),
        features: Some(RuntimeFeatures {
            supplemental_groups_policy: true,
            mount_options: true,
            ..Default::default()
        }),
        info: if request.verbose {
            info::node(backend, &handlers)
        } else {
            Default::default()
        },
    })
}

fn condition(kind: &str, reason: &str, result: Result<(), String>) -> RuntimeCondition {
    RuntimeCondition {
        r#type: kind.to_owned(),
        status: result.is_ok(),
        reason: result
            .as_ref()
            .err()
            .map(|_| reason.to_owned())
            .unwrap_or_default(),
        message: result.err().unwrap_or_default(),
    }
}

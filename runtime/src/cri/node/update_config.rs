//! `UpdateRuntimeConfig`.

use std::net::IpAddr;

use hull_proto_cri::v1::{UpdateRuntimeConfigRequest, UpdateRuntimeConfigResponse};
use tracing::info;

use crate::cri::error::CriError;

/// Takes note of the node's addresses for pods. The CNI configuration decides
/// which ones pods get, so nothing follows from it.
pub(crate) fn update(
    request: UpdateRuntimeConfigRequest,
) -> Result<UpdateRuntimeConfigResponse, CriError> {
    let network = request.runtime_config.and_then(|c| c.network_config);
    let cidrs = network.map(|n| n.pod_cidr).unwrap_or_default();
    // A node with two address families has two, separated by a comma.
    for cidr in cidrs.split(',').filter(|_| !cidrs.is_empty()) {
        check(cidr.trim())?;
    }
    if !cidrs.is_empty() {
        info!(%cidrs, "kubelet tells the node's addresses for pods; CNI decides");
    }
    Ok(UpdateRuntimeConfigResponse {})
}

fn check(cidr: &str) -> Result<(), CriError> {
    let parsed = cidr.split_once('/').and_then(|(address, prefix)| {
        let address: IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= most).then_some(())
    });
    parsed.ok_or_else(|| {
        CriError::invalid(
            "runtime_config.network_config.pod_cidr",
            format!("{cidr:?} is no address range"),
        )
    })
}

#[cfg(test)]
mod tests {
    use hull_proto_cri::v1::{NetworkConfig, RuntimeConfig};

    use super::*;

    fn with(pod_cidr: &str) -> Result<UpdateRuntimeConfigResponse, CriError> {
        update(UpdateRuntimeConfigRequest {
            runtime_config: Some(RuntimeConfig {
                network_config: Some(NetworkConfig {
                    pod_cidr: pod_cidr.into(),
                }),
            }),
        })
    }

    #[test]
    fn ranges_are_taken_and_nonsense_is_not() {
        update(UpdateRuntimeConfigRequest::default()).unwrap();
        for good in ["", "10.0.0.0/24", "10.0.0.0/24,fd00::/64"] {
            with(good).unwrap();
        }
        for bad in ["10.0.0.0", "10.0.0.0/33", "x/8", "10.0.0.0/24,"] {
            let error = with(bad).unwrap_err().to_string();
            assert!(error.starts_with("runtime_config."), "{bad}: {error}");
        }
    }
}

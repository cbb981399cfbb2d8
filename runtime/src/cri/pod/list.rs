//! `ListPodSandbox`.

use hull_proto_cri::v1::{ListPodSandboxRequest, ListPodSandboxResponse};

use crate::cri::{Backend, convert::sandbox, error::CriError, filter};

/// Lists the sandboxes that the filter selects.
pub(crate) async fn list(
    backend: &Backend,
    request: ListPodSandboxRequest,
) -> Result<ListPodSandboxResponse, CriError> {
    let filter = filter::Sandboxes::new(request.filter)?;
    let pods = backend.pods.sandboxes().await;
    Ok(ListPodSandboxResponse {
        items: pods
            .iter()
            .filter(|pod| filter.selects(pod))
            .map(sandbox::item)
            .collect(),
    })
}

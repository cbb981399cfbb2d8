//! `RemoveImage`. An unknown image is removed already.

use hull_proto_cri::v1::{RemoveImageRequest, RemoveImageResponse};
use tracing::Instrument;

use crate::cri::{Backend, convert::image, error::CriError};

/// Removes an image with all its names.
pub(crate) async fn remove(
    backend: &Backend,
    request: RemoveImageRequest,
) -> Result<RemoveImageResponse, CriError> {
    let name = image::request("image", request.image)?.image;
    let images = backend.images.clone();
    // In a task of its own: a client that goes away does not stop it half-way.
    tokio::spawn(async move { images.remove(&name).await }.in_current_span())
        .await
        .map_err(|source| CriError::Task {
            action: "remove image",
            source,
        })??;
    Ok(RemoveImageResponse {})
}

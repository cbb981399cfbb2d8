//! `ListImages`.

use hull_proto_cri::v1::{ListImagesRequest, ListImagesResponse};

use crate::cri::{Backend, convert::image, error::CriError};

/// Lists all images, or the one that the filter names.
pub(crate) async fn list(
    backend: &Backend,
    request: ListImagesRequest,
) -> Result<ListImagesResponse, CriError> {
    let name = request
        .filter
        .and_then(|filter| filter.image)
        .map(|spec| spec.image)
        .filter(|name| !name.is_empty());
    let found = match name {
        Some(name) => backend.images.get(&name).await?.into_iter().collect(),
        None => backend.images.list().await?,
    };
    Ok(ListImagesResponse {
        images: found.iter().map(image::image).collect(),
    })
}

//! `ListImages` and `StreamImages`.

use hull_proto_cri::v1::{
    Image, ImageFilter, ListImagesRequest, ListImagesResponse, StreamImagesRequest,
    StreamImagesResponse,
};

use crate::cri::{
    Backend,
    convert::image,
    error::CriError,
    stream::{Answer, batches},
};

/// Lists all images, or the one that the filter names.
pub(crate) async fn list(
    backend: &Backend,
    request: ListImagesRequest,
) -> Result<ListImagesResponse, CriError> {
    let images = selected(backend, request.filter).await?;
    Ok(ListImagesResponse { images })
}

/// The same in parts.
pub(crate) async fn stream(
    backend: &Backend,
    request: StreamImagesRequest,
) -> Result<Answer<StreamImagesResponse>, CriError> {
    let all = selected(backend, request.filter).await?;
    Ok(batches(all, |images| StreamImagesResponse { images }))
}

async fn selected(backend: &Backend, filter: Option<ImageFilter>) -> Result<Vec<Image>, CriError> {
    let name = filter
        .and_then(|filter| filter.image)
        .map(|spec| spec.image)
        .filter(|name| !name.is_empty());
    let found = match name {
        Some(name) => backend.images.get(&name).await?.into_iter().collect(),
        None => backend.images.list().await?,
    };
    Ok(found.iter().map(image::image).collect())
}

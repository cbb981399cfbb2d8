//! `ImageStatus`. An image that is not here is an empty answer, no error.

use hull_proto_cri::v1::{ImageStatusRequest, ImageStatusResponse};

use crate::cri::{Backend, convert::image, error::CriError, info};

/// Tells about one image.
pub(crate) async fn status(
    backend: &Backend,
    request: ImageStatusRequest,
) -> Result<ImageStatusResponse, CriError> {
    let name = image::request("image", request.image)?.image;
    let found = backend.images.get(&name).await?;
    Ok(ImageStatusResponse {
        image: found.as_ref().map(image::image),
        info: match &found {
            Some(found) if request.verbose => info::image(found),
            _ => Default::default(),
        },
    })
}

//! `PullImage`.

use hull_base::stages;
use hull_proto_cri::v1::{PullImageRequest, PullImageResponse};

use crate::cri::{Backend, convert::image, error::CriError};

/// Pulls an image and answers with its id. A client that goes away ends the pull.
pub(crate) async fn pull(
    backend: &Backend,
    request: PullImageRequest,
) -> Result<PullImageResponse, CriError> {
    let reference = image::request("image", request.image)?.image;
    stages::attribute("container.image.name", &reference);
    let auth = image::auth(request.auth)?;
    let id = backend.images.pull(&reference, auth).await?;
    Ok(PullImageResponse {
        image_ref: id.into(),
    })
}

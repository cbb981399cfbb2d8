//! The image service: every RPC with its span.

use hull_proto_cri::v1::{image_service_server::ImageService, *};
use tonic::{Request, Response, Status, async_trait};
use tracing::info_span;

use super::{Cri, answer, image, stream::Answer};

fn name(spec: Option<&ImageSpec>) -> &str {
    spec.map_or("", |spec| &spec.image)
}

#[async_trait]
impl ImageService for Cri {
    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<PullImageResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("PullImage", image = name(request.image.as_ref()));
        answer(span, image::pull::pull(&self.0, request)).await
    }

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let request = request.into_inner();
        answer(
            info_span!("ListImages"),
            image::list::list(&self.0, request),
        )
        .await
    }

    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("ImageStatus", image = name(request.image.as_ref()));
        answer(span, image::status::status(&self.0, request)).await
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("RemoveImage", image = name(request.image.as_ref()));
        answer(span, image::remove::remove(&self.0, request)).await
    }

    async fn image_fs_info(
        &self,
        _: Request<ImageFsInfoRequest>,
    ) -> Result<Response<ImageFsInfoResponse>, Status> {
        answer(info_span!("ImageFsInfo"), image::fs_info::fs_info(&self.0)).await
    }

    type StreamImagesStream = Answer<StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let request = request.into_inner();
        let span = info_span!("StreamImages");
        answer(span, image::list::stream(&self.0, request)).await
    }
}

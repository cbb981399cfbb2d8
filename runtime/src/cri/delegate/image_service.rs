//! The image service for all runtimes of the node: every RPC.

use std::sync::Arc;

use hull_proto_cri::v1::{image_service_server::ImageService, *};
use tonic::{Request, Response, Status, async_trait};

use super::{
    images::for_default_handler,
    peer::{Delegate, PATIENCE},
    router::Router,
};
use crate::cri::stream::{Answer, batches};

impl Router {
    /// Adds the images of the others; one that several have is one.
    async fn add_images(&self, filter: Option<ImageFilter>, images: &mut Vec<Image>) {
        let ask = |delegate: Arc<Delegate>| {
            let filter = filter.clone();
            async move {
                let request = ListImagesRequest { filter };
                delegate.images().list_images(request).await
            }
        };
        let all: Vec<ListImagesResponse> = self.gather(ask).await;
        for image in all.into_iter().flat_map(|answer| answer.images) {
            match images.iter_mut().find(|known| known.id == image.id) {
                Some(known) => merge(known, image),
                None => images.push(image),
            }
        }
    }
}

fn merge(known: &mut Image, other: Image) {
    for (names, more) in [
        (&mut known.repo_tags, other.repo_tags),
        (&mut known.repo_digests, other.repo_digests),
    ] {
        for name in more {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    known.pinned |= other.pinned;
}

#[async_trait]
impl ImageService for Router {
    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<PullImageResponse>, Status> {
        let asked = request.into_inner();
        let holder = self.puller(&asked)?;
        if let (Some(image), Some(auth)) = (&asked.image, &asked.auth)
            && !self.delegates().is_empty()
        {
            self.credentials.keep(&image.image, auth.clone());
        }
        let image_ref = self.pull(&holder, asked).await?;
        Ok(Response::new(PullImageResponse { image_ref }))
    }

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let filter = request.get_ref().filter.clone();
        let mut answer = self.own.list_images(request).await?;
        self.add_images(filter, &mut answer.get_mut().images).await;
        Ok(answer)
    }

    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        let asked = request.into_inner();
        if let Some(holder) = self.named(asked.image.as_ref())? {
            return self.image(&holder, asked).await.map(Response::new);
        }
        let own = self.image(&None, asked.clone()).await?;
        if own.image.is_some() {
            return Ok(Response::new(own));
        }
        for delegate in self.delegates().into_iter().filter(|one| !one.is_late()) {
            let holder = Some(Arc::clone(&delegate));
            let told = self.image(&holder, asked.clone());
            // One that does not tell has none that a pod could have now.
            if let Ok(told) = delegate.within(PATIENCE, told).await
                && told.image.is_some()
            {
                return Ok(Response::new(told));
            }
        }
        Ok(Response::new(own))
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        let asked = request.get_ref();
        let named = self.named(asked.image.as_ref())?;
        let other = RemoveImageRequest {
            image: for_default_handler(asked.image.clone()),
        };
        match named {
            Some(Some(delegate)) => delegate.answer(delegate.images().remove_image(other).await),
            Some(None) => self.own.remove_image(request).await,
            None => {
                let answer = self.own.remove_image(request).await?;
                for delegate in self.delegates() {
                    let images = &mut delegate.images();
                    let removed = images.remove_image(other.clone());
                    delegate.within(PATIENCE, removed).await?;
                }
                Ok(answer)
            }
        }
    }

    async fn image_fs_info(
        &self,
        request: Request<ImageFsInfoRequest>,
    ) -> Result<Response<ImageFsInfoResponse>, Status> {
        let mut answer = self.own.image_fs_info(request).await?;
        let ask = |delegate: Arc<Delegate>| async move {
            delegate.images().image_fs_info(ImageFsInfoRequest {}).await
        };
        let more: Vec<ImageFsInfoResponse> = self.gather(ask).await;
        let all = answer.get_mut();
        for more in more {
            all.image_filesystems.extend(more.image_filesystems);
            all.container_filesystems.extend(more.container_filesystems);
        }
        Ok(answer)
    }

    type StreamImagesStream = Answer<StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        if self.delegates().is_empty() {
            return self.own.stream_images(request).await;
        }
        let filter = request.into_inner().filter;
        let request = Request::new(ListImagesRequest { filter });
        let images = self.list_images(request).await?.into_inner().images;
        let all = batches(images, |images| StreamImagesResponse { images });
        Ok(Response::new(all))
    }
}

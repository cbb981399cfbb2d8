//! Which runtime gets an image.
//!
//! kubelet says for which handler it asks only with a feature that is off by default. So an image that any runtime
//! has is there, and the one that has to make a container of it pulls it then, if another one has it.

use std::sync::Arc;

use hull_proto_cri::v1::{
    ContainerConfig, Image, ImageSpec, ImageStatusRequest, ImageStatusResponse, PodSandboxConfig,
    PullImageRequest, image_service_server::ImageService,
};
use tonic::{Request, Status};
use tracing::info;

use super::{peer::Delegate, router::Router};
use crate::cri::error::CriError;

/// A runtime: another, or Hull.
pub(super) type Holder = Option<Arc<Delegate>>;

impl Router {
    /// The runtime of a handler.
    fn of_handler(&self, name: &str) -> Result<Holder, Status> {
        let handlers = self.own.0.handlers.borrow();
        let socket = handlers.leads_to(name).map(|(socket, _)| socket.to_owned());
        if socket.is_none() && handlers.get(name).is_none() {
            let reason = format!("there is no handler {name:?} on this node");
            let error = CriError::invalid("image.runtime_handler", reason);
            return Err(Status::invalid_argument(error.to_string()));
        }
        drop(handlers);
        Ok(socket.and_then(|socket| self.delegate(&socket)))
    }

    /// The runtime of the handler that an image names; none: it names no handler.
    pub(super) fn named(&self, image: Option<&ImageSpec>) -> Result<Option<Holder>, Status> {
        let handler = image.map_or("", |image| &image.runtime_handler);
        if handler.is_empty() {
            return Ok(None);
        }
        self.of_handler(handler).map(Some)
    }

    /// The runtime that is to have an image.
    pub(super) fn puller(&self, request: &PullImageRequest) -> Result<Holder, Status> {
        if let Some(holder) = self.named(request.image.as_ref())? {
            return Ok(holder);
        }
        let metadata = request
            .sandbox_config
            .as_ref()
            .and_then(|c| c.metadata.as_ref());
        let Some(metadata) = metadata else {
            return Ok(None);
        };
        let mut all = self.delegates().into_iter();
        Ok(all.find(|delegate| delegate.has_pod_named(metadata)))
    }

    /// What a runtime tells of an image.
    pub(super) async fn image(
        &self,
        holder: &Holder,
        request: ImageStatusRequest,
    ) -> Result<ImageStatusResponse, Status> {
        let status = match holder {
            None => self.own.image_status(Request::new(request)).await,
            Some(delegate) => {
                let request = ImageStatusRequest {
                    image: for_default_handler(request.image),
                    ..request
                };
                delegate.answer(delegate.images().image_status(request).await)
            }
        };
        Ok(status?.into_inner())
    }

    /// Has the runtime of a pod have the image of a container that it is to make: another one may be the one that
    /// has it.
    pub(super) async fn have_image(
        &self,
        holder: &Holder,
        config: Option<&mut ContainerConfig>,
        pod: Option<PodSandboxConfig>,
    ) -> Result<(), Status> {
        let delegates = self.delegates();
        let Some(spec) = config.and_then(|config| config.image.as_mut()) else {
            return Ok(());
        };
        if delegates.is_empty() || self.has(holder, &spec.image).await?.is_some() {
            return Ok(());
        }
        let others = delegates.into_iter().map(Some).chain([None]);
        let mut found = None;
        for other in others {
            if is_same(&other, holder) {
                continue;
            }
            // One that does not answer has nothing to tell.
            if let Ok(Some(image)) = self.has(&other, &spec.image).await {
                found = Some(image);
                break;
            }
        }
        let Some(image) = found else {
            return Ok(());
        };
        let Some(name) = [&spec.user_specified_image, &spec.image]
            .into_iter()
            .chain(&image.repo_tags)
            .chain(&image.repo_digests)
            .find(|name| !name.is_empty() && !name.starts_with("sha256:"))
            .cloned()
        else {
            return Ok(());
        };
        info!(image = name, "pulled for another runtime of the node, too");
        let request = PullImageRequest {
            image: Some(ImageSpec {
                image: name.clone(),
                ..ImageSpec::default()
            }),
            auth: self.credentials.of(&name),
            sandbox_config: pod,
        };
        spec.image = self.pull(holder, request).await?;
        Ok(())
    }

    /// Pulls an image for a runtime; returns its reference there.
    pub(super) async fn pull(
        &self,
        holder: &Holder,
        request: PullImageRequest,
    ) -> Result<String, Status> {
        let pulled = match holder {
            None => self.own.pull_image(Request::new(request)).await,
            Some(delegate) => {
                let request = PullImageRequest {
                    image: for_default_handler(request.image),
                    ..request
                };
                delegate.answer(delegate.images().pull_image(request).await)
            }
        };
        Ok(pulled?.into_inner().image_ref)
    }

    async fn has(&self, holder: &Holder, image: &str) -> Result<Option<Image>, Status> {
        let request = ImageStatusRequest {
            image: Some(ImageSpec {
                image: image.to_owned(),
                ..ImageSpec::default()
            }),
            verbose: false,
        };
        Ok(self.image(holder, request).await?.image)
    }
}

/// An image as another runtime is asked for it, whose handlers have names of their own.
pub(super) fn for_default_handler(image: Option<ImageSpec>) -> Option<ImageSpec> {
    image.map(|image| ImageSpec {
        runtime_handler: String::new(),
        ..image
    })
}

fn is_same(one: &Holder, other: &Holder) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

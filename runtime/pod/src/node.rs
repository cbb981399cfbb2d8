//! What all pods of the node share.

use std::sync::Arc;

use crate::{
    config::PodsConfig,
    events::Hub,
    ports::{PodImages, PodNetworking},
    record::Records,
    registry::Registry,
    stats::Samples,
    storage::volumes::Watches,
};

/// What all pods of the node share.
#[derive(Debug)]
pub(crate) struct Node {
    pub config: PodsConfig,
    pub images: Arc<dyn PodImages>,
    pub network: Arc<dyn PodNetworking>,
    pub records: Records,
    pub registry: Registry,
    pub events: Hub,
    pub samples: Samples,
    pub watches: Watches,
}

impl Node {
    pub(crate) fn new(
        config: PodsConfig,
        images: Arc<dyn PodImages>,
        network: Arc<dyn PodNetworking>,
        records: Records,
    ) -> Self {
        Self {
            config,
            images,
            network,
            records,
            registry: Registry::default(),
            events: Hub::default(),
            samples: Samples::default(),
            watches: Watches::start(),
        }
    }
}

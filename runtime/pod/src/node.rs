//! What all pods of the node share.

use std::sync::Arc;

use tokio::sync::broadcast;

use crate::{
    config::PodsConfig,
    info::PodEvent,
    ports::{PodImages, PodNetworking},
    record::Records,
    registry::Registry,
};

/// How many events a slow follower may be behind.
const EVENTS: usize = 4096;

/// What all pods of the node share.
#[derive(Debug)]
pub(crate) struct Node {
    pub config: PodsConfig,
    pub images: Arc<dyn PodImages>,
    pub network: Arc<dyn PodNetworking>,
    pub records: Records,
    pub registry: Registry,
    pub events: broadcast::Sender<PodEvent>,
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
            events: broadcast::channel(EVENTS).0,
        }
    }

    /// Tells those who follow events.
    pub(crate) fn announce(&self, event: PodEvent) {
        // An error means that nobody follows.
        let _ = self.events.send(event);
    }
}

//! What all pods of the node share.

use std::sync::Arc;

use tokio::sync::Semaphore;

use hull_base::clock::Steps;
use hull_spec::config::PodsConfig;

use crate::{
    checkpoint::class::Classes,
    events::Hub,
    ports::{PodImages, PodNetworking, PodProcesses},
    record::Records,
    registry::Registry,
    session::permits::NODE_OUTPUT,
    starts::Starts,
    stats::samples::Samples,
    storage::atomic_volumes::Watches,
    templates::Templates,
    users::Users,
};

/// What all pods of the node share.
#[derive(Debug)]
pub(crate) struct Node {
    pub config: PodsConfig,
    pub images: Arc<dyn PodImages>,
    pub network: Arc<dyn PodNetworking>,
    pub processes: Arc<dyn PodProcesses>,
    pub records: Records,
    pub registry: Registry,
    pub users: Users,
    pub events: Hub,
    pub samples: Samples,
    pub watches: Watches,
    /// Room for what commands write until it is answered, bytes.
    pub exec_output: Arc<Semaphore>,
    /// What of the records was lost when this daemon started, for a person.
    pub faults: Vec<String>,
    pub starts: Starts,
    /// What guests' clocks follow at once.
    pub clock_steps: Steps,
    pub templates: Templates,
    pub classes: Classes,
}

impl Node {
    pub(crate) fn new(
        config: PodsConfig,
        images: Arc<dyn PodImages>,
        network: Arc<dyn PodNetworking>,
        processes: Arc<dyn PodProcesses>,
        records: Records,
        faults: Vec<String>,
    ) -> Self {
        Self {
            users: Users::new(config.users),
            config,
            images,
            network,
            processes,
            records,
            registry: Registry::default(),
            events: Hub::default(),
            samples: Samples::default(),
            watches: Watches::start(),
            exec_output: Arc::new(Semaphore::new(NODE_OUTPUT)),
            faults,
            starts: Starts::new(),
            clock_steps: Steps::watch(),
            templates: Templates::default(),
            classes: Classes::default(),
        }
    }
}

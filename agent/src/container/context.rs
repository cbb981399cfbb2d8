//! What all containers use.

use std::sync::Arc;

use super::pause::PodNamespaces;
use crate::{events::Events, layout::Layout, live::LiveVolumes, reaper::Reaper, storage::Storages};

/// What all containers use.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) layout: Layout,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) events: Arc<Events>,
    pub(crate) storages: Arc<Storages>,
    pub(crate) live: Arc<LiveVolumes>,
    pub(crate) pod: Arc<PodNamespaces>,
}

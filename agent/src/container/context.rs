//! What all containers use.

use std::sync::Arc;

use super::{huge_pages::HugePages, pause::PodNamespaces};
use crate::{
    apparmor::AppArmor, atomic_volumes::AtomicVolumes, events::Events, layout::Layout,
    reaper::Reaper, storage::Storages,
};

/// What all containers use.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) layout: Layout,
    pub(crate) apparmor: Arc<AppArmor>,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) events: Arc<Events>,
    pub(crate) storages: Arc<Storages>,
    pub(crate) atomic_volumes: Arc<AtomicVolumes>,
    pub(crate) huge_pages: Arc<HugePages>,
    pub(crate) pod: Arc<PodNamespaces>,
}

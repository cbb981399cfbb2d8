//! What a snapshot keeps of the device.

use serde::{Deserialize, Serialize};

use crate::virtio::Counters;

/// The device's own state. What the guest has open is the file server's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The name by which the guest mounts it.
    pub tag: String,
    /// What was counted so far.
    pub counters: Counters,
}

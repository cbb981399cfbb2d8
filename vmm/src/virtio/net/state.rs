//! What a snapshot keeps of the device.

use serde::{Deserialize, Serialize};

/// The device's own state. A frame that waits for the guest is not in it:
/// networks lose frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The MTU offered to the guest.
    pub mtu: Option<u16>,
    /// How many pairs of queues the driver uses.
    pub used_pairs: u16,
}

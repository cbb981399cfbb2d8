//! What a snapshot keeps of the device.

use serde::{Deserialize, Serialize};

/// The device's own state. Connections are not in it: their clients stay with
/// the process that had them, and a restored guest is told to drop its ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The guest's context id.
    pub cid: u32,
    /// The host port of the last connection, so that a restored device uses others.
    pub last_port: u32,
}

//! virtio-vsock with a Unix socket as its host side.

use serde::{Deserialize, Serialize};

/// What a snapshot keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {}

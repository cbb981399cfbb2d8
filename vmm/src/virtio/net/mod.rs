//! virtio-net on a tap.

use serde::{Deserialize, Serialize};

/// What a snapshot keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {}

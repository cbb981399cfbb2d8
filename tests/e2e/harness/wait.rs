//! How long tests wait.

use std::time::Duration;

/// How long anything may take in an emulated host.
pub const PATIENCE: Duration = Duration::from_secs(120);

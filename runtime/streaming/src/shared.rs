//! What all connections share.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{backend::Backend, config::Config, tokens::Tokens};

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) tokens: Tokens,
    /// A permit for each connection whose client has shown a token.
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) backend: Arc<dyn Backend>,
    /// All tasks.
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

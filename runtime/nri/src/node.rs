//! What plugins and the node are to each other: what is asked of the node, where plugins are found and how long they
//! may take, and how they refuse.

use std::{fmt::Debug, path::PathBuf, time::Duration};

use async_trait::async_trait;
use hull_spec::{error::PodError, spec::Resources};

use crate::describe::{Pod, Told};

/// What plugins need of the node.
#[async_trait]
pub trait Node: Debug + Send + Sync + 'static {
    /// All pods and containers.
    async fn known(&self) -> (Vec<Pod>, Vec<Told>);

    /// Changes limits of a container: those that are not zero or empty.
    ///
    /// # Errors
    /// When there is no such container, or its VM can't have them.
    async fn update(&self, container: &str, limits: Resources) -> Result<(), PodError>;

    /// Begins to stop a container, because `plugin` wants it to end.
    fn evict(&self, plugin: &str, container: &str, reason: &str);
}

/// Where plugins are found, and how long they may take.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of plugins that are started with the daemon; it need not be there.
    pub plugins: PathBuf,
    /// Directory of their configurations.
    pub configs: PathBuf,
    /// How long.
    pub times: Times,
}

/// How long plugins may take.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// To register, and again to take in what there is.
    pub registration: Duration,
    /// For every other call.
    pub request: Duration,
}

impl Default for Config {
    /// What NRI names.
    fn default() -> Self {
        Self {
            plugins: "/opt/nri/plugins".into(),
            configs: "/etc/nri/conf.d".into(),
            times: Times {
                registration: Duration::from_secs(5),
                request: Duration::from_secs(2),
            },
        }
    }
}

/// A plugin refused, or wants what can't be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("NRI plugin {plugin}: {what}: {reason}")]
pub struct Refusal {
    pub(crate) plugin: String,
    pub(crate) what: String,
    pub(crate) reason: String,
}

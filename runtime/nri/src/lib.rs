//! NRI (Node Resource Interface) for pods in VMs: the socket at which plugins of the node, as containerd and
//! CRI-O have them, register; what they are told of pods and containers, and what they may change.
//!
//! Read in this order: [`plugins`] (all of them: who is called when), [`plugin`] (one: registration, calls),
//! [`launch`] (those that are installed), [`outcome`] (what several want together), [`limits`] and [`apply`]
//! (what of it a VM can have), [`describe`] (what they are told), [`peer`] and [`mux`] (ttrpc over one socket).
//!
//! Plugins are the administrator's, but neither their bugs nor their end may harm pods: every call has a time
//! limit, and who exceeds it, or says what can't be, is dropped.
//!
//! Not here: pods. What plugins want is asked of a [`Node`].

#![forbid(unsafe_code)]

mod apply;
pub mod describe;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod launch;
mod limits;
mod mux;
mod outcome;
mod peer;
mod plugin;
mod plugins;

use std::{fmt::Debug, path::PathBuf, time::Duration};

use async_trait::async_trait;
pub use hull_proto_nri::SOCKET;
use hull_spec::{error::PodError, spec::Resources};

pub use self::{
    describe::{Command, Pod, Told},
    plugins::{Creation, Plugins},
};

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

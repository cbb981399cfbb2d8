//! `hull run`: one container in a microVM of its own, for a person.
//!
//! It is a client of the CRI socket. When no daemon serves it, [`client`] starts
//! one in this process, on a socket of its own, until the container has ended.
//! [`session`] is the way from pull to clean-up, [`follow`] prints the log.

mod follow;
mod request;
mod session;

use anyhow::Result;

use self::request::{Bytes, Variable};
use crate::{client, config::Settings};

/// What `hull run` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RunArgs {
    /// Image name
    pub(crate) image: String,
    /// Command with its arguments, in place of the image's
    #[arg(last = true)]
    pub(crate) command: Vec<String>,
    /// Set an environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<Variable>,
    /// Memory limit: bytes, or with K, M or G
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<Bytes>,
    /// CPU limit, e.g. 0.5
    #[arg(long, value_name = "NUMBER", value_parser = request::parse_cpus)]
    pub(crate) cpus: Option<f64>,
    /// Runtime handler
    #[arg(long, value_name = "NAME", default_value = "")]
    pub(crate) handler: String,
    /// Say nothing but what the container says
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Runs it and returns the container's exit code. Pod and container are gone then.
pub(crate) async fn run(settings: Settings, arguments: RunArgs) -> Result<u8> {
    let directory = settings.state.clone();
    let daemon = client::connect(settings).await?;
    let result = session::run(daemon.client(), &directory, &arguments).await;
    daemon.close().await;
    result
}

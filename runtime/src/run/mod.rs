//! `hull run`: one container in a microVM of its own, for a person.
//!
//! It is a client of the CRI socket. When no daemon serves it, [`client`] starts
//! one in this process, on a socket of its own, until the container has ended.
//! [`session`] is the way from pull to clean-up, [`follow`] prints the log.

mod arguments;
mod follow;
mod request;
mod session;

use anyhow::Result;

pub(crate) use self::arguments::RunArgs;
use crate::{client, config::Settings};

/// Runs it and returns the container's exit code. Pod and container are gone then.
pub(crate) async fn run(settings: Settings, arguments: RunArgs) -> Result<u8> {
    let directory = settings.state.clone();
    let daemon = client::connect(settings).await?;
    let result = session::run(daemon.client(), &directory, &arguments).await;
    daemon.close().await;
    result
}

//! `hull run`: one container in a microVM of its own, for a person.
//!
//! It is a client of the CRI socket. When no daemon serves it, [`client`] starts
//! one in this process, on a socket of its own, until the container has ended.
//! [`session`] is the way from pull to clean-up, [`streams`] what goes in and comes out.

mod arguments;
pub(crate) mod interrupts;
mod request;
mod restore;
mod session;
mod streams;
mod values;

use anyhow::Result;

use self::session::Session;
pub(crate) use self::{
    arguments::RunArgs,
    restore::{RestoreArgs, restore},
};
use crate::{
    client,
    config::Settings,
    containers::{Streams, check_terminal},
};

/// Runs it and returns the container's exit code. Pod and container are gone then, but for those that
/// are left to the daemon.
pub(crate) async fn run(settings: Settings, arguments: RunArgs) -> Result<u8> {
    arguments.check()?;
    let passes = streams::passes_input(&arguments);
    check_terminal(arguments.interactive && !arguments.detach, arguments.tty)?;
    let (state, server) = (settings.state.clone(), settings.streaming.clone());
    let daemon = if arguments.detach {
        client::serving(&settings).await?
    } else {
        client::connect(settings).await?
    };
    let streams = Streams::new(daemon.client(), &server)?;
    let session = Session::new(&daemon, streams, &arguments, passes);
    let result = match session {
        Ok(session) => session.run(&state).await,
        Err(error) => Err(error),
    };
    daemon.close().await;
    result
}

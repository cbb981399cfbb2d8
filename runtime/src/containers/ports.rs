//! `hull port-forward`.

use anyhow::Result;
use hull_streaming::client::{Ports, listen};

use super::{find, streams::Streams};
use crate::{client::Client, table};

/// What `hull port-forward` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PortForwardArgs {
    /// Container
    container: String,
    /// Ports of 127.0.0.1 and of the pod, or one number for both; local port 0: a free one
    #[arg(required = true, value_name = "[LOCAL:]PORT")]
    ports: Vec<Ports>,
}

/// Forwards connections until interrupted.
pub(super) async fn port_forward(
    client: &Client,
    streams: &Streams,
    arguments: &PortForwardArgs,
) -> Result<()> {
    let found = find::one(client, &arguments.container).await?;
    let ports: Vec<_> = arguments.ports.iter().map(|ports| ports.pod).collect();
    let forwarder = streams.port_forward(&found.pod.id, &ports).await?;
    let listening = |address, port| {
        // Who does not read it can connect all the same.
        let _ = table::print(&format!("{address} -> {port}\n"));
    };
    let failed = |port, error| eprintln!("hull: port {port}: {:#}", anyhow::Error::from(error));
    Ok(listen(forwarder, &arguments.ports, listening, failed).await?)
}

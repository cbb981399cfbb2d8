//! Exec, attach and port-forward for a person at a terminal.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use hull_proto_cri::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use hull_streaming::client::{self, Detach, Dialer, Ports, Wants};

use crate::client::Client;

/// What carries the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// SPDY/3.1, as kubelet speaks it.
    Spdy,
    /// WebSocket, as kubectl speaks it.
    Websocket,
}

impl Transport {
    fn of_commands(self) -> client::Transport<'static> {
        match self {
            Self::Spdy => client::Transport::Spdy(&["v4.channel.k8s.io"]),
            Self::Websocket => client::Transport::WebSocket("v5.channel.k8s.io"),
        }
    }
}

/// Which of our streams a process gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streams {
    /// Our input.
    pub interactive: bool,
    /// Our terminal.
    pub tty: bool,
}

impl Streams {
    fn wants(self) -> Wants {
        Wants {
            stdin: self.interactive,
            stdout: true,
            stderr: !self.tty,
            tty: self.tty,
        }
    }
}

/// Runs a command; its exit code is ours.
///
/// # Errors
/// The daemon's, and those of the connection.
pub async fn exec(
    mut client: Client,
    container_id: String,
    cmd: Vec<String>,
    streams: Streams,
    transport: Transport,
) -> Result<ExitCode> {
    let wants = streams.wants();
    let request = ExecRequest {
        container_id,
        cmd,
        tty: wants.tty,
        stdin: wants.stdin,
        stdout: wants.stdout,
        stderr: wants.stderr,
    };
    let url = client.runtime.exec(request).await?.into_inner().url;
    follow(&url, wants, transport).await
}

/// Shows what a container writes.
///
/// # Errors
/// The daemon's, and those of the connection.
pub async fn attach(
    mut client: Client,
    container_id: String,
    streams: Streams,
    transport: Transport,
) -> Result<ExitCode> {
    let wants = streams.wants();
    let request = AttachRequest {
        container_id,
        tty: wants.tty,
        stdin: wants.stdin,
        stdout: wants.stdout,
        stderr: wants.stderr,
    };
    let url = client.runtime.attach(request).await?.into_inner().url;
    follow(&url, wants, transport).await
}

async fn follow(url: &str, wants: Wants, transport: Transport) -> Result<ExitCode> {
    let mut session =
        client::command(&Dialer::default(), url, wants, transport.of_commands()).await?;
    client::interact(&mut session, wants, Detach::Never).await?;
    let status = session.end().await?.status;
    let status = status.context("the server tells no status")?;
    match status.exit_code() {
        Some(code) => Ok(ExitCode::from(code)),
        None => bail!("{}", status.message),
    }
}

/// Forwards ports until interrupted.
///
/// # Errors
/// The daemon's, those of the connection, and ports that are taken.
pub async fn port_forward(
    mut client: Client,
    pod_sandbox_id: String,
    ports: &[Ports],
    transport: Transport,
) -> Result<()> {
    let request = PortForwardRequest {
        pod_sandbox_id,
        port: ports.iter().map(|ports| ports.pod.into()).collect(),
    };
    let url = client.runtime.port_forward(request).await?.into_inner().url;
    let dialer = Dialer::default();
    let forwarder = match transport {
        Transport::Spdy => client::forward(&dialer, &url).await?,
        Transport::Websocket => client::forward_tunnel(&dialer, &url).await?,
    };
    let listening = |address, port| println!("{address} -> {port}");
    let failed = |port, error| eprintln!("port {port}: {:#}", anyhow::Error::from(error));
    Ok(client::listen(forwarder, ports, listening, failed).await?)
}

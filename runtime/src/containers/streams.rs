//! Sessions of the daemon's streaming server.

use anyhow::Result;
use hull_proto_cri::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use hull_streaming::{
    Config,
    client::{self, Dialer, Forwarder, Session, Transport, Wants},
};

use crate::client::{Client, refused};

/// Each stream has an end of its own, which a WebSocket's have not.
const TRANSPORT: Transport<'_> = Transport::Spdy(&["v4.channel.k8s.io"]);

/// Opens them.
#[derive(Debug, Clone)]
pub(crate) struct Streams {
    client: Client,
    dialer: Dialer,
}

impl Streams {
    /// For the daemon whose streaming server has this configuration: its certificate is trusted.
    pub(crate) fn new(client: Client, server: &Config) -> Result<Self> {
        let dialer = match &server.tls {
            Some(files) => Dialer::trusting_file(&files.cert)?,
            None => Dialer::default(),
        };
        Ok(Self { client, dialer })
    }

    /// Runs a command in a container.
    pub(crate) async fn exec(
        &self,
        container_id: &str,
        cmd: Vec<String>,
        wants: Wants,
    ) -> Result<Session> {
        let request = ExecRequest {
            container_id: container_id.to_owned(),
            cmd,
            tty: wants.tty,
            stdin: wants.stdin,
            stdout: wants.stdout,
            stderr: wants.stderr,
        };
        let answer = self.client.runtime.clone().exec(request).await;
        let url = answer.map_err(refused("run a command"))?.into_inner().url;
        Ok(client::command(&self.dialer, &url, wants, TRANSPORT).await?)
    }

    /// Connects to a container's process, which may be still to be started.
    pub(crate) async fn attach(&self, container_id: &str, wants: Wants) -> Result<Session> {
        let request = AttachRequest {
            container_id: container_id.to_owned(),
            tty: wants.tty,
            stdin: wants.stdin,
            stdout: wants.stdout,
            stderr: wants.stderr,
        };
        let answer = self.client.runtime.clone().attach(request).await;
        let url = answer.map_err(refused("attach"))?.into_inner().url;
        Ok(client::command(&self.dialer, &url, wants, TRANSPORT).await?)
    }

    /// Connects to the network of a sandbox.
    pub(super) async fn port_forward(&self, pod: &str, ports: &[u16]) -> Result<Forwarder> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.to_owned(),
            port: ports.iter().map(|&port| port.into()).collect(),
        };
        let answer = self.client.runtime.clone().port_forward(request).await;
        let url = answer.map_err(refused("forward ports"))?.into_inner().url;
        Ok(client::forward(&self.dialer, &url).await?)
    }
}

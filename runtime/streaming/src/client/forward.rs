//! Port-forward.

use std::sync::atomic::{AtomicU32, Ordering};

use hull_spdy::Headers;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::{dial::Dialer, error::ClientError};
use crate::{
    channel::{Input, Lost},
    mux::{Mux, Side},
    negotiate::{CHANNELS, PORT_FORWARD, TUNNEL},
    output::Output,
    websocket::{Channels, Tunnel},
};

const BUFFERED: usize = 4 << 20;
const STREAMS: usize = 4096;

/// A connection that carries many forwarded ones.
#[derive(Debug)]
pub struct Forwarder {
    mux: Mux,
    next: AtomicU32,
}

/// One forwarded connection.
#[derive(Debug)]
pub struct Forward {
    /// To the pod.
    pub output: Output,
    /// From the pod.
    pub input: Input,
    /// What went wrong, as text.
    pub error: Input,
}

/// Opens the URL of a port-forward request, over SPDY.
///
/// # Errors
/// When the server can't be reached, or refuses.
pub async fn forward(dialer: &Dialer, url: &str) -> Result<Forwarder, ClientError> {
    let (io, _) = dialer.spdy(url, &[PORT_FORWARD]).await?;
    let (mux, _) = Mux::start(io, Side::Client, STREAMS, BUFFERED);
    Ok(Forwarder::new(mux))
}

/// As [`forward`], through a WebSocket.
///
/// # Errors
/// When the server can't be reached, or refuses.
pub async fn forward_tunnel(dialer: &Dialer, url: &str) -> Result<Forwarder, ClientError> {
    let socket = dialer.websocket(url, TUNNEL).await?;
    let (mux, _) = Mux::start(Tunnel::new(socket), Side::Client, STREAMS, BUFFERED);
    Ok(Forwarder::new(mux))
}

impl Forwarder {
    fn new(mux: Mux) -> Self {
        Self {
            mux,
            next: AtomicU32::new(0),
        }
    }

    /// Opens a connection to a port.
    ///
    /// # Errors
    /// When the server refuses it, or is gone.
    pub async fn open(&self, port: u16) -> Result<Forward, Lost> {
        let request = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let port = port.to_string();
        let (mut error_out, error) = self.stream("error", &port, Some(&request)).await?;
        error_out.finish().await?;
        let (output, input) = self.stream("data", &port, Some(&request)).await?;
        Ok(Forward {
            output,
            input,
            error,
        })
    }

    /// Opens one stream of a pair.
    ///
    /// # Errors
    /// When the server refuses it, or is gone.
    pub async fn stream(
        &self,
        kind: &str,
        port: &str,
        request: Option<&str>,
    ) -> Result<(Output, Input), Lost> {
        let mut headers = Headers::new(&[("streamtype", kind), ("port", port)]);
        if let Some(request) = request {
            headers.0.push(("requestid".into(), request.into()));
        }
        let (output, input) = self.mux.open(headers).await?;
        Ok((output.into(), input))
    }

    /// Ends when the server is gone.
    pub async fn closed(&self) {
        self.mux.closed().await;
    }
}

/// Opens the URL of a port-forward request over a WebSocket with channels: a connection for each
/// port of the request, and what holds them open.
///
/// # Errors
/// When the server can't be reached, refuses, or its channels are for other ports.
pub async fn forward_channels(
    dialer: &Dialer,
    url: &str,
    protocol: &str,
    ports: &[u16],
) -> Result<(Vec<Forward>, impl Send + use<>), ClientError> {
    let known = CHANNELS
        .into_iter()
        .find(|known| known.name == protocol)
        .ok_or(ClientError::Upgrade("unknown subprotocol"))?;
    let socket = dialer.websocket(url, protocol).await?;
    let numbers: Vec<u8> = (0..2 * ports.len())
        .map(|n| u8::try_from(n).unwrap_or(u8::MAX))
        .collect();
    let (channels, inputs) = Channels::start(socket, Role::Client, known.codec, &numbers, BUFFERED);
    let mut inputs = inputs.into_iter();
    let mut forwards = Vec::new();
    for (number, port) in numbers.iter().step_by(2).zip(ports) {
        let (Some(mut input), Some(mut error)) = (inputs.next(), inputs.next()) else {
            return Err(Lost.into());
        };
        for channel in [&mut input, &mut error] {
            if channel.recv().await?.as_deref() != Some(&port.to_le_bytes()) {
                return Err(ClientError::Upgrade("channels for another port"));
            }
        }
        forwards.push(Forward {
            output: channels.sender(*number).into(),
            input,
            error,
        });
    }
    Ok((forwards, channels))
}

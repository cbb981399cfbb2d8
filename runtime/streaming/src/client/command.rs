//! Exec and attach.

use std::time::Duration;

use bytes::Bytes;
use hull_spdy::Headers;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::{dial::Dialer, error::ClientError};
use crate::{
    channel::{Input, Lost},
    exec::CommandStatus,
    mux::{Mux, Side},
    negotiate::{CHANNELS, SPDY_COMMANDS},
    output::Output,
    websocket::Channels,
};

/// How long closing the connection may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
const BUFFERED: usize = 1 << 20;

/// What carries a command's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport<'a> {
    /// SPDY/3.1, with these subprotocols in order of preference.
    Spdy(&'a [&'a str]),
    /// A WebSocket with this subprotocol; the empty one is not sent.
    WebSocket(&'a str),
}

/// Which streams the client wants; the same as in the request for the URL.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wants {
    /// Input.
    pub stdin: bool,
    /// Output.
    pub stdout: bool,
    /// Error output.
    pub stderr: bool,
    /// A terminal.
    pub tty: bool,
}

/// The streams of a process.
#[derive(Debug)]
pub struct Session {
    /// Its input.
    pub stdin: Option<Output>,
    /// Its output.
    pub stdout: Option<Input>,
    /// Its error output.
    pub stderr: Option<Input>,
    /// The subprotocol that the server chose.
    pub protocol: String,
    resize: Option<Output>,
    error: Input,
    json_status: bool,
    carrier: Carrier,
    /// Halves that are not used, but whose end would say something.
    _unused: Vec<Output>,
}

#[derive(Debug)]
enum Carrier {
    Spdy(Mux),
    WebSocket(Channels),
}

/// All that came from a process until its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its output.
    pub stdout: Vec<u8>,
    /// Its error output.
    pub stderr: Vec<u8>,
    /// How it ended; none: well, as far as an old protocol can tell.
    pub status: Option<CommandStatus>,
    /// What an old protocol says of a failure.
    pub failure: String,
}

/// Opens the URL of an exec or attach request.
///
/// # Errors
/// When the server can't be reached, or refuses.
pub async fn open(
    dialer: &Dialer,
    url: &str,
    wants: Wants,
    transport: Transport<'_>,
) -> Result<Session, ClientError> {
    match transport {
        Transport::Spdy(protocols) => over_spdy(dialer, url, wants, protocols).await,
        Transport::WebSocket(protocol) => over_websocket(dialer, url, wants, protocol).await,
    }
}

async fn over_spdy(
    dialer: &Dialer,
    url: &str,
    wants: Wants,
    protocols: &[&str],
) -> Result<Session, ClientError> {
    let (io, protocol) = dialer.spdy(url, protocols).await?;
    let known = SPDY_COMMANDS
        .into_iter()
        .find(|known| known.name == protocol)
        .ok_or(ClientError::Upgrade("another subprotocol"))?;
    let (mux, _) = Mux::start(io, Side::Client, 16, BUFFERED);
    let mut unused = Vec::new();
    let stream = |kind| mux.open(Headers::new(&[("streamtype", kind)]));
    let (mut error_out, error) = stream("error").await?;
    error_out.finish().await?;
    let mut stdin = None;
    if wants.stdin {
        stdin = Some(stream("stdin").await?.0.into());
    }
    let mut outputs = [None, None];
    for (wanted, kind, output) in [
        (wants.stdout, "stdout", 0),
        (wants.stderr && !wants.tty, "stderr", 1),
    ] {
        if wanted {
            let (other, input) = stream(kind).await?;
            unused.push(other.into());
            outputs[output] = Some(input);
        }
    }
    let mut resize = None;
    if wants.tty && known.resize {
        resize = Some(stream("resize").await?.0.into());
    }
    let [stdout, stderr] = outputs;
    Ok(Session {
        stdin,
        stdout,
        stderr,
        protocol,
        resize,
        error,
        json_status: known.json_status,
        carrier: Carrier::Spdy(mux),
        _unused: unused,
    })
}

async fn over_websocket(
    dialer: &Dialer,
    url: &str,
    wants: Wants,
    protocol: &str,
) -> Result<Session, ClientError> {
    let known = CHANNELS
        .into_iter()
        .find(|known| known.name == protocol)
        .ok_or(ClientError::Upgrade("unknown subprotocol"))?;
    let socket = dialer.websocket(url, protocol).await?;
    let (channels, inputs) =
        Channels::start(socket, Role::Client, known.codec, &[1, 2, 3], BUFFERED);
    let Ok([stdout, stderr, error]) = <[Input; 3]>::try_from(inputs) else {
        return Err(Lost.into());
    };
    Ok(Session {
        stdin: wants.stdin.then(|| channels.sender(0).into()),
        stdout: Some(stdout).filter(|_| wants.stdout),
        stderr: Some(stderr).filter(|_| wants.stderr && !wants.tty),
        protocol: protocol.to_owned(),
        resize: wants.tty.then(|| channels.sender(4).into()),
        error,
        json_status: known.json_status,
        carrier: Carrier::WebSocket(channels),
        _unused: Vec::new(),
    })
}

impl Session {
    /// Tells the size of the terminal.
    ///
    /// # Errors
    /// [`Lost`].
    pub async fn resize(&mut self, columns: u16, rows: u16) -> Result<(), Lost> {
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}\n");
        match &mut self.resize {
            Some(resize) => resize.send(Bytes::from(size)).await,
            None => Ok(()),
        }
    }

    /// Reads all output that is left and the status. Input stays as it is.
    ///
    /// # Errors
    /// When the connection broke, or the status makes no sense.
    pub async fn end(mut self) -> Result<Ended, ClientError> {
        // A WebSocket tells the end of all channels with its own, and so do other runtimes with SPDY. A status
        // comes last.
        let json_status = self.json_status;
        let has_end = matches!(self.carrier, Carrier::Spdy(_)) && !json_status;
        let (stdout, stderr, text) = tokio::join!(
            read(self.stdout.as_mut(), has_end),
            read(self.stderr.as_mut(), has_end),
            read(Some(&mut self.error), has_end),
        );
        let (stdout, stderr, text) = (stdout?, stderr?, text?);
        if json_status && text.is_empty() {
            return Err(Lost.into());
        }
        self.close().await;
        let mut ended = Ended {
            stdout,
            stderr,
            status: None,
            failure: String::new(),
        };
        if json_status {
            let status = serde_json::from_slice(&text)
                .map_err(|_| ClientError::Status(String::from_utf8_lossy(&text).into_owned()))?;
            ended.status = Some(status);
        } else {
            ended.failure = String::from_utf8_lossy(&text).into_owned();
        }
        Ok(ended)
    }

    /// Hangs up; a command is killed then if it still runs.
    pub async fn close(self) {
        match self.carrier {
            Carrier::Spdy(mux) => mux.close(CLOSE_TIMEOUT).await,
            Carrier::WebSocket(channels) => channels.close(CLOSE_TIMEOUT).await,
        }
    }
}

/// Reads to the end; without an end of its own, that is the connection's.
async fn read(from: Option<&mut Input>, has_end: bool) -> Result<Vec<u8>, Lost> {
    let mut all = Vec::new();
    let Some(from) = from else {
        return Ok(all);
    };
    loop {
        match from.recv().await {
            Ok(Some(bytes)) => all.extend_from_slice(&bytes),
            Ok(None) => return Ok(all),
            Err(Lost) if !has_end => return Ok(all),
            Err(Lost) => return Err(Lost),
        }
    }
}

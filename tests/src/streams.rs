//! Exec, attach and port-forward for a person at a terminal.

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
    str::FromStr,
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use hull_proto_cri::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use hull_streaming::{
    Input, Output,
    client::{self, CommandStatus, Dialer, Forward, Session, Wants},
};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
};

use crate::client::Client;

/// How much is read at a time.
const CHUNK: usize = 32 << 10;

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

/// A port here and one in the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// To listen on; 0: a free one.
    pub local: u16,
    /// To connect to.
    pub pod: u16,
}

impl FromStr for Ports {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (local, pod) = text.split_once(':').unwrap_or((text, text));
        Ok(Self {
            local: local.parse()?,
            pod: pod.parse()?,
        })
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
    let _raw = if wants.tty { Raw::set()? } else { None };
    let stdin = session.stdin.take();
    let (stdout, stderr) = (session.stdout.take(), session.stderr.take());
    // Ends with the process: a thread of tokio's waits for our input, and is not waited for.
    let sending = tokio::spawn(async move {
        if let Some(stdin) = stdin {
            send(tokio::io::stdin(), stdin).await?;
        }
        std::future::pending::<Result<()>>().await
    });
    let output = async {
        tokio::try_join!(
            receive(stdout, tokio::io::stdout()),
            receive(stderr, tokio::io::stderr()),
        )
    };
    let resizes = wants.tty && io::stdout().is_terminal();
    let mut window = signal(SignalKind::window_change())?;
    tokio::pin!(output);
    loop {
        if resizes {
            let size = tcgetwinsize(io::stdout())?;
            session.resize(size.ws_col, size.ws_row).await?;
        }
        tokio::select! {
            done = &mut output => {
                done?;
                break;
            }
            _ = window.recv() => {}
        }
    }
    sending.abort();
    let ended = session_end(session).await?;
    match ended.exit_code() {
        Some(code) => Ok(ExitCode::from(code)),
        None => bail!("{}", ended.message),
    }
}

async fn session_end(session: Session) -> Result<CommandStatus> {
    let ended = session.end().await?;
    ended.status.context("the server tells no status")
}

/// Our terminal, without line editing and echo; as it was when dropped.
struct Raw(Termios);

impl Raw {
    fn set() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Whoever closed our terminal does not need it.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Copies to a stream and ends it.
async fn send(mut from: impl AsyncRead + Unpin, mut to: Output) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await? {
            0 => return Ok(to.finish().await?),
            length => to.send(Bytes::copy_from_slice(&buffer[..length])).await?,
        }
    }
}

/// Copies from a stream to its end. A WebSocket has no end of single streams: it is the
/// connection's.
async fn receive(from: Option<Input>, mut to: impl AsyncWrite + Unpin) -> Result<()> {
    let Some(mut from) = from else {
        return Ok(());
    };
    while let Ok(Some(bytes)) = from.recv().await {
        to.write_all(&bytes).await?;
        to.flush().await?;
    }
    Ok(())
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
    let forwarder = Arc::new(match transport {
        Transport::Spdy => client::forward(&dialer, &url).await?,
        Transport::Websocket => client::forward_tunnel(&dialer, &url).await?,
    });
    for &ports in ports {
        let listener = TcpListener::bind(("127.0.0.1", ports.local)).await?;
        println!("{} -> {}", listener.local_addr()?, ports.pod);
        let forwarder = Arc::clone(&forwarder);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let forwarder = Arc::clone(&forwarder);
                tokio::spawn(async move {
                    let copied = match forwarder.open(ports.pod).await {
                        Ok(forward) => copy(stream, forward).await,
                        Err(error) => Err(error.into()),
                    };
                    if let Err(error) = copied {
                        eprintln!("port {}: {error:#}", ports.pod);
                    }
                });
            }
        });
    }
    forwarder.closed().await;
    bail!("the server hung up")
}

async fn copy(mut stream: TcpStream, forward: Forward) -> Result<()> {
    let Forward {
        output,
        input,
        mut error,
    } = forward;
    let (reader, writer) = stream.split();
    let up = send(reader, output);
    let down = async {
        let mut writer = writer;
        receive(Some(input), &mut writer).await?;
        Ok(writer.shutdown().await?)
    };
    tokio::try_join!(up, down)?;
    if let Ok(Some(text)) = error.recv().await {
        bail!("{}", String::from_utf8_lossy(&text));
    }
    Ok(())
}

//! From an HTTP request to a session.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request as HttpRequest, Response, StatusCode,
    body::Incoming,
    header::{
        ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT,
        SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
    },
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::{handshake::derive_accept_key, protocol::Role};
use tracing::{Instrument, debug, info_span};

use crate::{
    exec, forward,
    mux::{Mux, Side},
    negotiate::{
        ACCEPTED_PROTOCOLS, CHANNELS, ChannelProtocol, ForwardProtocol, PORT_FORWARD,
        RemoteCommand, SPDY, SPDY_COMMANDS, STREAM_PROTOCOL, choose, offered_channels,
        offered_streams, wants_upgrade,
    },
    request::{Command, FORWARD, Request},
    shared::Shared,
    strangers::Stranger,
    websocket::{self, Channels, Tunnel},
};

/// Streams at a time in an exec or attach connection: five, and some that are refused.
const COMMAND_STREAMS: usize = 16;
/// How long a session whose work was cut off, and any when the server ends, may take to close its
/// connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

type Answer = Response<Full<Bytes>>;

/// A connection's next life.
#[derive(Debug)]
enum Session {
    SpdyCommand(Command, RemoteCommand),
    SpdyForward(String),
    ChannelCommand(Command, ChannelProtocol),
    ChannelForward(String, Vec<u16>, ChannelProtocol),
    TunnelForward(String),
}

/// Answers a request; begins the session when it is an upgrade.
pub(crate) fn respond(
    mut request: HttpRequest<Incoming>,
    shared: Arc<Shared>,
    stranger: &Stranger,
) -> Answer {
    let (answer, session) = match decide(&request, &shared) {
        Ok(decision) => decision,
        Err(refusal) => return refusal.into(),
    };
    let Ok(permit) = Arc::clone(&shared.connections).try_acquire_owned() else {
        debug!("too many streaming clients; one more is refused");
        let reason = "too many streams are open";
        return Refusal::new(StatusCode::SERVICE_UNAVAILABLE, reason).into();
    };
    stranger.known();
    let upgrade = hyper::upgrade::on(&mut request);
    let span = info_span!("stream", kind = session.kind(), target = session.target());
    let limit = shared.config.handshake_timeout;
    let tasks = shared.tasks.clone();
    let work = async move {
        let _permit = permit;
        match tokio::time::timeout(limit, upgrade).await {
            Ok(Ok(io)) => session.run(TokioIo::new(io), &shared).await,
            Ok(Err(error)) => debug!(%error, "upgrade failed"),
            Err(_) => debug!("upgrade timed out"),
        }
    };
    tasks.spawn(work.instrument(span));
    answer
}

fn decide(request: &HttpRequest<Incoming>, shared: &Shared) -> Result<(Answer, Session), Refusal> {
    if !matches!(*request.method(), Method::GET | Method::POST) {
        let refusal = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST");
        return Err(refusal.with(ALLOW, &["GET, POST"]));
    }
    let found = request
        .uri()
        .path()
        .strip_prefix('/')
        .and_then(|path| path.split_once('/'))
        .and_then(|(verb, token)| {
            let wanted = shared.tokens.take(token)?;
            (wanted.verb() == verb).then_some(wanted)
        });
    let Some(wanted) = found else {
        return Err(Refusal::new(StatusCode::NOT_FOUND, "no such stream"));
    };
    let headers = request.headers();
    if wants_upgrade(headers, "websocket") {
        websocket_session(wanted, request)
    } else {
        spdy_session(wanted, headers)
    }
}

fn spdy_session(wanted: Request, headers: &HeaderMap) -> Result<(Answer, Session), Refusal> {
    if !wants_upgrade(headers, SPDY) {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            "an upgrade to SPDY/3.1 or websocket is needed",
        ));
    }
    let offered = offered_streams(headers);
    if offered.is_empty() {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            "X-Stream-Protocol-Version is missing",
        ));
    }
    let (protocol, session) = match wanted {
        Request::Command(command) => {
            let protocol = choose(&offered, &SPDY_COMMANDS, |p| p.name)
                .ok_or_else(|| forbidden(&SPDY_COMMANDS.map(|p| p.name)))?;
            (protocol.name, Session::SpdyCommand(command, protocol))
        }
        Request::PortForward(request) => {
            let protocol = choose(&offered, &[PORT_FORWARD], |p| p)
                .ok_or_else(|| forbidden(&[PORT_FORWARD]))?;
            (protocol, Session::SpdyForward(request.pod_sandbox_id))
        }
    };
    let mut answer = switch(SPDY);
    answer
        .headers_mut()
        .insert(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
    Ok((answer, session))
}

fn websocket_session(
    wanted: Request,
    request: &HttpRequest<Incoming>,
) -> Result<(Answer, Session), Refusal> {
    let headers = request.headers();
    let bad = |reason| Refusal::new(StatusCode::BAD_REQUEST, reason);
    if request.method() != Method::GET {
        return Err(bad("a WebSocket is opened by GET"));
    }
    let key = headers
        .get(SEC_WEBSOCKET_KEY)
        .ok_or_else(|| bad("Sec-WebSocket-Key is missing"))?;
    if headers
        .get(SEC_WEBSOCKET_VERSION)
        .map(HeaderValue::as_bytes)
        != Some(b"13")
    {
        let refusal = Refusal::new(
            StatusCode::UPGRADE_REQUIRED,
            "WebSocket version 13 is needed",
        );
        return Err(refusal.with(SEC_WEBSOCKET_VERSION, &["13"]));
    }
    let offered = offered_channels(headers);
    let (protocol, session) = match wanted {
        Request::Command(command) => {
            let protocol = choose(&offered, &CHANNELS, |p| p.name)
                .ok_or_else(|| forbidden(&CHANNELS.map(|p| p.name)))?;
            (protocol.name, Session::ChannelCommand(command, protocol))
        }
        Request::PortForward(request) => {
            let known = ForwardProtocol::known();
            let protocol = choose(&offered, &known, ForwardProtocol::name).ok_or_else(|| {
                let names: Vec<_> = known.iter().map(ForwardProtocol::name).collect();
                forbidden(&names)
            })?;
            let session = match protocol {
                ForwardProtocol::Tunnel => Session::TunnelForward(request.pod_sandbox_id),
                ForwardProtocol::Channels(channels) => {
                    forward::check_ports(&request.ports, channels.codec).map_err(bad)?;
                    Session::ChannelForward(request.pod_sandbox_id, request.ports, channels)
                }
            };
            (protocol.name(), session)
        }
    };
    let mut answer = switch("websocket");
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| bad("Sec-WebSocket-Key is wrong"))?;
    let answers = answer.headers_mut();
    answers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    if !protocol.is_empty() {
        answers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    Ok((answer, session))
}

impl Session {
    /// For a person who reads the log.
    fn kind(&self) -> &'static str {
        match self {
            Self::SpdyCommand(command, _) | Self::ChannelCommand(command, _) => command.verb(),
            Self::SpdyForward(_) | Self::ChannelForward(..) | Self::TunnelForward(_) => FORWARD,
        }
    }

    /// The container or pod.
    fn target(&self) -> &str {
        match self {
            Self::SpdyCommand(command, _) | Self::ChannelCommand(command, _) => command.id(),
            Self::SpdyForward(pod) | Self::ChannelForward(pod, ..) | Self::TunnelForward(pod) => {
                pod
            }
        }
    }

    async fn run(self, io: TokioIo<Upgraded>, shared: &Shared) {
        let limits = shared.config.limits;
        let open = |io| websocket::open(io, Role::Server, limits.message);
        match self {
            Self::SpdyCommand(command, protocol) => {
                let (mux, incoming) =
                    Mux::start(io, Side::Server, COMMAND_STREAMS, limits.buffered);
                let work = exec::over_spdy(shared, command, protocol, incoming);
                guard_mux(shared, mux, work).await;
            }
            Self::SpdyForward(pod) => {
                let (mux, incoming) = Mux::start(io, Side::Server, limits.streams, limits.buffered);
                guard_mux(shared, mux, forward::over_spdy(shared, pod, incoming)).await;
            }
            Self::TunnelForward(pod) => {
                let io = Tunnel::new(open(io).await);
                let (mux, incoming) = Mux::start(io, Side::Server, limits.streams, limits.buffered);
                guard_mux(shared, mux, forward::over_spdy(shared, pod, incoming)).await;
            }
            Self::ChannelCommand(command, protocol) => {
                let (channels, inputs) = Channels::start(
                    open(io).await,
                    Role::Server,
                    protocol.codec,
                    &exec::CLIENT_CHANNELS,
                    limits.buffered,
                );
                let work = exec::over_channels(shared, command, protocol, &channels, inputs);
                let end = guard(shared, channels.closed(), |t| channels.idle(t), work).await;
                close_connection(shared, channels.close(end)).await;
            }
            Self::ChannelForward(pod, ports, protocol) => {
                let (channels, inputs) = Channels::start(
                    open(io).await,
                    Role::Server,
                    protocol.codec,
                    &forward::data_channels(&ports),
                    limits.buffered,
                );
                let work = forward::over_channels(shared, &pod, &ports, &channels, inputs);
                let end = guard(shared, channels.closed(), |t| channels.idle(t), work).await;
                close_connection(shared, channels.close(end)).await;
            }
        }
    }
}

async fn guard_mux(shared: &Shared, mux: Mux, work: impl Future<Output = ()>) {
    let end = guard(shared, mux.closed(), |timeout| mux.idle(timeout), work).await;
    close_connection(shared, mux.close(end)).await;
}

/// Closes a connection in order, and within [`CLOSE_TIMEOUT`] once the server ends.
async fn close_connection(shared: &Shared, close: impl Future<Output = ()>) {
    let hurry = async {
        shared.stop.cancelled().await;
        tokio::time::sleep(CLOSE_TIMEOUT).await;
    };
    tokio::select! {
        () = close => {}
        () = hurry => {}
    }
}

/// Does the work of a session for as long as there is somebody who wants it, and tells how long
/// closing the connection may take. The work is dropped, and with it its process, when the client is gone.
async fn guard<Idle: Future<Output = ()>>(
    shared: &Shared,
    closed: impl Future<Output = ()>,
    idle: impl Fn(Duration) -> Idle,
    work: impl Future<Output = ()>,
) -> Duration {
    let timeout = shared.config.idle_timeout;
    tokio::select! {
        // What the client has still to read may take it as long as it takes.
        () = work => return timeout,
        () = closed => debug!("the client is gone"),
        () = idle(timeout) => debug!("no traffic for too long"),
        () = shared.stop.cancelled() => {}
    }
    CLOSE_TIMEOUT
}

/// `Connection` must be `Upgrade` alone: Go's HTTP client, which kubelet and crictl use, drops the
/// whole header when `close` is in it, and finds no upgrade then.
fn switch(protocol: &'static str) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(protocol));
    answer
}

/// Why there is no session.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    reason: &'static str,
    header: Option<(HeaderName, Vec<&'static str>)>,
}

impl Refusal {
    fn new(status: StatusCode, reason: &'static str) -> Self {
        Self {
            status,
            reason,
            header: None,
        }
    }

    fn with(mut self, name: HeaderName, values: &[&'static str]) -> Self {
        self.header = Some((name, values.to_vec()));
        self
    }
}

fn forbidden(known: &[&'static str]) -> Refusal {
    let name = HeaderName::from_static(ACCEPTED_PROTOCOLS);
    Refusal::new(StatusCode::FORBIDDEN, "none of the subprotocols is known").with(name, known)
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        let mut answer = Self::new(Full::from(format!("{}\n", refusal.reason)));
        *answer.status_mut() = refusal.status;
        let headers = answer.headers_mut();
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        headers.insert(CONTENT_TYPE, plain);
        // One request per connection.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        if let Some((name, values)) = refusal.header {
            for value in values.iter().filter(|value| !value.is_empty()) {
                headers.append(&name, HeaderValue::from_static(value));
            }
        }
        answer
    }
}

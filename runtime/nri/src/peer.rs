//! One end of a plugin's socket: calls over one of its connections, and calls that are answered over the other.
//!
//! One task reads. Calls that come are answered one after the other by a second task, and few may wait: who
//! asks faster is cut off. Calls that are made wait for their answers for a limited time.

use std::{
    collections::HashMap,
    fmt::Debug,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use protobuf::Message as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex as AsyncMutex, mpsc, oneshot},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use ttrpc::{
    get_status,
    proto::{
        Code, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader, Request, Response, Status,
    },
};

use crate::mux::{Message, MuxError, Parser, frames};

/// Calls of the other end that may wait for those before them.
const WAITING: usize = 4;
/// How long an answer may take to be sent.
const SEND: Duration = Duration::from_secs(2);
const BUFFER: usize = 64 << 10;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The other end refused; the connection goes on.
    #[error("{}", .0.message())]
    Refused(Status),
    /// The other end is gone, or was cut off.
    #[error("the connection is closed")]
    Closed,
    /// The other end is too slow.
    #[error("no answer within {} ms", .0.as_millis())]
    TooSlow(Duration),
    /// The other end said what can't be.
    #[error("the answer is no message of its kind")]
    Garbage(#[source] protobuf::Error),
    /// The request can't be sent.
    #[error("send the request")]
    Request(#[source] MuxError),
}

impl CallError {
    /// Whether the connection is of no use any more.
    pub(crate) fn is_fatal(&self) -> bool {
        !matches!(self, Self::Refused(_) | Self::Request(_))
    }

    /// Whether the other end has no such method.
    pub(crate) fn is_unknown_method(&self) -> bool {
        // Go's ttrpc says so as a number alone.
        matches!(self, Self::Refused(status) if status.code.value() == Code::UNIMPLEMENTED as i32)
    }
}

/// Answers the calls of the other end.
#[async_trait]
pub(crate) trait Serve: Debug + Send + Sync + 'static {
    /// The answer's bytes, or why there is none.
    async fn serve(&self, service: &str, method: &str, payload: &[u8]) -> Result<Vec<u8>, Status>;
}

/// One end of a plugin's socket. Dropping it closes the socket.
#[derive(Debug)]
pub(crate) struct Peer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    writer: AsyncMutex<OwnedWriteHalf>,
    /// Those who wait for answers, by stream.
    waiting: Mutex<HashMap<u32, oneshot::Sender<Vec<u8>>>>,
    /// The next stream; a client's are odd.
    next: AtomicU32,
    /// The connection over which calls are made, and that over which they are answered.
    calls: u32,
    serves: u32,
    closed: CancellationToken,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.closed.cancel();
    }
}

impl Peer {
    /// Makes calls over the connection `calls`, and has those over `serves` answered.
    pub(crate) fn start(
        stream: UnixStream,
        calls: u32,
        serves: u32,
        server: Arc<dyn Serve>,
    ) -> Self {
        let (reader, writer) = stream.into_split();
        let shared = Arc::new(Shared {
            writer: AsyncMutex::new(writer),
            waiting: Mutex::default(),
            next: AtomicU32::new(1),
            calls,
            serves,
            closed: CancellationToken::new(),
        });
        let (asked, asking) = mpsc::channel(WAITING);
        let reads = Arc::clone(&shared);
        tokio::spawn(async move {
            let closed = reads.closed.clone();
            tokio::select! {
                () = closed.cancelled() => {}
                () = read(&reads, reader, asked) => {}
            }
            reads.close();
        });
        tokio::spawn(answer(Arc::clone(&shared), server, asking));
        Self { shared }
    }

    /// Calls a method and waits for its answer up to `limit`. A fatal error closes the socket.
    pub(crate) async fn call<A: protobuf::Message>(
        &self,
        service: &str,
        method: &str,
        request: &impl protobuf::Message,
        limit: Duration,
    ) -> Result<A, CallError> {
        let called = timeout(limit, self.shared.call(service, method, request, limit)).await;
        let called = called.unwrap_or(Err(CallError::TooSlow(limit)));
        let answer =
            called.and_then(|payload| A::parse_from_bytes(&payload).map_err(CallError::Garbage));
        if answer.as_ref().is_err_and(CallError::is_fatal) {
            self.close();
        }
        answer
    }

    /// Ends it; calls under way fail.
    pub(crate) fn close(&self) {
        self.shared.close();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.shared.closed.is_cancelled()
    }

    /// What tells that the socket is closed.
    pub(crate) fn closing(&self) -> CancellationToken {
        self.shared.closed.clone()
    }

    /// Returns when the socket is closed, by whomever.
    pub(crate) async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }
}

impl Shared {
    fn close(&self) {
        self.closed.cancel();
        // Tells those who wait.
        self.waiting().clear();
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<Vec<u8>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn call(
        &self,
        service: &str,
        method: &str,
        request: &impl protobuf::Message,
        limit: Duration,
    ) -> Result<Vec<u8>, CallError> {
        let request = Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: request.write_to_bytes().map_err(CallError::Garbage)?,
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
            ..Request::default()
        };
        let payload = request.write_to_bytes().map_err(CallError::Garbage)?;
        let stream = self.next.fetch_add(2, Ordering::Relaxed);
        let header = MessageHeader::new_request(stream, 0);
        let bytes = frames(self.calls, header, &payload).map_err(CallError::Request)?;
        let (answered, answer) = oneshot::channel();
        self.waiting().insert(stream, answered);
        let _no_more = NoMore(self, stream);
        if self.closed.is_cancelled() {
            return Err(CallError::Closed);
        }
        self.send(&bytes).await?;
        let answer = answer.await.map_err(|_| CallError::Closed)?;
        let response = Response::parse_from_bytes(&answer).map_err(CallError::Garbage)?;
        match response.status.into_option() {
            Some(status) if status.code.value() != Code::OK as i32 => {
                Err(CallError::Refused(status))
            }
            _ => Ok(response.payload),
        }
    }

    /// What is not sent as a whole ends the connection.
    async fn send(&self, bytes: &[u8]) -> Result<(), CallError> {
        let mut writer = self.writer.lock().await;
        let mut whole = CloseUnlessDone(self, false);
        let sent = tokio::select! {
            sent = writer.write_all(bytes) => sent.is_ok(),
            () = self.closed.cancelled() => false,
        };
        whole.1 = sent;
        if sent { Ok(()) } else { Err(CallError::Closed) }
    }
}

/// Takes a call that is over, or given up, off the list.
struct NoMore<'a>(&'a Shared, u32);

impl Drop for NoMore<'_> {
    fn drop(&mut self) {
        self.0.waiting().remove(&self.1);
    }
}

/// A message of which a part was sent makes the rest of the connection senseless.
struct CloseUnlessDone<'a>(&'a Shared, bool);

impl Drop for CloseUnlessDone<'_> {
    fn drop(&mut self) {
        if !self.1 {
            self.0.close();
        }
    }
}

/// Reads until there is no more, or what comes can't be.
async fn read(shared: &Shared, mut reader: OwnedReadHalf, asked: mpsc::Sender<Message>) {
    let mut parser = Parser::new([shared.calls, shared.serves]);
    let mut buffer = vec![0; BUFFER];
    loop {
        let bytes = match reader.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => buffer.get(..n).unwrap_or_default(),
        };
        let mut wrong = false;
        let fed = parser.feed(bytes, |message| {
            let kind = (message.connection, message.header.type_);
            if kind == (shared.calls, MESSAGE_TYPE_RESPONSE) {
                // Of a call that was given up: nobody waits.
                if let Some(waiting) = shared.waiting().remove(&message.header.stream_id) {
                    let _ = waiting.send(message.payload);
                }
            } else if kind == (shared.serves, MESSAGE_TYPE_REQUEST) {
                wrong |= asked.try_send(message).is_err();
            } else {
                wrong = true;
            }
        });
        if fed.is_err() || wrong {
            return;
        }
    }
}

/// Answers what is asked, one call after the other.
async fn answer(shared: Arc<Shared>, server: Arc<dyn Serve>, mut asked: mpsc::Receiver<Message>) {
    let work = async {
        while let Some(message) = asked.recv().await {
            let header = MessageHeader::new_response(message.header.stream_id, 0);
            let response = respond(&*server, &message.payload).await;
            let bytes = response.write_to_bytes().ok();
            let bytes = bytes.and_then(|payload| frames(shared.serves, header, &payload).ok());
            let Some(bytes) = bytes else { return };
            if !matches!(timeout(SEND, shared.send(&bytes)).await, Ok(Ok(()))) {
                return;
            }
        }
    };
    tokio::select! {
        () = shared.closed.cancelled() => {}
        () = work => {}
    }
    shared.close();
}

async fn respond(server: &dyn Serve, payload: &[u8]) -> Response {
    let answer = match Request::parse_from_bytes(payload) {
        Ok(call) => {
            server
                .serve(&call.service, &call.method, &call.payload)
                .await
        }
        Err(_) => Err(get_status(Code::INVALID_ARGUMENT, "this is no request")),
    };
    let mut response = Response::default();
    match answer {
        Ok(payload) => {
            response.payload = payload;
            response.status = Some(get_status(Code::OK, "")).into();
        }
        Err(status) => response.status = Some(status).into(),
    }
    response
}

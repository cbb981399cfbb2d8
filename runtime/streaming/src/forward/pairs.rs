//! Port-forward over SPDY: two streams per forwarded connection, found together by `requestid`.
//!
//! A pair is a task from its first stream on; it waits for the second one. All end with the
//! connection, and none of them ends it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};
use tracing::debug;

use super::relay::Pair;
use crate::{backend::Backend, channel::Input, mux::Incoming, output::Output, shared::Shared};

/// The longest id of a pair, bytes; clients count. Each open pair keeps its own.
const MAX_REQUEST: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Error,
    Data,
}

/// What the headers of a stream say.
#[derive(Debug, PartialEq, Eq)]
struct Role {
    kind: Kind,
    port: u16,
    /// The same for both streams of a pair.
    request: String,
}

impl Role {
    /// None when the headers make no sense.
    fn of(stream: &Incoming) -> Option<Self> {
        let headers = &stream.headers;
        let kind = match headers.get("streamtype")? {
            "error" => Kind::Error,
            "data" => Kind::Data,
            _ => return None,
        };
        let port = headers.get("port")?.parse().ok().filter(|port| *port > 0)?;
        let request = match (headers.get("requestid"), kind) {
            (Some(id), _) if id.len() > MAX_REQUEST => return None,
            (Some(id), _) if !id.is_empty() => id.to_owned(),
            // Clients of old open the error stream, then the data stream.
            (_, Kind::Error) => stream.id.to_string(),
            (_, Kind::Data) => stream.id.checked_sub(2)?.to_string(),
        };
        Some(Self {
            kind,
            port,
            request,
        })
    }
}

/// One stream of a pair.
#[derive(Debug)]
struct Half {
    kind: Kind,
    output: Output,
    input: Input,
}

/// A pair that waits for its second stream.
#[derive(Debug)]
struct Waiting {
    first: Kind,
    second: oneshot::Sender<Half>,
}

/// Serves pairs until the client opens no more streams.
pub(crate) async fn over_spdy(
    shared: &Shared,
    pod: String,
    mut incoming: mpsc::Receiver<Incoming>,
) {
    let pod: Arc<str> = pod.into();
    let mut waiting: HashMap<String, Waiting> = HashMap::new();
    let mut pairs = JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = incoming.recv() => match stream {
                Some(stream) => stream,
                // The connection is gone.
                None => return,
            },
            Some(ended) = pairs.join_next(), if !pairs.is_empty() => {
                // One that never got its second stream; its id may be another's by now.
                if let Ok(Some(request)) = ended
                    && waiting.get(&request).is_some_and(|w: &Waiting| w.second.is_closed())
                {
                    waiting.remove(&request);
                }
                continue;
            }
        };
        let Some(role) = Role::of(&stream) else {
            debug!(headers = ?stream.headers, "a stream without sense is refused");
            stream.reject().await;
            continue;
        };
        let matching = match waiting.get(&role.request) {
            Some(other) if other.second.is_closed() => None,
            Some(other) if other.first == role.kind => {
                debug!(
                    request = role.request,
                    "a second stream of its type is refused"
                );
                stream.reject().await;
                continue;
            }
            Some(_) => waiting.remove(&role.request),
            None => None,
        };
        // Streams may be reset while they wait, so that there can be more of these than streams.
        if matching.is_none() && pairs.len() >= shared.config.limits.streams {
            stream.reject().await;
            continue;
        }
        let Ok((output, input)) = stream.accept().await else {
            continue;
        };
        let half = Half {
            kind: role.kind,
            output: output.into(),
            input,
        };
        match matching {
            // Its task has ended meanwhile: dropping the half resets its stream.
            Some(other) => drop(other.second.send(half)),
            None => {
                let (second, other) = oneshot::channel();
                let wait = Waiting {
                    first: role.kind,
                    second,
                };
                waiting.insert(role.request.clone(), wait);
                let backend = Arc::clone(&shared.backend);
                let limit = shared.config.creation_timeout;
                pairs.spawn(pair(half, other, role, limit, backend, Arc::clone(&pod)));
            }
        }
    }
}

/// Serves a pair from its first stream on. The id when it never had a second one.
async fn pair(
    first: Half,
    second: oneshot::Receiver<Half>,
    role: Role,
    limit: Duration,
    backend: Arc<dyn Backend>,
    pod: Arc<str>,
) -> Option<String> {
    let Ok(Ok(second)) = timeout(limit, second).await else {
        incomplete(first, &role).await;
        return Some(role.request);
    };
    let (error, data) = match first.kind {
        Kind::Error => (first, second),
        Kind::Data => (second, first),
    };
    let pair = Pair {
        input: data.input,
        output: data.output,
        // Nothing comes on it; what does is dropped.
        error: error.output,
    };
    pair.relay(backend.as_ref(), &pod, role.port).await;
    None
}

/// Tells the client, if it gave us an error stream to do so.
async fn incomplete(mut half: Half, role: &Role) {
    debug!(request = role.request, "a pair is not complete in time");
    if half.kind == Kind::Error {
        let text = format!(
            "forward port {}: the data stream of request {} did not come in time",
            role.port, role.request
        );
        let _ = half.output.send(Bytes::from(text)).await;
        let _ = half.output.finish().await;
    }
    half.output.reset().await;
}

//! The task that reads frames.

use std::{io, sync::Arc};

use hull_spdy::{DecodeError, Decoder, Frame, Headers, status};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    shared::{Shared, Side},
    stream::{Incoming, StreamSender},
};
use crate::channel::probing;

/// How much is read at a time.
const READ: usize = 16 << 10;

/// Why a connection can't go on.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("read")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("stream id {0} is not the next one of the peer")]
    StreamId(u32),
}

/// Reads until the peer hangs up, breaks the protocol, or this is stopped. Streams are lost then.
pub(super) async fn run(
    io: impl AsyncRead + Unpin,
    shared: Arc<Shared>,
    incoming: mpsc::Sender<Incoming>,
    stop: CancellationToken,
) {
    let reading = read(io, &shared, incoming);
    if let Some(Err(error)) = stop.run_until_cancelled(reading).await {
        let error = &error as &dyn std::error::Error;
        debug!(error, "connection lost");
    }
    shared.closed.cancel();
    let mut streams = shared.streams();
    streams.closing = true;
    for (_, entry) in streams.open.drain() {
        entry.input.lost();
    }
}

async fn read(
    mut io: impl AsyncRead + Unpin,
    shared: &Arc<Shared>,
    incoming: mpsc::Sender<Incoming>,
) -> Result<(), ReadError> {
    let mut decoder = Decoder::new();
    loop {
        decoder.buffer().reserve(READ);
        if io.read_buf(&mut decoder.buffer()).await? == 0 {
            return Ok(());
        }
        while let Some(frame) = decoder.frame()? {
            if !matches!(frame, Frame::Ping(_)) {
                shared.activity.touch();
            }
            handle(frame, shared, &incoming).await?;
        }
    }
}

async fn handle(
    frame: Frame,
    shared: &Arc<Shared>,
    incoming: &mpsc::Sender<Incoming>,
) -> Result<(), ReadError> {
    match frame {
        Frame::SynStream {
            stream,
            headers,
            fin,
            unidirectional,
            ..
        } => {
            if let Some(new) = open(shared, stream, headers, fin, unidirectional)? {
                // Not wanted: dropping it resets the stream.
                let _ = incoming.send(new).await;
            }
        }
        Frame::SynReply { stream, fin, .. } => {
            let entry = &mut shared.streams();
            let reply = entry.open.get_mut(&stream).and_then(|e| e.reply.take());
            if let Some(reply) = reply {
                let _ = reply.send(());
            }
            if fin {
                shared.received_end(stream);
            }
        }
        Frame::Data {
            stream,
            payload,
            fin,
        } => {
            let input = {
                let streams = shared.streams();
                let entry = streams.open.get(&stream);
                // After its end nothing may come.
                entry.filter(|e| !e.received_end).map(|e| e.input.clone())
            };
            if let Some(input) = input {
                let probe = || shared.frames.try_send(Frame::Ping(shared.probe_id()));
                probing(input.bytes(&shared.budget, payload), probe).await;
                if fin {
                    shared.received_end(stream);
                }
            }
        }
        Frame::Headers { stream, fin, .. } => {
            if fin {
                shared.received_end(stream);
            }
        }
        Frame::RstStream { stream, .. } => {
            shared.forget(stream);
        }
        Frame::Ping(id) => {
            // Ours are odd when we are the client; the answer to one needs no answer.
            if (id % 2 == 1) == (shared.side == Side::Server) {
                let _ = shared.frames.send(Frame::Ping(id)).await;
            }
        }
        Frame::Settings | Frame::GoAway { .. } | Frame::WindowUpdate { .. } => {}
    }
    Ok(())
}

/// Adds a stream of the peer's; none when there may be no more.
fn open(
    shared: &Arc<Shared>,
    stream: u32,
    headers: Headers,
    fin: bool,
    unidirectional: bool,
) -> Result<Option<Incoming>, ReadError> {
    let (mut sender, input) = {
        let mut streams = shared.streams();
        let theirs = (stream % 2 == 1) == (shared.side == Side::Server);
        if !theirs || stream <= streams.last_received {
            return Err(ReadError::StreamId(stream));
        }
        streams.last_received = stream;
        if streams.closing {
            return Ok(None);
        }
        if streams.open.len() >= shared.max_streams {
            let status = status::REFUSED_STREAM;
            // One that does not read its answers gets none.
            let _ = shared.frames.try_send(Frame::RstStream { stream, status });
            return Ok(None);
        }
        let (reset, input) = shared.add(&mut streams, stream, None);
        (StreamSender::new(stream, Arc::clone(shared), reset), input)
    };
    if fin {
        shared.received_end(stream);
    }
    if unidirectional {
        sender.finished = true;
        shared.sent_end(stream);
    }
    Ok(Some(Incoming {
        sender,
        input,
        id: stream,
        headers,
    }))
}

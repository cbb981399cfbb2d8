//! A connection and its tasks.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

#[cfg(any(test, feature = "client"))]
use hull_spdy::Headers;
use hull_spdy::{Frame, status};
#[cfg(any(test, feature = "client"))]
use tokio::sync::oneshot;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};

#[cfg(any(test, feature = "client"))]
use super::stream::StreamSender;
use super::{
    reader,
    shared::{Shared, Side},
    stream::Incoming,
    writer,
};
#[cfg(any(test, feature = "client"))]
use crate::channel::{Input, Lost};
use crate::{activity::Activity, channel::Budget};

/// Frames that wait to be written.
const QUEUE: usize = 16;

/// A connection. Dropping it ends its tasks and streams.
#[derive(Debug)]
pub(crate) struct Mux {
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    _stop: DropGuard,
}

impl Mux {
    /// Takes over a connection. The receiver gets the streams that the peer opens.
    pub(crate) fn start(
        io: impl AsyncRead + AsyncWrite + Send + 'static,
        side: Side,
        max_streams: usize,
        buffered: usize,
    ) -> (Self, mpsc::Receiver<Incoming>) {
        let (frames, queue) = mpsc::channel(QUEUE);
        let (incoming, accepted) = mpsc::channel(QUEUE);
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            side,
            streams: Mutex::default(),
            max_streams,
            frames,
            budget: Budget::new(buffered),
            activity: Activity::new(),
            closed: stop.child_token(),
        });
        let (read, write) = tokio::io::split(io);
        let mux = Self {
            reader: tokio::spawn(reader::run(
                read,
                Arc::clone(&shared),
                incoming,
                stop.clone(),
            )),
            writer: tokio::spawn(writer::run(
                write,
                queue,
                shared.activity.clone(),
                shared.closed.clone(),
                stop.clone(),
            )),
            shared,
            _stop: stop.drop_guard(),
        };
        (mux, accepted)
    }

    /// Ends when the peer is gone.
    pub(crate) async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }

    /// Ends when there was no traffic for so long.
    pub(crate) async fn idle(&self, timeout: Duration) {
        self.shared.activity.idle(timeout).await;
    }

    /// Opens a stream and waits until the peer has accepted it.
    #[cfg(any(test, feature = "client"))]
    pub(crate) async fn open(&self, headers: Headers) -> Result<(StreamSender, Input), Lost> {
        let permit = self.shared.frames.reserve().await.map_err(|_| Lost)?;
        let (reply, replied) = oneshot::channel();
        let (sender, input) = {
            // Ids rise on the wire: the frame is queued before the next one is taken.
            let mut streams = self.shared.streams();
            if streams.closing {
                return Err(Lost);
            }
            let stream = match streams.last_opened {
                0 => 1,
                last => last + 2,
            };
            streams.last_opened = stream;
            let (reset, input) = self.shared.add(&mut streams, stream, Some(reply));
            let sender = StreamSender::new(stream, Arc::clone(&self.shared), reset);
            permit.send(Frame::SynStream {
                stream,
                associated: 0,
                priority: 0,
                headers,
                fin: false,
                unidirectional: false,
            });
            (sender, input)
        };
        // Gone with the entry when the stream is reset.
        replied.await.map_err(|_| Lost)?;
        Ok((sender, input))
    }

    /// Ends the connection in order: all streams, then what is queued is written, then the peer
    /// hangs up. Waits at most for `limit`.
    pub(crate) async fn close(self, limit: Duration) {
        let open: Vec<u32> = {
            let mut streams = self.shared.streams();
            streams.closing = true;
            let open = streams.open.drain();
            open.map(|(stream, entry)| {
                entry.input.lost();
                entry.reset.cancel();
                stream
            })
            .collect()
        };
        let shared = Arc::clone(&self.shared);
        let last_stream = shared.streams().last_received;
        let closing = async {
            for stream in open {
                let status = status::CANCEL;
                let _ = shared
                    .frames
                    .send(Frame::RstStream { stream, status })
                    .await;
            }
            let frame = Frame::GoAway {
                last_stream,
                status: 0,
            };
            // The last that the writer writes.
            let _ = shared.frames.send(frame).await;
            let _ = self.writer.await;
            // Reads on until the peer hangs up: closing before could take back what was written.
            let _ = self.reader.await;
        };
        let _ = timeout(limit, closing).await;
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use hull_spdy::{Decoder, Encoder};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_stream_ends_once_however_often_a_client_says_so() {
        let (ours, mut client) = duplex(64 << 10);
        let (_mux, mut incoming) = Mux::start(ours, Side::Server, 16, 512 << 10);
        let (mut encoder, mut wire) = (Encoder::new(), BytesMut::new());
        let syn = Frame::SynStream {
            stream: 1,
            associated: 0,
            priority: 0,
            headers: Headers::default(),
            fin: false,
            unidirectional: false,
        };
        encoder.encode(&syn, &mut wire).unwrap();
        for _ in 0..10_000 {
            let headers = Frame::Headers {
                stream: 1,
                headers: Headers::default(),
                fin: true,
            };
            encoder.encode(&headers, &mut wire).unwrap();
        }
        encoder.encode(&Frame::Ping(1), &mut wire).unwrap();
        client.write_all(&wire).await.unwrap();
        // All before the ping was looked at when it comes back.
        let mut decoder = Decoder::new();
        while decoder.frame().unwrap() != Some(Frame::Ping(1)) {
            let mut buffer = decoder.buffer();
            assert_ne!(client.read_buf(&mut buffer).await.unwrap(), 0);
        }
        let stream = incoming.recv().await.unwrap();
        assert_eq!(stream.input.waiting(), 1);
    }
}

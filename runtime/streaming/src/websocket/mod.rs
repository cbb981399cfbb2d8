//! Channels over a WebSocket: the first byte of each message names one.

mod tunnel;

use std::{collections::HashMap, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, Stream, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;

pub(crate) use self::tunnel::Tunnel;
use crate::{
    activity::Activity,
    channel::{Budget, Input, InputSender, Lost, input, probing},
};

/// Messages that wait to be written.
const QUEUE: usize = 16;
/// In place of a channel: the next byte is a channel that ends (v5).
const CLOSE: u8 = 255;

/// How messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Codec {
    /// As text: the channel is a digit, what follows is base64.
    pub(crate) base64: bool,
    /// There is a message for the end of a channel.
    pub(crate) close_signal: bool,
}

/// A WebSocket after its handshake.
pub(crate) async fn open<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    role: Role,
    max_message: usize,
) -> WebSocketStream<T> {
    let config = WebSocketConfig::default()
        .max_message_size(Some(max_message))
        .max_frame_size(Some(max_message))
        .write_buffer_size(0)
        .max_write_buffer_size(2 * max_message);
    WebSocketStream::from_raw_socket(io, role, Some(config)).await
}

/// A WebSocket that carries channels. Dropping it ends its tasks and channels.
#[derive(Debug)]
pub(crate) struct Channels {
    codec: Codec,
    role: Role,
    messages: mpsc::Sender<Message>,
    activity: Activity,
    closed: CancellationToken,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    _stop: DropGuard,
}

impl Channels {
    /// Takes over a WebSocket and gives an input for each of these channels, in their order. What
    /// comes for another one is dropped.
    pub(crate) fn start<T>(
        socket: WebSocketStream<T>,
        role: Role,
        codec: Codec,
        channels: &[u8],
        buffered: usize,
    ) -> (Self, Vec<Input>)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sink, stream) = socket.split();
        let (messages, queue) = mpsc::channel(QUEUE);
        let (senders, inputs): (HashMap<_, _>, Vec<_>) = channels
            .iter()
            .map(|channel| {
                let (sender, input) = input();
                ((*channel, sender), input)
            })
            .unzip();
        let stop = CancellationToken::new();
        let closed = stop.child_token();
        let activity = Activity::new();
        let reader = Reader {
            codec,
            senders,
            budget: Budget::new(buffered),
            activity: activity.clone(),
            messages: messages.clone(),
        };
        let reader = {
            let (stop, closed) = (stop.clone(), closed.clone());
            async move {
                let read = reader.run(stream);
                if let Some(Err(error)) = stop.run_until_cancelled(read).await {
                    debug!(%error, "WebSocket lost");
                }
                closed.cancel();
            }
        };
        let writer = {
            let (stop, closed, activity) = (stop.clone(), closed.clone(), activity.clone());
            async move {
                let write = write(sink, queue, activity);
                if let Some(Err(error)) = stop.run_until_cancelled(write).await {
                    debug!(%error, "WebSocket lost while writing");
                    closed.cancel();
                }
            }
        };
        let channels = Self {
            codec,
            role,
            messages,
            activity,
            closed,
            reader: tokio::spawn(reader),
            writer: tokio::spawn(writer),
            _stop: stop.drop_guard(),
        };
        (channels, inputs)
    }

    /// The sending half of a channel.
    pub(crate) fn sender(&self, channel: u8) -> ChannelSender {
        ChannelSender {
            channel,
            codec: self.codec,
            role: self.role,
            messages: self.messages.clone(),
            closed: self.closed.clone(),
        }
    }

    /// Ends when the peer is gone.
    pub(crate) async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Ends when there was no traffic for so long.
    pub(crate) async fn idle(&self, timeout: Duration) {
        self.activity.idle(timeout).await;
    }

    /// Sends a close message after what is queued, and waits until the peer hangs up, at most for
    /// `limit`.
    pub(crate) async fn close(self, limit: Duration) {
        let closing = async {
            let frame = CloseFrame {
                code: CloseCode::Normal,
                reason: "".into(),
            };
            let _ = self.messages.send(Message::Close(Some(frame))).await;
            let _ = self.writer.await;
            let _ = self.reader.await;
        };
        let _ = timeout(limit, closing).await;
    }
}

/// The sending half of a channel.
#[derive(Debug)]
pub struct ChannelSender {
    channel: u8,
    codec: Codec,
    role: Role,
    messages: mpsc::Sender<Message>,
    closed: CancellationToken,
}

impl ChannelSender {
    async fn queue(&self, message: Message) -> Result<(), Lost> {
        tokio::select! {
            biased;
            () = self.closed.cancelled() => Err(Lost),
            sent = self.messages.send(message) => sent.map_err(|_| Lost),
        }
    }

    /// Sends a message, also one without bytes.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Result<(), Lost> {
        let message = if self.codec.base64 {
            let mut text = String::with_capacity(1 + bytes.len().div_ceil(3) * 4);
            text.push(char::from(b'0' + self.channel));
            BASE64.encode_string(bytes, &mut text);
            Message::text(text)
        } else {
            let mut message = BytesMut::with_capacity(1 + bytes.len());
            message.put_u8(self.channel);
            message.put_slice(bytes);
            Message::binary(message.freeze())
        };
        self.queue(message).await
    }

    /// Only clients have a word for it: they take a server's for an unknown channel.
    pub(crate) async fn finish(&mut self) -> Result<(), Lost> {
        if self.codec.close_signal && self.role == Role::Client {
            let message = Bytes::copy_from_slice(&[CLOSE, self.channel]);
            self.queue(Message::binary(message)).await?;
        }
        Ok(())
    }
}

/// Why a WebSocket can't go on.
#[derive(Debug, thiserror::Error)]
enum ChannelError {
    #[error(transparent)]
    Socket(Box<Error>),
    #[error("a message is not base64")]
    Base64,
    #[error("a close signal has {0} bytes")]
    Signal(usize),
}

struct Reader {
    codec: Codec,
    senders: HashMap<u8, InputSender>,
    budget: Budget,
    activity: Activity,
    messages: mpsc::Sender<Message>,
}

impl Reader {
    async fn run(
        self,
        mut messages: impl Stream<Item = Result<Message, Error>> + Unpin,
    ) -> Result<(), ChannelError> {
        while let Some(message) = messages.next().await {
            let message = match message.map_err(|error| ChannelError::Socket(Box::new(error)))? {
                Message::Binary(bytes) => bytes,
                Message::Text(text) => text.into(),
                // Answered by the next call.
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
                // And on until the peer hangs up.
                Message::Close(_) => continue,
            };
            self.activity.touch();
            self.message(message).await?;
        }
        Ok(())
    }

    async fn message(&self, mut message: Bytes) -> Result<(), ChannelError> {
        if message.is_empty() {
            return Ok(());
        }
        let mut channel = message.split_to(1)[0];
        if self.codec.close_signal && channel == CLOSE {
            let &[ended] = message.as_ref() else {
                return Err(ChannelError::Signal(message.len() + 1));
            };
            if let Some(sender) = self.senders.get(&ended) {
                sender.end();
            }
            return Ok(());
        }
        if self.codec.base64 {
            channel = channel.wrapping_sub(b'0');
        }
        let Some(sender) = self.senders.get(&channel) else {
            return Ok(());
        };
        message = if self.codec.base64 {
            let decoded = BASE64.decode(&message).map_err(|_| ChannelError::Base64)?;
            decoded.into()
        } else {
            // Copied, so that a few bytes that wait don't keep the whole buffer they were read to.
            Bytes::copy_from_slice(&message)
        };
        let probe = || self.messages.try_send(Message::Ping(Bytes::new()));
        probing(sender.bytes(&self.budget, message), probe).await;
        Ok(())
    }
}

/// Writes until a close message is written or the connection breaks.
async fn write(
    mut sink: impl SinkExt<Message, Error = Error> + Unpin,
    mut queue: mpsc::Receiver<Message>,
    activity: Activity,
) -> Result<(), Error> {
    while let Some(message) = queue.recv().await {
        let last = message.is_close();
        let traffic = !message.is_ping();
        sink.send(message).await?;
        if traffic {
            activity.touch();
        }
        if last {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    const V5: Codec = Codec {
        base64: false,
        close_signal: true,
    };

    /// A server's channel 0 and a client that writes messages to it as it likes.
    async fn pair() -> (Channels, Input, WebSocketStream<tokio::io::DuplexStream>) {
        let (ours, theirs) = duplex(64 << 10);
        let server = open(ours, Role::Server, 1 << 20).await;
        let (channels, mut inputs) = Channels::start(server, Role::Server, V5, &[0], 512 << 10);
        let client = open(theirs, Role::Client, 1 << 20).await;
        (channels, inputs.remove(0), client)
    }

    /// Waits until all that was sent before was looked at.
    async fn settle(client: &mut WebSocketStream<tokio::io::DuplexStream>) {
        client.send(Message::Ping(Bytes::new())).await.unwrap();
        let answer = timeout(Duration::from_secs(30), client.next()).await;
        assert!(matches!(answer, Ok(Some(Ok(Message::Pong(_))))));
    }

    #[tokio::test]
    async fn a_channel_ends_once_however_often_a_client_says_so() {
        let (_channels, mut input, mut client) = pair().await;
        client.send(Message::binary(vec![0, 7])).await.unwrap();
        for _ in 0..10_000 {
            client.send(Message::binary(vec![CLOSE, 0])).await.unwrap();
        }
        client.send(Message::binary(vec![0; 1000])).await.unwrap();
        settle(&mut client).await;
        // The byte and the end.
        assert_eq!(input.waiting(), 2);
        assert_eq!(input.recv().await, Ok(Some(Bytes::from_static(&[7]))));
        assert_eq!(input.recv().await, Ok(None));
    }

    #[tokio::test]
    async fn bytes_that_wait_keep_no_more_than_themselves() {
        let (_channels, mut input, mut client) = pair().await;
        client.send(Message::binary(vec![0, 7])).await.unwrap();
        settle(&mut client).await;
        let bytes = input.recv().await.unwrap().unwrap();
        // Else it shares the buffer that the socket was read to, 128 KiB or a whole message.
        assert!(bytes.is_unique());
    }
}

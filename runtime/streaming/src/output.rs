//! What a peer is sent on one stream of a session, whatever carries it.

use bytes::Bytes;

use crate::{channel::Lost, mux::StreamSender, websocket::ChannelSender};

/// The sending half of a stream. Dropped before its end, it resets the stream.
#[derive(Debug)]
pub enum Output {
    /// A stream of SPDY.
    #[doc(hidden)]
    Spdy(StreamSender),
    /// A channel of a WebSocket.
    #[doc(hidden)]
    WebSocket(ChannelSender),
}

impl Output {
    /// Sends bytes, waiting until the connection takes them.
    ///
    /// # Errors
    /// [`Lost`].
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), Lost> {
        match self {
            Self::Spdy(stream) => stream.send(bytes).await,
            Self::WebSocket(channel) => channel.send(&bytes).await,
        }
    }

    /// Says that nothing follows, as far as the protocol has words for it.
    ///
    /// # Errors
    /// [`Lost`].
    pub async fn finish(&mut self) -> Result<(), Lost> {
        match self {
            Self::Spdy(stream) => stream.finish().await,
            Self::WebSocket(channel) => channel.finish().await,
        }
    }

    /// Ends the stream in both directions, unless it has ended already.
    pub async fn reset(&mut self) {
        match self {
            Self::Spdy(stream) => stream.reset().await,
            Self::WebSocket(_) => {}
        }
    }
}

impl From<StreamSender> for Output {
    fn from(stream: StreamSender) -> Self {
        Self::Spdy(stream)
    }
}

impl From<ChannelSender> for Output {
    fn from(channel: ChannelSender) -> Self {
        Self::WebSocket(channel)
    }
}

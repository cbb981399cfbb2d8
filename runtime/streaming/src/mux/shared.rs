//! What a connection, its tasks and its streams have in common.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use hull_spdy::Frame;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    activity::Activity,
    channel::{Budget, Input, InputSender, input},
};

/// Which side of a connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    #[cfg_attr(not(any(test, feature = "client")), expect(dead_code))]
    Client,
    Server,
}

/// What connection, tasks and streams have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) side: Side,
    pub(super) streams: Mutex<Streams>,
    pub(super) max_streams: usize,
    pub(super) frames: mpsc::Sender<Frame>,
    pub(super) budget: Budget,
    pub(super) activity: Activity,
    /// The peer is gone.
    pub(super) closed: CancellationToken,
}

#[derive(Debug, Default)]
pub(super) struct Streams {
    pub(super) open: HashMap<u32, Entry>,
    /// The last stream of the peer.
    pub(super) last_received: u32,
    /// The last stream of ours.
    #[cfg(any(test, feature = "client"))]
    pub(super) last_opened: u32,
    /// No stream is accepted any more.
    pub(super) closing: bool,
}

/// A stream that is open in at least one direction.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) input: InputSender,
    /// Cancelled when the stream is reset.
    pub(super) reset: CancellationToken,
    pub(super) received_end: bool,
    pub(super) sent_end: bool,
    /// Of a stream of ours that has no reply yet.
    pub(super) reply: Option<oneshot::Sender<()>>,
}

impl Shared {
    pub(super) fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The id of a ping of ours, which the peer sends back.
    pub(super) fn probe_id(&self) -> u32 {
        match self.side {
            Side::Client => 1,
            Side::Server => 2,
        }
    }

    /// Adds a stream that is open in both directions; the token is cancelled when it is reset.
    pub(super) fn add(
        &self,
        streams: &mut Streams,
        stream: u32,
        reply: Option<oneshot::Sender<()>>,
    ) -> (CancellationToken, Input) {
        let (sender, receiver) = input();
        let reset = self.closed.child_token();
        streams.open.insert(
            stream,
            Entry {
                input: sender,
                reset: reset.clone(),
                received_end: false,
                sent_end: false,
                reply,
            },
        );
        (reset, receiver)
    }

    /// The peer sends no more on a stream.
    pub(super) fn received_end(&self, stream: u32) {
        let mut streams = self.streams();
        if let Some(entry) = streams.open.get_mut(&stream) {
            entry.input.end();
            entry.received_end = true;
            if entry.sent_end {
                streams.open.remove(&stream);
            }
        }
    }

    /// This side sends no more on a stream.
    pub(super) fn sent_end(&self, stream: u32) {
        let mut streams = self.streams();
        if let Some(entry) = streams.open.get_mut(&stream) {
            entry.sent_end = true;
            if entry.received_end {
                streams.open.remove(&stream);
            }
        }
    }

    /// Forgets a stream; false: it had ended before.
    pub(super) fn forget(&self, stream: u32) -> bool {
        let entry = self.streams().open.remove(&stream);
        if let Some(entry) = &entry {
            entry.input.lost();
            entry.reset.cancel();
        }
        entry.is_some()
    }
}

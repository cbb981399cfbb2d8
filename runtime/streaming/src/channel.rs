//! What a peer sends on one stream of a session, whatever carries it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};

/// How often a peer is probed that can't be heard.
const PROBE: Duration = Duration::from_secs(3);
/// What a chunk costs besides its bytes.
const CHUNK_COST: usize = 128;

/// The other side ended the stream at once, or the connection is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream was reset or its connection is gone")]
pub struct Lost;

/// Bytes of all streams of a connection that wait to be taken.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    free: Arc<Semaphore>,
    total: usize,
}

impl Budget {
    pub(crate) fn new(total: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(total)),
            total,
        }
    }

    /// Waits until so many more bytes may wait.
    async fn take(&self, length: usize) -> Result<OwnedSemaphorePermit, Lost> {
        let cost = (length + CHUNK_COST).min(self.total);
        let cost = u32::try_from(cost).map_err(|_| Lost)?;
        let free = Arc::clone(&self.free);
        free.acquire_many_owned(cost).await.map_err(|_| Lost)
    }
}

#[derive(Debug)]
enum Item {
    Bytes(Bytes, OwnedSemaphorePermit),
    End,
    Lost,
}

/// Where a connection puts what came for a stream. Clones share its end.
///
/// The queue itself has no bound: bytes are bounded by the connection's [`Budget`], and there is
/// one end, however often a peer says so.
#[derive(Debug, Clone)]
pub(crate) struct InputSender {
    items: mpsc::UnboundedSender<Item>,
    ended: Arc<AtomicBool>,
}

impl InputSender {
    /// Passes bytes on, waiting until there is room for them. Nobody may want them any more, and
    /// after the end nobody does.
    pub(crate) async fn bytes(&self, budget: &Budget, bytes: Bytes) {
        if bytes.is_empty() || self.items.is_closed() || self.ended.load(Ordering::Acquire) {
            return;
        }
        if let Ok(permit) = budget.take(bytes.len()).await {
            let _ = self.items.send(Item::Bytes(bytes, permit));
        }
    }

    /// The other side sends no more.
    pub(crate) fn end(&self) {
        self.last(Item::End);
    }

    /// See [`Lost`].
    pub(crate) fn lost(&self) {
        self.last(Item::Lost);
    }

    fn last(&self, item: Item) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            let _ = self.items.send(item);
        }
    }
}

/// Does something for which nothing can be read meanwhile. While it takes long, `probe` writes
/// something: a peer that has hung up behind what waits to be read answers with a reset.
pub(crate) async fn probing<T>(
    work: impl Future<Output = ()>,
    probe: impl Fn() -> Result<(), mpsc::error::TrySendError<T>>,
) {
    tokio::pin!(work);
    while timeout(PROBE, &mut work).await.is_err() {
        // Who does not read either is probed by what waits in the queue.
        let _ = probe();
    }
}

/// The receiving half of a stream.
#[derive(Debug)]
pub struct Input {
    items: mpsc::UnboundedReceiver<Item>,
    /// Belongs to the bytes that were taken last: their taker still has them.
    held: Option<OwnedSemaphorePermit>,
    end: Option<Result<(), Lost>>,
}

pub(crate) fn input() -> (InputSender, Input) {
    let (sender, items) = mpsc::unbounded_channel();
    let input = Input {
        items,
        held: None,
        end: None,
    };
    let sender = InputSender {
        items: sender,
        ended: Arc::default(),
    };
    (sender, input)
}

impl Input {
    /// How many pieces and ends wait to be taken.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.items.len()
    }

    /// The next bytes; none after the last. May be dropped and called again.
    ///
    /// # Errors
    /// [`Lost`].
    pub async fn recv(&mut self) -> Result<Option<Bytes>, Lost> {
        self.held = None;
        if let Some(end) = self.end {
            return end.map(|()| None);
        }
        let end = match self.items.recv().await {
            Some(Item::Bytes(bytes, permit)) => {
                self.held = Some(permit);
                return Ok(Some(bytes));
            }
            Some(Item::End) => Ok(()),
            Some(Item::Lost) | None => Err(Lost),
        };
        self.end = Some(end);
        end.map(|()| None)
    }
}

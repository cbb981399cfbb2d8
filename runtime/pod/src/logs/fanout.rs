//! Copies of an output for those who follow it live.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    sync::mpsc,
};

/// Most bytes that wait for one follower; with more it is cut off.
const BEHIND_MAX: usize = 1 << 20;
/// Small pieces cost more than their bytes.
const PIECE_COST: usize = 64;

/// An output's followers. Clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fanout(Arc<Mutex<Followers>>);

#[derive(Debug, Default)]
struct Followers {
    ended: bool,
    all: Vec<Follower>,
}

#[derive(Debug)]
struct Follower {
    pieces: mpsc::UnboundedSender<Arc<[u8]>>,
    behind: Arc<Behind>,
}

fn cost(piece: &[u8]) -> usize {
    piece.len().saturating_add(PIECE_COST)
}

/// How far a follower is behind.
#[derive(Debug, Default)]
struct Behind {
    bytes: AtomicUsize,
    cut_off: AtomicBool,
}

impl Fanout {
    /// Gives bytes to all followers; waits for none.
    pub(crate) fn publish(&self, bytes: &[u8]) {
        let mut followers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if followers.all.is_empty() {
            return;
        }
        let piece: Arc<[u8]> = bytes.into();
        followers.all.retain(|follower| {
            let cost = cost(&piece);
            let before = follower.behind.bytes.fetch_add(cost, Ordering::AcqRel);
            if before.saturating_add(cost) > BEHIND_MAX {
                follower.behind.cut_off.store(true, Ordering::Release);
                return false;
            }
            // An error means that it went away.
            follower.pieces.send(Arc::clone(&piece)).is_ok()
        });
    }

    /// Ends the output.
    pub(crate) fn end(&self) {
        let mut followers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        followers.ended = true;
        followers.all.clear();
    }

    /// Follows the output from now on.
    pub(crate) fn follow(&self) -> AttachedOutput {
        let (pieces, receiver) = mpsc::unbounded_channel();
        let behind = Arc::new(Behind::default());
        let mut followers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !followers.ended {
            followers.all.push(Follower {
                pieces,
                behind: Arc::clone(&behind),
            });
        }
        AttachedOutput {
            pieces: receiver,
            behind,
            piece: Arc::default(),
            read: 0,
        }
    }
}

/// What a follower reads.
#[derive(Debug)]
pub(crate) struct AttachedOutput {
    pieces: mpsc::UnboundedReceiver<Arc<[u8]>>,
    behind: Arc<Behind>,
    piece: Arc<[u8]>,
    /// How much of the piece was read.
    read: usize,
}

impl AsyncRead for AttachedOutput {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.read == self.piece.len() {
            match ready!(self.pieces.poll_recv(context)) {
                Some(piece) => {
                    self.behind.bytes.fetch_sub(cost(&piece), Ordering::AcqRel);
                    self.piece = piece;
                    self.read = 0;
                }
                None if self.behind.cut_off.load(Ordering::Acquire) => {
                    return Poll::Ready(Err(io::Error::other(
                        "the client reads too slowly; the rest is in the container's log",
                    )));
                }
                None => return Poll::Ready(Ok(())),
            }
        }
        let rest = self.piece.get(self.read..).unwrap_or_default();
        let part = rest.get(..buffer.remaining()).unwrap_or(rest);
        buffer.put_slice(part);
        self.read = self.read.saturating_add(part.len());
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn followers_get_what_comes_after_them() {
        let fanout = Fanout::default();
        fanout.publish(b"before");
        let (mut one, mut two) = (fanout.follow(), fanout.follow());
        fanout.publish(b"a");
        drop(fanout.follow());
        fanout.publish(b"bc");
        fanout.end();
        for follower in [&mut one, &mut two] {
            let mut seen = String::new();
            follower.read_to_string(&mut seen).await.unwrap();
            assert_eq!(seen, "abc");
        }
        let mut late = String::new();
        fanout.follow().read_to_string(&mut late).await.unwrap();
        assert_eq!(late, "");
    }

    #[tokio::test]
    async fn a_follower_that_does_not_read_is_cut_off_alone() {
        let fanout = Fanout::default();
        let (mut slow, mut fast) = (fanout.follow(), fanout.follow());
        let piece = [b'x'; 1000];
        let mut buffer = [0; 1000];
        for _ in 0..2000 {
            fanout.publish(&piece);
            fast.read_exact(&mut buffer).await.unwrap();
        }
        fanout.end();
        assert_eq!(fast.read(&mut buffer).await.unwrap(), 0);
        let mut seen = Vec::new();
        let error = slow.read_to_end(&mut seen).await.unwrap_err();
        assert!(error.to_string().contains("too slowly"));
        // What it got is the beginning, without a hole.
        assert_eq!(seen.len() % 1000, 0);
        assert!(!seen.is_empty() && seen.len() < BEHIND_MAX);
    }

    #[tokio::test]
    async fn tiny_pieces_do_not_pile_up() {
        let fanout = Fanout::default();
        let slow = fanout.follow();
        for _ in 0..BEHIND_MAX {
            fanout.publish(b"x");
        }
        assert!(slow.pieces.len() <= BEHIND_MAX / PIECE_COST);
    }
}

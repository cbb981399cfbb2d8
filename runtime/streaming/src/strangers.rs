//! Connections whose client has not shown a token yet.
//!
//! Nobody knows who they are, so they get nothing that a client with a token needs: a number and a
//! deadline of their own. When there are too many, the oldest one makes room for the new one. A
//! client that means it sends its request as soon as it is connected, and is no stranger any more
//! long before so many others have come after it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// Those that there are. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Strangers {
    waiting: Arc<Mutex<Waiting>>,
    max: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    /// In the order in which they came.
    all: BTreeMap<u64, CancellationToken>,
}

/// A place among the strangers; given up when dropped.
#[derive(Debug)]
pub(crate) struct Stranger {
    number: u64,
    turned_away: CancellationToken,
    strangers: Strangers,
}

impl Strangers {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            waiting: Arc::default(),
            max,
        }
    }

    /// Takes one more; turns the oldest away when there are too many.
    pub(crate) fn admit(&self) -> Stranger {
        let turned_away = CancellationToken::new();
        let mut waiting = self.lock();
        if waiting.all.len() >= self.max
            && let Some((_, oldest)) = waiting.all.pop_first()
        {
            oldest.cancel();
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.all.insert(number, turned_away.clone());
        drop(waiting);
        Stranger {
            number,
            turned_away,
            strangers: self.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stranger {
    /// Ends when it has to make room.
    pub(crate) async fn turned_away(&self) {
        self.turned_away.cancelled().await;
    }

    /// It has shown a token: from now on it makes room for nobody.
    pub(crate) fn known(&self) {
        self.strangers.lock().all.remove(&self.number);
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.known();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room_and_who_is_known_does_not() {
        let strangers = Strangers::new(2);
        let (one, two) = (strangers.admit(), strangers.admit());
        one.known();
        let three = strangers.admit();
        assert!(!two.turned_away.is_cancelled());
        let _four = strangers.admit();
        assert!(two.turned_away.is_cancelled());
        assert!(!one.turned_away.is_cancelled());
        drop(three);
        let _five = strangers.admit();
        assert_eq!(strangers.lock().all.len(), 2);
    }
}

//! What happened, in order, for hosts that come and go.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use hull_proto_agent::agent::{Event, Overrun, event::Kind};
use tokio::sync::watch;

/// How many events are kept for a host that is away.
const KEPT: usize = 4096;

/// The last events, numbered from 1 without gaps.
#[derive(Debug)]
pub(crate) struct Events {
    ring: Mutex<VecDeque<Event>>,
    /// Number of the newest event.
    newest: watch::Sender<u64>,
    kept: usize,
}

impl Default for Events {
    fn default() -> Self {
        Self::keeping(KEPT)
    }
}

impl Events {
    fn keeping(kept: usize) -> Self {
        Self {
            ring: Mutex::default(),
            newest: watch::Sender::new(0),
            kept,
        }
    }

    /// Numbers `kind`, keeps it and wakes all readers.
    pub(crate) fn publish(&self, kind: Kind) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = *self.newest.borrow() + 1;
        if ring.len() == self.kept {
            ring.pop_front();
        }
        ring.push_back(Event {
            seq,
            kind: Some(kind),
            ..Event::default()
        });
        // Under the lock, so that numbers and ring agree.
        self.newest.send_replace(seq);
    }

    /// Returns a reader of all events after `since`.
    pub(crate) fn reader(&self, since: u64) -> Reader<'_> {
        Reader {
            events: self,
            newest: self.newest.subscribe(),
            seen: since,
        }
    }

    /// Returns the kept events after `since`, led by an `Overrun` when some
    /// are missing.
    fn after(&self, since: u64) -> Vec<Event> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let first = ring.front().map_or(0, |e| e.seq);
        let lost = (first > since + 1).then(|| Event {
            seq: first - 1,
            kind: Some(Kind::Overrun(Overrun::default())),
            ..Event::default()
        });
        let skipped = since.saturating_add(1).saturating_sub(first);
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
        lost.into_iter()
            .chain(ring.iter().skip(skipped).cloned())
            .collect()
    }
}

/// One host's place in the events.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    events: &'a Events,
    newest: watch::Receiver<u64>,
    seen: u64,
}

impl Reader<'_> {
    /// Waits for events that were not returned yet; never empty.
    pub(crate) async fn next(&mut self) -> Vec<Event> {
        loop {
            self.newest.mark_unchanged();
            // A number from before a restart of the guest may be too high.
            let newest = *self.newest.borrow();
            self.seen = self.seen.min(newest);
            let batch = self.events.after(self.seen);
            if let Some(last) = batch.last() {
                self.seen = last.seq;
                return batch;
            }
            // The sender lives as long as `events`.
            let _ = self.newest.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use hull_proto_agent::agent::Oom;

    use super::*;

    fn publish(events: &Events, count: usize) {
        for _ in 0..count {
            events.publish(Kind::Oom(Oom::default()));
        }
    }

    fn seqs(batch: &[Event]) -> Vec<u64> {
        batch.iter().map(|e| e.seq).collect()
    }

    #[test]
    fn events_are_numbered_from_one_and_replayed() {
        let events = Events::keeping(8);
        assert!(events.after(0).is_empty());
        publish(&events, 3);
        assert_eq!(seqs(&events.after(0)), [1, 2, 3]);
        assert_eq!(seqs(&events.after(2)), [3]);
        assert!(events.after(3).is_empty());
    }

    #[test]
    fn a_host_that_was_away_too_long_is_told() {
        let events = Events::keeping(2);
        publish(&events, 5);
        let batch = events.after(1);
        assert_eq!(seqs(&batch), [3, 4, 5]);
        assert!(matches!(batch[0].kind, Some(Kind::Overrun(_))));
        assert_eq!(seqs(&events.after(3)), [4, 5]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_gets_each_event_once() {
        let events = Events::keeping(8);
        publish(&events, 2);
        let mut reader = events.reader(0);
        assert_eq!(seqs(&reader.next().await), [1, 2]);
        let (batch, ()) = tokio::join!(reader.next(), async {
            tokio::task::yield_now().await;
            publish(&events, 1);
        });
        assert_eq!(seqs(&batch), [3]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_number_from_the_future_does_not_block_for_ever() {
        let events = Events::keeping(8);
        publish(&events, 1);
        let mut reader = events.reader(900);
        let (batch, ()) = tokio::join!(reader.next(), async {
            tokio::task::yield_now().await;
            publish(&events, 1);
        });
        assert_eq!(seqs(&batch), [2]);
    }
}

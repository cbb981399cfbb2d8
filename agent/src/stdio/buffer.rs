//! The bytes of an output stream that the host has not stored yet.

use std::collections::VecDeque;

/// Output from the first byte that was not acknowledged on.
///
/// Offsets count from the start of the stream and never go back. A reader may
/// begin again anywhere between what was acknowledged and what was written.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    /// Offset of the first kept byte: everything before was acknowledged.
    acked: u64,
    bytes: VecDeque<u8>,
}

/// An offset at which the stream has no byte to begin with.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("offset {offset} is beyond the {total} bytes of the stream")]
pub(crate) struct BeyondEnd {
    offset: u64,
    total: u64,
}

impl Replay {
    /// Returns how many bytes were ever written.
    pub(crate) fn total(&self) -> u64 {
        self.acked + self.bytes.len() as u64
    }

    /// Returns how many bytes are kept.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Returns the offset of the first kept byte.
    pub(crate) fn start(&self) -> u64 {
        self.acked
    }

    /// Appends what the process wrote.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Forgets all bytes before `offset`: the host has them. Going back is no
    /// error, an acknowledgement may arrive late.
    pub(crate) fn ack(&mut self, offset: u64) -> Result<(), BeyondEnd> {
        let total = self.total();
        if offset > total {
            return Err(BeyondEnd { offset, total });
        }
        let done = offset.saturating_sub(self.acked);
        self.bytes
            .drain(..usize::try_from(done).unwrap_or(usize::MAX));
        self.acked += done;
        if self.bytes.is_empty() {
            // An idle stream keeps no memory.
            self.bytes = VecDeque::new();
        }
        Ok(())
    }

    /// Returns up to `max` bytes from `offset` on, in two parts because they lie in a ring.
    /// Bytes that were acknowledged meanwhile are skipped: the returned offset says where
    /// the bytes begin.
    pub(crate) fn read(&self, offset: u64, max: usize) -> (u64, [&[u8]; 2]) {
        let from = offset.clamp(self.acked, self.total());
        let skip = usize::try_from(from - self.acked).unwrap_or(usize::MAX);
        let (first, second) = self.bytes.as_slices();
        let head = first.get(skip..).unwrap_or_default();
        let head = &head[..head.len().min(max)];
        let tail = second
            .get(skip.saturating_sub(first.len())..)
            .unwrap_or_default();
        let tail = &tail[..tail.len().min(max - head.len())];
        (from, [head, tail])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize),
        Read(usize),
        Ack(f64),
        Reconnect(f64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..300usize).prop_map(Step::Write),
            (1..200usize).prop_map(Step::Read),
            (0.0..=1.0f64).prop_map(Step::Ack),
            (0.0..=1.0f64).prop_map(Step::Reconnect),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        /// Whatever is written, read, acknowledged and lost in between: the
        /// host ends up with exactly the bytes that were written.
        #[test]
        fn nothing_is_lost_or_doubled(steps in steps()) {
            let byte = |offset: usize| (offset * 7 % 251) as u8;
            let mut replay = Replay::default();
            let mut written = 0;
            // What the host received, and how much of it it has stored for good.
            let (mut host, mut stored): (Vec<u8>, usize) = (Vec::new(), 0);
            for step in steps {
                match step {
                    Step::Write(n) => {
                        replay.push(&(written..written + n).map(byte).collect::<Vec<_>>());
                        written += n;
                    }
                    Step::Read(max) => {
                        let (from, bytes) = replay.read(host.len() as u64, max);
                        prop_assert_eq!(from, host.len() as u64);
                        host.extend(bytes.concat());
                    }
                    Step::Ack(part) => {
                        stored = stored.max((host.len() as f64 * part) as usize);
                        replay.ack(stored as u64).unwrap();
                    }
                    Step::Reconnect(part) => {
                        // The host died: what it had not stored is gone, and it
                        // asks for any byte from there on that it still has.
                        let kept = stored + ((host.len() - stored) as f64 * part) as usize;
                        host.truncate(kept);
                    }
                }
            }
            loop {
                let (from, bytes) = replay.read(host.len() as u64, 64);
                prop_assert_eq!(from, host.len() as u64);
                if bytes.concat().is_empty() { break; }
                host.extend(bytes.concat());
            }
            prop_assert_eq!(host, (0..written).map(byte).collect::<Vec<_>>());
            prop_assert_eq!(replay.total(), written as u64);
        }
    }

    #[test]
    fn what_was_never_written_cannot_be_acknowledged() {
        let mut replay = Replay::default();
        replay.push(b"abc");
        assert_eq!(
            replay.ack(4),
            Err(BeyondEnd {
                offset: 4,
                total: 3
            })
        );
        assert_eq!(replay.ack(3), Ok(()));
        assert_eq!(replay.ack(1), Ok(()));
        assert_eq!((replay.start(), replay.len(), replay.total()), (3, 0, 3));
    }

    #[test]
    fn a_reader_behind_the_acknowledged_part_is_moved_up() {
        let mut replay = Replay::default();
        replay.push(b"abcdef");
        replay.ack(4).unwrap();
        assert_eq!(replay.read(1, 10), (4, [b"ef".as_slice(), b""]));
        assert_eq!(replay.read(99, 10), (6, [b"".as_slice(); 2]));
    }
}

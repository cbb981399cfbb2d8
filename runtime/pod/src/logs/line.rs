//! Bytes to log lines, without any I/O.

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

use hull_base::clock;
use memchr::memchr;

/// Longest content of a log line, as in containerd; longer lines are split.
pub(crate) const LINE_MAX: usize = 16 * 1024;

/// Splits the bytes of one output into log lines.
///
/// A line that is longer than [`LINE_MAX`] becomes several with the tag `P` (partial) and one
/// with `F` (full). What comes last without a line end is `P` too: a reader that joins partial
/// lines gets the output byte for byte.
#[derive(Debug)]
pub(crate) struct LineSplitter {
    stream: &'static str,
    /// The start of a line whose end has not come, at most [`LINE_MAX`] bytes.
    pending: Vec<u8>,
}

impl LineSplitter {
    /// `stream` is `stdout` or `stderr`.
    pub(crate) fn new(stream: &'static str) -> Self {
        Self {
            stream,
            pending: Vec::new(),
        }
    }

    /// Appends the log lines that `bytes` complete to `out`, and returns how many bytes of output
    /// they hold: what is not counted is kept for the next call.
    pub(crate) fn push(&mut self, mut bytes: &[u8], at_ns: i64, out: &mut Vec<u8>) -> u64 {
        let head = Head::new(at_ns, self.stream);
        let mut written = 0_u64;
        while !bytes.is_empty() {
            let room = LINE_MAX.saturating_sub(self.pending.len());
            // One byte more than fits may be the line end.
            let window = bytes.get(..=room).unwrap_or(bytes);
            let (tag, length, line_end) = match memchr(b'\n', window) {
                Some(end) => (Tag::Full, end, 1),
                None if window.len() > room => (Tag::Partial, room, 0),
                None => {
                    self.pending.extend_from_slice(bytes);
                    break;
                }
            };
            let (part, rest) = bytes.split_at(length);
            bytes = rest.get(line_end..).unwrap_or_default();
            written = written
                .saturating_add(self.pending_bytes())
                .saturating_add(length as u64)
                .saturating_add(line_end as u64);
            head.write(tag, out);
            out.append(&mut self.pending);
            out.extend_from_slice(part);
            out.push(b'\n');
        }
        written
    }

    /// Appends what is left at the end of the output, and returns its length.
    pub(crate) fn finish(&mut self, at_ns: i64, out: &mut Vec<u8>) -> u64 {
        let written = self.pending_bytes();
        if written > 0 {
            Head::new(at_ns, self.stream).write(Tag::Partial, out);
            out.append(&mut self.pending);
            out.push(b'\n');
        }
        written
    }

    fn pending_bytes(&self) -> u64 {
        self.pending.len() as u64
    }
}

/// Whether a log line has the end of a line of output.
#[derive(Debug, Clone, Copy)]
enum Tag {
    Full,
    Partial,
}

/// What all log lines of one moment begin with.
#[derive(Debug)]
struct Head(String);

impl Head {
    fn new(at_ns: i64, stream: &str) -> Self {
        let mut head = String::with_capacity(48);
        clock::write_rfc3339(at_ns, &mut head);
        head.push(' ');
        head.push_str(stream);
        head.push(' ');
        Self(head)
    }

    fn write(&self, tag: Tag, out: &mut Vec<u8>) {
        out.extend_from_slice(self.0.as_bytes());
        out.extend_from_slice(match tag {
            Tag::Full => b"F ",
            Tag::Partial => b"P ",
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(out: &[u8]) -> Vec<(String, Vec<u8>)> {
        out.split_inclusive(|b| *b == b'\n')
            .map(|line| {
                let line = line.strip_suffix(b"\n").unwrap();
                let mut fields = line.splitn(4, |b| *b == b' ');
                assert_eq!(fields.next().unwrap().len(), 30);
                assert_eq!(fields.next().unwrap(), b"stdout");
                let tag = String::from_utf8(fields.next().unwrap().to_vec()).unwrap();
                (tag, fields.next().unwrap().to_vec())
            })
            .collect()
    }

    fn joined(out: &[u8]) -> Vec<u8> {
        let mut content = Vec::new();
        for (tag, line) in lines(out) {
            content.extend(line);
            if tag == "F" {
                content.push(b'\n');
            }
        }
        content
    }

    fn split(input: &[u8], chunk: usize) -> (Vec<u8>, u64) {
        let mut splitter = LineSplitter::new("stdout");
        let (mut out, mut written) = (Vec::new(), 0);
        for part in input.chunks(chunk.max(1)) {
            written += splitter.push(part, 0, &mut out);
        }
        written += splitter.finish(0, &mut out);
        (out, written)
    }

    #[test]
    fn a_line_is_one_line() {
        let (out, written) = split(b"hello\n\nworld", 3);
        assert_eq!(written, 12);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "1970-01-01T00:00:00.000000000Z stdout F hello\n\
             1970-01-01T00:00:00.000000000Z stdout F \n\
             1970-01-01T00:00:00.000000000Z stdout P world\n"
        );
    }

    #[test]
    fn lines_are_split_at_the_limit_and_not_before() {
        let sizes = |length: usize| {
            let mut input = vec![b'x'; length];
            input.push(b'\n');
            let (out, _) = split(&input, 4096);
            lines(&out)
                .into_iter()
                .map(|(tag, content)| (tag, content.len()))
                .collect::<Vec<_>>()
        };
        assert_eq!(sizes(LINE_MAX), [("F".into(), LINE_MAX)]);
        assert_eq!(
            sizes(LINE_MAX + 1),
            [("P".into(), LINE_MAX), ("F".into(), 1)]
        );
        assert_eq!(
            sizes(2 * LINE_MAX),
            [("P".into(), LINE_MAX), ("F".into(), LINE_MAX)]
        );
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_or_doubled_however_it_comes(
            words in prop::collection::vec(
                prop_oneof![
                    Just(b"\n".to_vec()),
                    prop::collection::vec(any::<u8>(), 0..40),
                    (0_usize..3 * LINE_MAX).prop_map(|n| vec![b'y'; n]),
                ],
                0..12,
            ),
            chunk in 1_usize..40_000,
        ) {
            let input = words.concat();
            let (out, written) = split(&input, chunk);
            prop_assert_eq!(written, input.len() as u64);
            prop_assert_eq!(joined(&out), input);
            prop_assert!(lines(&out).iter().all(|(_, content)| content.len() <= LINE_MAX));
        }

        #[test]
        fn what_is_counted_is_what_is_written(
            input in prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'a')], 0..200),
            at in 0_usize..200,
        ) {
            let at = at.min(input.len());
            let mut splitter = LineSplitter::new("stdout");
            let mut out = Vec::new();
            let written = splitter.push(&input[..at], 0, &mut out) as usize;
            prop_assert_eq!(joined(&out), &input[..written]);
            // Another splitter that begins there completes the output.
            let mut rest = LineSplitter::new("stdout");
            rest.push(&input[written..], 0, &mut out);
            rest.finish(0, &mut out);
            prop_assert_eq!(joined(&out), input);
        }
    }
}

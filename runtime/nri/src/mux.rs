//! One socket that is shared by several connections, each with ttrpc's messages in it.
//!
//! ```text
//! socket:      connection u32 │ length u32 │ bytes          (big endian; NRI's)
//! connection:  length u32 │ stream u32 │ type u8 │ flags u8 │ payload      (ttrpc's)
//! ```
//!
//! A frame may have a part of a message, or several. Those of connections that nobody here has are dropped, as
//! NRI's own multiplexer does.

use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MessageHeader};

/// Connection and length.
const FRAME_HEADER: usize = 8;
/// The most bytes of a frame: a whole message.
const FRAME_MAX: usize = MESSAGE_HEADER_LENGTH + MESSAGE_LENGTH_MAX;
/// NRI's own multiplexer hands a frame to a reader as a whole, which fails if it does not fit where ttrpc reads
/// the beginning of a message to.
const FIRST_FRAME: usize = 4096;

/// What came over the socket can't be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MuxError {
    /// Of a frame.
    #[error("a frame of {0} bytes is longer than a message can be")]
    Frame(usize),
    /// Of a message.
    #[error("a message of {0} bytes is longer than 4 MiB")]
    Message(usize),
}

/// A message of one of the connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) connection: u32,
    pub(crate) header: MessageHeader,
    pub(crate) payload: Vec<u8>,
}

/// Takes the bytes of a socket apart. It keeps a message for each connection at most.
#[derive(Debug)]
pub(crate) struct Parser {
    /// The connections that count, and what came of their next messages.
    partial: Vec<(u32, Vec<u8>)>,
    header: Vec<u8>,
    /// Connection and bytes to come of the frame that has begun.
    frame: Option<(u32, usize)>,
}

impl Parser {
    pub(crate) fn new(connections: impl IntoIterator<Item = u32>) -> Self {
        let partial = connections.into_iter().map(|id| (id, Vec::new())).collect();
        Self {
            partial,
            header: Vec::with_capacity(FRAME_HEADER),
            frame: None,
        }
    }

    /// Takes what came next, and gives the messages that are whole now to `each`.
    ///
    /// # Errors
    /// For lengths that can't be; the socket is of no use then.
    pub(crate) fn feed(
        &mut self,
        mut bytes: &[u8],
        mut each: impl FnMut(Message),
    ) -> Result<(), MuxError> {
        while !bytes.is_empty() {
            let Some((connection, left)) = self.frame else {
                let (head, rest) = split(bytes, FRAME_HEADER - self.header.len());
                self.header.extend_from_slice(head);
                bytes = rest;
                if let &[a, b, c, d, e, f, g, h] = self.header.as_slice() {
                    let length = u32::from_be_bytes([e, f, g, h]) as usize;
                    if length > FRAME_MAX {
                        return Err(MuxError::Frame(length));
                    }
                    self.header.clear();
                    self.frame = Some((u32::from_be_bytes([a, b, c, d]), length));
                    self.end_of_frame();
                }
                continue;
            };
            let (part, rest) = split(bytes, left);
            bytes = rest;
            self.frame = Some((connection, left - part.len()));
            self.end_of_frame();
            let mut known = self.partial.iter_mut();
            if let Some((_, partial)) = known.find(|(id, _)| *id == connection) {
                partial.extend_from_slice(part);
                messages(connection, partial, &mut each)?;
            }
        }
        Ok(())
    }

    fn end_of_frame(&mut self) {
        self.frame = self.frame.filter(|(_, left)| *left > 0);
    }
}

/// Takes the messages that are whole off the beginning.
fn messages(
    connection: u32,
    partial: &mut Vec<u8>,
    each: &mut impl FnMut(Message),
) -> Result<(), MuxError> {
    let mut done = 0;
    while let Some(head) = partial.get(done..done + MESSAGE_HEADER_LENGTH) {
        let header = MessageHeader::from(head);
        let length = header.length as usize;
        if length > MESSAGE_LENGTH_MAX {
            return Err(MuxError::Message(length));
        }
        let begin = done + MESSAGE_HEADER_LENGTH;
        let Some(payload) = partial.get(begin..begin + length) else {
            break;
        };
        each(Message {
            connection,
            header,
            payload: payload.to_vec(),
        });
        done = begin + length;
    }
    partial.drain(..done);
    Ok(())
}

fn split(bytes: &[u8], most: usize) -> (&[u8], &[u8]) {
    bytes.split_at(bytes.len().min(most))
}

/// A message as it goes over the socket.
///
/// # Errors
/// When it is too long.
pub(crate) fn frames(
    connection: u32,
    mut header: MessageHeader,
    payload: &[u8],
) -> Result<Vec<u8>, MuxError> {
    let length = u32::try_from(payload.len()).ok();
    let length = length.filter(|_| payload.len() <= MESSAGE_LENGTH_MAX);
    header.length = length.ok_or(MuxError::Message(payload.len()))?;
    let mut message = Vec::from(header);
    message.extend_from_slice(payload);
    let mut bytes = Vec::with_capacity(message.len() + 2 * FRAME_HEADER);
    let (first, rest) = split(&message, FIRST_FRAME);
    for frame in [first, rest].into_iter().filter(|frame| !frame.is_empty()) {
        bytes.extend_from_slice(&connection.to_be_bytes());
        // A message is shorter than 4 GiB, and so is a part of it.
        let length = u32::try_from(frame.len()).map_err(|_| MuxError::Frame(frame.len()))?;
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(frame);
    }
    Ok(bytes)
}

/// The fuzz target: bytes of a plugin, in pieces. What is whole is encoded again and has to be the same.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let Some((size, bytes)) = input.split_first() else {
        return;
    };
    let all = |size: usize| {
        let (mut parser, mut all) = (Parser::new([1, 2]), Vec::new());
        let mut pieces = bytes.chunks(size);
        let fed = pieces.try_for_each(|piece| parser.feed(piece, |message| all.push(message)));
        (fed, all)
    };
    let (fed, messages) = all(usize::from(*size).max(1));
    let whole = all(usize::MAX);
    assert_eq!((fed, &messages), (whole.0, &whole.1));
    for message in messages {
        let Message {
            connection,
            header,
            payload,
        } = &message;
        let frames = frames(*connection, *header, payload);
        let mut again = Vec::new();
        if let Ok(frames) = frames {
            let fed = Parser::new([1, 2]).feed(&frames, |message| again.push(message));
            assert_eq!(fed, Ok(()));
        }
        assert_eq!(again, [message]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(connection: u32, stream: u32, length: usize) -> Message {
        let header = MessageHeader::new_request(stream, u32::try_from(length).unwrap());
        let payload = (0..length).map(|n| (n % 251) as u8).collect();
        Message {
            connection,
            header,
            payload,
        }
    }

    fn sent(message: &Message) -> Vec<u8> {
        frames(message.connection, message.header, &message.payload).unwrap()
    }

    #[test]
    fn messages_of_two_connections_arrive_whole_in_whatever_pieces() {
        let all = [
            message(1, 1, 0),
            message(2, 1, 5000),
            message(1, 3, 4086),
            message(1, 5, 70_000),
            message(2, 3, 1),
        ];
        let mut bytes: Vec<u8> = all.iter().flat_map(sent).collect();
        // One that nobody has.
        let other = sent(&message(7, 1, 9));
        bytes.splice(0..0, other);
        for size in [1, 7, 4096, bytes.len()] {
            let (mut parser, mut got) = (Parser::new([1, 2]), Vec::new());
            for piece in bytes.chunks(size) {
                parser.feed(piece, |message| got.push(message)).unwrap();
            }
            assert_eq!(got, all, "{size}");
        }
    }

    #[test]
    fn a_message_is_one_frame_that_fits_a_reader_of_4096_bytes_and_one_for_the_rest() {
        let lengths = |length| {
            let (mut bytes, mut lengths) = (sent(&message(1, 1, length)), Vec::new());
            while !bytes.is_empty() {
                let length = u32::from_be_bytes(bytes[4..8].try_into().unwrap()) as usize;
                lengths.push(length);
                bytes.drain(..FRAME_HEADER + length);
            }
            lengths
        };
        assert_eq!(lengths(0), [10]);
        assert_eq!(lengths(4086), [4096]);
        assert_eq!(lengths(4087), [4096, 1]);
        assert_eq!(lengths(MESSAGE_LENGTH_MAX), [4096, FRAME_MAX - 4096]);
        let header = MessageHeader::new_request(1, 0);
        let long = vec![0; MESSAGE_LENGTH_MAX + 1];
        let refused = frames(1, header, &long).unwrap_err();
        assert_eq!(refused, MuxError::Message(MESSAGE_LENGTH_MAX + 1));
    }

    #[test]
    fn lengths_that_can_not_be_are_refused_before_they_are_waited_for() {
        let mut parser = Parser::new([1]);
        let frame = [0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff];
        let refused = parser.feed(&frame, |_| ()).unwrap_err();
        assert_eq!(refused, MuxError::Frame(0xffff_ffff));
        let mut parser = Parser::new([1]);
        let mut bytes = vec![0, 0, 0, 1, 0, 0, 0, 10];
        bytes.extend(Vec::from(MessageHeader::new_request(1, 4 << 20 | 1)));
        let refused = parser.feed(&bytes, |_| ()).unwrap_err();
        assert_eq!(refused, MuxError::Message((4 << 20) + 1));
    }
}

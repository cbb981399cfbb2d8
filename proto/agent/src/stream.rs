//! Byte streams between host and guest, one vsock connection each.
//!
//! The host connects to [`STREAM_PORT`](crate::STREAM_PORT) and sends a frame
//! with a [`StreamHeader`]; the agent answers with a frame that holds a
//! [`StreamReply`]. What follows an `Ok` reply depends on the kind:
//!
//! * `Stdout`, `Stderr`: the agent sends the output from `offset` on in chunks, each a
//!   `u32` length (little endian) and as many bytes. A chunk without bytes is the end of
//!   the output, also while its process lives on, and nothing follows it; a connection
//!   that ends without one was lost. The host sends back `u64` (little endian)
//!   totals of the bytes that it has stored safely; what is not acknowledged is
//!   kept and sent again on the next connection, so nothing is lost or doubled
//!   when the host restarts. A newer connection replaces an older one. An exec that is
//!   to be killed when its streams are lost counts connections, so the host keeps one
//!   whose output has ended.
//! * `Stdin`: the host sends raw bytes and half-closes for end of file. There may be
//!   several connections at a time; what they send is mixed.
//! * `Dial`: raw bytes of both directions are relayed to a TCP port inside the guest.
//! * `Shell`: raw bytes of both directions are those of a shell in the guest itself, which ends with the
//!   connection, and with it all that it started.
//!
//! A frame is a `u32` length (little endian, at most [`MAX_FRAME`]) and JSON.

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

use std::io;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The largest frame, in bytes.
pub const MAX_FRAME: usize = 4096;

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamKind {
    /// Output of a process; the terminal's output when it has one.
    Stdout,
    /// Error output of a process without a terminal.
    Stderr,
    /// Input of a process.
    Stdin,
    /// A connection to `localhost:port` inside the guest.
    Dial {
        /// TCP port; 127.0.0.1 is tried first, then ::1.
        port: u16,
    },
    /// A shell in the guest itself, if its root has one.
    Shell {
        /// Rows and columns of its terminal; none: it has none, and the host half-closes for end of file.
        terminal: Option<(u16, u16)>,
    },
}

/// The first frame of a connection, sent by the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHeader {
    /// What the connection is for.
    pub kind: StreamKind,
    /// The container; ignored for [`StreamKind::Dial`] and [`StreamKind::Shell`].
    #[serde(default)]
    pub container: String,
    /// The exec in it; empty for the container's init.
    #[serde(default)]
    pub exec: String,
    /// The first byte wanted of an output stream: what the host already has.
    #[serde(default)]
    pub offset: u64,
}

/// The agent's answer to a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamReply {
    /// The stream follows, its first byte at this offset (never above the one asked for
    /// unless bytes between were acknowledged before).
    Ok {
        /// Offset of the first byte that follows.
        offset: u64,
    },
    /// No such stream, or it can't be had; the connection ends.
    Error {
        /// Why, for a person.
        message: String,
    },
}

/// Encodes `value` as one frame.
///
/// # Errors
/// `InvalidInput` when it is larger than [`MAX_FRAME`].
pub fn encode<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(value).map_err(io::Error::other)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= MAX_FRAME)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "stream frame too large"))?;
    Ok([&length.to_le_bytes(), body.as_slice()].concat())
}

/// Returns the length of the body that follows a frame's four length bytes.
///
/// # Errors
/// `InvalidData` when it is larger than [`MAX_FRAME`].
pub fn body_length(prefix: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(prefix) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "stream frame too large",
        ));
    }
    Ok(length)
}

/// Decodes the body of a frame.
///
/// # Errors
/// `InvalidData` when it is not the JSON of a `T`.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> io::Result<T> {
    serde_json::from_slice(body).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// The end of an output: a chunk without bytes.
pub const END_OF_OUTPUT: [u8; 4] = [0; 4];

/// Encodes the parts of `bytes` as one chunk of an output; none are its end.
///
/// # Errors
/// `InvalidInput` for more bytes than fit a chunk, 4 GiB.
pub fn encode_chunk(bytes: [&[u8]; 2]) -> io::Result<Vec<u8>> {
    let [head, tail] = bytes;
    let length = u32::try_from(head.len().saturating_add(tail.len()))
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "output chunk too large"))?;
    Ok([&length.to_le_bytes(), head, tail].concat())
}

/// Takes the chunks of an output apart, wherever they are cut when they are read.
#[derive(Debug, Default)]
pub struct ChunkDecoder {
    /// The length of the next chunk, as far as it is known.
    prefix: [u8; 4],
    prefix_length: usize,
    /// Bytes of the chunk that are still to come.
    left: usize,
    has_ended: bool,
}

impl ChunkDecoder {
    /// Moves the output in `read`, which was read next from a connection, to its front;
    /// returns how many bytes of output there are.
    ///
    /// # Errors
    /// `InvalidData` when anything follows the end of the output.
    pub fn decode(&mut self, read: &mut [u8]) -> io::Result<usize> {
        let (mut at, mut output) = (0_usize, 0_usize);
        while let Some(&byte) = read.get(at) {
            if self.has_ended {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "bytes after the end of the output",
                ));
            }
            if self.left > 0 {
                let length = self.left.min(read.len().saturating_sub(at));
                let next = at.saturating_add(length);
                read.copy_within(at..next, output);
                at = next;
                output = output.saturating_add(length);
                self.left = self.left.saturating_sub(length);
                continue;
            }
            at = at.saturating_add(1);
            if let Some(place) = self.prefix.get_mut(self.prefix_length) {
                *place = byte;
            }
            self.prefix_length = self.prefix_length.saturating_add(1);
            if self.prefix_length == self.prefix.len() {
                self.prefix_length = 0;
                self.left = u32::from_le_bytes(self.prefix) as usize;
                self.has_ended = self.prefix == END_OF_OUTPUT;
            }
        }
        Ok(output)
    }

    /// Returns whether the end of the output has come.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `wire` in pieces of `size` bytes.
    fn decoded(wire: &[u8], size: usize) -> io::Result<(Vec<u8>, bool)> {
        let (mut decoder, mut output) = (ChunkDecoder::default(), Vec::new());
        for piece in wire.chunks(size) {
            let mut read = piece.to_vec();
            let length = decoder.decode(&mut read)?;
            output.extend_from_slice(&read[..length]);
        }
        Ok((output, decoder.has_ended()))
    }

    #[test]
    fn output_survives_the_wire_however_it_is_cut() {
        let long = vec![b'x'; 300];
        let chunks = [[b"hello ".as_slice(), b"world"], [&long, b""]];
        let mut wire = chunks.map(|chunk| encode_chunk(chunk).unwrap()).concat();
        let output = [b"hello world".as_slice(), &long].concat();
        for size in 1..=wire.len() {
            assert_eq!(decoded(&wire, size).unwrap(), (output.clone(), false));
        }
        wire.extend(encode_chunk([b"", b""]).unwrap());
        assert_eq!(wire[wire.len() - 4..], END_OF_OUTPUT);
        for size in 1..=wire.len() {
            assert_eq!(decoded(&wire, size).unwrap(), (output.clone(), true));
        }
    }

    #[test]
    fn nothing_follows_the_end_of_output() {
        let end = END_OF_OUTPUT.as_slice();
        for after in [end, b"x", &encode_chunk([b"more", b""]).unwrap()] {
            for size in 1..=8 {
                let error = decoded(&[end, after].concat(), size).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            }
        }
    }

    #[test]
    fn a_header_survives_the_wire() {
        let header = StreamHeader {
            kind: StreamKind::Dial { port: 80 },
            container: String::new(),
            exec: String::new(),
            offset: 7,
        };
        let frame = encode(&header).unwrap();
        let length = body_length(frame[..4].try_into().unwrap()).unwrap();
        assert_eq!(length, frame.len() - 4);
        assert_eq!(decode::<StreamHeader>(&frame[4..]).unwrap(), header);
    }

    #[test]
    fn an_oversized_frame_is_refused_both_ways() {
        assert!(body_length(u32::MAX.to_le_bytes()).is_err());
        assert!(encode(&"x".repeat(MAX_FRAME)).is_err());
    }
}

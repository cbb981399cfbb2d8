//! Byte streams between host and guest, one vsock connection each.
//!
//! The host connects to [`STREAM_PORT`](crate::STREAM_PORT) and sends a frame
//! with a [`StreamHeader`]; the agent answers with a frame that holds a
//! [`StreamReply`]. After an `Ok` reply the connection carries raw bytes:
//!
//! * `Stdout`, `Stderr`: the agent sends bytes from `offset` on and shuts its
//!   side down after the last one. The host sends back `u64` (little endian)
//!   totals of the bytes that it has stored safely; what is not acknowledged is
//!   kept and sent again on the next connection, so nothing is lost or doubled
//!   when the host restarts. A newer connection replaces an older one.
//! * `Stdin`: the host sends bytes and half-closes for end of file. There may be several
//!   connections at a time; what they send is mixed.
//! * `Dial`: both directions are relayed to a TCP port inside the guest.
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
}

/// The first frame of a connection, sent by the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHeader {
    /// What the connection is for.
    pub kind: StreamKind,
    /// The container; ignored for [`StreamKind::Dial`].
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
    /// Bytes follow, the first of them at this offset (never above the one asked for
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

#[cfg(test)]
mod tests {
    use super::*;

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

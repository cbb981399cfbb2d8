//! Bytes to frames.

use bytes::{Buf, Bytes, BytesMut};

use crate::{
    frame::Frame,
    headers::{HeadersError, Inflater},
    wire::{MAX_STREAM, VERSION, flag, kind},
};

/// The largest control frame that is read, bytes after its first eight.
pub const MAX_CONTROL_FRAME: usize = 16 << 10;
/// Bytes of a frame before its content.
const PREFIX: usize = 8;

/// Why bytes are no frames. The connection can't go on.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Another version of the protocol, or no SPDY at all.
    #[error("control frame of version {0}")]
    Version(u16),
    /// A control frame above [`MAX_CONTROL_FRAME`].
    #[error("control frame of {0} bytes")]
    TooLarge(usize),
    /// A control frame whose length does not fit its type.
    #[error("control frame of type {kind} with {length} bytes")]
    Malformed {
        /// Its type.
        kind: u16,
        /// Its length.
        length: usize,
    },
    /// Its headers.
    #[error("control frame of type {kind}")]
    Headers {
        /// Its type.
        kind: u16,
        /// What is wrong.
        source: HeadersError,
    },
}

/// Reads the frames of one direction of a connection.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    state: State,
    headers: Inflater,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// Before a frame.
    Between,
    /// In a data frame, so many bytes before its end.
    Data { stream: u32, left: usize, fin: bool },
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder for a new connection.
    #[must_use]
    pub fn new() -> Self {
        Self {
            buffer: BytesMut::new(),
            state: State::Between,
            headers: Inflater::new(),
        }
    }

    /// Where to append what was read.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next frame, when there is one in the buffer.
    ///
    /// # Errors
    /// When this is not SPDY, or too large. The decoder can't be used any more then.
    pub fn frame(&mut self) -> Result<Option<Frame>, DecodeError> {
        loop {
            if let State::Data { stream, left, fin } = self.state {
                return Ok(self.data(stream, left, fin));
            }
            let Some((first, second)) = self.prefix() else {
                return Ok(None);
            };
            let flags = (second >> 24) as u8;
            let length = (second & 0x00ff_ffff) as usize;
            if first >> 31 == 0 {
                self.buffer.advance(PREFIX);
                self.state = State::Data {
                    stream: first,
                    left: length,
                    fin: flags & flag::FIN != 0,
                };
                if length == 0 {
                    return Ok(self.data_end());
                }
                continue;
            }
            let (version, kind) = ((first >> 16) as u16 & 0x7fff, first as u16);
            if version != VERSION {
                return Err(DecodeError::Version(version));
            }
            if length > MAX_CONTROL_FRAME {
                return Err(DecodeError::TooLarge(length));
            }
            if self.buffer.len() < PREFIX + length {
                return Ok(None);
            }
            self.buffer.advance(PREFIX);
            let content = self.buffer.split_to(length);
            // Types that are not known are skipped, as the specification asks.
            if let Some(frame) = self.control(kind, flags, &content)? {
                return Ok(Some(frame));
            }
        }
    }

    fn prefix(&self) -> Option<(u32, u32)> {
        let prefix: &[u8; PREFIX] = self.buffer.first_chunk()?;
        let mut prefix = prefix.as_slice();
        Some((prefix.get_u32(), prefix.get_u32()))
    }

    /// What is there of a data frame.
    fn data(&mut self, stream: u32, left: usize, fin: bool) -> Option<Frame> {
        if self.buffer.is_empty() {
            return None;
        }
        let length = left.min(self.buffer.len());
        // Copied, so that a few bytes that wait don't keep the whole buffer.
        let payload = Bytes::copy_from_slice(&self.buffer[..length]);
        self.buffer.advance(length);
        let left = left - length;
        self.state = match left {
            0 => State::Between,
            left => State::Data { stream, left, fin },
        };
        Some(Frame::Data {
            stream,
            payload,
            fin: fin && left == 0,
        })
    }

    /// A data frame without bytes.
    fn data_end(&mut self) -> Option<Frame> {
        let State::Data { stream, fin, .. } = self.state else {
            return None;
        };
        self.state = State::Between;
        Some(Frame::Data {
            stream,
            payload: Bytes::new(),
            fin,
        })
    }

    fn control(
        &mut self,
        kind: u16,
        flags: u8,
        content: &[u8],
    ) -> Result<Option<Frame>, DecodeError> {
        let length = content.len();
        let malformed = DecodeError::Malformed { kind, length };
        let fin = flags & flag::FIN != 0;
        let needed = match kind {
            kind::SYN_STREAM => 10,
            kind::SYN_REPLY | kind::HEADERS | kind::PING => 4,
            kind::RST_STREAM | kind::GOAWAY | kind::WINDOW_UPDATE => 8,
            _ => 0,
        };
        let Some((mut fixed, block)) = content.split_at_checked(needed) else {
            return Err(malformed);
        };
        let has_block = matches!(kind, kind::SYN_STREAM | kind::SYN_REPLY | kind::HEADERS);
        if needed > 0 && !has_block && !block.is_empty() {
            return Err(malformed);
        }
        let mut headers = || {
            let headers = self.headers.decompress(block);
            headers.map_err(|source| DecodeError::Headers { kind, source })
        };
        Ok(Some(match kind {
            kind::SYN_STREAM => Frame::SynStream {
                stream: fixed.get_u32() & MAX_STREAM,
                associated: fixed.get_u32() & MAX_STREAM,
                priority: fixed.get_u8() >> 5,
                headers: headers()?,
                fin,
                unidirectional: flags & flag::UNIDIRECTIONAL != 0,
            },
            kind::SYN_REPLY => Frame::SynReply {
                stream: fixed.get_u32() & MAX_STREAM,
                headers: headers()?,
                fin,
            },
            kind::HEADERS => Frame::Headers {
                stream: fixed.get_u32() & MAX_STREAM,
                headers: headers()?,
                fin,
            },
            kind::RST_STREAM => Frame::RstStream {
                stream: fixed.get_u32() & MAX_STREAM,
                status: fixed.get_u32(),
            },
            kind::SETTINGS => Frame::Settings,
            kind::PING => Frame::Ping(fixed.get_u32()),
            kind::GOAWAY => Frame::GoAway {
                last_stream: fixed.get_u32() & MAX_STREAM,
                status: fixed.get_u32(),
            },
            kind::WINDOW_UPDATE => Frame::WindowUpdate {
                stream: fixed.get_u32() & MAX_STREAM,
                delta: fixed.get_u32() & MAX_STREAM,
            },
            _ => return Ok(None),
        }))
    }
}

//! Frames to bytes.

use bytes::{BufMut, BytesMut};

use crate::{
    frame::{Frame, Headers},
    headers::Deflater,
    wire::{MAX_DATA, MAX_STREAM, VERSION, flag, kind},
};

/// Why a frame can't be written.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The compressor failed.
    #[error("compress a header block")]
    Deflate(#[from] flate2::CompressError),
    /// The frame does not fit into the format.
    #[error("frame has a payload of {0} bytes or a stream id that is too large")]
    TooLarge(usize),
}

/// Writes the frames of one direction of a connection.
#[derive(Debug)]
pub struct Encoder {
    headers: Deflater,
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Encoder {
    /// An encoder for a new connection.
    #[must_use]
    pub fn new() -> Self {
        Self {
            headers: Deflater::new(),
        }
    }

    /// Appends a frame to `out`.
    ///
    /// # Errors
    /// When it is too large for the format; the encoder can't be used any more then.
    pub fn encode(&mut self, frame: &Frame, out: &mut BytesMut) -> Result<(), EncodeError> {
        match frame {
            Frame::SynStream {
                stream,
                associated,
                priority,
                headers,
                fin,
                unidirectional,
            } => {
                let block = self.headers.compress(headers)?;
                let one_way = if *unidirectional {
                    flag::UNIDIRECTIONAL
                } else {
                    0
                };
                let flags = fin_flag(*fin) | one_way;
                control(out, kind::SYN_STREAM, flags, 10 + block.len())?;
                put_stream(out, *stream)?;
                put_stream(out, *associated)?;
                out.put_u8(priority << 5);
                out.put_u8(0);
                out.put_slice(&block);
            }
            Frame::SynReply {
                stream,
                headers,
                fin,
            } => self.with_headers(kind::SYN_REPLY, *stream, headers, *fin, out)?,
            Frame::Headers {
                stream,
                headers,
                fin,
            } => self.with_headers(kind::HEADERS, *stream, headers, *fin, out)?,
            Frame::RstStream { stream, status } => {
                control(out, kind::RST_STREAM, 0, 8)?;
                put_stream(out, *stream)?;
                out.put_u32(*status);
            }
            Frame::Settings => {
                control(out, kind::SETTINGS, 0, 4)?;
                out.put_u32(0);
            }
            Frame::Ping(id) => {
                control(out, kind::PING, 0, 4)?;
                out.put_u32(*id);
            }
            Frame::GoAway {
                last_stream,
                status,
            } => {
                control(out, kind::GOAWAY, 0, 8)?;
                put_stream(out, *last_stream)?;
                out.put_u32(*status);
            }
            Frame::WindowUpdate { stream, delta } => {
                control(out, kind::WINDOW_UPDATE, 0, 8)?;
                put_stream(out, *stream)?;
                put_stream(out, *delta)?;
            }
            Frame::Data {
                stream,
                payload,
                fin,
            } => {
                put_stream(out, *stream)?;
                put_flags_and_length(out, fin_flag(*fin), payload.len())?;
                out.put_slice(payload);
            }
        }
        Ok(())
    }

    fn with_headers(
        &mut self,
        kind: u16,
        stream: u32,
        headers: &Headers,
        fin: bool,
        out: &mut BytesMut,
    ) -> Result<(), EncodeError> {
        let block = self.headers.compress(headers)?;
        control(out, kind, fin_flag(fin), 4 + block.len())?;
        put_stream(out, stream)?;
        out.put_slice(&block);
        Ok(())
    }
}

fn fin_flag(fin: bool) -> u8 {
    if fin { flag::FIN } else { 0 }
}

fn control(out: &mut BytesMut, kind: u16, flags: u8, length: usize) -> Result<(), EncodeError> {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    put_flags_and_length(out, flags, length)
}

fn put_flags_and_length(out: &mut BytesMut, flags: u8, length: usize) -> Result<(), EncodeError> {
    let word = u32::try_from(length)
        .ok()
        .filter(|_| length <= MAX_DATA)
        .ok_or(EncodeError::TooLarge(length))?;
    out.put_u32(u32::from(flags) << 24 | word);
    Ok(())
}

fn put_stream(out: &mut BytesMut, stream: u32) -> Result<(), EncodeError> {
    if stream > MAX_STREAM {
        return Err(EncodeError::TooLarge(0));
    }
    out.put_u32(stream);
    Ok(())
}

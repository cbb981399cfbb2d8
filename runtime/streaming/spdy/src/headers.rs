//! Header blocks: a count, then names and values, each with its length before it; compressed by
//! one zlib stream per direction, which is flushed after each block.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use crate::{
    dictionary::{ADLER32, DICTIONARY},
    frame::Headers,
};

/// The largest header block, uncompressed bytes: it fits into a control frame however it is packed.
pub const MAX_HEADER_BLOCK: usize = 15 << 10;
/// How much room a compressor gets at a time.
const STEP: usize = 1024;
/// The most names in a block.
const MAX_NAMES: usize = 256;

/// Why a header block can't be read.
#[derive(Debug, thiserror::Error)]
pub enum HeadersError {
    /// The zlib stream is broken.
    #[error("decompress a header block")]
    Inflate(#[source] flate2::DecompressError),
    /// The zlib stream ended, or wants another dictionary.
    #[error("header block: {0}")]
    Stream(&'static str),
    /// It is larger than [`MAX_HEADER_BLOCK`], or has too many names.
    #[error("header block is too large")]
    TooLarge,
    /// Lengths and content don't fit, or a text is not UTF-8.
    #[error("header block is malformed")]
    Malformed,
}

/// Compresses the header blocks of one direction.
#[derive(Debug)]
pub(crate) struct Deflater(Compress);

impl Deflater {
    pub(crate) fn new() -> Self {
        Self(Compress::new(Compression::default(), true))
    }

    /// Gives the dictionary to a stream that has not begun.
    fn begin(&mut self) -> Result<(), flate2::CompressError> {
        if self.0.total_in() == 0 {
            self.0.set_dictionary(&DICTIONARY)?;
        }
        Ok(())
    }

    pub(crate) fn compress(&mut self, headers: &Headers) -> Result<Vec<u8>, flate2::CompressError> {
        self.begin()?;
        let plain = write(headers);
        let mut out = Vec::with_capacity(STEP);
        let start = self.0.total_in();
        loop {
            let done = usize::try_from(self.0.total_in() - start).unwrap_or(plain.len());
            let rest = plain.get(done..).unwrap_or_default();
            self.0.compress_vec(rest, &mut out, FlushCompress::Sync)?;
            // Room left over: all is flushed.
            if out.len() < out.capacity() {
                return Ok(out);
            }
            out.reserve(STEP);
        }
    }
}

/// Decompresses the header blocks of one direction.
#[derive(Debug)]
pub(crate) struct Inflater(Decompress);

impl Inflater {
    pub(crate) fn new() -> Self {
        Self(Decompress::new(true))
    }

    pub(crate) fn decompress(&mut self, block: &[u8]) -> Result<Headers, HeadersError> {
        let mut plain = Vec::with_capacity(STEP);
        let start = self.0.total_in();
        loop {
            let done = usize::try_from(self.0.total_in() - start).unwrap_or(block.len());
            let rest = block.get(done..).unwrap_or_default();
            let result = self
                .0
                .decompress_vec(rest, &mut plain, FlushDecompress::Sync);
            match result {
                Ok(Status::StreamEnd) => return Err(HeadersError::Stream("zlib stream ended")),
                Ok(_) => {}
                Err(error) => match error.needs_dictionary() {
                    Some(ADLER32) => {
                        self.0
                            .set_dictionary(&DICTIONARY)
                            .map_err(HeadersError::Inflate)?;
                        continue;
                    }
                    Some(_) => return Err(HeadersError::Stream("unknown dictionary")),
                    None => return Err(HeadersError::Inflate(error)),
                },
            }
            if plain.len() > MAX_HEADER_BLOCK {
                return Err(HeadersError::TooLarge);
            }
            // Room left over: all input is used up.
            if plain.len() < plain.capacity() {
                return read(&plain);
            }
            plain.reserve(STEP);
        }
    }
}

fn write(headers: &Headers) -> Vec<u8> {
    let mut plain = Vec::new();
    let number = |plain: &mut Vec<u8>, n: usize| {
        // Bounded by the frame that it goes into.
        plain.extend(u32::try_from(n).unwrap_or(u32::MAX).to_be_bytes());
    };
    number(&mut plain, headers.0.len());
    for text in headers.0.iter().flat_map(|(name, value)| [name, value]) {
        number(&mut plain, text.len());
        plain.extend(text.as_bytes());
    }
    plain
}

fn read(mut plain: &[u8]) -> Result<Headers, HeadersError> {
    let count = number(&mut plain)?;
    if count > MAX_NAMES {
        return Err(HeadersError::TooLarge);
    }
    let mut headers = Headers::default();
    for _ in 0..count {
        let name = text(&mut plain)?;
        let value = text(&mut plain)?;
        headers.0.push((name, value));
    }
    if !plain.is_empty() {
        return Err(HeadersError::Malformed);
    }
    Ok(headers)
}

fn number(plain: &mut &[u8]) -> Result<usize, HeadersError> {
    let (bytes, rest) = plain.split_first_chunk().ok_or(HeadersError::Malformed)?;
    *plain = rest;
    usize::try_from(u32::from_be_bytes(*bytes)).map_err(|_| HeadersError::Malformed)
}

fn text(plain: &mut &[u8]) -> Result<String, HeadersError> {
    let length = number(plain)?;
    let (bytes, rest) = plain
        .split_at_checked(length)
        .ok_or(HeadersError::Malformed)?;
    *plain = rest;
    String::from_utf8(bytes.to_vec()).map_err(|_| HeadersError::Malformed)
}

//! Bytes on their way from the registry into the unpacker: counted and hashed, and decompressed.

use std::io::{self, BufReader, Read};

use bytes::Bytes;

use crate::digest::{Digest, Hasher};

/// Bytes that go from one stage to the next at a time.
pub(crate) const BUFFER: usize = 128 << 10;

/// Largest window of a zstd stream, as a power of two: 32 MiB, what the strongest level of the
/// compressor in Go's image tools needs. The stream says itself what memory it wants, and the
/// library would give it 128 MiB.
const ZSTD_WINDOW_LOG: u32 = 25;

/// What goes through the channel that a layer comes by; an end without [`Chunk::End`] is an error.
#[derive(Debug)]
pub(crate) enum Chunk {
    Data(Bytes),
    End,
}

/// Hashes and counts what is read, and stops a stream that is longer than allowed.
#[derive(Debug)]
pub(crate) struct HashReader<R> {
    inner: R,
    hasher: Hasher,
    count: u64,
    limit: u64,
}

impl<R: Read> HashReader<R> {
    pub(crate) fn new(inner: R, hasher: Hasher, limit: u64) -> Self {
        Self {
            inner,
            hasher,
            count: 0,
            limit,
        }
    }

    /// Reads to the end of the stream and tells the digest and length of all of it.
    pub(crate) fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((self.hasher.finish(), self.count))
    }
}

impl<R: Read> Read for HashReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count += count as u64;
        if self.count > self.limit {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "stream is longer than its limit",
            ));
        }
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

/// Bytes at the start of a stream that tell how it is compressed.
pub(crate) const MARK: usize = 4;

/// How a layer is compressed: told by its first bytes, as media types of old images lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    pub(crate) fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, 0x08, ..] => Self::Gzip,
            // A zstd frame, or a skippable frame that goes before one.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// A plain tar stream out of a possibly compressed one. `source` stays the caller's, so that its
/// digest can be taken afterwards.
pub(crate) fn decompress<'a>(mut source: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = Vec::with_capacity(MARK);
    (&mut source).take(MARK as u64).read_to_end(&mut start)?;
    let compression = Compression::detect(&start);
    let source = BufReader::with_capacity(BUFFER, Read::chain(io::Cursor::new(start), source));
    Ok(match compression {
        Compression::None => Box::new(source),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(source)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_does_not_say_what_memory_it_gets() {
        let stream = |window: u32| {
            let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(window).unwrap();
            io::Write::write_all(&mut encoder, b"abc").unwrap();
            io::Write::flush(&mut encoder).unwrap();
            encoder.finish().unwrap()
        };
        let mut out = Vec::new();
        let read = |stream: Vec<u8>, out: &mut Vec<u8>| {
            decompress(io::Cursor::new(stream))
                .unwrap()
                .read_to_end(out)
        };
        read(stream(25), &mut out).unwrap();
        assert_eq!(out, b"abc");
        read(stream(26), &mut out).unwrap_err();
    }

    #[test]
    fn hashing_stops_at_the_limit() {
        let reader = HashReader::new(&b"abcdef"[..], Digest::of(b"").hasher(), 6);
        assert_eq!(reader.finish().unwrap(), (Digest::of(b"abcdef"), 6));
        let reader = HashReader::new(&b"abcdef"[..], Digest::of(b"").hasher(), 5);
        assert!(reader.finish().is_err());
    }
}

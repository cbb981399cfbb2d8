//! How to make a layer's tar stream again, byte by byte: the layer's file `recipe`.
//!
//! Registries' blobs are not kept, as they would take as much room as the unpacked layers. An
//! export has to hand out layers with the digests that the image's configuration names all the
//! same, and an archive that is packed anew never has them. So what a stream has besides file
//! contents is written down while it passes: headers and padding, which compress well.
//!
//! A recipe is the mark, the version, the length of the stream, and in zstd the steps: bytes to
//! take from the recipe, or a piece of the layer's file `data`.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use super::source::BUFFER;

const MARK: &[u8; 8] = b"HULLRECP";
const VERSION: u32 = 1;
/// Where the length stands.
const LENGTH_AT: u64 = 12;
/// Most bytes of a step that brings its own.
const LONGEST_LITERAL: usize = 64 << 10;

const LITERAL: u8 = 0;
const CONTENT: u8 = 1;
const END: u8 = 2;

/// Passes a stream on and writes its recipe.
///
/// A recipe that cannot be written is told by [`Recorder::finish`], not by reading, so that the
/// stream's own failures are told apart from the store's.
pub(crate) struct Recorder<R> {
    inner: R,
    out: zstd::Encoder<'static, BufWriter<File>>,
    literal: Vec<u8>,
    /// Bytes to come that are in the layer's data.
    content: u64,
    length: u64,
    failure: Option<io::Error>,
}

impl<R: Read> Recorder<R> {
    pub(super) fn new(inner: R, mut file: File) -> io::Result<Self> {
        file.write_all(MARK)?;
        file.write_all(&VERSION.to_le_bytes())?;
        file.write_all(&0u64.to_le_bytes())?;
        let mut out = zstd::Encoder::new(BufWriter::with_capacity(BUFFER, file), 1)?;
        out.include_checksum(true)?;
        Ok(Self {
            inner,
            out,
            literal: Vec::with_capacity(LONGEST_LITERAL),
            content: 0,
            length: 0,
            failure: None,
        })
    }

    /// The next `length` bytes of the stream are those from `position` on in the layer's data.
    pub(super) fn content(&mut self, position: u64, length: u64) {
        self.content += length;
        self.flush_literal();
        self.write(&[CONTENT]);
        self.write(&position.to_le_bytes());
        self.write(&length.to_le_bytes());
    }

    /// Completes the recipe; the stream is at its end.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.flush_literal();
        self.write(&[END]);
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let mut file = self
            .out
            .finish()?
            .into_inner()
            .map_err(|e| e.into_error())?;
        file.seek(SeekFrom::Start(LENGTH_AT))?;
        file.write_all(&self.length.to_le_bytes())
    }

    fn record(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        let content = usize::try_from(self.content)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        self.content -= content as u64;
        let mut rest = &bytes[content..];
        while !rest.is_empty() {
            let room = LONGEST_LITERAL - self.literal.len();
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.literal.extend_from_slice(now);
            rest = later;
            if self.literal.len() == LONGEST_LITERAL {
                self.flush_literal();
            }
        }
    }

    fn flush_literal(&mut self) {
        if self.literal.is_empty() {
            return;
        }
        let literal = std::mem::take(&mut self.literal);
        self.write(&[LITERAL]);
        self.write(&(literal.len() as u32).to_le_bytes());
        self.write(&literal);
        self.literal = literal;
        self.literal.clear();
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.failure.is_none() {
            self.failure = self.out.write_all(bytes).err();
        }
    }
}

impl<R: Read> Read for Recorder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.record(&buffer[..count]);
        Ok(count)
    }
}

/// The tar stream of a layer, made again.
pub(crate) struct Remade {
    steps: zstd::Decoder<'static, BufReader<File>>,
    data: File,
    step: Step,
}

/// Bytes of the whole stream, as a recipe says at its start.
pub(crate) fn announced_length(recipe: &mut impl Read) -> io::Result<u64> {
    let mut head = [0; 20];
    recipe.read_exact(&mut head)?;
    let (mark, rest) = head.split_at(MARK.len());
    let (version, length) = rest.split_at(4);
    if mark != MARK || version != VERSION.to_le_bytes() {
        return Err(damaged());
    }
    let length = length.try_into().map_err(|_| damaged())?;
    Ok(u64::from_le_bytes(length))
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Literal { left: u64 },
    Content { position: u64, left: u64 },
    End,
}

impl Remade {
    /// Whether the stream is the layer's shows in its digest.
    pub(crate) fn new(mut recipe: File, data: File) -> io::Result<Self> {
        announced_length(&mut recipe)?;
        Ok(Self {
            steps: zstd::Decoder::with_buffer(BufReader::with_capacity(BUFFER, recipe))?,
            data,
            step: Step::Literal { left: 0 },
        })
    }

    fn next_step(&mut self) -> io::Result<Step> {
        let mut kind = [0];
        self.steps.read_exact(&mut kind)?;
        match kind[0] {
            LITERAL => {
                let mut left = [0; 4];
                self.steps.read_exact(&mut left)?;
                let left = u32::from_le_bytes(left).into();
                Ok(Step::Literal { left })
            }
            CONTENT => Ok(Step::Content {
                position: self.number()?,
                left: self.number()?,
            }),
            // The checksum is looked at only when the end is read.
            END if self.steps.read(&mut [0])? == 0 => Ok(Step::End),
            _ => Err(damaged()),
        }
    }

    fn number(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.steps.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

impl Read for Remade {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len();
        let most = |left: u64| usize::try_from(left).unwrap_or(usize::MAX).min(room);
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let count = match &mut self.step {
                Step::End => return Ok(0),
                Step::Literal { left: 0 } | Step::Content { left: 0, .. } => {
                    self.step = self.next_step()?;
                    continue;
                }
                Step::Literal { left } => {
                    let count = self.steps.read(&mut buffer[..most(*left)])?;
                    *left -= count as u64;
                    count
                }
                Step::Content { position, left } => {
                    let count = self.data.read_at(&mut buffer[..most(*left)], *position)?;
                    *position += count as u64;
                    *left -= count as u64;
                    count
                }
            };
            return if count == 0 {
                Err(damaged())
            } else {
                Ok(count)
            };
        }
    }
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "layer recipe is damaged")
}

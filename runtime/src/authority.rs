//! Clients that put the socket's path into `:authority`.
//!
//! gRPC in C++, Python, Java and Swift does, and Go programs that dial by path; the servers of containerd and CRI-O take
//! what comes there. The HTTP/2 below tonic does not: a `:authority` that is none of a URI (RFC 3986, section 3.2) is a
//! stream error for it. So the first block of headers of a connection is looked at. A connection with a usual one is
//! passed on as it is from there. With another one, all of its blocks are written anew with `localhost`, without
//! compression, so that nobody has to know what the server's table of headers (RFC 7541, section 2.3.2) has.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BufMut, BytesMut};
use http::uri::Authority;
use loona_hpack::Decoder;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADER: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// What a priority takes at the begin of a frame.
const PRIORITY_BYTES: usize = 5;
/// The largest frame that the server takes, in bytes (RFC 9113, section 4.2).
const MAX_FRAME: usize = 16 << 10;
/// The largest block of headers, compressed or not, in bytes.
const MAX_BLOCK: usize = 64 << 10;
/// The server's table, as it announces none (RFC 9113, section 6.5.2).
const TABLE: usize = 4096;
const READ: usize = 16 << 10;

/// A connection whose `:authority` is what the server takes.
#[derive(Debug)]
pub(crate) struct WithAuthority<S> {
    stream: S,
    filter: Filter,
    /// What came and was not looked at yet.
    input: BytesMut,
    /// What the server is to have next.
    output: BytesMut,
}

impl<S> WithAuthority<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            filter: Filter::new(),
            input: BytesMut::new(),
            output: BytesMut::new(),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WithAuthority<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.output.is_empty() {
                let length = this.output.len().min(to.remaining());
                to.put_slice(&this.output.split_to(length));
                return Poll::Ready(Ok(()));
            }
            if this.filter.passes() {
                return Pin::new(&mut this.stream).poll_read(context, to);
            }
            let mut piece = [0; READ];
            let mut piece = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut piece))?;
            if piece.filled().is_empty() {
                // The server knows best what to say of half a frame.
                this.filter.stage = Stage::Plain;
            }
            this.input.extend_from_slice(piece.filled());
            this.filter.advance(&mut this.input, &mut this.output)?;
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WithAuthority<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl<S: Connected> Connected for WithAuthority<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

/// What is done with bytes of a client.
struct Filter {
    stage: Stage,
    /// The client's table of headers.
    decoder: Decoder<'static>,
    /// Whether blocks are written anew.
    rewrites: bool,
}

/// Name and value.
type Field = (Vec<u8>, Vec<u8>);

/// What comes next.
#[derive(Debug)]
enum Stage {
    Preface,
    Frame,
    /// So many bytes of a frame without headers.
    Payload(usize),
    /// Anything, which is passed on as it is.
    Plain,
}

/// A block of headers.
#[derive(Debug)]
struct Block {
    stream: u32,
    /// The first frame's, without those of what is not kept.
    flags: u8,
    fragments: Vec<u8>,
    /// Its frames' bytes, with their heads.
    length: usize,
}

#[derive(Debug, Clone, Copy)]
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Head {
    /// Of the frame at the begin of bytes, if all of it is there.
    fn read(mut bytes: &[u8]) -> Option<Self> {
        if bytes.len() < HEADER {
            return None;
        }
        Some(Self {
            length: usize::try_from(bytes.get_uint(3)).ok()?,
            kind: bytes.get_u8(),
            flags: bytes.get_u8(),
            stream: bytes.get_u32(),
        })
    }

    fn write(self, to: &mut BytesMut) {
        to.put_uint(self.length as u64, 3);
        to.put_u8(self.kind);
        to.put_u8(self.flags);
        to.put_u32(self.stream);
    }
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = formatter.debug_struct("Filter");
        shown.field("stage", &self.stage);
        shown.field("rewrites", &self.rewrites);
        shown.finish_non_exhaustive()
    }
}

impl Filter {
    fn new() -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE);
        Self {
            stage: Stage::Preface,
            decoder,
            rewrites: false,
        }
    }

    /// Whether nothing is looked at any more.
    fn passes(&self) -> bool {
        matches!(self.stage, Stage::Plain)
    }

    /// Moves what is understood of the input to the output.
    ///
    /// # Errors
    /// `InvalidData`, when a client whose blocks are written anew sends what is no block.
    fn advance(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> io::Result<()> {
        loop {
            match self.stage {
                Stage::Preface => {
                    let length = input.len().min(PREFACE.len());
                    if input[..length] != PREFACE[..length] {
                        self.stage = Stage::Plain;
                    } else if length < PREFACE.len() {
                        return Ok(());
                    } else {
                        output.unsplit(input.split_to(length));
                        self.stage = Stage::Frame;
                    }
                }
                Stage::Frame => {
                    let Some(head) = Head::read(input) else {
                        return Ok(());
                    };
                    if head.kind != HEADERS {
                        self.stage = Stage::Payload(HEADER.saturating_add(head.length));
                        continue;
                    }
                    match Block::read(input) {
                        Ok(Some(block)) => self.block(&block, input, output)?,
                        Ok(None) => return Ok(()),
                        Err(why) => self.give_up(why)?,
                    }
                }
                Stage::Payload(left) => {
                    let length = left.min(input.len());
                    output.unsplit(input.split_to(length));
                    if length < left {
                        self.stage = Stage::Payload(left.saturating_sub(length));
                        return Ok(());
                    }
                    self.stage = Stage::Frame;
                }
                Stage::Plain => {
                    output.unsplit(input.split());
                    return Ok(());
                }
            }
        }
    }

    /// Decides by the first block, and writes it and all others anew if need be.
    fn block(
        &mut self,
        block: &Block,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> io::Result<()> {
        let fields = match self.fields(&block.fragments) {
            Ok(fields) => fields,
            Err(why) => return self.give_up(why),
        };
        self.rewrites |= fields
            .iter()
            .any(|(name, value)| name == b":authority" && Authority::try_from(&value[..]).is_err());
        if !self.rewrites {
            self.stage = Stage::Plain;
            return Ok(());
        }
        input.advance(block.length);
        block.write(&fields, output);
        Ok(())
    }

    /// The server says what is wrong, if it has all that the client sent.
    fn give_up(&mut self, why: &'static str) -> io::Result<()> {
        if self.rewrites {
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        self.stage = Stage::Plain;
        Ok(())
    }

    fn fields(&mut self, block: &[u8]) -> Result<Vec<Field>, &'static str> {
        let mut fields = Vec::new();
        let mut length = 0_usize;
        let decoded = self.decoder.decode_with_cb(block, |name, value| {
            // One byte may stand for all that the table has.
            length = length.saturating_add(name.len() + value.len());
            if length <= MAX_BLOCK {
                fields.push((name.into_owned(), value.into_owned()));
            }
        });
        if decoded.is_err() {
            return Err("a block of headers that can't be decoded");
        }
        if length > MAX_BLOCK {
            return Err("a block of headers that is too large");
        }
        Ok(fields)
    }
}

impl Block {
    /// The block at the begin of bytes; none: it is not all there yet.
    fn read(bytes: &[u8]) -> Result<Option<Self>, &'static str> {
        let mut block: Option<Self> = None;
        let mut rest = bytes;
        loop {
            let Some(head) = Head::read(rest) else {
                return Ok(None);
            };
            if head.length > MAX_FRAME {
                return Err("a frame that is too large");
            }
            let Some(payload) = rest.get(HEADER..HEADER + head.length) else {
                return Ok(None);
            };
            let block = match &mut block {
                None => block.insert(Self {
                    stream: head.stream,
                    flags: head.flags & !(PADDED | PRIORITY | END_HEADERS),
                    fragments: fragment(head, payload)
                        .ok_or("a frame with wrong lengths")?
                        .to_vec(),
                    length: 0,
                }),
                Some(block) if head.kind == CONTINUATION && head.stream == block.stream => {
                    block.fragments.extend_from_slice(payload);
                    block
                }
                Some(_) => return Err("another frame within a block of headers"),
            };
            block.length += HEADER + payload.len();
            if block.length > MAX_BLOCK {
                return Err("a block of headers that is too large");
            }
            if head.flags & END_HEADERS != 0 {
                break;
            }
            rest = &rest[HEADER + payload.len()..];
        }
        Ok(block)
    }

    /// Writes it with these fields, and with an authority that the server takes.
    fn write(&self, fields: &[Field], to: &mut BytesMut) {
        let mut block = BytesMut::new();
        for (name, value) in fields {
            let value: &[u8] = if name == b":authority" {
                b"localhost"
            } else {
                value
            };
            // A literal field that is not indexed, with a new name (RFC 7541, section 6.2.2).
            block.put_u8(0);
            for text in [name, value] {
                write_length(text.len(), &mut block);
                block.put_slice(text);
            }
        }
        let mut kind = HEADERS;
        let mut flags = self.flags;
        loop {
            let piece = block.split_to(block.len().min(MAX_FRAME));
            if block.is_empty() {
                flags |= END_HEADERS;
            }
            let head = Head {
                length: piece.len(),
                kind,
                flags,
                stream: self.stream,
            };
            head.write(to);
            to.put_slice(&piece);
            if block.is_empty() {
                return;
            }
            (kind, flags) = (CONTINUATION, 0);
        }
    }
}

/// What a frame has of the block of headers, without padding and priority.
fn fragment(head: Head, payload: &[u8]) -> Option<&[u8]> {
    let mut rest = payload;
    if head.flags & PADDED != 0 {
        let (padding, after) = rest.split_first()?;
        rest = after.get(..after.len().checked_sub(usize::from(*padding))?)?;
    }
    if head.flags & PRIORITY != 0 {
        rest = rest.get(PRIORITY_BYTES..)?;
    }
    Some(rest)
}

/// A length with a prefix of seven bits (RFC 7541, section 5.1).
fn write_length(length: usize, to: &mut BytesMut) {
    const PREFIX: usize = 0x7f;
    let Some(mut rest) = length.checked_sub(PREFIX) else {
        to.put_u8(length as u8);
        return;
    };
    to.put_u8(PREFIX as u8);
    while rest >= 0x80 {
        to.put_u8((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    to.put_u8(rest as u8);
}

/// Fuzz target: bytes of a client in pieces, whose lengths the first byte tells.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Some((piece, rest)) = bytes.split_first() else {
        return;
    };
    let mut filter = Filter::new();
    let (mut input, mut output) = (BytesMut::from(PREFACE), BytesMut::new());
    for piece in rest.chunks(usize::from(*piece).max(1)) {
        input.extend_from_slice(piece);
        if filter.advance(&mut input, &mut output).is_err() {
            return;
        }
        assert!(input.len() <= MAX_BLOCK + MAX_FRAME + HEADER, "{filter:?}");
    }
    assert!(filter.rewrites || output.len() + input.len() == PREFACE.len() + rest.len());
}

#[cfg(test)]
mod tests;

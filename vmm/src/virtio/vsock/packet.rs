//! vsock packets: the header, and the guest memory that carries it.
//!
//! A packet is a 44-byte header and up to [`MAX_BODY`] bytes of data (virtio
//! 1.2, 5.10.6). The driver may split both over any number of descriptors, so
//! nothing here counts on a layout. A header is copied once: what was checked
//! is what is used, whatever the guest writes to its memory meanwhile.

use std::io;

use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use crate::memory::Memory;
use crate::virtio::buffers::{Buffers, ChainError, total};
use crate::virtio::queue::Chain;

/// The CID of the host.
pub const HOST_CID: u64 = 2;
/// The size of a header in bytes.
pub const HEADER_SIZE: usize = 44;
/// The most data that a packet carries, in bytes.
pub const MAX_BODY: usize = 64 * 1024;
/// The only socket type that is offered (`VIRTIO_VSOCK_TYPE_STREAM`).
pub const TYPE_STREAM: u16 = 1;
/// Flag of [`Op::Shutdown`]: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`Op::Shutdown`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The most descriptors of a packet. Linux uses at most 1 + `MAX_SKB_FRAGS` (45).
const MAX_DESCRIPTORS: usize = 64;

/// What a packet asks for (`VIRTIO_VSOCK_OP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Connect.
    Request = 1,
    /// Connection accepted.
    Response = 2,
    /// Connection refused, aborted or gone.
    Reset = 3,
    /// One or both directions are finished.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// Carries nothing but the credit fields.
    CreditUpdate = 6,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

impl Op {
    /// Returns the operation with a number, if there is one.
    #[must_use]
    pub fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet's header (`struct virtio_vsock_hdr`), in the host's byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// CID of the sender.
    pub src_cid: u64,
    /// CID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data that follow the header.
    pub len: u32,
    /// Socket type; only [`TYPE_STREAM`] is served.
    pub kind: u16,
    /// Operation; see [`Op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes that left the sender's receive buffer so far, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes a header.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Encodes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Returns the reset that answers this packet when nobody owns its connection.
    #[must_use]
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (head, tail) = bytes
        .split_first_chunk()
        .expect("the header has the sizes of its fields");
    *bytes = tail;
    *head
}

/// Why a descriptor chain is not a packet.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The chain can't be followed.
    #[error("follow packet's descriptor chain")]
    Chain(#[from] ChainError),
    /// A chain to read from has writable descriptors or the reverse.
    #[error("descriptor has the wrong direction")]
    Direction,
    /// The chain ends before the header does, or has no room for data.
    #[error("chain of {0} bytes is too short")]
    TooShort(usize),
    /// The header announces more data than the chain holds, or than is allowed.
    #[error("packet announces {announced} bytes in a chain with {present}")]
    Length {
        /// What the header says.
        announced: u32,
        /// What follows the header.
        present: usize,
    },
}

/// Pieces of guest memory that are read or written one after another.
#[derive(Debug)]
pub struct Fragments<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Fragments<'m> {
    /// Wraps slices.
    #[must_use]
    pub fn new(slices: Vec<VolatileSlice<'m>>) -> Self {
        let len = total(&slices);
        Self { slices, len }
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tells whether there is no memory.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops what is beyond `len` bytes.
    fn truncate(&mut self, len: usize) {
        let mut left = len;
        for slice in &mut self.slices {
            let keep = left.min(slice.len());
            if let Ok(head) = slice.subslice(0, keep) {
                *slice = head;
            }
            left -= keep;
        }
        self.len = self.len.min(len);
    }

    /// Takes the first `head.len()` bytes out of the fragments, through `copy`.
    fn split_head(&mut self, head: usize, mut copy: impl FnMut(usize, &VolatileSlice<'m>)) {
        let mut done = 0;
        for slice in &mut self.slices {
            let count = (head - done).min(slice.len());
            if let (Ok(front), Ok(back)) = (slice.subslice(0, count), slice.offset(count)) {
                copy(done, &front);
                *slice = back;
            }
            done += count;
        }
        self.len -= done;
    }

    /// Reads from `source` until `limit` bytes came, the source has no more or
    /// the fragments are full. Returns the number of bytes; 0 is the end of the
    /// source (or a `limit` of 0).
    ///
    /// # Errors
    /// Those of the source, unless bytes came before.
    pub fn fill_from(&mut self, source: &mut impl ReadVolatile, limit: usize) -> io::Result<usize> {
        let mut total = 0;
        for slice in &self.slices {
            let wanted = slice.len().min(limit - total);
            if wanted == 0 {
                continue;
            }
            let mut slice = slice.subslice(0, wanted).map_err(into_io)?;
            let count = match retry(|| source.read_volatile(&mut slice)) {
                Ok(count) => count,
                Err(error) if total == 0 => return Err(error),
                Err(_) => break,
            };
            total += count;
            if count < wanted {
                break;
            }
        }
        Ok(total)
    }

    /// Writes from the start to `sink` until it takes no more. Returns the
    /// number of bytes taken.
    ///
    /// # Errors
    /// Those of the sink, unless it took bytes before.
    pub fn drain_to(&self, sink: &mut impl WriteVolatile) -> io::Result<usize> {
        let mut total = 0;
        for slice in self.slices.iter().filter(|slice| !slice.is_empty()) {
            let count = match retry(|| sink.write_volatile(slice)) {
                Ok(count) => count,
                Err(error) if total == 0 => return Err(error),
                Err(_) => break,
            };
            total += count;
            if count < slice.len() {
                break;
            }
        }
        Ok(total)
    }

    /// Copies everything after the first `skip` bytes out of guest memory.
    pub fn copy_after(&self, skip: usize, mut append: impl FnMut(&[u8])) {
        let mut skip = skip;
        let mut bounce = [0; 4096];
        for slice in &self.slices {
            let jump = skip.min(slice.len());
            skip -= jump;
            let Ok(mut rest) = slice.offset(jump) else {
                continue;
            };
            while !rest.is_empty() {
                let count = rest.copy_to(&mut bounce[..]);
                append(&bounce[..count]);
                let Ok(next) = rest.offset(count) else { break };
                rest = next;
            }
        }
    }
}

fn retry<T>(mut io: impl FnMut() -> Result<T, VolatileMemoryError>) -> io::Result<T> {
    loop {
        match io().map_err(into_io) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn into_io(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other.to_string()),
    }
}

/// A packet that the guest sent.
#[derive(Debug)]
pub struct TxPacket<'m> {
    /// Its header, copied.
    pub header: Header,
    /// Its data: exactly `header.len` bytes, unless `malformed`.
    pub body: Fragments<'m>,
    /// Why the packet can't be believed although its header can be read.
    pub malformed: Option<PacketError>,
}

impl<'m> TxPacket<'m> {
    /// Parses a chain of the transmit queue.
    ///
    /// # Errors
    /// [`PacketError`] when not even a header can be read.
    pub fn parse(memory: &'m Memory, chain: Chain<'m>) -> Result<Self, PacketError> {
        let buffers = Buffers::collect(chain, memory, MAX_DESCRIPTORS)?;
        if !buffers.writable.is_empty() {
            return Err(PacketError::Direction);
        }
        let mut body = Fragments::new(buffers.readable);
        if body.len() < HEADER_SIZE {
            return Err(PacketError::TooShort(body.len()));
        }
        let mut bytes = [0; HEADER_SIZE];
        body.split_head(HEADER_SIZE, |at, piece| {
            piece.copy_to(&mut bytes[at..at + piece.len()]);
        });
        let header = Header::decode(&bytes);
        let announced = header.len as usize;
        let length = PacketError::Length {
            announced: header.len,
            present: body.len(),
        };
        let malformed = (announced > body.len() || announced > MAX_BODY).then_some(length);
        body.truncate(announced);
        Ok(Self {
            header,
            body,
            malformed,
        })
    }
}

/// A buffer that the guest offers for a packet.
#[derive(Debug)]
pub struct RxBuffer<'m> {
    head: Vec<VolatileSlice<'m>>,
    /// Where data goes; never empty.
    pub body: Fragments<'m>,
}

impl<'m> RxBuffer<'m> {
    /// Parses a chain of the receive queue.
    ///
    /// # Errors
    /// [`PacketError`] when it can't hold a header and a byte.
    pub fn parse(memory: &'m Memory, chain: Chain<'m>) -> Result<Self, PacketError> {
        let buffers = Buffers::collect(chain, memory, MAX_DESCRIPTORS)?;
        if !buffers.readable.is_empty() {
            return Err(PacketError::Direction);
        }
        let mut body = Fragments::new(buffers.writable);
        if body.len() <= HEADER_SIZE {
            return Err(PacketError::TooShort(body.len()));
        }
        let mut head = Vec::with_capacity(1);
        body.split_head(HEADER_SIZE, |_, piece| head.push(*piece));
        body.truncate(MAX_BODY);
        Ok(Self { head, body })
    }

    /// Writes the header and returns how many bytes of the chain are used.
    #[must_use]
    pub fn finish(self, header: &Header) -> u32 {
        let bytes = header.encode();
        let mut rest = bytes.as_slice();
        for piece in self.head {
            let (now, later) = rest.split_at(piece.len());
            piece.copy_from(now);
            rest = later;
        }
        // The body holds at most MAX_BODY bytes, so this is a small number.
        HEADER_SIZE as u32 + header.len
    }
}

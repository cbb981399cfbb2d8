//! Packets of a guest and bytes of clients: the whole device, one connection against what both sides saw,
//! and packets in chains.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use arbitrary::{Result, Unstructured};
use vm_memory::VolatileSlice;

use super::Vsock;
use super::connection::{Connection, HostEvents};
use super::packet::{
    Fragments, HEADER_SIZE, HOST_CID, Header, MAX_BODY, Op, RxBuffer, TYPE_STREAM, TxPacket,
};
use crate::fuzz::guest::{Guest, World, drive, number, some_bytes};
use crate::virtio::device::VirtioDevice;
use crate::virtio::test_driver::{DriverQueue, Segment, memory, readable, writable};

const CID: u32 = 3;
/// The host ports of the first connections.
const FIRST_PORT: u32 = 1 << 30;
const PORT: u32 = 1024;
const CONNECT: &[u8] = b"CONNECT 1024\n";
/// The most steps of a connection.
const STEPS: usize = 200;
/// The most clients at a time.
const CLIENTS: usize = 4;

struct Sockets {
    device: Vsock,
    address: SocketAddr,
    clients: Vec<UnixStream>,
}

/// A guest and its vsock device, with clients that connect and leave.
pub(crate) fn device(input: &[u8]) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "hull-fuzz-{}-{}",
        process::id(),
        NEXT.fetch_add(1, Ordering::SeqCst)
    );
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("listen");
    let device = Vsock::new(CID, listener.into()).expect("a device");
    let mut world = Sockets {
        device,
        address,
        clients: Vec::new(),
    };
    drive(&mut world, &mut Unstructured::new(input));
}

impl World for Sockets {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn request(
        &mut self,
        input: &mut Unstructured<'_>,
        guest: &mut Guest,
    ) -> Result<(u16, Vec<Segment>)> {
        Ok(match input.int_in_range(0..=7)? {
            // Room for packets.
            0..=3 => {
                let lengths = [4096, 44, 45, 0x1_0000 + 44, 20];
                let room = guest.room(*input.choose(&lengths)?);
                (0, vec![room])
            }
            4 => (2, vec![guest.room(input.int_in_range(0..=8)?)]),
            _ => {
                let body = some_bytes(input, 100)?;
                let header = Header {
                    dst_port: FIRST_PORT + u32::from(input.int_in_range(0..=CLIENTS as u8)?),
                    ..packet(input, body.len())?
                };
                let packet = [&header.encode()[..], body].concat();
                (1, guest.sent(input, &packet)?)
            }
        })
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.int_in_range(0..=7)? {
            0..=2 if self.clients.len() < CLIENTS => {
                let client = UnixStream::connect_addr(&self.address).expect("connect");
                client.set_nonblocking(true).expect("make a client");
                // What the device does not want is lost.
                let _ = (&client).write(CONNECT);
                self.clients.push(client);
            }
            3 | 4 => {
                let bytes = some_bytes(input, 100)?;
                if let Some(mut client) = self.clients.last() {
                    let _ = client.write(bytes);
                }
            }
            5 => drop(self.clients.pop()),
            6 => {
                let how = if input.arbitrary()? {
                    Shutdown::Read
                } else {
                    Shutdown::Write
                };
                if let Some(client) = self.clients.first() {
                    let _ = client.shutdown(how);
                }
            }
            _ => {
                for mut client in &self.clients {
                    let _ = client.read(&mut [0; 4096]);
                }
            }
        }
        Ok(())
    }
}

/// A packet of the guest, for the first port.
fn packet(input: &mut Unstructured<'_>, length: usize) -> Result<Header> {
    let ops = [2, 2, 5, 5, 5, 4, 6, 7, 3, 1, 0, 8];
    let mut header = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: PORT,
        dst_port: FIRST_PORT,
        len: length as u32,
        kind: TYPE_STREAM,
        op: *input.choose(&ops)?,
        flags: input.int_in_range(0..=3)?,
        buf_alloc: number(input, &[0, 4096, 0x1_0000, u32::MAX.into()])? as u32,
        fwd_cnt: number(input, &[0, u32::MAX.into()])? as u32,
    };
    match input.int_in_range(0..=31)? {
        0 => header.len = number(input, &[0x1_0000, 0x1_0001, u32::MAX.into()])? as u32,
        1 => header.kind = input.arbitrary()?,
        2 => header.src_port = input.arbitrary()?,
        3 => header.src_cid = number(input, &[1 << 32 | 3])?,
        4 => header.dst_cid = number(input, &[1 << 32 | 2])?,
        5 => header.flags = input.arbitrary()?,
        _ => {}
    }
    Ok(header)
}

/// One connection. What comes out at either end is what went in at the other, in order, and the guest gets no
/// more than it has room for.
pub(crate) fn connection(input: &[u8]) {
    let (ours, client) = UnixStream::pair().expect("make a socket");
    ours.set_nonblocking(true).expect("make a connection");
    client.set_nonblocking(true).expect("make a client");
    let now = Instant::now();
    let mut ends = Ends {
        connection: Connection::new(ours, CID.into(), FIRST_PORT, now),
        client: Some(client),
        to_guest: Vec::new(),
        at_guest: Vec::new(),
        to_client: format!("OK {FIRST_PORT}\n").into_bytes(),
        at_client: Vec::new(),
        from_guest: 0,
        told: (0, 0),
        now,
    };
    // An input that ends in the middle of a step is at its end.
    let _ = ends.steps(&mut Unstructured::new(input));
}

/// A connection and what its ends sent and got.
struct Ends {
    connection: Connection,
    client: Option<UnixStream>,
    to_guest: Vec<u8>,
    at_guest: Vec<u8>,
    to_client: Vec<u8>,
    at_client: Vec<u8>,
    /// Bytes that the guest sent.
    from_guest: u32,
    /// What the guest said last of its buffer: its size, and what left it.
    told: (u32, u32),
    now: Instant,
}

impl Ends {
    fn steps(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        if let Some(client) = &mut self.client {
            client.write_all(CONNECT).expect("connect");
        }
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            match input.int_in_range(0..=9)? {
                0..=2 => self.guest_sends(input)?,
                3 | 4 => self.guest_receives(input)?,
                5 | 6 => self.client_sends(input)?,
                7 => self.client_receives(),
                8 => match (input.int_in_range(0..=3)?, &self.client) {
                    (0, _) => self.client = None,
                    (1, Some(client)) => drop(client.shutdown(Shutdown::Write)),
                    (2, Some(client)) => drop(client.shutdown(Shutdown::Read)),
                    _ => self.connection.expire(),
                },
                _ => {}
            }
            let events = HostEvents {
                readable: true,
                hung_up: self.client.is_none(),
            };
            self.connection.on_host_events(events, self.now);
        }
        self.client_receives();
        Ok(())
    }

    fn guest_sends(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut body = some_bytes(input, 40)?.to_vec();
        if input.int_in_range(0..=3)? == 0 {
            body.resize(*input.choose(&[4096, 0x8000, MAX_BODY])?, 9);
        }
        let header = packet(input, body.len())?;
        // The muxer lets no others through.
        if !self.connection.is_known_to_guest() {
            return Ok(());
        }
        self.told = (header.buf_alloc, header.fwd_cnt);
        if header.op == Op::Data as u16 {
            self.to_client.extend(&body);
            self.from_guest += body.len() as u32;
        }
        let slices = vec![VolatileSlice::from(body.as_mut_slice())];
        self.connection
            .on_guest_packet(&header, &Fragments::new(slices));
        Ok(())
    }

    fn guest_receives(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut room = vec![0; input.int_in_range(1..=200)?];
        let slices = vec![VolatileSlice::from(room.as_mut_slice())];
        let packet = self
            .connection
            .next_packet(&mut Fragments::new(slices), self.now);
        let Some(header) = packet else { return Ok(()) };
        assert_eq!((header.src_port, header.dst_port), (FIRST_PORT, PORT));
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
        assert!(
            header.fwd_cnt <= self.from_guest,
            "more than the guest sent"
        );
        let length = header.len as usize;
        assert_eq!(length > 0, header.op == Op::Data as u16);
        if length > 0 {
            self.at_guest.extend(&room[..length]);
            let (size, left) = self.told;
            let in_flight = (self.at_guest.len() as u32).wrapping_sub(left);
            assert!(in_flight <= size, "{in_flight} bytes in a buffer of {size}");
            assert!(self.to_guest.starts_with(&self.at_guest));
        }
        Ok(())
    }

    fn client_sends(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let bytes = some_bytes(input, 100)?;
        if let Some(client) = &mut self.client
            && let Ok(count) = client.write(bytes)
        {
            self.to_guest.extend(&bytes[..count]);
        }
        Ok(())
    }

    fn client_receives(&mut self) {
        let Some(client) = &mut self.client else {
            return;
        };
        if let Err(error) = client.read_to_end(&mut self.at_client) {
            let gone = [ErrorKind::WouldBlock, ErrorKind::ConnectionReset];
            assert!(gone.contains(&error.kind()), "{error}");
        }
        assert!(self.to_client.starts_with(&self.at_client));
    }
}

/// A packet in a chain of the transmit queue, and room for one in the receive queue, however they are cut.
fn packet_in_chain(input: &[u8]) -> Result<()> {
    let mut input = Unstructured::new(input);
    let memory = memory(0x4_0000);
    let mut queue = DriverQueue::new(&memory, 0, 16);
    let mut device = queue.device_side(false);
    let direction = input.arbitrary()?;
    let mut at = 0x1_0000;
    let mut segments = Vec::new();
    for _ in 0..input.int_in_range(1..=16)? {
        let length = number(&mut input, &[0x1_0000, 0xffff, 44])? as usize % 0x1_1000;
        let gap = u64::from(input.int_in_range(0..=3_u8)?) * 0x1000;
        let segment = if direction {
            writable(at, length)
        } else {
            readable(at, length)
        };
        segments.push(segment);
        at += length as u64 + gap;
    }
    let bytes = some_bytes(&mut input, HEADER_SIZE)?;
    let mut rest = bytes;
    for segment in segments.iter().filter(|segment| !segment.writable) {
        let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
        let _ =
            vm_memory::Bytes::write_slice(&memory, now, vm_memory::GuestAddress(segment.address));
        rest = later;
    }
    queue.offer(&segments);
    let Ok(Some(chain)) = device.pop(&memory) else {
        return Ok(());
    };
    let total: usize = segments.iter().map(|segment| segment.len as usize).sum();
    if direction {
        if let Ok(buffer) = RxBuffer::parse(&memory, chain) {
            let room = buffer.body.len();
            assert!(room <= MAX_BODY && room <= total - HEADER_SIZE && room > 0);
            let used = buffer.finish(&Header {
                len: room as u32,
                ..Header::default()
            });
            assert!(used as usize <= total);
        }
    } else if let Ok(packet) = TxPacket::parse(&memory, chain) {
        let announced = packet.header.len as usize;
        let present = total - HEADER_SIZE;
        assert_eq!(
            packet.malformed.is_some(),
            announced > present || announced > MAX_BODY
        );
        assert_eq!(packet.body.len(), announced.min(present));
        assert_eq!(packet.header, Header::decode(&packet.header.encode()));
    }
    Ok(())
}

/// See [`packet_in_chain`].
pub(crate) fn chains(input: &[u8]) {
    // An input that is too short has no packet.
    let _ = packet_in_chain(input);
}

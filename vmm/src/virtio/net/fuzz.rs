//! A network card, a guest that sends and receives frames, and what comes out of the cable.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};

use arbitrary::{Result, Unstructured};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::Net;
use super::frame::{MAX_FRAME, MIN_FRAME};
use super::header::{HEADER_SIZE, Header};
use super::tap::Port;
use crate::fuzz::guest::{Guest, World, drive, some_bytes};
use crate::virtio::device::VirtioDevice;
use crate::virtio::test_driver::Segment;

/// A packet socket in place of a queue of a tap.
#[derive(Debug)]
struct Cable(File);

impl Port for Cable {
    fn file(&self) -> &File {
        &self.0
    }

    fn set_offloads(&self, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn switch(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

struct Card {
    device: Net<Cable>,
    /// The far ends of its cables; none: unplugged.
    far: Vec<Option<File>>,
}

/// A guest and its network card. What is sent has a header that makes sense for its frame.
pub(crate) fn device(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok(pairs) = input.int_in_range(1..=2) else {
        return;
    };
    let (cables, far): (Vec<_>, Vec<_>) = (0..pairs)
        .map(|_| {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let ends = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
            let (near, far) = ends.expect("make a cable");
            (Cable(near.into()), Some(File::from(far)))
        })
        .unzip();
    let device = Net::new(cables, [2, 0, 0, 0, 0, 1], Some(1450)).expect("a card");
    drive(&mut Card { device, far }, &mut input);
}

/// The check of a header: what passes makes sense, and passes again unchanged.
pub(crate) fn header(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok((bytes, frame, features)) = input.arbitrary::<([u8; HEADER_SIZE], u16, u64)>() else {
        return;
    };
    if let Ok(header) = Header::check(&bytes, frame.into(), features) {
        let encoded = header.encode();
        assert_eq!(Header::check(&encoded, frame.into(), features), Ok(header));
        // Without features nothing can be asked of the host.
        assert!(features & 0xffff != 0 || encoded == [0; HEADER_SIZE]);
    }
}

impl World for Card {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn request(
        &mut self,
        input: &mut Unstructured<'_>,
        guest: &mut Guest,
    ) -> Result<(u16, Vec<Segment>)> {
        let queue = input.int_in_range(0..=2 * self.far.len() as u16)?;
        let segments = match queue {
            // A command for the number of pairs.
            _ if queue == 2 * self.far.len() as u16 => {
                let pairs = input.arbitrary::<u8>()?;
                let class = if input.arbitrary()? {
                    4
                } else {
                    input.arbitrary()?
                };
                let command = [class, 0, pairs, 0];
                let mut segments = guest.sent(input, &command)?;
                segments.push(guest.room(1));
                segments
            }
            _ if queue % 2 == 0 => {
                let lengths = [2048, 1526, 64, 12, 0xffff, 11, 1];
                let count = input.int_in_range(1..=3)?;
                let room = |_| Ok(guest.room(*input.choose(&lengths)?));
                (0..count).map(room).collect::<Result<_>>()?
            }
            _ => {
                let frame = frame(input)?;
                guest.sent(input, &frame)?
            }
        };
        Ok((queue, segments))
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let cable = input.choose_index(self.far.len())?;
        let frame = frame(input)?;
        match &mut self.far[cable] {
            Some(far) if input.int_in_range(0..=30)? > 0 => {
                // A full cable loses it.
                let _ = far.write(&frame);
            }
            far => *far = None,
        }
        Ok(())
    }

    fn look(&mut self, features: u64) {
        let mut frame = vec![0; MAX_FRAME + 1];
        for far in self.far.iter_mut().flatten() {
            loop {
                let length = match far.read(&mut frame) {
                    Ok(0) => break,
                    Ok(length) => length,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => panic!("read from the cable: {error}"),
                };
                assert!((MIN_FRAME..=MAX_FRAME).contains(&length), "{length} bytes");
                let sent = frame.first_chunk().expect("a header");
                let checked = Header::check(sent, length - HEADER_SIZE, features);
                assert_eq!(checked.map(|header| header.encode()), Ok(*sent));
            }
        }
    }
}

/// A header and a frame.
fn frame(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut header: [u8; HEADER_SIZE] = if input.arbitrary()? {
        // Segmentation of IPv4, as Linux asks for it.
        [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]
    } else {
        [0; HEADER_SIZE]
    };
    for _ in 0..input.int_in_range(0..=3)? {
        header[input.choose_index(HEADER_SIZE)?] = input.arbitrary()?;
    }
    let mut frame = header.to_vec();
    frame.extend(some_bytes(input, 20)?);
    let lengths = [0, 26, 60, 1514, 65550, 65562, 65563];
    let length = *input.choose(&lengths)?;
    frame.resize(frame.len().max(length), 7);
    Ok(frame)
}

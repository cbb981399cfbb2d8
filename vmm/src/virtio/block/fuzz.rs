//! A disk and a guest that sends it requests of all kinds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use rustix::fs::{MemfdFlags, memfd_create};

use super::request::SECTOR;
use super::{Block, Disk};
use crate::extent::FileExtent;
use crate::fuzz::guest::{Guest, World, drive, number};
use crate::virtio::device::VirtioDevice;
use crate::virtio::test_driver::{Segment, readable, writable};

/// The disk's two extents, with as much of the file before, between and behind them.
const EXTENT: u64 = 8 * SECTOR;
const SECTORS: u64 = 2 * EXTENT / SECTOR;
const OTHERS: [u64; 3] = [0, 2 * EXTENT, 4 * EXTENT];
const UNTOUCHED: u8 = 0x5e;

struct Disks {
    device: Block,
    file: Arc<File>,
    readonly: bool,
}

/// A guest and its disk. Nothing beside the disk's extents changes, and nothing of a read-only disk.
pub(crate) fn device(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok(readonly) = input.arbitrary() else {
        return;
    };
    let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("make a file");
    let file = Arc::new(File::from(file));
    let filled = vec![UNTOUCHED; 5 * EXTENT as usize];
    file.write_all_at(&filled, 0).expect("fill the file");
    let extents = [3 * EXTENT, EXTENT].map(|offset| FileExtent {
        file: Arc::clone(&file),
        offset,
        length: EXTENT,
    });
    let disk = Disk::new(extents.to_vec(), readonly).expect("a disk");
    let mut world = Disks {
        device: Block::new(disk, "disk-0".into()).expect("a serial number"),
        file,
        readonly,
    };
    drive(&mut world, &mut input);
    world.check();
}

impl Disks {
    fn check(&self) {
        let length = self.file.metadata().expect("look at the file").len();
        assert_eq!(length, 5 * EXTENT);
        let untouched = |from, length| {
            let mut bytes = vec![0; length as usize];
            self.file
                .read_exact_at(&mut bytes, from)
                .expect("read the file");
            assert!(bytes.iter().all(|byte| *byte == UNTOUCHED), "at {from}");
        };
        for from in OTHERS {
            untouched(from, EXTENT);
        }
        if self.readonly {
            untouched(0, length);
        }
    }
}

impl World for Disks {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn request(
        &mut self,
        input: &mut Unstructured<'_>,
        guest: &mut Guest,
    ) -> Result<(u16, Vec<Segment>)> {
        let kinds = [0, 1, 4, 8, 11, 13, 2, 14, u32::MAX];
        let kind = *input.choose(&kinds)?;
        let edges = [
            0,
            SECTORS - 1,
            SECTORS,
            SECTORS + 1,
            u64::MAX,
            1 << 55,
            u64::MAX / SECTOR,
        ];
        let sector = number(input, &edges)?;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let mut segments = guest.sent(input, &header)?;
        match kind {
            // Ranges to discard or to fill with zeros.
            11 | 13 => {
                for _ in 0..input.int_in_range(0..=3)? {
                    let start = number(input, &edges)?;
                    let length = number(input, &[SECTORS, 1 << 21, u32::MAX.into()])? as u32;
                    let flags = u32::from(input.int_in_range(0..=2_u8)?);
                    let mut range = start.to_le_bytes().to_vec();
                    range.extend(length.to_le_bytes());
                    range.extend(flags.to_le_bytes());
                    segments.extend(guest.sent(input, &range)?);
                }
            }
            1 => {
                for _ in 0..input.int_in_range(0..=3)? {
                    let length = usize::from(input.int_in_range(0..=9_u8)?) * 256;
                    let at = guest.place(&[], length);
                    segments.push(readable(at, length));
                }
            }
            _ => {
                for _ in 0..input.int_in_range(0..=3)? {
                    let length = usize::from(input.int_in_range(0..=9_u8)?) * 256;
                    segments.push(guest.room(length));
                }
            }
        }
        let status = guest.place(&[0xaa], 1);
        segments.push(writable(status, 1));
        Ok((0, segments))
    }
}

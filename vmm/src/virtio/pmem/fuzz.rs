//! A guest that flushes persistent memory, and uses it where devices only read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use rustix::fs::{MemfdFlags, memfd_create};

use super::Pmem;
use crate::extent::FileExtent;
use crate::file_regions::{FileRegions, MemorySlots};
use crate::fuzz::guest::{Guest, World, drive_in, number, ram};
use crate::virtio::device::VirtioDevice;
use crate::virtio::test_driver::{Segment, readable, writable};

const LENGTH: usize = 2 * 4096;
const UNTOUCHED: u8 = 0x5e;

#[derive(Debug)]
struct NoSlots;

impl MemorySlots for NoSlots {
    unsafe fn map(&self, _: u32, _: u64, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn unmap(&self, _: u32) -> io::Result<()> {
        Ok(())
    }
}

struct Region {
    device: Pmem,
    start: u64,
}

/// A guest and its persistent memory, whose file never changes.
pub(crate) fn device(input: &[u8]) {
    let file = memfd_create("pmem", MemfdFlags::CLOEXEC).expect("make a file");
    let file = Arc::new(File::from(file));
    file.write_all_at(&[UNTOUCHED; LENGTH], 0)
        .expect("fill the file");
    let ram = ram();
    let regions = FileRegions::new(&ram, 48, Arc::new(NoSlots)).expect("addresses");
    let (memory, regions) = (regions.join(&ram), Arc::new(regions));
    let extent = FileExtent {
        file: Arc::clone(&file),
        offset: 0,
        length: LENGTH as u64,
    };
    let region = regions.map(&[extent]).expect("a region");
    let start = region.start();
    let device = Pmem::new(region);
    let mut world = Region { device, start };
    drive_in(&mut world, &mut Unstructured::new(input), memory);
    let mut now = [0; LENGTH];
    file.read_exact_at(&mut now, 0).expect("read the file");
    assert!(now == [UNTOUCHED; LENGTH], "the file changed");
}

impl World for Region {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn request(
        &mut self,
        input: &mut Unstructured<'_>,
        guest: &mut Guest,
    ) -> Result<(u16, Vec<Segment>)> {
        let end = self.start + (2 << 20);
        let inside = [self.start, self.start - 4, end - 4, end - 2, end];
        let kind = (number(input, &[1])? as u32).to_le_bytes();
        let request = match input.int_in_range(0..=2)? {
            0 => vec![readable(*input.choose(&inside)?, 4)],
            _ => guest.sent(input, &kind)?,
        };
        let response = match input.int_in_range(0..=2)? {
            0 => writable(*input.choose(&inside)?, 4),
            _ => guest.room(input.int_in_range(0..=8)?),
        };
        Ok((0, [request, vec![response]].concat()))
    }
}

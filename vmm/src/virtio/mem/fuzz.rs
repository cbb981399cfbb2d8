//! A guest that plugs and unplugs memory.

use std::sync::Arc;

use arbitrary::{Result, Unstructured};

use super::{BLOCK, Mem, REQUEST, RESPONSE};
use crate::fuzz::guest::{Guest, World, drive_in, number, ram};
use crate::memory::Backing;
use crate::pluggable::Pluggable;
use crate::virtio::device::VirtioDevice;
use crate::virtio::test_driver::Segment;

const PORT: u32 = 0x1000_0000;

struct Plugging {
    device: Mem,
    memory: Arc<Pluggable>,
}

/// A guest and its pluggable memory, which is never more than was ever requested.
pub(crate) fn device(input: &[u8]) {
    let config = hull_proto_vmm::Pluggable {
        mib: 128,
        port: PORT,
    };
    let (memory, pluggable) = Pluggable::new(&ram(), config, Backing::Own).expect("memory");
    let device = Mem::new(&pluggable).expect("the only device");
    let mut world = Plugging {
        device,
        memory: pluggable,
    };
    drive_in(&mut world, &mut Unstructured::new(input), memory);
}

impl World for Plugging {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn request(
        &mut self,
        input: &mut Unstructured<'_>,
        guest: &mut Guest,
    ) -> Result<(u16, Vec<Segment>)> {
        let start = self.memory.start();
        let end = start + self.memory.length();
        let address = match input.int_in_range(0..=3)? {
            0 => number(input, &[start, end, start - BLOCK, end - BLOCK, start + 1])?,
            _ => start + BLOCK * u64::from(input.arbitrary::<u8>()? % 66),
        };
        let kind = number(input, &[0, 1, 2, 3])?;
        let count = number(input, &[0, 1, 63, 64, 65, 0xffff])?;
        let bytes = [kind, address, count].map(u64::to_le_bytes).concat();
        let request = guest.sent(input, bytes.get(..REQUEST).unwrap_or(&[]))?;
        let room = match input.int_in_range(0..=7)? {
            0 => input.int_in_range(0..=RESPONSE)?,
            _ => RESPONSE,
        };
        Ok((0, [request, vec![guest.room(room)]].concat()))
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let sizes = [0, 127, 128, 129, 1 << 40, u64::MAX];
        match input.arbitrary()? {
            true => self
                .memory
                .bound(number(input, &sizes)?, number(input, &sizes)?),
            false => self.memory.hear(input.arbitrary()?),
        }
        Ok(())
    }

    fn look(&mut self, _features: u64) {
        let blocks = &self.device.blocks;
        let plugged = blocks.plugged.iter().filter(|block| **block).count();
        assert_eq!(plugged as u64, blocks.count, "blocks were counted wrong");
        assert!(blocks.bytes() <= self.memory.length());
        assert_eq!(self.memory.metrics().0, blocks.bytes() >> 20);
    }
}

//! A guest that tells of free pages.

use arbitrary::{Result, Unstructured};

use super::Balloon;
use crate::fuzz::guest::{Guest, World, drive};
use crate::memory::Backing;
use crate::virtio::device::VirtioDevice;
use crate::virtio::test_driver::{Segment, writable};

struct Free(Balloon);

/// A guest and its balloon. The guest's own memory may go, as it says, but for the canary, which it never names.
pub(crate) fn device(input: &[u8]) {
    let (first, rest) = input.split_first().unwrap_or((&0, &[]));
    let backing = if first % 2 == 0 {
        Backing::Own
    } else {
        Backing::Snapshot
    };
    drive(
        &mut Free(Balloon::new(backing)),
        &mut Unstructured::new(rest),
    );
}

impl World for Free {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.0
    }

    fn request(
        &mut self,
        input: &mut Unstructured<'_>,
        _guest: &mut Guest,
    ) -> Result<(u16, Vec<Segment>)> {
        let count = input.int_in_range(1..=40)?;
        let range = |_| {
            let page = input.int_in_range(8..=0x60)?;
            let pages: usize = input.int_in_range(0..=3)?;
            Ok(writable(page * 4096, pages * 4096))
        };
        Ok((2, (0..count).map(range).collect::<Result<_>>()?))
    }
}

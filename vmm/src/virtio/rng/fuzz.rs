//! A guest that asks for random bytes.

use arbitrary::{Result, Unstructured};

use super::Rng;
use crate::fuzz::guest::{Guest, World, drive};
use crate::virtio::device::VirtioDevice;
use crate::virtio::test_driver::Segment;

struct Source(Rng);

/// A guest and its entropy source.
pub(crate) fn device(input: &[u8]) {
    drive(&mut Source(Rng::new()), &mut Unstructured::new(input));
}

impl World for Source {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.0
    }

    fn request(
        &mut self,
        input: &mut Unstructured<'_>,
        guest: &mut Guest,
    ) -> Result<(u16, Vec<Segment>)> {
        let count = input.int_in_range(1..=4)?;
        let room = |_| Ok(guest.room(input.int_in_range(0..=5000)?));
        Ok((0, (0..count).map(room).collect::<Result<_>>()?))
    }
}

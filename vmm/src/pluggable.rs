//! Pluggable memory: what a guest gets beside its RAM, and gives back, while it runs.
//!
//! One range of addresses behind RAM, as large as it can ever be, is a memory slot of KVM from the start on.
//! The host has no memory behind it until the guest touches it, and none any more once it is unplugged. So a
//! guest that touches what it did not plug gets memory that counts as its pod's, up to the end of the range, and
//! nothing else; who sets limits for pods sets them for that.
//!
//! ```text
//! what the guest wants (vsock) ─┐
//!                               ├─▶ requested ─▶ virtio-mem ─▶ the guest plugs or unplugs
//! least and most (control) ─────┘
//! ```

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hull_proto_vmm::{PLUG_MIB, PLUG_STEP_MIB};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::layout::FOUR_GIB;
use crate::memory::{self, Backing, MAX_MIB, Memory, MemoryError};
use crate::sync::lock;

const MIB: u64 = 1 << 20;
/// What the range starts at a multiple of: a memory block of Linux.
const ALIGNMENT: u64 = PLUG_MIB * MIB;
/// Ports of vsock by which a guest says what it wants: so many bits are a number of MiB.
const PORT_BITS: u32 = 24;

/// What is wanted and allowed, in MiB.
#[derive(Debug, Clone, Copy, Default)]
struct Bounds {
    wanted: u64,
    least: u64,
    most: u64,
}

impl Bounds {
    /// What is requested of the guest to have, in MiB.
    fn requested(self) -> u64 {
        let wanted = self.wanted.next_multiple_of(PLUG_MIB);
        wanted.clamp(self.least, self.most)
    }
}

/// The pluggable memory of a VM.
#[derive(Debug)]
pub struct Pluggable {
    region: Arc<GuestRegionMmap>,
    /// What is behind it.
    backing: Backing,
    port: u32,
    bounds: Mutex<Bounds>,
    /// Readable when what is requested may have changed.
    changed: EventFd,
    /// How much the guest has, in bytes.
    plugged: AtomicU64,
    /// Whether there is a device for it.
    taken: AtomicBool,
}

impl Pluggable {
    /// Sets addresses aside behind `ram`; returns both, and the pluggable part.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn new(
        ram: &Memory,
        config: hull_proto_vmm::Pluggable,
        backing: Backing,
    ) -> Result<(Memory, Arc<Self>), MemoryError> {
        let mib = config.mib;
        if mib == 0 || mib > MAX_MIB || !mib.is_multiple_of(PLUG_MIB) {
            return Err(MemoryError::Size(mib));
        }
        let port = config.port;
        if port.trailing_zeros() < PORT_BITS {
            return Err(MemoryError::Port(port));
        }
        let failed = |source| MemoryError::Allocate { mib, source };
        let ends = memory::regions(ram).map(|(guest, _, length)| guest + length);
        let end = ends.max().unwrap_or_default().max(FOUR_GIB);
        let mapping = MmapRegionBuilder::new((mib * MIB) as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .map_err(failed)?;
        let start = GuestAddress(end.next_multiple_of(ALIGNMENT));
        let region = Arc::new(GuestRegionMmap::new(mapping, start).ok_or(MemoryError::Arrange)?);
        memory::advise(&region);
        let all = ram.insert_region(Arc::clone(&region));
        let pluggable = Self {
            region,
            backing,
            port,
            bounds: Mutex::default(),
            changed: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(MemoryError::Event)?,
            plugged: AtomicU64::new(0),
            taken: AtomicBool::new(false),
        };
        Ok((all.map_err(|_| MemoryError::Arrange)?, Arc::new(pluggable)))
    }

    /// Has parts of it be private copies of those of a file that has them from `at` on.
    ///
    /// # Errors
    /// [`MemoryError::File`]
    pub fn restore(&self, parts: &[Range<u64>], file: &File, at: u64) -> Result<(), MemoryError> {
        let mut parts = parts.iter();
        parts.try_for_each(|part| memory::restore_part(&self.region, part.clone(), file, at))
    }

    /// Returns its address in the guest.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.region.start_addr().0
    }

    /// Returns how much there can be, in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.region.len()
    }

    /// Has it belong to a device; false: it does already.
    pub fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::SeqCst)
    }

    /// Returns a descriptor that is readable when [`Pluggable::requested`] may have changed.
    #[must_use]
    pub fn changed(&self) -> RawFd {
        self.changed.as_raw_fd()
    }

    /// Returns how much the guest is to have, in bytes, and waits for the next change.
    #[must_use]
    pub fn requested(&self) -> u64 {
        // Nothing to read is no change.
        let _ = self.changed.read();
        (lock(&self.bounds).requested() * MIB).min(self.length())
    }

    /// Sets how much the guest has at least and at most, in MiB; what is not a multiple of
    /// [`PLUG_STEP_MIB`] is rounded up.
    pub fn bound(&self, least_mib: u64, most_mib: u64) {
        let whole = |mib: u64| mib.min(MAX_MIB).next_multiple_of(PLUG_STEP_MIB);
        let mut bounds = lock(&self.bounds);
        bounds.least = whole(least_mib);
        bounds.most = whole(most_mib).max(bounds.least);
        let _ = self.changed.write(1);
    }

    /// Returns how much the guest wants, and has at least and at most, in MiB.
    #[must_use]
    pub fn bounds(&self) -> (u64, u64, u64) {
        let bounds = lock(&self.bounds);
        (bounds.wanted, bounds.least, bounds.most)
    }

    /// Takes over what [`Pluggable::bounds`] told of another VM.
    pub fn take_over(&self, (wanted, least_mib, most_mib): (u64, u64, u64)) {
        lock(&self.bounds).wanted = wanted.min(MAX_MIB);
        self.bound(least_mib, most_mib);
    }

    /// Takes what the guest says by asking for a connection to a port.
    pub fn hear(&self, port: u32) {
        let mib = port & ((1 << PORT_BITS) - 1);
        if port - mib == self.port {
            lock(&self.bounds).wanted = u64::from(mib).min(MAX_MIB);
            let _ = self.changed.write(1);
        }
    }

    /// Notes how much the guest has, in bytes.
    pub fn note(&self, plugged: u64) {
        self.plugged.store(plugged, Ordering::Relaxed);
    }

    /// Returns how much the guest has and is to have, in MiB.
    #[must_use]
    pub fn metrics(&self) -> (u64, u64) {
        let plugged = self.plugged.load(Ordering::Relaxed) / MIB;
        (plugged, lock(&self.bounds).requested())
    }

    /// Gives the host back what is behind `length` bytes from `offset` on.
    ///
    /// # Errors
    /// What the host says.
    pub fn give_back(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.backing {
            Backing::Own => memory::drop_pages(&self.region, offset, length),
            Backing::Snapshot => memory::replace_pages(&self.region, offset, length),
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::test_driver::memory;

    const PORT: u32 = 0x1000_0000;

    fn pluggable(mib: u64) -> (Memory, Arc<Pluggable>) {
        let config = hull_proto_vmm::Pluggable { mib, port: PORT };
        Pluggable::new(&memory(0x20000), config, Backing::Own).unwrap()
    }

    #[test]
    fn the_guest_has_what_it_wants_between_the_bounds() {
        let (_, it) = pluggable(1024);
        assert_eq!(it.requested(), 0);
        it.hear(PORT + 300);
        assert_eq!(it.requested(), 0, "nothing is allowed yet");
        it.bound(0, 512);
        assert_eq!(it.requested(), 384 * MIB);
        it.hear(PORT + 0xff_ffff);
        assert_eq!(it.requested(), 512 * MIB);
        it.bound(0, 1 << 40);
        assert_eq!(it.requested(), 1024 * MIB, "no more than there is");
        it.bound(199, 0);
        assert_eq!(it.requested(), 200 * MIB);
        it.hear(PORT);
        assert_eq!(it.requested(), 200 * MIB);
        for other in [PORT - 1, 2 * PORT, 0, u32::MAX] {
            it.hear(other);
        }
        it.bound(0, 512);
        assert_eq!(it.requested(), 0, "other ports mean nothing");
    }

    #[test]
    fn what_is_given_back_reads_as_zeros() {
        let (all, it) = pluggable(128);
        let at = |offset| GuestAddress(it.start() + offset);
        assert!(it.start().is_multiple_of(ALIGNMENT));
        assert!(memory::is_writable(&all, at(0)));
        for page in [0, 4096, 8192] {
            all.write_obj(7u8, at(page)).unwrap();
        }
        it.give_back(4096, 4096).unwrap();
        let bytes = [0, 4096, 8192].map(|page| all.read_obj::<u8>(at(page)).unwrap());
        assert_eq!(bytes, [7, 0, 7]);
        assert!(it.give_back(128 * MIB, 4096).is_err());
        assert!(it.give_back(u64::MAX, 4096).is_err());
    }

    #[test]
    fn sizes_and_ports_that_make_no_sense_are_refused() {
        let ram = memory(0x20000);
        for (mib, port) in [
            (0, PORT),
            (100, PORT),
            (MAX_MIB + PLUG_MIB, PORT),
            (128, PORT + 1),
            (128, 1 << 20),
        ] {
            let config = hull_proto_vmm::Pluggable { mib, port };
            assert!(
                Pluggable::new(&ram, config, Backing::Own).is_err(),
                "{config:?}"
            );
        }
    }
}

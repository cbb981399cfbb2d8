use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::virtio::test_driver::memory;

const MIB: u64 = 1 << 20;

/// Keeps what KVM would be told; refuses when told so.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    pub(crate) filled: Mutex<BTreeMap<u32, (u64, u64, u64)>>,
    refuse: Mutex<bool>,
}

impl MemorySlots for Slots {
    unsafe fn map(&self, number: u32, guest: u64, host: u64, length: u64) -> io::Result<()> {
        if *lock(&self.refuse) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let before = lock(&self.filled).insert(number, (guest, host, length));
        assert_eq!(before, None, "slot {number} is taken");
        Ok(())
    }

    fn unmap(&self, number: u32) -> io::Result<()> {
        lock(&self.filled)
            .remove(&number)
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// File regions behind the given RAM, and what it becomes with them.
pub(crate) fn regions(ram: &Memory) -> (Arc<Slots>, Arc<FileRegions>, Memory) {
    let slots = Arc::new(Slots::default());
    let regions = FileRegions::new(ram, 48, Arc::clone(&slots) as _).unwrap();
    let joined = regions.join(ram);
    (slots, Arc::new(regions), joined)
}

/// A file whose pages are filled with the given bytes.
pub(crate) fn pages(fill: &[u8]) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    for byte in fill {
        file.write_all(&[*byte; PAGE as usize]).unwrap();
    }
    Arc::new(file)
}

pub(crate) fn extent(file: &Arc<File>, page: u64, count: u64) -> FileExtent {
    FileExtent {
        file: Arc::clone(file),
        offset: page * PAGE,
        length: count * PAGE,
    }
}

fn byte(memory: &Memory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn a_region_has_its_files_one_after_another_and_zeros() {
    let (slots, regions, memory) = regions(&memory(0x10000));
    let (one, other) = (pages(&[1, 2, 3]), pages(&[4, 5]));
    let region = regions
        .map(&[extent(&one, 1, 2), extent(&other, 0, 1), extent(&one, 0, 1)])
        .unwrap();
    assert_eq!(
        (region.start(), region.length()),
        (FOUR_GIB + SECTION, ALIGNMENT)
    );
    let shown: Vec<u8> = (0..6)
        .map(|page| byte(&memory, region.start() + page * PAGE))
        .collect();
    assert_eq!(shown, [2, 3, 4, 1, 0, 0]);
    assert_eq!(byte(&memory, region.start() + ALIGNMENT - 1), 0);
    let (guest, host, length) = lock(&slots.filled)[&0];
    assert_eq!((guest, length), (region.start(), ALIGNMENT));
    assert_eq!(host % ALIGNMENT, guest % ALIGNMENT);
    // It is the files' own pages.
    one.write_all_at(&[77], PAGE).unwrap();
    assert_eq!(byte(&memory, region.start()), 77);
    let start = region.start();
    drop(region);
    assert!(lock(&slots.filled).is_empty());
    assert_eq!(byte(&memory, start), 0);
    assert_eq!(Arc::strong_count(&one), 1);
}

#[test]
fn regions_have_sections_of_their_own_and_places_are_used_again() {
    let (slots, regions, _) = regions(&memory(0x10000));
    let file = pages(&[]);
    file.set_len(300 * MIB).unwrap();
    let open = |pages| regions.map(&[extent(&file, 0, pages)]).unwrap();
    let [small, large, last] = [open(1), open(130 * MIB / PAGE), open(1)];
    let first = small.start();
    assert_eq!(large.start(), first + SECTION);
    assert_eq!(last.start(), first + 3 * SECTION);
    drop(large);
    assert_eq!(open(257 * MIB / PAGE).start(), first + 4 * SECTION);
    assert_eq!(open(256 * MIB / PAGE).start(), first + SECTION);
    drop((small, last));
    assert!(lock(&slots.filled).is_empty());
}

#[test]
fn what_makes_no_region_is_refused_and_changes_nothing() {
    let (slots, regions, memory) = regions(&memory(0x10000));
    let file = pages(&[9, 9]);
    let odd = |offset, length| {
        let file = Arc::clone(&file);
        regions.map(&[FileExtent {
            file,
            offset,
            length,
        }])
    };
    assert!(matches!(odd(512, PAGE), Err(FileRegionError::Unaligned(0))));
    assert!(matches!(odd(0, 512), Err(FileRegionError::Unaligned(0))));
    assert!(matches!(odd(0, 0), Err(FileRegionError::Full(0))));
    assert!(matches!(odd(0, 1 << 40), Err(FileRegionError::Full(_))));
    assert!(matches!(odd(0, !(PAGE - 1)), Err(FileRegionError::Full(_))));
    let write_only = File::options().write(true).open("/dev/null").unwrap();
    let unreadable = extent(&Arc::new(write_only), 0, 1);
    let failed = regions.map(&[extent(&file, 0, 1), unreadable]);
    assert!(matches!(failed, Err(FileRegionError::Map(_))));
    *lock(&slots.refuse) = true;
    let failed = regions.map(&[extent(&file, 0, 1)]);
    assert!(matches!(failed, Err(FileRegionError::Slot(_))));
    *lock(&slots.refuse) = false;
    assert_eq!(byte(&memory, FOUR_GIB + SECTION), 0);
    let region = regions.map(&[extent(&file, 0, 1)]).unwrap();
    assert_eq!(region.start(), FOUR_GIB + SECTION);
}

#[test]
fn a_guest_with_few_addresses_has_no_file_regions() {
    let ram = memory(0x10000);
    let few = FileRegions::new(&ram, 36, Arc::new(Slots::default())).unwrap();
    assert_eq!(few.join(&ram).num_regions(), 1);
    let file = pages(&[1]);
    let refused = Arc::new(few).map(&[extent(&file, 0, 1)]);
    assert!(matches!(refused, Err(FileRegionError::Full(_))));
}

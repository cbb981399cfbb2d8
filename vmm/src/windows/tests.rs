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
    unsafe fn fill(&self, number: u32, guest: u64, host: u64, length: u64) -> io::Result<()> {
        if *lock(&self.refuse) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let before = lock(&self.filled).insert(number, (guest, host, length));
        assert_eq!(before, None, "slot {number} is taken");
        Ok(())
    }

    fn clear(&self, number: u32) -> io::Result<()> {
        lock(&self.filled)
            .remove(&number)
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// Windows behind the given RAM, and what it becomes with them.
pub(crate) fn windows(ram: &Memory) -> (Arc<Slots>, Arc<Windows>, Memory) {
    let slots = Arc::new(Slots::default());
    let windows = Windows::new(ram, 48, Arc::clone(&slots) as _).unwrap();
    let joined = windows.join(ram);
    (slots, Arc::new(windows), joined)
}

/// A file whose pages are filled with the given bytes.
pub(crate) fn pages(fill: &[u8]) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    for byte in fill {
        file.write_all(&[*byte; PAGE as usize]).unwrap();
    }
    Arc::new(file)
}

pub(crate) fn piece(file: &Arc<File>, page: u64, count: u64) -> Piece {
    Piece {
        file: Arc::clone(file),
        offset: page * PAGE,
        length: count * PAGE,
    }
}

fn byte(memory: &Memory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn a_window_shows_its_files_one_after_another_and_zeros() {
    let (slots, windows, memory) = windows(&memory(0x10000));
    let (one, other) = (pages(&[1, 2, 3]), pages(&[4, 5]));
    let window = windows
        .open(&[piece(&one, 1, 2), piece(&other, 0, 1), piece(&one, 0, 1)])
        .unwrap();
    assert_eq!(
        (window.start(), window.length()),
        (FOUR_GIB + SECTION, GRAIN)
    );
    let shown: Vec<u8> = (0..6)
        .map(|page| byte(&memory, window.start() + page * PAGE))
        .collect();
    assert_eq!(shown, [2, 3, 4, 1, 0, 0]);
    assert_eq!(byte(&memory, window.start() + GRAIN - 1), 0);
    let (guest, host, length) = lock(&slots.filled)[&0];
    assert_eq!((guest, length), (window.start(), GRAIN));
    assert_eq!(host % GRAIN, guest % GRAIN);
    // It is the files' own pages.
    one.write_all_at(&[77], PAGE).unwrap();
    assert_eq!(byte(&memory, window.start()), 77);
    let start = window.start();
    drop(window);
    assert!(lock(&slots.filled).is_empty());
    assert_eq!(byte(&memory, start), 0);
    assert_eq!(Arc::strong_count(&one), 1);
}

#[test]
fn windows_have_sections_of_their_own_and_places_are_used_again() {
    let (slots, windows, _) = windows(&memory(0x10000));
    let file = pages(&[]);
    file.set_len(300 * MIB).unwrap();
    let open = |pages| windows.open(&[piece(&file, 0, pages)]).unwrap();
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
fn what_makes_no_window_is_refused_and_changes_nothing() {
    let (slots, windows, memory) = windows(&memory(0x10000));
    let file = pages(&[9, 9]);
    let odd = |offset, length| {
        let file = Arc::clone(&file);
        windows.open(&[Piece {
            file,
            offset,
            length,
        }])
    };
    assert!(matches!(odd(512, PAGE), Err(WindowError::Unaligned(0))));
    assert!(matches!(odd(0, 512), Err(WindowError::Unaligned(0))));
    assert!(matches!(odd(0, 0), Err(WindowError::Full(0))));
    assert!(matches!(odd(0, 1 << 40), Err(WindowError::Full(_))));
    assert!(matches!(odd(0, !(PAGE - 1)), Err(WindowError::Full(_))));
    let write_only = File::options().write(true).open("/dev/null").unwrap();
    let unreadable = piece(&Arc::new(write_only), 0, 1);
    let failed = windows.open(&[piece(&file, 0, 1), unreadable]);
    assert!(matches!(failed, Err(WindowError::Map(_))));
    *lock(&slots.refuse) = true;
    let failed = windows.open(&[piece(&file, 0, 1)]);
    assert!(matches!(failed, Err(WindowError::Slot(_))));
    *lock(&slots.refuse) = false;
    assert_eq!(byte(&memory, FOUR_GIB + SECTION), 0);
    let window = windows.open(&[piece(&file, 0, 1)]).unwrap();
    assert_eq!(window.start(), FOUR_GIB + SECTION);
}

#[test]
fn a_guest_with_few_addresses_has_no_windows() {
    let ram = memory(0x10000);
    let few = Windows::new(&ram, 36, Arc::new(Slots::default())).unwrap();
    assert_eq!(few.join(&ram).num_regions(), 1);
    let file = pages(&[1]);
    let refused = Arc::new(few).open(&[piece(&file, 0, 1)]);
    assert!(matches!(refused, Err(WindowError::Full(_))));
}

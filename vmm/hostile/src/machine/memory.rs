//! Physical memory, read and written at any address.

/// How much pluggable memory there is, in MiB.
pub const PLUGGABLE_MIB: u64 = 256;
/// Where it is.
pub(crate) const PLUGGABLE: u64 = 1 << 32;
/// The first file region, one section of Linux behind it: where virtio-pmem is.
pub(crate) const FILE_REGION: u64 = PLUGGABLE + ((PLUGGABLE_MIB + 128) << 20);

/// The boot protocol's page tables, and a page for one more: the gigabyte from 4 GiB on.
const DIRECTORY_POINTERS: u64 = 0xa000;
const DIRECTORY: u64 = 0xf000;
const PRESENT_WRITABLE: u64 = 3;
const HUGE_PAGE: u64 = 0x80;

macro_rules! access {
    ($read:ident, $write:ident, $type:ty) => {
        pub(crate) fn $read(address: u64) -> $type {
            // SAFETY: nothing of Rust's is read as something else: it is a plain number, wherever it comes from.
            unsafe { (address as *const $type).read_volatile() }
        }

        pub(crate) fn $write(address: u64, value: $type) {
            // SAFETY: callers write to devices, rings and buffers, which are no objects of Rust's.
            unsafe { (address as *mut $type).write_volatile(value) }
        }
    };
}

access!(read8, write8, u8);
access!(read16, write16, u16);
access!(read32, write32, u32);
access!(read64, write64, u64);

/// Maps the gigabyte that pluggable memory is in, and in which file regions begin.
pub(crate) fn map_high_memory() {
    for index in 0..512 {
        let page = (4 << 30) + (index << 21);
        write64(DIRECTORY + index * 8, page | PRESENT_WRITABLE | HUGE_PAGE);
    }
    write64(DIRECTORY_POINTERS + 4 * 8, DIRECTORY | PRESENT_WRITABLE);
}

/// Fills memory.
pub(crate) fn fill(address: u64, byte: u8, count: u64) {
    (0..count).for_each(|at| write8(address + at, byte));
}

/// Writes bytes.
pub(crate) fn put(address: u64, bytes: &[u8]) {
    (0..)
        .zip(bytes)
        .for_each(|(at, byte)| write8(address + at, *byte));
}

//! Which pages a process has written to: of a file, to its private mappings of it, or of its memory, since it was
//! asked last (proc_pid_maps(5), proc_pid_pagemap(5), the kernel's admin-guide/mm/soft-dirty.rst).

use std::{
    fs::{self, File, Metadata},
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
};

use hull_proto_vmm::CopiedMemory;
use rustix::fs::{major, minor};

const PAGE: u64 = 4096;
/// Bits of a word of pagemap: the page is in memory; it is of a file, or shared.
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;
/// It was written to since [`forget_writes`].
const SOFT_DIRTY: u64 = 1 << 55;
/// Pages whose words are read at once.
const AT_ONCE: usize = 1 << 16;

/// A part of the file that is mapped.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    /// Number of the first page, by its address.
    page: u64,
    /// Of how many pages.
    pages: u64,
    /// Where it begins in the file, in bytes.
    offset: u64,
}

/// Returns the parts of `file`, in bytes and whole pages, of which the process has copies of its own.
///
/// # Errors
/// When the process is gone, or what the kernel says of it can't be read.
pub fn private_pages(pid: u32, file: &Metadata) -> io::Result<Vec<Range<u64>>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut found = Vec::new();
    for mapping in mappings(&maps, file.dev(), file.ino()) {
        let length = usize::try_from(mapping.pages.saturating_mul(8));
        let mut words = vec![0; length.map_err(|_| io::ErrorKind::InvalidData)?];
        pagemap.read_exact_at(&mut words, mapping.page.saturating_mul(8))?;
        let is_copy = |word| word & (PRESENT | OF_FILE) == PRESENT;
        collect(&words, mapping.offset, is_copy, &mut found);
    }
    Ok(found)
}

/// Whether the kernel notes which pages are written to.
#[must_use]
pub fn notes_writes() -> bool {
    // The stack was just written to.
    let mut word = [1; 8];
    let at = word.as_ptr().expose_provenance() as u64 / PAGE;
    let pagemap = File::open("/proc/self/pagemap");
    let read = pagemap.and_then(|it| it.read_exact_at(&mut word, at.saturating_mul(8)));
    read.is_ok() && u64::from_ne_bytes(word) & SOFT_DIRTY != 0
}

/// Begins to note which pages of its memory a process writes to, and forgets those that it did.
///
/// # Errors
/// When the process is gone, or the kernel refuses.
pub fn forget_writes(pid: u32) -> io::Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "4")
}

/// Returns the parts of a file, in bytes and whole pages, that a process may have written to since
/// [`forget_writes`], by where they stand in its memory. There are at most `most`: what is between two may be
/// one of them. Parts of no whole pages, or with more than `bytes` together, are an error.
///
/// # Errors
/// When the process is gone, or what the kernel says of it can't be read.
pub fn written(
    pid: u32,
    parts: &[CopiedMemory],
    bytes: u64,
    most: usize,
) -> io::Result<Vec<Range<u64>>> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let wrong = || io::Error::from(io::ErrorKind::InvalidData);
    let (mut found, mut left) = (Vec::new(), bytes);
    let mut words = Vec::new();
    for part in parts {
        let numbers = [part.address, part.offset, part.length];
        if !numbers.iter().all(|number| number.is_multiple_of(PAGE)) {
            return Err(wrong());
        }
        left = left.checked_sub(part.length).ok_or_else(wrong)?;
        let (first, count) = (part.address / PAGE, part.length / PAGE);
        for done in (0..count).step_by(AT_ONCE) {
            let pages = usize::try_from(count.saturating_sub(done)).map_err(|_| wrong())?;
            words.resize(pages.min(AT_ONCE).saturating_mul(8), 0);
            let page = first.checked_add(done).ok_or_else(wrong)?;
            pagemap.read_exact_at(&mut words, page.saturating_mul(8))?;
            let offset = part.offset.saturating_add(done.saturating_mul(PAGE));
            let is_dirty = |word| word & SOFT_DIRTY != 0;
            collect(&words, offset, is_dirty, &mut found);
        }
    }
    let mut gap = PAGE;
    while found.len() > most {
        gap = gap.saturating_mul(2);
        join(&mut found, gap);
    }
    Ok(found)
}

/// Makes one of neighbours with at most `gap` bytes between them.
fn join(parts: &mut Vec<Range<u64>>, gap: u64) {
    parts.dedup_by(|next, last| {
        let is_near = next
            .start
            .checked_sub(last.end)
            .is_some_and(|between| between <= gap);
        if is_near {
            last.end = next.end;
        }
        is_near
    });
}

/// The mappings of a file, of lines as `START-END PERMISSIONS OFFSET MAJOR:MINOR INODE NAME`.
fn mappings(maps: &str, device: u64, inode: u64) -> impl Iterator<Item = Mapping> {
    let device = format!("{:02x}:{:02x}", major(device), minor(device));
    maps.lines().filter_map(move |line| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let offset = hexadecimal(words.nth(1)?)?;
        if words.next()? != device || words.next()?.parse() != Ok(inode) {
            return None;
        }
        let start = hexadecimal(start)?;
        let length = hexadecimal(end)?.checked_sub(start)?;
        Some(Mapping {
            page: start / PAGE,
            pages: length / PAGE,
            offset,
        })
    })
}

fn hexadecimal(word: &str) -> Option<u64> {
    u64::from_str_radix(word, 16).ok()
}

/// Adds to `found` the pages of these words of pagemap that are `wanted`; the first one is of `offset`.
fn collect(words: &[u8], offset: u64, wanted: impl Fn(u64) -> bool, found: &mut Vec<Range<u64>>) {
    let mut end = offset;
    for word in words.as_chunks::<8>().0 {
        let at = end;
        end = at.saturating_add(PAGE);
        if !wanted(u64::from_ne_bytes(*word)) {
            continue;
        }
        match found.last_mut() {
            Some(last) if last.end == at => last.end = end,
            _ => found.push(at..end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_a_file_are_told_from_others() {
        let maps = "\
            555ce70a9000-555ce7134000 r--p 00000000 00:22 6      /opt/hull/hull-vmm\n\
            7f4e08200000-7f4e08221000 rw-p 00000000 00:01 1025   /memfd:template-memory (deleted)\n\
            7f4e08221000-7f4e08299000 rw-p 00000000 00:00 0 \n\
            7f4e08299000-7f4e0829b000 rw-p 00099000 00:01 1025   /memfd:template-memory (deleted)\n\
            7f4e0829b000-7f4e0829c000 rw-p 00099000 00:01 1026   /memfd:template-memory (deleted)\n\
            7f4e0829c000-7f4e0829d000 rw-p 00099000 08:01 1025   /other\n";
        let found: Vec<_> = mappings(maps, rustix::fs::makedev(0, 1), 1025).collect();
        let expected = [(0x7_f4e0_8200, 0x21, 0), (0x7_f4e0_8299, 2, 0x99000)];
        let expected = expected.map(|(page, pages, offset)| Mapping {
            page,
            pages,
            offset,
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn copies_are_told_from_pages_of_the_file_and_from_holes() {
        let words = [PRESENT, PRESENT, PRESENT | OF_FILE, 0, OF_FILE, PRESENT | 7];
        let mut found = vec![0..1, PAGE..2 * PAGE];
        let words = words.map(u64::to_ne_bytes);
        let is_copy = |word| word & (PRESENT | OF_FILE) == PRESENT;
        collect(words.as_flattened(), 2 * PAGE, is_copy, &mut found);
        assert_eq!(found, [0..1, PAGE..4 * PAGE, 7 * PAGE..8 * PAGE]);
    }

    #[test]
    fn a_process_has_no_copies_of_what_it_has_not_mapped() {
        let file = tempfile::tempfile().unwrap().metadata().unwrap();
        let ours = private_pages(std::process::id(), &file);
        assert_eq!(ours.unwrap(), []);
        assert!(private_pages(u32::MAX, &file).is_err());
    }

    #[test]
    fn what_is_written_to_is_found() {
        if !notes_writes() {
            println!("SKIPPED: written pages: this kernel does not note them (MEM_SOFT_DIRTY)");
            return;
        }
        let pages = 64;
        let mut memory = vec![1_u8; (pages + 1) * PAGE as usize];
        let skipped = memory.as_ptr().align_offset(PAGE as usize);
        let ours = std::process::id();
        let parts = |memory: &[u8]| {
            let address = memory[skipped..].as_ptr().expose_provenance() as u64;
            let half = pages as u64 / 2 * PAGE;
            [(0, 1 << 30), (half, 4 << 30)].map(|(from, offset)| CopiedMemory {
                offset,
                address: address + from,
                length: half,
            })
        };
        forget_writes(ours).unwrap();
        for page in [3, 4, 40] {
            memory[skipped + page * PAGE as usize] = 7;
        }
        let places = parts(&memory);
        let all = pages as u64 * PAGE;
        let (low, high) = (1 << 30, 4 << 30);
        let expected = [
            low + 3 * PAGE..low + 5 * PAGE,
            high + 8 * PAGE..high + 9 * PAGE,
        ];
        let found = |bytes, most| written(ours, &places, bytes, most);
        assert_eq!(found(all, 2).unwrap(), expected);
        let joined = found(all, 1).unwrap();
        assert_eq!(joined.len(), 1);
        assert_eq!(joined[0], expected[0].start..expected[1].end);
        assert!(found(all - 1, 2).is_err(), "more than there is");
        let odd = CopiedMemory {
            address: 1,
            ..places[0]
        };
        assert!(written(ours, &[odd], all, 2).is_err());
        let nowhere = CopiedMemory {
            address: 0,
            ..places[0]
        };
        // What is not mapped was not written to.
        assert_eq!(written(ours, &[nowhere], all, 2).unwrap(), []);
        let endless = CopiedMemory {
            address: u64::MAX - PAGE + 1,
            ..places[0]
        };
        assert!(written(ours, &[endless], all, 2).is_err());
    }

    #[test]
    fn the_nearest_parts_are_made_one() {
        let mut parts = vec![0..1, 3..4, 20..30, 31..32];
        join(&mut parts, 2);
        assert_eq!(parts, [0..4, 20..32]);
        join(&mut parts, 16);
        assert_eq!((parts.len(), &parts[0]), (1, &(0..32)));
    }
}

//! Which pages of a file a process has written to its private mappings of (proc_pid_maps(5), proc_pid_pagemap(5)).

use std::{
    fs::{self, File, Metadata},
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
};

use rustix::fs::{major, minor};

const PAGE: u64 = 4096;
/// Bits of a word of pagemap: the page is in memory; it is of a file, or shared.
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;

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
        copied(&words, mapping.offset, &mut found);
    }
    Ok(found)
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

/// Adds to `found` what these words of pagemap, the first of which is of `offset`, say of copies.
fn copied(words: &[u8], offset: u64, found: &mut Vec<Range<u64>>) {
    let mut end = offset;
    for word in words.as_chunks::<8>().0 {
        let at = end;
        end = at.saturating_add(PAGE);
        if u64::from_ne_bytes(*word) & (PRESENT | OF_FILE) != PRESENT {
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
        copied(words.as_flattened(), 2 * PAGE, &mut found);
        assert_eq!(found, [0..1, PAGE..4 * PAGE, 7 * PAGE..8 * PAGE]);
    }

    #[test]
    fn a_process_has_no_copies_of_what_it_has_not_mapped() {
        let file = tempfile::tempfile().unwrap().metadata().unwrap();
        let ours = private_pages(std::process::id(), &file);
        assert_eq!(ours.unwrap(), []);
        assert!(private_pages(u32::MAX, &file).is_err());
    }
}

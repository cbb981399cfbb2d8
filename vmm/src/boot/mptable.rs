//! The Intel MultiProcessor table (specification 1.4): the CPUs and how lines reach them.
//!
//! It is what makes a kernel without ACPI use the IOAPIC, and one of the things that make Linux not
//! look for a PIT.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{COM1_PIN, IOAPIC, IOAPIC_PINS, LOCAL_APIC, MPTABLE, MPTABLE_END};
use crate::memory::Memory;

const REVISION: u8 = 4;
const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const APIC_VERSION: u8 = 0x14;
const ENABLED: u8 = 1;
const BOOTSTRAP: u8 = 2;
/// Family 6, model 0, stepping 0: only looked at when there is no CPUID.
const SIGNATURE: u32 = 0x600;
/// FPU and APIC.
const FEATURES: u32 = 0x201;
const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
const ALL_APICS: u8 = 0xff;

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    /// Too many CPUs for the place.
    #[error("multiprocessor table for {0} vCPUs is too large")]
    TooLarge(u8),
    /// Guest memory is too small.
    #[error("write multiprocessor table")]
    Write(#[from] GuestMemoryError),
}

/// Writes the table for `vcpus` processors, of which number 0 boots.
///
/// # Errors
/// [`MpTableError`]
pub fn write(memory: &Memory, vcpus: u8) -> Result<(), MpTableError> {
    let bytes = build(vcpus);
    if MPTABLE + bytes.len() as u64 > MPTABLE_END {
        return Err(MpTableError::TooLarge(vcpus));
    }
    Ok(memory.write_slice(&bytes, GuestAddress(MPTABLE))?)
}

fn build(vcpus: u8) -> Vec<u8> {
    // The last local APIC id plus one, but never that of all APICs.
    let ioapic_id = vcpus.min(0xfe);
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        let flags = if id == 0 {
            ENABLED | BOOTSTRAP
        } else {
            ENABLED
        };
        let mut entry = vec![PROCESSOR, id, APIC_VERSION, flags];
        entry.extend(SIGNATURE.to_le_bytes());
        entry.extend(FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        entries.push(entry);
    }
    entries.push([&[BUS, 0], b"ISA   ".as_slice()].concat());
    let mut ioapic = vec![IO_APIC, ioapic_id, 0x20, ENABLED];
    ioapic.extend((IOAPIC as u32).to_le_bytes());
    entries.push(ioapic);
    // Polarity and trigger mode 0: as usual on the bus, which is active high and edge for ISA.
    for pin in COM1_PIN..IOAPIC_PINS {
        entries.push(vec![IO_INTERRUPT, INTERRUPT, 0, 0, 0, pin, ioapic_id, pin]);
    }
    entries.push(vec![LOCAL_INTERRUPT, EXTINT, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_APICS, 1]);

    let length = HEADER_SIZE + entries.iter().map(Vec::len).sum::<usize>();
    let mut header = b"PCMP".to_vec();
    header.extend((length as u16).to_le_bytes());
    header.extend([REVISION, 0]);
    header.extend(b"HULL    HULL VMM    ");
    header.extend([0; 6]);
    header.extend((entries.len() as u16).to_le_bytes());
    header.extend((LOCAL_APIC as u32).to_le_bytes());
    header.extend([0; 4]);
    let mut table = [header, entries.concat()].concat();
    seal(&mut table, 7);

    let mut pointer = b"_MP_".to_vec();
    pointer.extend((MPTABLE as u32 + POINTER_SIZE as u32).to_le_bytes());
    pointer.extend([1, REVISION, 0, 0, 0, 0, 0, 0]);
    seal(&mut pointer, 10);
    [pointer, table].concat()
}

/// Makes the sum of all bytes zero.
fn seal(bytes: &mut [u8], checksum: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(checksum) {
        *byte = 0u8.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_table_is_well_formed_for_any_number_of_cpus() {
        for vcpus in [1, 2, 32, 254] {
            let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            write(&memory, vcpus).unwrap();
            let mut pointer = [0; POINTER_SIZE];
            memory
                .read_slice(&mut pointer, GuestAddress(MPTABLE))
                .unwrap();
            assert_eq!((&pointer[..4], sum(&pointer)), (b"_MP_".as_slice(), 0));
            let address = u32::from_le_bytes(pointer[4..8].try_into().unwrap());
            let length: u16 = memory
                .read_obj(GuestAddress(u64::from(address) + 4))
                .unwrap();
            let mut table = vec![0; usize::from(length)];
            memory
                .read_slice(&mut table, GuestAddress(u64::from(address)))
                .unwrap();
            assert_eq!((&table[..4], sum(&table)), (b"PCMP".as_slice(), 0));
            assert_eq!(table[36..40], [0x00, 0x00, 0xe0, 0xfe]);

            let count = u16::from_le_bytes([table[34], table[35]]);
            let (mut at, mut found, mut cpus, mut pins) = (HEADER_SIZE, 0, 0, Vec::new());
            while at < table.len() {
                found += 1;
                match table[at] {
                    PROCESSOR => {
                        assert_eq!(table[at + 1], cpus);
                        assert_eq!(table[at + 3] & BOOTSTRAP != 0, cpus == 0);
                        cpus += 1;
                        at += 20;
                    }
                    kind => {
                        if kind == IO_INTERRUPT {
                            pins.push(table[at + 7]);
                        }
                        at += 8;
                    }
                }
            }
            assert_eq!((found, cpus, at), (count, vcpus, table.len()));
            assert_eq!(pins, (COM1_PIN..IOAPIC_PINS).collect::<Vec<_>>());
        }
    }
}

//! The boot parameters ("zero page") and what they point to.

use linux_loader::loader::bootparam::{SETUP_RNG_SEED, boot_params};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::kernel::Loaded;
use crate::layout::{CMDLINE, FOUR_GIB, HIGH_RAM, LOW_RAM_END, SETUP_DATA, ZERO_PAGE};
use crate::memory;
use crate::memory::Memory;
use crate::virtio::rng::random_bytes;

const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS"
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
/// Boot protocol 2.15.
const PROTOCOL: u16 = 0x020f;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const SEED: usize = 32;

/// Why the parameters were not written.
#[derive(Debug, thiserror::Error)]
pub enum ParamsError {
    /// Guest memory is too small.
    #[error("write boot parameters")]
    Write(#[from] GuestMemoryError),
    /// The host has no randomness.
    #[error("make random seed for the guest")]
    Seed(#[source] std::io::Error),
}

/// Writes the parameters and the command line.
///
/// # Errors
/// [`ParamsError`]
pub fn write(memory: &Memory, loaded: &Loaded, cmdline: &str) -> Result<(), ParamsError> {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.kernel_alignment = 1 << 24;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    params.hdr.setup_data = SETUP_DATA;
    if let Some((address, length)) = loaded.initrd {
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = length as u32;
    }
    let map = e820(memory);
    params.e820_entries = map.len() as u8;
    for (entry, (address, size, kind)) in params.e820_table.iter_mut().zip(map) {
        entry.addr = address;
        entry.size = size;
        entry.r#type = kind;
    }
    memory.write_slice(params.as_slice(), GuestAddress(ZERO_PAGE))?;
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE + cmdline.len() as u64))?;

    let mut seed = [0; SEED];
    random_bytes(&mut seed).map_err(ParamsError::Seed)?;
    // struct setup_data: next, type, length, data.
    memory.write_obj(0u64, GuestAddress(SETUP_DATA))?;
    memory.write_obj(SETUP_RNG_SEED, GuestAddress(SETUP_DATA + 8))?;
    memory.write_obj(SEED as u32, GuestAddress(SETUP_DATA + 12))?;
    memory.write_slice(&seed, GuestAddress(SETUP_DATA + 16))?;
    Ok(())
}

/// Returns the memory map as (address, size, type).
fn e820(memory: &Memory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_RAM_END, E820_RAM),
        (LOW_RAM_END, HIGH_RAM - LOW_RAM_END, E820_RESERVED),
    ];
    for (address, _, length) in memory::regions(memory) {
        if address == 0 {
            map.push((HIGH_RAM, length - HIGH_RAM, E820_RAM));
        } else {
            debug_assert_eq!(address, FOUR_GIB);
            map.push((address, length, E820_RAM));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_finds_memory_command_line_and_seed() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let loaded = Loaded {
            entry: HIGH_RAM,
            initrd: Some((0x200_0000, 123)),
        };
        write(&memory, &loaded, "quiet").unwrap();
        let mut bytes = vec![0; size_of::<boot_params>()];
        memory
            .read_slice(&mut bytes, GuestAddress(ZERO_PAGE))
            .unwrap();
        assert_eq!(bytes[0x1fe..0x200], [0x55, 0xaa]);
        assert_eq!(&bytes[0x202..0x206], b"HdrS");
        assert_eq!(bytes[0x1e8], 3);
        assert_eq!(bytes[0x218..0x220], [0, 0, 0, 2, 123, 0, 0, 0]);
        let mut cmdline = [1; 6];
        memory
            .read_slice(&mut cmdline, GuestAddress(CMDLINE))
            .unwrap();
        assert_eq!(&cmdline, b"quiet\0");
        let mut seed = [0; SEED];
        memory
            .read_slice(&mut seed, GuestAddress(SETUP_DATA + 16))
            .unwrap();
        assert_ne!(seed, [0; SEED]);
    }

    #[test]
    fn the_map_leaves_out_the_gap() {
        let memory = Memory::from_ranges(&[
            (GuestAddress(0), 0x20_0000),
            (GuestAddress(FOUR_GIB), 0x20_0000),
        ])
        .unwrap();
        assert_eq!(
            e820(&memory)[2..],
            [
                (HIGH_RAM, 0x10_0000, E820_RAM),
                (FOUR_GIB, 0x20_0000, E820_RAM)
            ]
        );
    }
}

//! Loading the kernel.

use std::fs::File;
use std::io::{self, Seek};

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::layout::{HIGH_RAM, MMIO_GAP};
use crate::memory::Memory;

const PAGE: u64 = 4096;

/// Why a kernel was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Not an uncompressed ELF kernel for x86-64 that fits in memory.
    #[error("load kernel (an uncompressed ELF vmlinux)")]
    Kernel(#[source] linux_loader::loader::Error),
    /// The kernel leaves no memory to run in.
    #[error("kernel ends at {end:#x}, guest memory at {memory:#x}")]
    NoRoom {
        /// End of the kernel.
        end: u64,
        /// End of low guest memory.
        memory: u64,
    },
    /// The initrd could not be read.
    #[error("read initrd")]
    ReadInitrd(#[source] io::Error),
    /// The initrd does not fit behind the kernel.
    #[error("initrd of {0} bytes does not fit in guest memory")]
    InitrdSize(u64),
    /// The initrd could not be copied.
    #[error("copy initrd to guest memory")]
    CopyInitrd(#[source] GuestMemoryError),
}

/// Where the kernel and its initrd are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// The kernel's 64-bit entry.
    pub entry: u64,
    /// Address and length of the initrd.
    pub initrd: Option<(u64, u64)>,
}

/// Loads a kernel to where it wants to be and an initrd to the end of low memory.
///
/// # Errors
/// [`KernelError`]
pub fn load(
    memory: &Memory,
    kernel: &mut File,
    initrd: Option<&mut File>,
) -> Result<Loaded, KernelError> {
    let loaded = Elf::load(memory, None, kernel, Some(GuestAddress(HIGH_RAM)))
        .map_err(KernelError::Kernel)?;
    let end_of_memory = memory
        .iter()
        .next()
        .map_or(0, GuestMemoryRegion::len)
        .min(MMIO_GAP);
    if loaded.kernel_end >= end_of_memory {
        return Err(KernelError::NoRoom {
            end: loaded.kernel_end,
            memory: end_of_memory,
        });
    }
    let initrd = match initrd {
        Some(file) => Some(load_initrd(memory, file, loaded.kernel_end, end_of_memory)?),
        None => None,
    };
    Ok(Loaded {
        entry: loaded.kernel_load.0,
        initrd,
    })
}

fn load_initrd(
    memory: &Memory,
    file: &mut File,
    start: u64,
    end: u64,
) -> Result<(u64, u64), KernelError> {
    let size = file
        .seek(io::SeekFrom::End(0))
        .map_err(KernelError::ReadInitrd)?;
    file.rewind().map_err(KernelError::ReadInitrd)?;
    let address = end.checked_sub(size).map(|address| address & !(PAGE - 1));
    let Some(address) = address.filter(|address| *address >= start) else {
        return Err(KernelError::InitrdSize(size));
    };
    let length = usize::try_from(size).map_err(|_| KernelError::InitrdSize(size))?;
    memory
        .read_exact_volatile_from(GuestAddress(address), file, length)
        .map_err(KernelError::CopyInitrd)?;
    Ok((address, size))
}

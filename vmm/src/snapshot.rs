//! A machine that stands still, as bytes: all but its memory, which is a file of its own
//! ([`crate::memory::save`]).
//!
//! ```text
//!  8  magic
//!  4  version of this format
//! 16  the build of the VMM that wrote it
//!  4  CRC-32 of all that follows
//!     label, then state (postcard)
//! ```
//! The types are those that parts of the machine tell of themselves, with nothing of this process in them.
//! Any build but the one that wrote them refuses them, so they may change with every build; a test says when
//! they did, and the version is raised then.
//!
//! What is read may come from anybody: it is taken for a state only in whole, and each value is looked at by
//! the part that it belongs to, or by KVM.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use hull_proto_vmm::MAX_LABEL;
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use crate::kvm::state::VcpuState;
use crate::legacy::{ioapic, serial};
use crate::virtio::mmio;

const MAGIC: [u8; 8] = *b"HULLSNAP";
/// Raised when what is saved changes.
const VERSION: u32 = 2;
/// What this program was built of (build.rs).
const BUILD: &str = env!("HULL_VMM_BUILD");
const HEADER: usize = 32;
/// The longest state, in bytes: some ten KiB for each vCPU.
const MAX_STATE: u64 = 8 << 20;

/// A machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// RAM in MiB.
    pub memory_mib: u64,
    /// How much pluggable memory there can be beside it, in MiB; 0: the machine has no device for it.
    pub pluggable_mib: u64,
    /// What the first vCPU is told of itself ([`crate::kvm::cpuid::Template::saved`]).
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The rate of the time stamp counter in kHz; 0: not known.
    pub tsc_khz: u32,
    /// The guest's time since its start, in nanoseconds.
    pub clock: u64,
    /// The vCPUs, by their ids.
    pub vcpus: Vec<VcpuState>,
    /// The interrupt controller.
    pub ioapic: ioapic::State,
    /// The serial port.
    pub com1: serial::State,
    /// Devices, by their slots.
    pub slots: Vec<(u8, mmio::State)>,
}

/// Why bytes are no state that this program can use.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file can't be read or written.
    #[error("use the file of a snapshot's state")]
    File(#[source] io::Error),
    /// The file has something in it already.
    #[error("the file for a snapshot's state is not empty")]
    NotEmpty,
    /// The label is too long.
    #[error("the label of a snapshot has {0} bytes, more than {MAX_LABEL}")]
    Label(usize),
    /// No snapshot at all.
    #[error("this is no snapshot, or not a whole one")]
    Damaged,
    /// Another program's.
    #[error(
        "the snapshot is of another build of the VMM: format {version}, build {build}; this one is {VERSION}, {BUILD}"
    )]
    Build {
        /// The version of its format.
        version: u32,
        /// The program that wrote it.
        build: String,
    },
    /// Of something else.
    #[error("the snapshot is of {saved:?}, not of {asked:?}")]
    Other {
        /// What it is of.
        saved: String,
        /// What was asked for.
        asked: String,
    },
    /// Can't be written down.
    #[error("encode the state of a machine")]
    Encode(#[source] postcard::Error),
}

/// Writes a state, which is of `label`, to an empty file.
///
/// # Errors
/// [`SnapshotError`]
pub fn write(state: &MachineState, label: &str, file: &File) -> Result<(), SnapshotError> {
    if label.len() > MAX_LABEL {
        return Err(SnapshotError::Label(label.len()));
    }
    if file.metadata().map_err(SnapshotError::File)?.len() != 0 {
        return Err(SnapshotError::NotEmpty);
    }
    let bytes = encode(state, label).map_err(SnapshotError::Encode)?;
    file.write_all_at(&bytes, 0).map_err(SnapshotError::File)
}

/// Reads the state of `label`.
///
/// # Errors
/// [`SnapshotError`]
pub fn read(label: &str, file: &File) -> Result<MachineState, SnapshotError> {
    let length = file.metadata().map_err(SnapshotError::File)?.len();
    if length > MAX_STATE {
        return Err(SnapshotError::Damaged);
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| SnapshotError::Damaged)?];
    file.read_exact_at(&mut bytes, 0)
        .map_err(SnapshotError::File)?;
    decode(&bytes, label)
}

fn encode(state: &MachineState, label: &str) -> postcard::Result<Vec<u8>> {
    let body = postcard::to_allocvec(&(label, state))?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(BUILD.as_bytes());
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

fn decode(bytes: &[u8], asked: &str) -> Result<MachineState, SnapshotError> {
    let parts = bytes.split_first_chunk::<HEADER>();
    let (header, body) = parts.ok_or(SnapshotError::Damaged)?;
    let mut header = header.as_slice();
    if take(&mut header) != Some(MAGIC) {
        return Err(SnapshotError::Damaged);
    }
    let version = take(&mut header).map_or(0, u32::from_le_bytes);
    let build = take::<16>(&mut header).unwrap_or_default();
    if version != VERSION || build != BUILD.as_bytes() {
        let build = build.escape_ascii().to_string();
        return Err(SnapshotError::Build { version, build });
    }
    if take(&mut header).map(u32::from_le_bytes) != Some(crc32fast::hash(body)) {
        return Err(SnapshotError::Damaged);
    }
    let decoded = postcard::take_from_bytes::<(String, MachineState)>(body);
    match decoded {
        Ok(((saved, _), [])) if saved != asked => Err(SnapshotError::Other {
            saved,
            asked: asked.to_owned(),
        }),
        Ok(((_, state), [])) => Ok(state),
        _ => Err(SnapshotError::Damaged),
    }
}

/// Takes the next bytes, if there are as many.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

#[cfg(any(test, fuzzing))]
#[path = "snapshot/fuzz.rs"]
pub(crate) mod fuzz;
#[cfg(test)]
#[path = "snapshot/tests.rs"]
mod tests;

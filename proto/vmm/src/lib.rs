//! The daemon↔VMM contract, spoken on the control socket of each `hull-vmm`.
//!
//! A message is a `u32` length (little endian, at most [`MAX_MESSAGE`]) and
//! JSON. The daemon sends a [`Request`], the VMM answers each with one
//! [`Response`], in order. File descriptors travel as `SCM_RIGHTS` with the
//! first byte of a request; configuration refers to them by their index
//! ([`FdIndex`]), so the VMM never opens a path that it was not born with.
//!
//! The socket listens for the life of the VM: a restarted daemon connects again. It may be a newer one than
//! the VMM, so a field that is added to what a VMM says has a default.
//! When the VM ends, the VMM writes an [`ExitReport`] to the file given on its
//! command line, closes its connections and exits.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]
#![forbid(unsafe_code)]

pub mod fs;

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The contract version that this build speaks.
pub const VERSION: u32 = 1;
/// The largest message, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;
/// The most file descriptors that one request carries (the kernel's SCM_MAX_FD).
pub const MAX_FDS: usize = 253;
/// The number of virtio-mmio slots of every VM.
pub const SLOTS: u8 = 32;

/// The longest label of a snapshot, in bytes.
pub const MAX_LABEL: usize = 256;

/// What pluggable memory is a multiple of, in MiB: the guest's kernel (x86-64) adds and removes so much at a time.
pub const PLUG_MIB: u64 = 128;
/// What a guest has of it is a multiple of that, in MiB: a huge page.
pub const PLUG_STEP_MIB: u64 = 2;

/// The most pairs of queues that a network card has.
pub const MAX_QUEUE_PAIRS: usize = 8;

/// A position in the list of file descriptors sent with the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(pub u32);

/// What the daemon asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Version handshake; the first request of every connection.
    Hello {
        /// The daemon's contract version.
        version: u32,
    },
    /// Describes the VM; once, before [`Request::Start`].
    Configure(Box<VmConfig>),
    /// Makes the VM from a snapshot, instead of [`Request::Configure`].
    Restore(Box<RestoreConfig>),
    /// Boots the VM, or lets one that was restored go on.
    Start,
    /// Puts a device behind an empty slot. The guest sees it once its agent
    /// probes the slot.
    Attach {
        /// The slot, below [`SLOTS`].
        slot: u8,
        /// The device.
        device: DeviceConfig,
    },
    /// Takes the device out of a slot, after the guest released it.
    Detach {
        /// The slot.
        slot: u8,
    },
    /// Bounds the pluggable memory ([`Pluggable`]) that the guest has: at least and at most so many MiB of
    /// it. Between the two the guest says how much it wants. No effect without any.
    Plug {
        /// What the guest is to have whether it wants it or not.
        least_mib: u64,
        /// What it may have; not below `least_mib`.
        most_mib: u64,
    },
    /// Stops all vCPUs and drains device I/O; no effect when paused.
    Pause,
    /// Lets the vCPUs run again; no effect when running.
    Resume,
    /// Writes the guest's memory to an empty file while it runs, for a [`Request::Save`] that has less to
    /// write: answered with [`Response::Copied`]. What the guest writes meanwhile may be in the file or not.
    Copy {
        /// As in [`Request::Save`].
        memory: FdIndex,
    },
    /// Writes a snapshot of a VM that is paused, which stays so. Refused as long as a device waits for
    /// another process.
    Save {
        /// What the snapshot is of, up to [`MAX_LABEL`] bytes: who restores it must give the same.
        label: String,
        /// An empty file for the state of CPUs and devices.
        state: FdIndex,
        /// An empty file for the guest's memory. It has holes where memory is zeros.
        memory: FdIndex,
        /// Parts of the file, in bytes and whole pages, that the guest may have written to since
        /// [`Request::Copy`] began to write the file; none: nothing did, and it is empty.
        #[serde(default)]
        changed: Option<Vec<Range<u64>>>,
    },
    /// Asks for counters.
    Metrics,
    /// Ends the VM at once; the answer comes before the process exits.
    Stop,
}

/// The VMM's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Ok,
    /// To [`Request::Hello`].
    Hello {
        /// The VMM's contract version.
        version: u32,
        /// What the VM is doing.
        state: VmState,
    },
    /// To [`Request::Metrics`].
    Metrics(Box<Metrics>),
    /// To [`Request::Copy`]: where what is in the file stands in the VMM's memory.
    Copied(Vec<CopiedMemory>),
    /// The request failed and had no effect.
    Error {
        /// What kind of failure.
        kind: ErrorKind,
        /// Why, for a person.
        message: String,
    },
}

/// A part of a guest's memory in a file and in the VMM, in bytes and whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedMemory {
    /// Where it begins in the file.
    pub offset: u64,
    /// Where it begins in the VMM's memory.
    pub address: u64,
    /// Its length.
    pub length: u64,
}

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Waiting for [`Request::Configure`].
    Empty,
    /// Waiting for [`Request::Start`].
    Configured,
    /// vCPUs run.
    Running,
    /// vCPUs stand still.
    Paused,
}

/// Kinds of failure that the daemon tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request is malformed, or refers to what is not there.
    Invalid,
    /// Not possible in this [`VmState`].
    State,
    /// The slot is taken, or its device is in use: try again.
    Busy,
    /// The host has no memory (or other resource) for it.
    NoResources,
    /// /dev/kvm is missing, forbidden or can't run the VM.
    Kvm,
    /// Anything else.
    Internal,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Virtual CPUs that the guest may bring online; at least 1.
    pub vcpus: u8,
    /// Virtual CPUs online at boot; the agent brings up the others.
    pub boot_vcpus: u8,
    /// Memory in MiB; at least 32.
    pub memory_mib: u64,
    /// Memory that it may have beside that; none: it never has more.
    pub pluggable: Option<Pluggable>,
    /// An uncompressed ELF kernel.
    pub kernel: FdIndex,
    /// An uncompressed initrd, for debugging.
    pub initrd: Option<FdIndex>,
    /// What is added to the VMM's own kernel command line
    /// (e.g. `root=/dev/vda rootfstype=erofs ro init=/init`).
    pub cmdline: String,
    /// Where the guest's serial console is written; none: discarded.
    pub serial: Option<FdIndex>,
    /// Devices that are there at boot, by slot.
    pub devices: Vec<(u8, DeviceConfig)>,
}

/// A VM that goes on where a snapshot was made of one. What the snapshot has is not said again: CPUs,
/// memory, the guest's kernel and what it was doing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreConfig {
    /// That of [`Request::Save`].
    pub label: String,
    /// The state of CPUs and devices.
    pub state: FdIndex,
    /// The guest's memory, which nobody may change from now on. The guest's own writes don't reach the
    /// file.
    pub memory: FdIndex,
    /// Parts of the memory's file, in bytes and whole pages, that the guest is going to write to: it gets its
    /// copies of them at once, which costs less than one by one.
    #[serde(default)]
    pub written: Vec<Range<u64>>,
    /// As in [`VmConfig`]: as much of it as the one had that was saved, if it had any.
    pub pluggable: Option<Pluggable>,
    /// Where the guest's serial console is written; none: discarded.
    pub serial: Option<FdIndex>,
    /// What is behind the slots that had a device: the same ones, whose files may be others. A network card
    /// may have no taps: then its link is down, and address and MTU are those that were saved.
    pub devices: Vec<(u8, DeviceConfig)>,
}

/// Memory that a guest gets and gives back while it runs, by [`DeviceConfig::Memory`]: none of it at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pluggable {
    /// How much there can ever be, in MiB: a multiple of [`PLUG_MIB`].
    pub mib: u64,
    /// How the guest says how much of it it wants: it asks for a vsock connection to this port plus so many
    /// MiB, and is refused as with any port. The lowest 24 bits are 0.
    pub port: u32,
}

/// A virtio device and its host resources.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceConfig {
    /// virtio-blk.
    Block {
        /// Up to 20 bytes, readable in the guest (`/sys/block/vdX/serial`).
        serial: String,
        /// Refuse writes (`VIRTIO_BLK_F_RO`, enforced in the VMM).
        readonly: bool,
        /// The disk: these extents one after another, each a multiple of 512 bytes.
        extents: Vec<Extent>,
    },
    /// virtio-pmem: memory of the guest that is the host's page cache of these files, read-only.
    Pmem {
        /// Its contents: these extents one after another, each whole pages of 4096 bytes, then
        /// zeros up to a multiple of 2 MiB.
        extents: Vec<Extent>,
    },
    /// virtio-net on a tap.
    Net {
        /// A tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`; for more than one pair of queues
        /// with `IFF_MULTI_QUEUE` too, once for each pair, of which there may be [`MAX_QUEUE_PAIRS`].
        taps: Vec<FdIndex>,
        /// The guest's MAC address.
        mac: [u8; 6],
        /// MTU offered to the guest.
        mtu: Option<u16>,
    },
    /// virtio-rng fed from the host's `getrandom`.
    Rng,
    /// virtio-mem over [`VmConfig::pluggable`].
    Memory,
    /// virtio-balloon that inflates never: the guest tells by it which pages are free, and the host gets them.
    Balloon,
    /// virtio-vsock. The host side is a Unix socket: connect, send
    /// `CONNECT <port>\n`, read `OK <port>\n`, then bytes both ways.
    Vsock {
        /// The guest's context id; above 2.
        cid: u32,
        /// A listening Unix stream socket.
        listener: FdIndex,
    },
    /// virtio-fs whose files are served by another process ([`fs`]).
    Fs {
        /// The name by which the guest mounts it, up to 36 bytes.
        tag: String,
        /// A connected Unix seqpacket socket: a FUSE request or reply is a packet.
        socket: FdIndex,
    },
}

/// A part of a file that is a part of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// The file; several extents may share one.
    pub file: FdIndex,
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Counters of a VM since it started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// vCPU exits to user space by reason (`mmio_read`, `pio_write`, `hlt`, …).
    pub exits: Vec<(String, u64)>,
    /// Nanoseconds from process start to the first guest entry, by phase
    /// (`jail`, `memory`, `kvm`, `kernel_load`, `devices`, `total`).
    pub start_ns: Vec<(String, u64)>,
    /// Pluggable memory that the guest has now, and is to have, in MiB. VMMs of earlier versions have none.
    #[serde(default)]
    pub plugged_mib: (u64, u64),
    /// Per slot: kind of device, requests handled, bytes moved, interrupts raised, errors.
    pub devices: Vec<DeviceMetrics>,
}

/// Counters of a device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceMetrics {
    /// The slot.
    pub slot: u8,
    /// `block`, `pmem`, `net`, `rng`, `vsock`, `fs`, `memory`, `balloon`.
    pub kind: String,
    /// Guest notifications handled.
    pub notifications: u64,
    /// Descriptor chains completed.
    pub requests: u64,
    /// Bytes that the guest sent or wrote.
    pub bytes_out: u64,
    /// Bytes that the guest received or read.
    pub bytes_in: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Requests answered with an error, or malformed.
    pub errors: u64,
}

/// Why a VM ended; the last thing a VMM writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    /// The reason.
    pub reason: ExitReason,
    /// Details, for a person.
    pub message: String,
}

/// Reasons why a VM ended. A report that is missing or empty means that the VMM was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The daemon asked for it ([`Request::Stop`] or SIGTERM).
    Stopped,
    /// The guest powered off, rebooted or died of a triple fault.
    GuestShutdown,
    /// The guest's kernel panicked, as far as the VMM can tell.
    GuestPanic,
    /// KVM could not go on (`KVM_EXIT_INTERNAL_ERROR`, `KVM_EXIT_FAIL_ENTRY`).
    KvmError,
    /// The VMM failed.
    VmmError,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "it was stopped",
            Self::GuestShutdown => "its guest shut down",
            Self::GuestPanic => "its guest's kernel panicked",
            Self::KvmError => "KVM can't go on",
            Self::VmmError => "the VMM failed",
        })
    }
}

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The length prefix is above [`MAX_MESSAGE`].
    #[error("control message of {0} bytes is too large")]
    TooLarge(usize),
    /// The body is not the JSON of the type expected.
    #[error("decode control message")]
    Json(#[from] serde_json::Error),
}

/// Encodes a message with its length prefix.
///
/// # Errors
/// [`CodecError::TooLarge`] above [`MAX_MESSAGE`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= MAX_MESSAGE)
        .ok_or(CodecError::TooLarge(body.len()))?;
    Ok([&length.to_le_bytes(), body.as_slice()].concat())
}

/// Returns the length of the body that follows a message's four length bytes.
///
/// # Errors
/// [`CodecError::TooLarge`] above [`MAX_MESSAGE`].
pub fn body_length(prefix: [u8; 4]) -> Result<usize, CodecError> {
    let length = u32::from_le_bytes(prefix) as usize;
    if length > MAX_MESSAGE {
        return Err(CodecError::TooLarge(length));
    }
    Ok(length)
}

/// Decodes the body of a message.
///
/// # Errors
/// [`CodecError::Json`] when it is not a `T`.
pub fn decode<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T, CodecError> {
    Ok(serde_json::from_slice(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_wire() {
        let request = Request::Attach {
            slot: 4,
            device: DeviceConfig::Block {
                serial: "image".into(),
                readonly: true,
                extents: vec![Extent {
                    file: FdIndex(0),
                    offset: 0,
                    length: 4096,
                }],
            },
        };
        let frame = encode(&request).unwrap();
        let length = body_length(frame[..4].try_into().unwrap()).unwrap();
        assert_eq!(length, frame.len() - 4);
        assert_eq!(decode::<Request>(&frame[4..]).unwrap(), request);
    }

    /// VMMs outlive daemons, and so does what they say.
    #[test]
    fn answers_of_earlier_versions_are_read() {
        let counters = br#"{"exits":[["hlt",3]],"start_ns":[],"devices":[]}"#;
        let counters: Metrics = decode(counters).unwrap();
        assert_eq!(counters.exits, [("hlt".to_owned(), 3)]);
        assert_eq!(counters.plugged_mib, (0, 0));
    }

    #[test]
    fn an_oversized_length_is_refused() {
        assert!(matches!(
            body_length(u32::MAX.to_le_bytes()),
            Err(CodecError::TooLarge(_))
        ));
    }
}

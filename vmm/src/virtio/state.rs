//! What a snapshot keeps of devices: no file descriptors, no paths, and no queues, which the transport
//! saves.

use serde::{Deserialize, Serialize};

use crate::virtio::counters::Counters;

/// A device's own part of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// virtio-blk.
    Block(BlockState),
    /// virtio-net.
    Net(NetState),
    /// virtio-rng.
    Rng(RngState),
    /// virtio-vsock.
    Vsock(VsockState),
    /// virtio-fs.
    Fs(FsState),
    /// virtio-pmem.
    Pmem(PmemState),
    /// virtio-mem.
    Memory(MemoryState),
    /// virtio-balloon.
    Balloon(BalloonState),
}

/// What is kept of a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// The serial number.
    pub serial: String,
    /// Whether writes are refused.
    pub readonly: bool,
    /// Length of the disk in bytes.
    pub length: u64,
    /// What was counted so far.
    pub counters: Counters,
}

/// What is kept of a network card. A frame that waits for the guest is not in it: networks lose frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The MTU offered to the guest.
    pub mtu: Option<u16>,
    /// How many pairs of queues it has.
    pub pairs: u16,
    /// How many of them the driver uses.
    pub used_pairs: u16,
}

/// What is kept of an entropy source.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    /// What was counted so far.
    pub counters: Counters,
}

/// What is kept of a socket device. Connections are not in it: their clients stay with the process that
/// had them, and a restored guest is told to drop its ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub cid: u32,
    /// The host port of the last connection, so that a restored device uses others.
    pub last_port: u32,
}

/// What is kept of a file system. What the guest has open is the file server's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// The name by which the guest mounts it.
    pub tag: String,
    /// What was counted so far.
    pub counters: Counters,
}

/// What is kept of persistent memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemState {
    /// Its address in the guest.
    pub start: u64,
    /// Its length in bytes.
    pub length: u64,
    /// What was counted so far.
    pub counters: Counters,
}

/// What is kept of pluggable memory. Its contents are in the file of the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    /// Which blocks the guest has.
    pub plugged: Vec<bool>,
    /// How much it is to have, in bytes, as it can read.
    pub requested: u64,
    /// How much it wants, and has at least and at most, in MiB.
    pub bounds: (u64, u64, u64),
    /// What was counted so far.
    pub counters: Counters,
}

/// What is kept of a balloon. Pages that were given back are holes in the memory that is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// What was counted so far.
    pub counters: Counters,
}

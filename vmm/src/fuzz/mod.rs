//! Fuzz targets: bytes that a hostile guest, a client or a lost process beside it may send, and this crate's
//! code that reads them. Each is beside what it runs, in a file `fuzz.rs`; what a driver does to a device
//! as the input says is in [`guest`].
//!
//! `make fuzz` runs them (tests/fuzz), and the test below over kept inputs.

pub(crate) mod guest;

use crate::control::connection;
use crate::legacy::{ioapic, ports};
use crate::virtio::{balloon, block, fs, mem, mmio, net, pmem, queue, rng, vsock};
use crate::{slots, snapshot};

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("vmm-balloon", balloon::fuzz::device),
    ("vmm-block", block::fuzz::device),
    ("vmm-control", connection::fuzz::messages),
    ("vmm-fs", fs::fuzz::device),
    ("vmm-ioapic", ioapic::fuzz::registers),
    ("vmm-memory", mem::fuzz::device),
    ("vmm-mmio", mmio::fuzz::registers),
    ("vmm-net", net::fuzz::device),
    ("vmm-net-header", net::fuzz::header),
    ("vmm-pmem", pmem::fuzz::device),
    ("vmm-ports", ports::fuzz::accesses),
    ("vmm-queue", queue::fuzz::ring),
    ("vmm-rng", rng::fuzz::device),
    ("vmm-slots", slots::fuzz::slots),
    ("vmm-snapshot", snapshot::fuzz::state),
    ("vmm-vsock", vsock::fuzz::device),
    ("vmm-vsock-connection", vsock::fuzz::connection),
    ("vmm-vsock-packet", vsock::fuzz::chains),
];

#[test]
fn what_others_send_does_no_harm() {
    hull_corpus::replay(TARGETS);
}

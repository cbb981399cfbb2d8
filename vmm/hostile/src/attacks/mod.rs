//! The attacks, a file for each kind of device.

mod disks;
mod ends;
mod files;
mod memory;
mod network;
mod platform;
mod random;
mod registers;
mod rings;
mod slots;
mod sockets;

use crate::attack::{Group, group};

/// All attacks. Those that end the guest are alone.
pub static GROUPS: [Group; 42] = [
    group("rings of rng", 1, &rings::RNG_RINGS),
    group("rings of block", 6, &rings::BLOCK),
    group("rings of pmem", 8, &rings::PMEM_RINGS),
    group("rings of net, receive", 16, &rings::NET_RECEIVE),
    group("rings of net, transmit", 16, &rings::NET_TRANSMIT),
    group("rings of net, control", 16, &rings::NET_CONTROL),
    group("rings of vsock, receive", 32, &rings::VSOCK_RECEIVE),
    group("rings of vsock, transmit", 32, &rings::VSOCK_TRANSMIT),
    group("rings of vsock, events", 32, &rings::VSOCK_EVENT),
    group("rings of fs, urgent", 64, &rings::FS_URGENT),
    group("rings of fs, requests", 64, &rings::FS_REQUESTS),
    group("registers", 0x7f, &registers::ATTACKS),
    group("block", 6, &disks::ATTACKS),
    group("pmem", 8, &memory::ATTACKS),
    group("net", 16, &network::ATTACKS),
    group("vsock", 32, &sockets::ATTACKS),
    group("fs", 64, &files::ATTACKS),
    group("platform", 1, &platform::ATTACKS),
    group("slots", 3, &slots::ATTACKS),
    group("random", 0x1, &random::RNG),
    group("random", 0x2, &random::BLOCK),
    group("random", 0x4, &random::FIXED_BLOCK),
    group("random", 0x8, &random::PMEM),
    group("random", 0x10, &random::NET),
    group("random", 0x20, &random::VSOCK),
    group("random", 0x40, &random::FS),
    group("random", 0x7f, &random::ALL),
    group("processors", 0x7f, &platform::PROCESSORS),
    group("hypervisor", 0x7f, &platform::CALLS),
    group("end", 0x7f, &ends::TRIPLE_FAULT),
    group("end", 0x7f, &ends::KEYBOARD_RESET),
    group("end", 0x7f, &ends::RESET_PORT),
    group("end", 0x7f, &ends::RUN_REGISTERS),
    group("end", 0x7f, &ends::RUN_NOTHING),
    group("end", 0x7f, &ends::PAGE_TABLES_IN_REGISTERS),
    group("end", 0x7f, &ends::PAGE_TABLES_NOWHERE),
    group("end", 0x7f, &ends::STACK_IN_FILES),
    group("end", 0x7f, &ends::HALT_WITHOUT_INTERRUPTS),
    group("end", 0x7f, &ends::SPIN_WITHOUT_INTERRUPTS),
    group("end", 0x7f, &ends::RESET_IN_A_RESET),
    group("end", 0x7f, &ends::OTHER_PROCESSOR_RESETS),
    group("end", 0x7f, &ends::FALSE_PANIC),
];

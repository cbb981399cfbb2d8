//! The attacks, a file for each kind of device.

mod balloons;
mod disks;
mod ends;
mod files;
mod memory;
mod network;
mod platform;
mod plugging;
mod random;
mod registers;
mod rings;
mod slots;
mod sockets;

use crate::attack::{ALL, Group, group};

/// All attacks. Those that end the guest are alone.
pub static GROUPS: [Group; 49] = [
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
    group("rings of balloon, inflate", 128, &rings::BALLOON_INFLATE),
    group("rings of balloon, reports", 128, &rings::BALLOON_REPORTS),
    group("rings of memory", 256, &rings::PLUGGED_RINGS),
    group("registers", ALL, &registers::ATTACKS),
    group("block", 6, &disks::ATTACKS),
    group("pmem", 8, &memory::ATTACKS),
    group("net", 16, &network::ATTACKS),
    group("vsock", 32, &sockets::ATTACKS),
    group("fs", 64, &files::ATTACKS),
    group("balloon", 128, &balloons::ATTACKS),
    group("memory", 256, &plugging::ATTACKS),
    group("platform", 1, &platform::ATTACKS),
    group("slots", 3, &slots::ATTACKS),
    group("random", 0x1, &random::RNG),
    group("random", 0x2, &random::BLOCK),
    group("random", 0x4, &random::FIXED_BLOCK),
    group("random", 0x8, &random::PMEM),
    group("random", 0x10, &random::NET),
    group("random", 0x20, &random::VSOCK),
    group("random", 0x40, &random::FS),
    group("random", 0x80, &random::BALLOON),
    group("random", 0x100, &random::PLUGGED),
    group("random", ALL, &random::ALL),
    group("processors", ALL, &platform::PROCESSORS),
    group("hypervisor", ALL, &platform::CALLS),
    group("end", ALL, &ends::TRIPLE_FAULT),
    group("end", ALL, &ends::KEYBOARD_RESET),
    group("end", ALL, &ends::RESET_PORT),
    group("end", ALL, &ends::RUN_REGISTERS),
    group("end", ALL, &ends::RUN_NOTHING),
    group("end", ALL, &ends::PAGE_TABLES_IN_REGISTERS),
    group("end", ALL, &ends::PAGE_TABLES_NOWHERE),
    group("end", ALL, &ends::STACK_IN_FILES),
    group("end", ALL, &ends::HALT_WITHOUT_INTERRUPTS),
    group("end", ALL, &ends::SPIN_WITHOUT_INTERRUPTS),
    group("end", ALL, &ends::RESET_IN_A_RESET),
    group("end", ALL, &ends::OTHER_PROCESSOR_RESETS),
    group("end", ALL, &ends::FALSE_PANIC),
];

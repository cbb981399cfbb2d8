//! Pods from the outside: real records, disks, logs and processes; a VMM and a guest that are
//! neither (`examples/fake-vmm`), so that everything can go wrong on purpose and without KVM.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod apparmor;
mod checkpoints;
mod common;
mod faults;
mod hostile;
mod life;
mod local;
mod mute;
mod outputs;
mod processes;
mod recovery;
mod sessions;
mod stats;
mod templates;
mod updates;
mod volumes;

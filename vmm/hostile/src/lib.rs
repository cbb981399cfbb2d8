//! A guest that attacks the devices of `hull-vmm` from inside, with a kernel's rights.
//!
//! It is these sources, compiled a second time by `build.rs`: freestanding, loaded as the kernel by the boot
//! protocol of Linux. What the host knows of it is [`attacks::GROUPS`], the attacks by name, and [`PROGRAM`].
//! `vmm/tests/hostile` runs it and watches what becomes of the VMM.
//!
//! Read in this order: [`attack`] (what it is and what must come of it), `machine` (the processor, the
//! second processor, a driver of virtio-mmio that breaks every rule it is told to), then one of [`attacks`].
//!
//! A group of attacks runs in one VM. Host and guest agree on little:
//!
//! - the command line has `group=N`, `seed=N`, `steps=N`
//! - for each attack the guest prints its [`attack::Outcome`], a byte, then which of [`attack::TARGETS`] still
//!   work, one bit each in two bytes (all of them are looked at after the last attack, before that the group's)
//! - after the last one it stands still

#![cfg_attr(freestanding, no_std, no_main)]

pub mod attack;
pub mod attacks;
mod guest;
mod machine;

/// The guest, an ELF file.
#[cfg(not(freestanding))]
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest"));

pub use guest::run;

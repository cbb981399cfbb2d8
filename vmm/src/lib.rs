//! Hull's VMM: one process, one KVM virtual machine, one pod.
//!
//! Read in this order: [`machine`] (how a VM is put together), [`event_loop`] (the main thread: I/O and
//! answers to the daemon), [`kvm::vcpu`] (the threads that run the guest), [`slots`], [`service`]
//! and [`virtio`] (devices), [`file_regions`] (files as memory), [`snapshot`] (a machine as bytes), then what a guest finds when it starts:
//! [`layout`], [`boot`], [`legacy`].
//!
//! ```text
//!   daemon ── control socket ──▶ event loop ──▶ machine ──▶ slots ──▶ device   (block, net, …)
//!                                    ▲                        ▲         │
//!   taps, sockets, doorbells ────────┘        vCPU threads ───┘         ▼
//!                                                  ▲                  IOAPIC
//!                                                  └───── KVM ◀─────────┘ messages
//! ```
//!
//! Deliberately not here: PCI, ACPI, PIT, PIC, a keyboard; vhost-user and any other memory that is
//! shared with a second process; async runtimes; opening of files by name (the daemon sends
//! descriptors, so a VMM can be locked in).

mod areas;
mod boot;
mod cli;
mod control;
mod devices;
mod direct;
mod epolls;
mod event_loop;
mod exit;
mod extent;
mod fds;
mod file_regions;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod jail;
mod kvm;
mod layout;
mod legacy;
mod log;
mod machine;
mod memory;
mod pluggable;
mod probe;
mod seccomp;
mod service;
mod slots;
mod snapshot;
mod sync;
mod virtio;

pub use cli::main;

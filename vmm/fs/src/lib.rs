//! Hull's file server: one for each pod that mounts paths of the host.
//!
//! ```text
//!   daemon ── fs.sock ──▶ manager ── clones of mounts ──▶ ┌ namespaces of its own ┐
//!                            │       one-line commands    │  server: no root of   │
//!                            └───────────────────────────▶│  the host, few powers │
//!   hull-vmm ◀────────── FUSE, a packet each ────────────▶└───────────────────────┘
//! ```
//!
//! Read in this order: [`manager`] (privileged; reads nothing that a guest wrote), [`share`] (what
//! a share is to the kernel), [`jail`] (what the server may do), [`server`] (its threads), [`files`]
//! (what it serves), [`bounded`] and [`held`] (how much of that at a time), [`life`], [`private`] and [`keep_cache`]
//! (for how long the guest may believe it), [`filter`] (which FUSE requests it handles at all),
//! [`session`] (how the guest's kernel and it begin), [`saved`] and [`renumber`] (how a guest goes on that began
//! with another server).
//!
//! A share is a detached clone of the host's mounts that is moved into the server's mount
//! namespace: nothing is ever mounted on the host, and all of it dies with the server. What is
//! read-only is so by the host's kernel.
//!
//! Not here: file locks (the guest's kernel has them among its containers), DAX, device nodes,
//! sockets and FIFOs of the host (the other end would be in another kernel).

mod bounded;
mod cli;
mod files;
mod filter;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod held;
mod jail;
mod keep_cache;
mod life;
mod manager;
mod owners;
mod packet;
mod private;
mod renumber;
mod saved;
mod seccomp;
mod server;
mod session;
mod share;

pub use cli::main;

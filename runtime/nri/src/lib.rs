//! NRI (Node Resource Interface) for pods in VMs: the socket at which plugins of the node, as containerd and
//! CRI-O have them, register; what they are told of pods and containers, and what they may change.
//!
//! Read in this order: [`plugins`] (all of them: who is called when), [`plugin`] (one: registration, calls),
//! [`launch`] (those that are installed), [`outcome`] (what several want together), [`limits`] and [`apply`]
//! (what of it a VM can have), [`describe`] (what they are told), [`peer`] and [`mux`] (ttrpc over one socket).
//!
//! Plugins are the administrator's, but neither their bugs nor their end may harm pods: every call has a time
//! limit, and who exceeds it, or says what can't be, is dropped.
//!
//! Not here: pods. What plugins want is asked of a [`Node`] ([`node`]).

#![forbid(unsafe_code)]

mod apply;
pub mod describe;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod launch;
mod limits;
mod mux;
mod node;
mod outcome;
mod peer;
mod plugin;
mod plugins;

pub use self::{
    describe::{Command, Pod, Told},
    node::{Config, Node, Refusal, Times},
    plugins::{Creation, Plugins},
};

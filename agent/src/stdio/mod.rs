//! Bytes between the processes of the guest and the host.
//!
//! [`Stdio`] belongs to one process ([`process`]): its outputs with what the host has not
//! stored yet ([`output`], [`buffer`]), its input ([`input`]) and its terminal.
//! [`server`] joins it to the connections that the host opens ([`connection`], [`dial`], [`shell`]).

mod buffer;
pub(crate) mod connection;
mod dial;
mod fd;
mod input;
mod output;
mod process;
pub(crate) mod server;
pub(crate) mod shell;

pub(crate) use self::{
    input::InputEnd,
    process::{Directory, ProcessEnds, Stdio, Wanted},
};

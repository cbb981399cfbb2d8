//! The control socket: [`connection`] is the framing, [`answer`] what failures are called.

pub(crate) mod answer;
pub(crate) mod connection;

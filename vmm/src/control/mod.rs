//! The control socket: [`connection`] is the framing, [`answer`] what failures are called.

pub mod answer;
pub mod connection;

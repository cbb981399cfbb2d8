//! Pod sandboxes: one file per verb, and the choice of the handler.

pub(crate) mod checkpoint;
pub(crate) mod handler;
pub(crate) mod list;
pub(crate) mod metrics;
pub(crate) mod port_forward;
pub(crate) mod remove;
pub(crate) mod run;
pub(crate) mod stats;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod update;

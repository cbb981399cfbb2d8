//! Containers: one file per verb.

pub(crate) mod create;
pub(crate) mod events;
pub(crate) mod exec_sync;
pub(crate) mod list;
pub(crate) mod remove;
pub(crate) mod reopen_log;
pub(crate) mod start;
pub(crate) mod stats;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod update;

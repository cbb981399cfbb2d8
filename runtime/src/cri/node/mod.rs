//! The node: one file per verb.

pub(crate) mod runtime_config;
pub(crate) mod status;
pub(crate) mod update_config;
pub(crate) mod version;

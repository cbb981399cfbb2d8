//! What a sandbox has of the host: how it comes, and how it goes.

pub(crate) mod bringup;
pub(crate) mod teardown;

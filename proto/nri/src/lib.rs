//! The contract with NRI plugins: the messages, generated from `proto/nri.proto`, and the names of the services.
//! There is no logic here.

#![forbid(unsafe_code)]

/// The messages.
#[allow(warnings, clippy::all, clippy::pedantic, reason = "generated code")]
#[allow(
    clippy::allow_attributes,
    reason = "which lints fire varies with the generator"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/nri.rs"));
}
pub use generated::*;

/// The service that the daemon has for plugins.
pub const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";
/// The service that a plugin has for the daemon.
pub const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
/// The connection over which the daemon calls the plugin.
pub const PLUGIN_CONNECTION: u32 = 1;
/// The connection over which the plugin calls the daemon.
pub const RUNTIME_CONNECTION: u32 = 2;
/// Where plugins look for the daemon, unless they are told otherwise.
pub const SOCKET: &str = "/var/run/nri/nri.sock";

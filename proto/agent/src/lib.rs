//! The host↔guest contract: RPC messages and byte streams.
//!
//! Read `proto/agent.proto` first, then [`stream`]. There is no logic here but
//! the encoding of streams and of a status's detail, because both sides must agree on it.

#![forbid(unsafe_code)]

pub mod not_executed;
pub mod stream;

/// The messages, generated from `proto/agent.proto`, which documents them.
#[allow(warnings, clippy::all, clippy::pedantic, reason = "generated code")]
#[allow(
    clippy::allow_attributes,
    reason = "which lints fire varies with the generator"
)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The ttrpc service, client (`AgentClient`) and server (`create_agent`).
#[allow(warnings, clippy::all, clippy::pedantic, reason = "generated code")]
#[allow(
    clippy::allow_attributes,
    reason = "which lints fire varies with the generator"
)]
pub mod rpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// The contract version that this build speaks (`HelloRequest.version`).
pub const VERSION: u32 = 2;
/// The feature (`HelloResponse.features`) of guests whose kernel has AppArmor on.
pub const APPARMOR: &str = "apparmor";
/// The AppArmor profile that such a guest has from its boot on, for containers that name none.
pub const DEFAULT_PROFILE: &str = "hull-default";
/// The vsock port of the agent's ttrpc server.
pub const RPC_PORT: u32 = 1024;
/// The vsock port of the agent's byte streams.
pub const STREAM_PORT: u32 = 1025;
/// The guest says how much memory it wants beside that of its start by asking for a connection to this port of
/// the host plus so many MiB. It is refused in any case.
pub const MEMORY_PORT: u32 = 1 << 28;
/// The guest's context id: each VM has its own vsock device, so it never varies.
pub const GUEST_CID: u32 = 3;

//! Pods: one microVM each, and the containers in it.
//!
//! Read in this order: [`Pods`] (what callers use), `lifecycle` (what may happen when, as pure
//! functions), `driver` (the task that owns a pod), `sandbox` and `container` (how what they are made of comes and goes), `session`,
//! `storage`, `network`, `logs`, `record` and `recover` (what outlives the daemon). What is asked for and
//! told is in `hull-spec`, the VMM and the guest's agent in `hull-vm`.
//!
//! Not here: CRI types, gRPC codes, registries, CNI.

#![forbid(unsafe_code)]

mod checkpoint;
mod command;
mod container;
mod copies;
mod driver;
mod events;
mod exec;
mod lifecycle;
mod logs;
mod network;
mod node;
mod pods;
mod ports;
mod record;
mod recover;
mod registry;
mod sandbox;
pub mod session;
mod starts;
pub mod stats;
mod storage;
mod templates;
mod users;

/// The versions of what a daemon leaves to the next one: the records of pods, and the contracts with the VMMs and
/// agents that go on meanwhile.
pub const FORMATS: [(&str, u32); 3] = [
    ("records", record::VERSION),
    ("vmm", hull_proto_vmm::VERSION),
    ("agent", hull_proto_agent::VERSION),
];

pub use checkpoint::checkpoint_pause;
pub use command::Admission;
pub use container::restored::Asked;
pub use events::{EventKind, Events, EventsLost, PodEvent};
pub use pods::Pods;
pub use ports::{PodImages, PodNetworking, PodProcesses};
pub use session::{
    AttachControl, AttachSession, ExecControl, ExecSession, PodConnection, SessionInput,
    SessionOutput, SessionStreams,
};

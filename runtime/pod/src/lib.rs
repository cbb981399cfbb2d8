//! Pods: one microVM each, and the containers in it.
//!
//! Read in this order: [`Pods`] (what callers use), [`spec`] and [`info`] (what goes in and comes
//! out), `lifecycle` (what may happen when, as pure functions), `driver` (the task that owns a
//! pod), `bringup` (the stages of a start), `vm` (the VMM process and its control
//! socket), `guest` (the agent, its events and byte streams), `session`, `storage`, `logs`, `oci_spec`,
//! `record` and `recover` (what outlives the daemon).
//!
//! Not here: CRI types, gRPC codes, registries, CNI.

#![forbid(unsafe_code)]

mod beneath;
mod blocking;
mod bringup;
mod cgroup;
mod clock;
mod config;
mod copies;
mod driver;
mod error;
mod events;
mod exec;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod guest;
mod id;
pub mod info;
mod lifecycle;
mod logs;
mod node;
mod oci_spec;
mod panics;
mod pods;
mod ports;
mod record;
mod recover;
mod registry;
mod resources;
pub mod session;
mod signal;
pub mod spec;
mod starts;
pub mod stats;
mod storage;
mod validate;
mod vm;

pub use config::{ImageDevice, PodsConfig};
pub use error::{ErrorKind, ObjectKind, PodError};
pub use events::{EventKind, Events, EventsLost, PodEvent};
pub use id::{ContainerId, PodId};
pub use info::{
    BootTimes, ContainerInfo, ContainerState, ContainerUser, ExecOutput, GuestInfo, SandboxInfo,
    SandboxState, VmInfo,
};
pub use pods::Pods;
pub use ports::{PodImages, PodNetworking};
pub use session::{
    AttachControl, AttachSession, ExecControl, ExecSession, PodConnection, SessionInput,
    SessionOutput, SessionStreams,
};
pub use spec::{
    AppArmor, Capabilities, ContainerMetadata, ContainerSecurity, ContainerSpec, DeviceSpec, Dns,
    GroupsPolicy, HugepageLimit, IdRange, ImageRequest, MountPropagation, MountSource, MountSpec,
    NamespaceMode, Namespaces, PortMapping, Resources, SandboxMetadata, SandboxSecurity,
    SandboxSpec, Seccomp, UserNamespace,
};

//! Pods: one microVM each, and the containers in it.
//!
//! Read in this order: [`Pods`] (what callers use), [`spec`] and [`info`] (what goes in and comes
//! out), `lifecycle` (what may happen when, as pure functions), `driver` (the task that owns a
//! pod), `bringup` and `teardown` (the stages of a sandbox), `vm` (the VMM process and its control
//! socket), `guest` (the agent, its events and byte streams), `storage`, `logs`, `oci_spec`,
//! `record` and `recover` (what outlives the daemon).
//!
//! Not here: CRI types, gRPC codes, registries, CNI.

#![forbid(unsafe_code)]

mod config;
mod error;
mod id;
pub mod info;
mod pods;
mod ports;
pub mod spec;

pub use config::PodsConfig;
pub use error::{ErrorKind, ObjectKind, PodError};
pub use id::{ContainerId, PodId};
pub use info::{
    BootTimes, ContainerInfo, ContainerState, ContainerUser, ExecOutput, GuestInfo, PodEvent,
    SandboxInfo, SandboxState, VmInfo,
};
pub use pods::Pods;
pub use ports::{PodImages, PodNetworking};
pub use spec::{
    AppArmor, Capabilities, ContainerMetadata, ContainerSecurity, ContainerSpec, DeviceSpec, Dns,
    GroupsPolicy, HugepageLimit, ImageRequest, MountPropagation, MountSource, MountSpec,
    NamespaceMode, Namespaces, PortMapping, Resources, SandboxMetadata, SandboxSecurity,
    SandboxSpec, Seccomp,
};

//! Containers: each owned by one task.
//!
//! Read in this order: [`containers`] (all of them), [`task`] (what a container can do, and its states),
//! [`create`] (how one comes to be, and how that is undone), [`exec`] and [`family`],
//! [`process`] (from start to `Exited`), [`launch`] and [`child`] (a helper makes each process),
//! [`make`] (what happens to it on the way), then the leaves [`spec`], [`user`], [`rootfs`],
//! [`volumes`], [`declared`], [`nodes`], [`limits`], [`huge_pages`], [`cgroup`], [`devices`], [`pause`].

pub(crate) mod cgroup;
pub(crate) mod child;
mod containers;
mod context;
mod copies;
mod create;
mod declared;
mod descriptors;
mod devices;
mod error;
mod exec;
mod family;
mod huge_pages;
mod launch;
mod limits;
mod made;
mod make;
mod nodes;
mod oom;
pub(crate) mod pause;
mod process;
mod rootfs;
mod spec;
mod task;
mod update;
mod user;
mod volumes;

pub(crate) use self::{
    cgroup::Cgroup, containers::Containers, context::Context, error::ContainerError,
    huge_pages::HugePages, made::Made, task::Sending, update::Change,
};

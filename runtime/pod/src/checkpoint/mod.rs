//! Checkpoints: a pod as files, from which any number of pods go on.
//!
//! ```text
//! DIR/manifest     what it is of, what its containers are, what the other files must be ([`manifest`])
//! DIR/state        CPUs and devices, as the VMM writes them
//! DIR/memory       the guest's memory, with holes for zeros
//! DIR/scratch      the pod's scratch disk, likewise
//! ```
//! It is written aside and renamed ([`aside`]), memory before the pod stands still ([`ahead`]), so that a part of
//! one is never taken for one. Which node can restore it is a matter of programs and files of the node
//! ([`class`]), and of its processors, which the VMM compares. Every file is known by a digest of its contents,
//! wherever its holes are ([`digest`]).
//!
//! Not here: how a pod comes to stand still ([`crate::driver`]), and how one goes on ([`crate::sandbox`]).

pub(crate) mod ahead;
pub(crate) mod aside;
pub(crate) mod class;
pub(crate) mod digest;
pub(crate) mod image;
pub(crate) mod manifest;

use std::{path::Path, time::Duration};

use hull_base::beneath::Directory;

/// How long the pod stood still that the checkpoint in `directory` is of; none: there is none. Blocks.
#[must_use]
pub fn checkpoint_pause(directory: &Path) -> Option<Duration> {
    let directory = Directory::open(directory).ok()?;
    let manifest = manifest::Manifest::read(&directory).ok()?;
    Some(Duration::from_micros(manifest.paused_us))
}

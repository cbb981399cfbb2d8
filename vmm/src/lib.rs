//! Hull's VMM: one process, one KVM virtual machine, one pod.

pub mod virtio;

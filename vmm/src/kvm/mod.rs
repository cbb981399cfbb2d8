//! KVM: the virtual machine, its processors and how they start.
//!
//! Calls are made in the order memory slots, interrupt chip, vCPUs, ioeventfds: since Linux 6.18 a
//! change of memory slots after a device was put on KVM's I/O bus waits for a slow grace period.

pub(crate) mod cpuid;
pub(crate) mod device;
pub(crate) mod msr;
pub(crate) mod registers;
pub(crate) mod state;
pub(crate) mod vcpu;
pub(crate) mod vm;

use kvm_ioctls::Cap;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm could not be opened.
    #[error("open /dev/kvm")]
    Open(#[source] std::io::Error),
    /// KVM is too old or too strange.
    #[error("/dev/kvm has no {0:?}")]
    Missing(Cap),
    /// An ioctl failed.
    #[error("{call}")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl KvmError {
    /// Whether the host's kernel had no memory for it.
    pub(crate) fn lacks_memory(&self) -> bool {
        matches!(self, Self::Call { source, .. } if source.kind() == std::io::ErrorKind::OutOfMemory)
    }

    /// Makes an error of a failed ioctl.
    pub(crate) fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Call {
            call,
            source: error.into(),
        }
    }
}

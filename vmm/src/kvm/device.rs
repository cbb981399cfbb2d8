//! /dev/kvm, which is opened before the process is locked in.

use kvm_ioctls::{Cap, Kvm};
use vmm_sys_util::errno;

use super::KvmError;

const REQUIRED: [Cap; 8] = [
    Cap::UserMemory,
    Cap::ReadonlyMem,
    Cap::SplitIrqchip,
    Cap::SignalMsi,
    Cap::Ioeventfd,
    Cap::ImmediateExit,
    Cap::ExtCpuid,
    Cap::SetTssAddr,
];

/// /dev/kvm, or why it can't be opened, which is told to who asks for a VM.
#[derive(Debug)]
pub struct KvmDevice(Result<Kvm, errno::Error>);

impl KvmDevice {
    /// Opens /dev/kvm.
    #[must_use]
    pub fn open() -> Self {
        Self(Kvm::new())
    }

    /// Closes it, when the VM is there.
    pub fn close(&mut self) {
        self.0 = Err(errno::Error::new(libc::EBADF));
    }

    /// Checks that it can do what a VM needs.
    ///
    /// # Errors
    /// [`KvmError::Open`], [`KvmError::Missing`]
    pub fn check(&self) -> Result<&Kvm, KvmError> {
        let kvm = self.0.as_ref();
        let kvm = kvm.map_err(|error| KvmError::Open((*error).into()))?;
        match REQUIRED.into_iter().find(|cap| !kvm.check_extension(*cap)) {
            Some(cap) => Err(KvmError::Missing(cap)),
            None => Ok(kvm),
        }
    }
}

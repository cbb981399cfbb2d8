//! What a VM has of the host: the devices in its slots, and the files that it shares.

use std::sync::Arc;

use hull_vm::running::RunningVm;
use tokio::sync::Mutex;

use super::{devices::Devices, host_files::HostFiles};

/// A VM with what it has of the host. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Attachments {
    pub vm: RunningVm,
    pub devices: Arc<Mutex<Devices>>,
    pub files: Arc<Mutex<HostFiles>>,
}

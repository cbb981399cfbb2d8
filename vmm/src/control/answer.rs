//! What the daemon is told when a request fails.

use hull_proto_vmm::{ErrorKind, Response};

use crate::devices::DeviceConfigError;
use crate::fds::FdError;
use crate::log::chain;
use crate::machine::MachineError;
use crate::memory::MemoryError;
use crate::slots::SlotError;
use crate::windows::WindowError;

/// Makes a response of an error.
#[must_use]
pub fn refusal(error: &MachineError) -> Response {
    Response::Error {
        kind: kind(error),
        message: chain(error),
    }
}

fn kind(error: &MachineError) -> ErrorKind {
    match error {
        MachineError::Memory(MemoryError::Allocate { .. })
        | MachineError::Fd(FdError::Duplicate(_))
        | MachineError::Slot(SlotError::Connect { .. })
        | MachineError::Windows(_)
        | MachineError::Registers(_)
        | MachineError::Device {
            source:
                DeviceConfigError::Window(
                    WindowError::Full(_) | WindowError::Map(_) | WindowError::Slot(_),
                ),
            ..
        }
        | MachineError::Start(_) => ErrorKind::NoResources,
        MachineError::Vcpus { .. }
        | MachineError::Fd(FdError::Missing { .. })
        | MachineError::Memory(MemoryError::Size(_))
        | MachineError::Kernel(_)
        | MachineError::Cmdline(_)
        | MachineError::MpTable(_)
        | MachineError::Device { .. }
        | MachineError::Slot(SlotError::NoSuchSlot(_) | SlotError::Empty(_)) => ErrorKind::Invalid,
        MachineError::Slot(SlotError::Taken(_) | SlotError::Busy(_)) => ErrorKind::Busy,
        MachineError::Kvm(_) => ErrorKind::Kvm,
        MachineError::Memory(MemoryError::Arrange)
        | MachineError::Params(_)
        | MachineError::Tables(_)
        | MachineError::Stuck => ErrorKind::Internal,
    }
}

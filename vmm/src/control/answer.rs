//! What the daemon is told when a request fails.

use error_reporter::Report;
use hull_proto_vmm::{ErrorKind, Response};

use crate::devices::DeviceConfigError;
use crate::fds::FdError;
use crate::file_regions::FileRegionError;
use crate::machine::MachineError;
use crate::memory::MemoryError;
use crate::slots::SlotError;

/// Makes a response of an error.
#[must_use]
pub fn refusal(error: &MachineError) -> Response {
    Response::Error {
        kind: kind(error),
        message: Report::new(error).to_string(),
    }
}

fn kind(error: &MachineError) -> ErrorKind {
    match error {
        MachineError::Memory(MemoryError::Allocate { .. } | MemoryError::Event(_))
        | MachineError::Fd(FdError::Duplicate(_))
        | MachineError::Slot(SlotError::Connect { .. })
        | MachineError::FileRegions(_)
        | MachineError::Registers(_)
        | MachineError::Device {
            source:
                DeviceConfigError::FileRegion(
                    FileRegionError::Full(_) | FileRegionError::Map(_) | FileRegionError::Slot(_),
                ),
            ..
        }
        | MachineError::Start(_) => ErrorKind::NoResources,
        MachineError::Vcpus { .. }
        | MachineError::Fd(FdError::Missing { .. })
        | MachineError::Memory(MemoryError::Size(_) | MemoryError::Port(_))
        | MachineError::Kernel(_)
        | MachineError::Cmdline(_)
        | MachineError::MpTable(_)
        | MachineError::Device { .. }
        | MachineError::Memory(MemoryError::Length { .. } | MemoryError::Written(_))
        | MachineError::Snapshot(_)
        | MachineError::Processor { .. }
        | MachineError::Devices { .. }
        | MachineError::Vcpu { .. }
        | MachineError::Serial
        | MachineError::Pluggable { .. }
        | MachineError::Slot(
            SlotError::NoSuchSlot(_) | SlotError::Empty(_) | SlotError::Restore { .. },
        ) => ErrorKind::Invalid,
        MachineError::Slot(SlotError::Taken(_) | SlotError::Busy(_)) | MachineError::Busy => {
            ErrorKind::Busy
        }
        MachineError::Kvm(error) if error.lacks_memory() => ErrorKind::NoResources,
        MachineError::Kvm(_) => ErrorKind::Kvm,
        MachineError::Memory(MemoryError::Arrange | MemoryError::File(_))
        | MachineError::Params(_)
        | MachineError::Tables(_)
        | MachineError::Stuck => ErrorKind::Internal,
    }
}

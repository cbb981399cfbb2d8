//! The only place that turns errors into ttrpc codes.

use std::{error::Error, io};

use error_reporter::Report;
use hull_proto_agent::not_executed;
use ttrpc::{Code, get_status};

use crate::{
    atomic_volumes::Behind, container::ContainerError, ident::IdError, mmio::DeviceError,
    sandbox::SandboxError, storage::StorageError,
};

/// A request that failed: what the host hears.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Refusal {
    code: Code,
    message: String,
    /// The exit code of a process that was not started.
    exit_code: Option<i32>,
}

impl From<Refusal> for ttrpc::Error {
    fn from(refusal: Refusal) -> Self {
        let mut status = get_status(refusal.code, refusal.message);
        if let Some(code) = refusal.exit_code {
            not_executed::tell(&mut status, code);
        }
        Self::RpcStatus(status)
    }
}

/// An error that knows its code.
pub(crate) trait Classified: Error + 'static {
    /// Returns the code of the contract (see `agent.proto`).
    fn code(&self) -> Code;

    /// Returns the exit code of the process that was not started.
    fn exit_code(&self) -> Option<i32> {
        None
    }
}

/// Turns an error and its causes into a refusal.
pub(crate) fn status<E: Classified>(error: &E) -> Refusal {
    Refusal {
        code: error.code(),
        message: Report::new(error).to_string(),
        exit_code: error.exit_code(),
    }
}

/// Refuses a request that can never succeed.
pub(crate) fn invalid(message: String) -> Refusal {
    Refusal {
        code: Code::INVALID_ARGUMENT,
        message,
        exit_code: None,
    }
}

impl Classified for IdError {
    fn code(&self) -> Code {
        Code::INVALID_ARGUMENT
    }
}

impl Classified for ContainerError {
    fn code(&self) -> Code {
        match self {
            Self::BadId(_)
            | Self::Spec(_)
            | Self::User(_)
            | Self::SubPath { .. }
            | Self::NoDirectory(_)
            | Self::Device { .. }
            | Self::Limit(_)
            | Self::Unmapped(_)
            | Self::Mapping(_) => Code::INVALID_ARGUMENT,
            Self::NotFound(_) | Self::NoProcess { .. } => Code::NOT_FOUND,
            Self::Exists(_) | Self::ExecExists(_) => Code::ALREADY_EXISTS,
            Self::NoStorage(_)
            | Self::WrongState { .. }
            | Self::HugePages(_)
            | Self::AppArmor(_)
            | Self::Restless(_)
            | Self::Start { .. }
            | Self::Exec { .. } => Code::FAILED_PRECONDITION,
            Self::Rootfs(_)
            | Self::File { .. }
            | Self::Volume { .. }
            | Self::PodPid(_)
            | Self::Stdio(_)
            | Self::Create(_)
            | Self::Notify { .. }
            | Self::Signal { .. }
            | Self::Freeze { .. }
            | Self::Resize(_)
            | Self::Unkillable(_)
            | Self::Update { .. } => Code::INTERNAL,
        }
    }

    fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Start { source, .. } | Self::Exec { source, .. } => Some(source.code),
            _ => None,
        }
    }
}

impl Classified for DeviceError {
    fn code(&self) -> Code {
        match self {
            Self::NoSlot(_) => Code::INVALID_ARGUMENT,
            Self::Empty(_) | Self::Lacks { .. } => Code::FAILED_PRECONDITION,
            Self::Probe { .. } | Self::Protect { .. } | Self::Release { .. } => Code::INTERNAL,
        }
    }
}

impl Classified for StorageError {
    fn code(&self) -> Code {
        match self {
            Self::BadId(_) | Self::Option(_) => Code::INVALID_ARGUMENT,
            Self::Device(e) => e.code(),
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Directory { .. }
            | Self::Mount { .. }
            | Self::Unmount { .. }
            | Self::Sync { .. } => Code::INTERNAL,
        }
    }
}

impl Classified for Behind {
    fn code(&self) -> Code {
        Code::INTERNAL
    }
}

impl Classified for SandboxError {
    fn code(&self) -> Code {
        match self {
            Self::OtherSandbox { .. } | Self::NotConfigured => Code::FAILED_PRECONDITION,
            Self::Sysctl(_) | Self::Hostname(_) | Self::LittleEntropy(_) => Code::INVALID_ARGUMENT,
            // A sysctl that the namespace itself has to set.
            Self::UserNamespace(e) if e.kind() == io::ErrorKind::InvalidInput => {
                Code::INVALID_ARGUMENT
            }
            Self::Clock(_)
            | Self::Entropy(_)
            | Self::File { .. }
            | Self::Mount { .. }
            | Self::UserNamespace(_)
            | Self::Network(_) => Code::INTERNAL,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ident::Id;

    #[test]
    fn a_refusal_holds_code_and_causes() {
        let refusal = status(&ContainerError::NotFound(
            Id::parse("container id", "c1").unwrap(),
        ));
        assert_eq!(refusal.code, Code::NOT_FOUND);
        assert_eq!(refusal.message, "no container c1");
        let refusal = status(&DeviceError::Probe {
            slot: 4,
            source: io::Error::other("no driver"),
        });
        assert_eq!(refusal.code, Code::INTERNAL);
        assert_eq!(refusal.message, "probe slot 4: no driver");
    }
}

//! Why a VM could not be made, or does not answer.

use std::{io, path::PathBuf};

use hull_proto_vmm::{CodecError, ErrorKind};

use hull_spec::error::PodError;

/// Why a VM could not be made, or does not answer.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error("start {}", program.display())]
    Spawn { program: PathBuf, source: io::Error },
    #[error("prepare {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("connect to the VMM at {}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("{action}: the VM is gone: {report}")]
    Gone {
        action: &'static str,
        report: String,
    },
    #[error("{action}: the VMM did not answer in {seconds} s")]
    Timeout { action: &'static str, seconds: u64 },
    #[error("{action}: {message}")]
    Refused {
        action: &'static str,
        kind: ErrorKind,
        message: String,
    },
    #[error("{action}: the VMM answered with something else")]
    Unexpected { action: &'static str },
    #[error("{action}")]
    Codec {
        action: &'static str,
        source: CodecError,
    },
    #[error("{action}")]
    Socket {
        action: &'static str,
        source: io::Error,
    },
    #[error(
        "speak with the VMM: it has contract version {theirs}, this is {}",
        hull_proto_vmm::VERSION
    )]
    Version { theirs: u32 },
    #[error("find a free device slot: all {} are taken", hull_proto_vmm::SLOTS)]
    NoSlot,
    #[error("end the VMM process {pid}: it is still there after {seconds} s")]
    Unkillable { pid: u32, seconds: u64 },
}

impl From<VmError> for PodError {
    fn from(error: VmError) -> Self {
        let action = error.to_string();
        match error {
            VmError::Refused {
                kind: ErrorKind::NoResources,
                action,
                message,
            } => Self::ResourceExhausted {
                action: action.into(),
                reason: message,
            },
            VmError::Refused {
                kind: ErrorKind::Kvm,
                action,
                message,
            } => Self::precondition(action, message),
            VmError::NoSlot => Self::ResourceExhausted {
                action: "find a free device slot".into(),
                reason: format!("all {} are taken", hull_proto_vmm::SLOTS),
            },
            VmError::Spawn { ref source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Self::precondition(action, "no such file")
            }
            VmError::Gone { .. } | VmError::Timeout { .. } | VmError::Connect { .. } => {
                Self::unavailable("reach the VM", error)
            }
            other => Self::internal("run the VM", other),
        }
    }
}

//! Why a VM could not be made, or does not answer.

use std::{io, path::PathBuf};

use hull_proto_vmm::{CodecError, ErrorKind};

use hull_spec::error::PodError;

/// Why a VM could not be made, or does not answer.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A program could not be started.
    #[error("start {}", program.display())]
    Spawn {
        /// Where the program is.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of a process could not be made.
    #[error("prepare {}", path.display())]
    File {
        /// Where the file should be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM runs and can't be connected to.
    #[error("connect to the VMM at {}", path.display())]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM has ended or closed the connection.
    #[error("{action}: the VM is gone: {report}")]
    Gone {
        /// What was tried.
        action: &'static str,
        /// Why it ended, as it says itself.
        report: String,
    },
    /// The VMM took too long.
    #[error("{action}: the VMM did not answer in {seconds} s")]
    Timeout {
        /// What was asked for.
        action: &'static str,
        /// The time given.
        seconds: u64,
    },
    /// The VMM answered with an error.
    #[error("{action}: {message}")]
    Refused {
        /// What was asked for.
        action: &'static str,
        /// The class of its error.
        kind: ErrorKind,
        /// Its words, made printable.
        message: String,
    },
    /// The VMM's answer belongs to another request.
    #[error("{action}: the VMM answered with something else")]
    Unexpected {
        /// What was asked for.
        action: &'static str,
    },
    /// A message could not be encoded, or the VMM's answer not be decoded.
    #[error("{action}")]
    Codec {
        /// What was asked for.
        action: &'static str,
        /// Why.
        source: CodecError,
    },
    /// The connection failed in the middle of a call.
    #[error("{action}")]
    Socket {
        /// What was asked for.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The VMM speaks another version of the contract.
    #[error(
        "speak with the VMM: it has contract version {theirs}, this is {}",
        hull_proto_vmm::VERSION
    )]
    Version {
        /// The VMM's version.
        theirs: u32,
    },
    /// The VM has as many devices as it can have.
    #[error("find a free device slot: all {} are taken", hull_proto_vmm::SLOTS)]
    NoSlot,
    /// A process was killed and did not end.
    #[error("end the VMM process {pid}: it is still there after {seconds} s")]
    Unkillable {
        /// The process.
        pid: u32,
        /// The time given.
        seconds: u64,
    },
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

//! Why a call failed, in terms that a caller can map to a status exactly.

use std::{error::Error, fmt, sync::Arc};

use error_reporter::Report;
use hull_base::panics::Panic;

use crate::field::Field;

/// A cause, shared because all who wait for one operation get its error.
pub type Cause = Arc<dyn Error + Send + Sync>;

/// What kind of thing an id names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectKind {
    /// A pod sandbox.
    Sandbox,
    /// A container.
    Container,
    /// An image.
    Image,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sandbox => "sandbox",
            Self::Container => "container",
            Self::Image => "image",
        })
    }
}

/// Classes of [`PodError`], one for each status that a caller tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// What was named does not exist.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The request is wrong in itself.
    InvalidArgument,
    /// The request asks for what this version can't do.
    Unimplemented,
    /// Not possible in the present state of the pod or node.
    FailedPrecondition,
    /// The node has too little of something.
    ResourceExhausted,
    /// The VM or its agent is gone or does not answer.
    Unavailable,
    /// The time given to the operation is over.
    DeadlineExceeded,
    /// Anything else.
    Internal,
}

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PodError {
    /// No such object.
    #[error("find {object} {id}: not found")]
    NotFound {
        /// What was looked for.
        object: ObjectKind,
        /// As the caller named it.
        id: String,
    },
    /// A shortened id names several objects.
    #[error("find {object} {id}: several ids start with it")]
    Ambiguous {
        /// What was looked for.
        object: ObjectKind,
        /// As the caller named it.
        id: String,
    },
    /// The name is reserved.
    #[error("reserve name {name}: it is reserved for {id}")]
    AlreadyExists {
        /// The name.
        name: String,
        /// Id of the holder.
        id: String,
    },
    /// A field of the request is wrong.
    #[error("{field}: {reason}")]
    InvalidArgument {
        /// The field.
        field: Field,
        /// What is wrong.
        reason: String,
    },
    /// The guest finds something of the request wrong, and only it can tell; or it can't be told all of it.
    #[error("{action}: {reason}")]
    GuestRefused {
        /// What was tried.
        action: String,
        /// What is wrong, made printable.
        reason: String,
    },
    /// The guest could not execute the command of a container or exec.
    #[error("{action}: {reason}")]
    NotExecuted {
        /// What was tried.
        action: String,
        /// What a shell would end with: 126, or 127 if there is no such command.
        exit_code: u8,
        /// Why, made printable.
        reason: String,
    },
    /// A field of the request asks for what this version can't do.
    #[error("{field}: {reason}")]
    Unimplemented {
        /// The field.
        field: Field,
        /// What is missing.
        reason: String,
    },
    /// A field of the request asks for what the pod's VM or this node does not have.
    #[error("{field}: {reason}")]
    Unsatisfiable {
        /// The field.
        field: Field,
        /// What there is instead.
        reason: String,
    },
    /// Not possible now.
    #[error("{action}: {reason}")]
    FailedPrecondition {
        /// What was tried.
        action: String,
        /// What is in the way.
        reason: String,
    },
    /// The node has too little.
    #[error("{action}: {reason}")]
    ResourceExhausted {
        /// What was tried.
        action: String,
        /// What there is too little of.
        reason: String,
    },
    /// The VM or its agent is gone or does not answer.
    #[error("{action}")]
    Unavailable {
        /// What was tried.
        action: String,
        /// Why.
        source: Cause,
    },
    /// Time is over.
    #[error("{action}: not done after {seconds} s")]
    DeadlineExceeded {
        /// What was tried.
        action: String,
        /// The time given.
        seconds: u64,
    },
    /// Anything else.
    #[error("{action}")]
    Internal {
        /// What was tried.
        action: String,
        /// Why.
        source: Cause,
    },
    /// An operation failed, and so did undoing it; what is left is removed when the sandbox is,
    /// or when the daemon starts.
    #[error(
        "{}; and undoing it failed: {}",
        Report::new(failure),
        Report::new(undo)
    )]
    Undo {
        /// The failure.
        failure: Box<PodError>,
        /// Why it could not be undone.
        undo: Box<PodError>,
    },
}

impl PodError {
    /// The class of the error.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Ambiguous { .. } | Self::InvalidArgument { .. } | Self::GuestRefused { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::Unimplemented { .. } => ErrorKind::Unimplemented,
            Self::FailedPrecondition { .. }
            | Self::Unsatisfiable { .. }
            | Self::NotExecuted { .. } => ErrorKind::FailedPrecondition,
            Self::ResourceExhausted { .. } => ErrorKind::ResourceExhausted,
            Self::Unavailable { .. } => ErrorKind::Unavailable,
            Self::DeadlineExceeded { .. } => ErrorKind::DeadlineExceeded,
            Self::Internal { .. } => ErrorKind::Internal,
            Self::Undo { failure, .. } => failure.kind(),
        }
    }

    /// What a shell would end with, when the error is that a command could not be executed.
    #[must_use]
    pub fn exit_code(&self) -> Option<u8> {
        match self {
            Self::NotExecuted { exit_code, .. } => Some(*exit_code),
            Self::Undo { failure, .. } => failure.exit_code(),
            _ => None,
        }
    }

    /// [`PodError::InvalidArgument`] of a field.
    pub fn invalid(field: Field, reason: impl Into<String>) -> Self {
        Self::InvalidArgument {
            field,
            reason: reason.into(),
        }
    }

    /// [`PodError::Unimplemented`] of a field.
    pub fn unimplemented(field: Field, reason: impl Into<String>) -> Self {
        Self::Unimplemented {
            field,
            reason: reason.into(),
        }
    }

    /// [`PodError::Unsatisfiable`] of a field.
    pub fn unsatisfiable(field: Field, reason: impl Into<String>) -> Self {
        Self::Unsatisfiable {
            field,
            reason: reason.into(),
        }
    }

    /// [`PodError::FailedPrecondition`].
    pub fn precondition(action: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::FailedPrecondition {
            action: action.into(),
            reason: reason.into(),
        }
    }

    /// [`PodError::Internal`].
    pub fn internal(action: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self::Internal {
            action: action.into(),
            source: Arc::new(source),
        }
    }

    /// [`PodError::Unavailable`].
    pub fn unavailable(
        action: impl Into<String>,
        source: impl Error + Send + Sync + 'static,
    ) -> Self {
        Self::Unavailable {
            action: action.into(),
            source: Arc::new(source),
        }
    }

    /// Adds the result of a clean-up to the failure that made it necessary.
    #[must_use]
    pub fn after_undo(self, undo: Result<(), Self>) -> Self {
        match undo {
            Ok(()) => self,
            Err(undo) => Self::Undo {
                failure: Box::new(self),
                undo: Box::new(undo),
            },
        }
    }
}

impl From<Panic> for PodError {
    fn from(panic: Panic) -> Self {
        Self::internal("ask the guest's agent", panic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_every_cause() {
        let io = std::io::Error::other("disk on fire");
        let failure = PodError::internal("write it", io);
        let undo = Err(PodError::precondition("undo it", "too late"));
        let error = failure.after_undo(undo);
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert_eq!(
            Report::new(error).to_string(),
            "write it: disk on fire; and undoing it failed: undo it: too late"
        );
    }
}

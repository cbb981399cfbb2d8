//! Why a CRI call failed, before it becomes a gRPC status.

use hull_image::{PullError, StoreError};
use hull_spec::error::PodError;
use hull_streaming::RequestError;

/// Why a CRI call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriError {
    /// A field of the request is missing or wrong.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field's path in the request.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A field or call asks for what this version can't do.
    #[error("{what}: {reason}")]
    Unsupported {
        /// The field's path in the request, or the call.
        what: String,
        /// Why not.
        reason: String,
    },
    /// Pods and containers.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// Pulls.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// Images that are here.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Requests for streams.
    #[error(transparent)]
    Stream(#[from] RequestError),
    /// The same, about a pod or container that is to be made.
    #[error("{what}")]
    About {
        /// What kind of thing, and its name.
        what: String,
        /// What is wrong with it.
        source: Box<CriError>,
    },
    /// The call panicked; the process's panic hook has told where.
    #[error("internal error, of which the daemon's log tells more")]
    Panicked,
    /// A task of ours ended without an answer.
    #[error("{action}")]
    Task {
        /// What it did.
        action: &'static str,
        /// How it ended.
        source: tokio::task::JoinError,
    },
}

impl CriError {
    /// Says which pod or container it is about: what is to be made has no id that the caller knows.
    pub(crate) fn about(self, what: String) -> Self {
        Self::About {
            what,
            source: Box::new(self),
        }
    }

    /// A field that is wrong.
    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// A field that must be set and isn't.
    pub(crate) fn missing(field: impl Into<String>) -> Self {
        Self::invalid(field, "is missing")
    }

    /// A field or call that this version can't serve.
    pub(crate) fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            what: what.into(),
            reason: reason.into(),
        }
    }
}

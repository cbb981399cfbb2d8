//! Why a container could not be made, in one line: the step, the path, the kernel's reason.

use std::{io, path::Path};

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StepError {
    #[error("{step}")]
    System {
        step: String,
        #[source]
        source: io::Error,
    },
    /// What the kernel was not even asked for.
    #[error("{0}")]
    Refused(String),
}

impl StepError {
    /// The kernel's error number; 0: there is none.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            Self::System { source, .. } => source.raw_os_error().unwrap_or(0),
            Self::Refused(_) => 0,
        }
    }
}

/// Names the step that an error is of.
pub(crate) fn doing<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> StepError {
    move |source| StepError::System {
        step: step.to_owned(),
        source: source.into(),
    }
}

/// The same, with the path that it is about.
pub(super) fn doing_to<E: Into<io::Error>>(step: &str, path: &Path) -> impl FnOnce(E) -> StepError {
    move |source| StepError::System {
        step: format!("{step} {}", path.display()),
        source: source.into(),
    }
}

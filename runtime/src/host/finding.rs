//! What a check found.

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Finding {
    /// It is there; what it is.
    Good(String),
    /// It isn't.
    Bad {
        /// What was found instead.
        detail: String,
        /// What to do about it.
        advice: String,
    },
}

impl Finding {
    pub(crate) fn bad(detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::Bad {
            detail: detail.into(),
            advice: advice.into(),
        }
    }

    /// Tells whether it is there.
    pub(crate) fn is_good(&self) -> bool {
        matches!(self, Self::Good(_))
    }
}

/// Something that a host needs is not there.
#[derive(Debug, thiserror::Error)]
#[error("this host is not ready: {failed} of the checks failed")]
pub(crate) struct HostIncomplete {
    pub(crate) failed: usize,
    /// All else is there.
    pub(crate) network_alone: bool,
}

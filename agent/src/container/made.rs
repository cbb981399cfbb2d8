//! What is known of a container without asking its task.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use super::{cgroup::Cgroup, user::User};
use crate::{pidfd::Process, stdio::Stdio};

/// What is read of a container without asking its task.
#[derive(Debug, Default)]
pub(crate) struct Public {
    /// Streams by exec id; the first process has the empty one.
    stdio: Mutex<HashMap<String, Arc<Stdio>>>,
    /// Set when the container was made.
    pub(crate) made: OnceLock<Made>,
}

/// Facts of a container that do not change.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    /// The first process.
    pub(crate) init: Arc<Process>,
    pub(crate) user: User,
    pub(crate) cgroup: Cgroup,
    /// Directory of what it may write: changes to its root, and volumes of its own.
    pub(crate) own: Option<PathBuf>,
}

impl Public {
    pub(crate) fn stdio(&self) -> MutexGuard<'_, HashMap<String, Arc<Stdio>>> {
        self.stdio.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

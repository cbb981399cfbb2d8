//! What pods are made of, and what that takes.

use std::{env, path::Path, process::Command, time::Duration};

/// How long anything may take that has to happen.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What pods are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Of processes that say that they are VMs.
    Fake,
    /// Of microVMs.
    Real,
}

impl Kind {
    /// Real ones, if `make faults` or `make soak` says so.
    pub fn of_environment() -> Self {
        match env::var("HULL_FAULTS_VMS").as_deref() {
            Ok("real") => Self::Real,
            _ => Self::Fake,
        }
    }

    /// What this machine lacks to run them.
    pub fn lacks(self) -> Option<&'static str> {
        let has_namespaces = Command::new("unshare")
            .args(["--net", "--mount", "--pid", "--fork", "true"])
            .status();
        if !has_namespaces.is_ok_and(|status| status.success()) {
            return Some("no namespaces of our own");
        }
        if env::var_os("HULL_TEST_IMAGES").is_none() {
            return Some("no HULL_TEST_IMAGES");
        }
        let has_registry = Command::new("docker-registry").arg("--version").output();
        if has_registry.is_err() {
            return Some("no docker-registry");
        }
        (!Path::new("/usr/lib/cni/bridge").exists()).then_some("no /usr/lib/cni/bridge")
    }
}

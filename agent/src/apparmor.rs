//! AppArmor of the guest's kernel: the policies that it has. Which of them a process is under is said before its
//! `execve` ([`crate::container`]).
//!
//! The kernel has AppArmor on if its command line says so, as the host does when it has AppArmor itself. Who may
//! change policy is root of the guest with `CAP_MAC_ADMIN`: the agent, and what the pod's owner made privileged.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Where the kernel takes policies (security/apparmor/apparmorfs.c); not there when AppArmor is off.
const POLICIES: &str = "/sys/kernel/security/apparmor";
/// The compiled policy of the profile that all guests have, `hull-default`.
const DEFAULT: &str = "/etc/apparmor/hull-default";

/// Why a container can't have its profile.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppArmorError {
    #[error("AppArmor is off in the guest's kernel: there is no profile {0}")]
    Off(String),
    #[error("the guest's kernel does not take the policy of AppArmor profile {profile}")]
    Refused {
        profile: String,
        #[source]
        source: io::Error,
    },
}

/// AppArmor of the kernel.
#[derive(Debug, Default)]
pub(crate) struct AppArmor {
    /// None: it is off, or not the agent's to use.
    policies: Option<PathBuf>,
    /// What was loaded last for a profile.
    loaded: Mutex<HashMap<String, Vec<u8>>>,
}

impl AppArmor {
    /// That of the guest's kernel, to which the policy of all guests is given.
    ///
    /// # Errors
    /// When the kernel does not take it: without, containers would be less confined than they are said to be.
    pub(crate) fn of_guest() -> Result<Self, AppArmorError> {
        Self::with(Path::new(POLICIES), Path::new(DEFAULT))
    }

    fn with(policies: &Path, default: &Path) -> Result<Self, AppArmorError> {
        // A root without the policy is no guest's: the kernel is not the agent's.
        if !policies.exists() || !default.exists() {
            return Ok(Self::default());
        }
        let policy = fs::read(default);
        policy
            .and_then(|policy| load(policies, &policy))
            .map_err(|source| AppArmorError::Refused {
                profile: default.display().to_string(),
                source,
            })?;
        Ok(Self {
            policies: Some(policies.to_owned()),
            loaded: Mutex::default(),
        })
    }

    /// Whether containers can have profiles.
    pub(crate) fn is_on(&self) -> bool {
        self.policies.is_some()
    }

    /// Gives the kernel the compiled policy of `profile`, unless it has it; an empty one it must have already.
    /// One of that name is replaced, for the processes under it too, as on a host. May block.
    ///
    /// # Errors
    /// [`AppArmorError`]
    pub(crate) fn provide(&self, profile: &str, policy: &[u8]) -> Result<(), AppArmorError> {
        let off = || AppArmorError::Off(profile.to_owned());
        let policies = self.policies.as_deref().ok_or_else(off)?;
        if policy.is_empty() {
            return Ok(());
        }
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.get(profile).is_some_and(|known| known == policy) {
            return Ok(());
        }
        load(policies, policy).map_err(|source| AppArmorError::Refused {
            profile: profile.to_owned(),
            source,
        })?;
        loaded.insert(profile.to_owned(), policy.to_owned());
        Ok(())
    }
}

/// The kernel takes a policy in one write alone.
fn load(policies: &Path, policy: &[u8]) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(policies.join(".replace"))
        .and_then(|file| rustix::io::write(&file, policy).map_err(io::Error::from))
        .and_then(|written| match written == policy.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_loaded_once_and_again_when_it_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let default = dir.path().join("default");
        let policies = dir.path().join("policies");
        fs::create_dir(&policies).unwrap();
        assert!(!AppArmor::with(&policies, &default).unwrap().is_on());
        fs::remove_dir(&policies).unwrap();
        fs::write(&default, "default").unwrap();
        let off = AppArmor::with(&policies, &default).unwrap();
        assert!(!off.is_on());
        let error = off.provide("p", b"policy").unwrap_err();
        assert!(error.to_string().contains("AppArmor is off"), "{error}");

        fs::create_dir(&policies).unwrap();
        let taken = policies.join(".replace");
        assert!(AppArmor::with(&policies, &default).is_err());
        fs::write(&taken, "").unwrap();
        let on = AppArmor::with(&policies, &default).unwrap();
        assert!(on.is_on());
        assert_eq!(fs::read(&taken).unwrap(), b"default");
        for (profile, policy, expected) in [
            ("hull-default", "", "12345678"),
            ("p", "policy-1", "policy-1"),
            ("p", "policy-1", "12345678"),
            ("q", "policy-1", "policy-1"),
            ("p", "policy-2", "policy-2"),
        ] {
            fs::write(&taken, "12345678").unwrap();
            on.provide(profile, policy.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&taken).unwrap(), expected, "{profile}");
        }
    }
}

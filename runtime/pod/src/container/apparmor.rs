//! The AppArmor profile of a container: which one it gets, and the policy that its guest's kernel needs for it.
//!
//! A profile of the node is given to the guest as the node's kernel has it: compiled, for the node's kernel. The
//! guest's mediates of it what it knows, and refuses what it can't read.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use hull_base::blocking;
use hull_proto_agent::DEFAULT_PROFILE;
use hull_spec::{
    error::PodError,
    field::Field,
    spec::{AppArmor, ContainerSecurity},
};

/// Largest policy of the node that a guest is given, in bytes. Distributions' are some 100 KiB; a message to the
/// agent has 4 MiB.
const POLICY_MAX: u64 = 2 << 20;

/// A profile that confines a container.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Confinement {
    pub profile: String,
    /// What the guest's kernel is given for it; empty: it has it.
    pub policy: Vec<u8>,
}

/// Finds the profile of a container; none: it is unconfined. `host` is where the node's kernel tells of its
/// policy, if AppArmor is on there; `in_guest` says whether it is in the guest.
///
/// # Errors
/// When a profile of the node is asked for, and it or AppArmor is not there.
pub(crate) async fn confinement(
    security: &ContainerSecurity,
    host: Option<&Path>,
    in_guest: bool,
) -> Result<Option<Confinement>, PodError> {
    match &security.apparmor {
        AppArmor::Unconfined => Ok(None),
        // As containerd has it: what is privileged is confined by what is asked for alone.
        AppArmor::RuntimeDefault if security.privileged || !in_guest => Ok(None),
        AppArmor::RuntimeDefault => Ok(Some(Confinement {
            profile: DEFAULT_PROFILE.to_owned(),
            policy: Vec::new(),
        })),
        AppArmor::Localhost(profile) => {
            let off = |whose: &str| {
                let reason = format!("profile {profile:?}: AppArmor is off in {whose}");
                PodError::unimplemented(Field::AppArmor, reason)
            };
            let host = host.ok_or_else(|| off("the node's kernel"))?.to_owned();
            if !in_guest {
                return Err(off("the kernel that the pod's guest booted with"));
            }
            let name = profile.clone();
            match blocking(move || policy(&host, &name)).await {
                Ok(policy) => Ok(Some(Confinement {
                    profile: profile.clone(),
                    policy,
                })),
                Err(reason) => Err(PodError::invalid(
                    Field::AppArmor,
                    format!("profile {profile:?}: {reason}"),
                )),
            }
        }
    }
}

/// Why a profile of the node can't be had.
#[derive(Debug, thiserror::Error)]
enum Missing {
    #[error("it is not loaded on the node")]
    NotLoaded,
    #[error("its policy is larger than {POLICY_MAX} bytes")]
    TooLarge,
    #[error(
        "the node's kernel does not tell policies, for which it takes CONFIG_SECURITY_APPARMOR_EXPORT_BINARY"
    )]
    NotTold,
    #[error("read the node's policies: {0}")]
    Read(#[from] io::Error),
}

/// The compiled policy that a profile was loaded from. Directories have its name in a form that others can have too,
/// and their number; one may go while it is looked at (security/apparmor/apparmorfs.c).
fn policy(host: &Path, profile: &str) -> Result<Vec<u8>, Missing> {
    // A profile within another one comes with that.
    let outer = profile.split("//").next().unwrap_or_default();
    for entry in fs::read_dir(host.join("policy/profiles"))? {
        let directory = entry?.path();
        let name = match fs::read_to_string(directory.join("name")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            name => name?,
        };
        if name.strip_suffix('\n').unwrap_or(&name) != outer {
            continue;
        }
        let file = match File::open(directory.join("raw_data")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Missing::NotTold),
            file => file?,
        };
        let mut policy = Vec::new();
        file.take(POLICY_MAX + 1).read_to_end(&mut policy)?;
        return match policy.len() as u64 {
            0 => Err(Missing::NotTold),
            bytes if bytes > POLICY_MAX => Err(Missing::TooLarge),
            _ => Ok(policy),
        };
    }
    Err(Missing::NotLoaded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn security(apparmor: AppArmor, privileged: bool) -> ContainerSecurity {
        ContainerSecurity {
            apparmor,
            privileged,
            ..ContainerSecurity::default()
        }
    }

    async fn profile(
        apparmor: AppArmor,
        privileged: bool,
        host: Option<&Path>,
        in_guest: bool,
    ) -> Result<Option<String>, String> {
        let security = security(apparmor, privileged);
        let found = confinement(&security, host, in_guest).await;
        let found = found.map(|found| found.map(|confinement| confinement.profile));
        found.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn the_default_confines_where_the_guest_has_apparmor() {
        use AppArmor::{RuntimeDefault, Unconfined};
        let default = Ok(Some("hull-default".to_owned()));
        assert_eq!(profile(RuntimeDefault, false, None, true).await, default);
        for (apparmor, privileged, in_guest) in [
            (RuntimeDefault, false, false),
            (RuntimeDefault, true, true),
            (Unconfined, false, true),
        ] {
            let found = profile(apparmor, privileged, None, in_guest).await;
            assert_eq!(found, Ok(None));
        }
    }

    #[tokio::test]
    async fn a_profile_of_the_node_comes_with_its_policy_or_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let profiles = dir.path().join("policy/profiles");
        for (directory, name, policy) in [
            ("usr.bin.man.3", "/usr/bin/man", Some(b"man".as_slice())),
            ("p.7", "p.7", Some(b"other")),
            ("p.8", "p", Some(b"policy")),
            ("kept.9", "kept", None),
            ("large.10", "large", Some(&[0; (2 << 20) + 1])),
        ] {
            let directory = profiles.join(directory);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("name"), format!("{name}\n")).unwrap();
            if let Some(policy) = policy {
                fs::write(directory.join("raw_data"), policy).unwrap();
            }
        }
        fs::create_dir(profiles.join("went.11")).unwrap();
        let host = Some(dir.path());
        let named = |name: &str| AppArmor::Localhost(name.to_owned());
        for (name, policy) in [
            ("/usr/bin/man", "man"),
            ("p", "policy"),
            ("p//hat", "policy"),
        ] {
            let security = security(named(name), false);
            let found = confinement(&security, host, true).await.unwrap().unwrap();
            assert_eq!(found.profile, name);
            assert_eq!(found.policy, policy.as_bytes());
        }
        // It was asked for, so it holds.
        let found = profile(named("p"), true, host, true).await;
        assert_eq!(found, Ok(Some("p".to_owned())));
        for (name, host, in_guest, why) in [
            ("man", host, true, "it is not loaded on the node"),
            ("kept", host, true, "the node's kernel does not tell"),
            ("large", host, true, "its policy is larger"),
            ("p", None, true, "AppArmor is off in the node's kernel"),
            ("p", host, false, "AppArmor is off in the kernel that"),
        ] {
            let error = profile(named(name), false, host, in_guest).await;
            let error = error.unwrap_err();
            let expected = format!("profile {name:?}: {why}");
            assert!(error.contains(&expected), "{error}");
        }
    }
}

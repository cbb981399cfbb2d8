//! Namespaces, users, capabilities and profiles.

use std::path::PathBuf;

use hull_proto_cri::v1::{self, security_profile::ProfileType};
use hull_spec::spec::{
    AppArmor, Capabilities, ContainerSecurity, GroupsPolicy, IdRange, NamespaceMode, Namespaces,
    SandboxSecurity, Seccomp, UserNamespace,
};

use super::{enumeration, unix_id};
use crate::cri::error::CriError;

/// Settings of a sandbox; `field` is their path in the request.
pub(crate) fn of_sandbox(
    field: &str,
    context: &v1::LinuxSandboxSecurityContext,
) -> Result<SandboxSecurity, CriError> {
    Ok(SandboxSecurity {
        privileged: context.privileged,
        apparmor: apparmor(field, context.apparmor.as_ref(), "")?,
        seccomp: seccomp(
            field,
            context.seccomp.as_ref(),
            deprecated::sandbox(context),
        )?,
    })
}

/// Settings of a container; `field` is their path in the request.
pub(crate) fn of_container(
    field: &str,
    context: v1::LinuxContainerSecurityContext,
) -> Result<ContainerSecurity, CriError> {
    let id = |name: &str, value: Option<v1::Int64Value>| {
        value
            .map(|value| unix_id(&format!("{field}.{name}"), value.value))
            .transpose()
    };
    let groups_field = format!("{field}.supplemental_groups");
    Ok(ContainerSecurity {
        privileged: context.privileged,
        namespaces: namespaces(field, context.namespace_options.as_ref())?,
        run_as_user: id("run_as_user", context.run_as_user)?,
        run_as_group: id("run_as_group", context.run_as_group)?,
        supplemental_groups: context
            .supplemental_groups
            .iter()
            .map(|&group| unix_id(&groups_field, group))
            .collect::<Result<_, _>>()?,
        groups_policy: match enumeration(
            &format!("{field}.supplemental_groups_policy"),
            context.supplemental_groups_policy,
        )? {
            v1::SupplementalGroupsPolicy::Merge => GroupsPolicy::Merge,
            v1::SupplementalGroupsPolicy::Strict => GroupsPolicy::Strict,
        },
        readonly_rootfs: context.readonly_rootfs,
        no_new_privs: context.no_new_privs,
        seccomp: seccomp(
            field,
            context.seccomp.as_ref(),
            deprecated::seccomp(&context),
        )?,
        apparmor: apparmor(
            field,
            context.apparmor.as_ref(),
            deprecated::apparmor(&context),
        )?,
        capabilities: capabilities(context.capabilities.unwrap_or_default()),
        run_as_username: context.run_as_username,
        masked_paths: context.masked_paths,
        readonly_paths: context.readonly_paths,
    })
}

fn capabilities(wanted: v1::Capability) -> Capabilities {
    Capabilities {
        add: wanted.add_capabilities,
        drop: wanted.drop_capabilities,
        add_ambient: wanted.add_ambient_capabilities,
    }
}

/// Namespaces; none named means the pod's.
pub(crate) fn namespaces(
    field: &str,
    options: Option<&v1::NamespaceOption>,
) -> Result<Namespaces, CriError> {
    let Some(options) = options else {
        return Ok(Namespaces::default());
    };
    let mode = |name: &str, value: i32| {
        let field = format!("{field}.namespace_options.{name}");
        Ok(match enumeration(&field, value)? {
            v1::NamespaceMode::Pod => NamespaceMode::Pod,
            v1::NamespaceMode::Container => NamespaceMode::Container,
            v1::NamespaceMode::Node => NamespaceMode::Node,
            v1::NamespaceMode::Target if options.target_id.is_empty() => {
                return Err(CriError::missing(format!(
                    "{} (mode TARGET of {name})",
                    field.replace(name, "target_id")
                )));
            }
            v1::NamespaceMode::Target => NamespaceMode::Target(options.target_id.clone()),
        })
    };
    let user_namespace = match &options.userns_options {
        Some(asked) => user_namespace(&format!("{field}.namespace_options.userns_options"), asked)?,
        None => None,
    };
    Ok(Namespaces {
        network: mode("network", options.network)?,
        pid: mode("pid", options.pid)?,
        ipc: mode("ipc", options.ipc)?,
        user_namespace,
    })
}

/// A user namespace; none for that of the node, which to a pod is its guest's.
fn user_namespace(
    field: &str,
    asked: &v1::UserNamespace,
) -> Result<Option<UserNamespace>, CriError> {
    let mode_field = format!("{field}.mode");
    match enumeration(&mode_field, asked.mode)? {
        v1::NamespaceMode::Pod => Ok(Some(UserNamespace {
            uids: id_range(&format!("{field}.uids"), &asked.uids)?,
            gids: id_range(&format!("{field}.gids"), &asked.gids)?,
        })),
        v1::NamespaceMode::Node if asked.uids.is_empty() && asked.gids.is_empty() => Ok(None),
        v1::NamespaceMode::Node => Err(CriError::invalid(
            mode_field,
            "NODE can't be combined with id mappings",
        )),
        other => Err(CriError::invalid(
            mode_field,
            format!(
                "{} is not possible: only POD and NODE are",
                other.as_str_name()
            ),
        )),
    }
}

/// The only mapping of a kind; it must be of the ids from 0 on.
pub(super) fn id_range(field: &str, mappings: &[v1::IdMapping]) -> Result<IdRange, CriError> {
    let [mapping] = mappings else {
        return Err(CriError::invalid(
            field,
            format!("there must be one mapping, not {}", mappings.len()),
        ));
    };
    if mapping.container_id != 0 {
        return Err(CriError::invalid(
            format!("{field}[0].container_id"),
            format!("it must be 0, not {}", mapping.container_id),
        ));
    }
    // The last id may be no valid one either: it means "unchanged" to chown(2).
    if mapping.length == 0 || mapping.host_id.checked_add(mapping.length).is_none() {
        return Err(CriError::invalid(
            format!("{field}[0].length"),
            format!(
                "{} ids from {} on are not possible",
                mapping.length, mapping.host_id
            ),
        ));
    }
    Ok(IdRange {
        host: mapping.host_id,
        length: mapping.length,
    })
}

/// The mapping that a range was made from.
pub(super) fn id_mappings(range: IdRange) -> Vec<v1::IdMapping> {
    vec![v1::IdMapping {
        host_id: range.host,
        container_id: 0,
        length: range.length,
    }]
}

/// Namespaces, as a status has them.
pub(crate) fn namespace_option(namespaces: &Namespaces) -> v1::NamespaceOption {
    let mut target_id = String::new();
    let mut mode = |mode: &NamespaceMode| {
        i32::from(match mode {
            NamespaceMode::Pod => v1::NamespaceMode::Pod,
            NamespaceMode::Container => v1::NamespaceMode::Container,
            NamespaceMode::Node => v1::NamespaceMode::Node,
            NamespaceMode::Target(id) => {
                target_id.clone_from(id);
                v1::NamespaceMode::Target
            }
        })
    };
    let (network, pid, ipc) = (
        mode(&namespaces.network),
        mode(&namespaces.pid),
        mode(&namespaces.ipc),
    );
    v1::NamespaceOption {
        network,
        pid,
        ipc,
        target_id,
        userns_options: namespaces.user_namespace.map(|user| v1::UserNamespace {
            mode: v1::NamespaceMode::Pod.into(),
            uids: id_mappings(user.uids),
            gids: id_mappings(user.gids),
        }),
    }
}

fn seccomp(
    field: &str,
    profile: Option<&v1::SecurityProfile>,
    deprecated: &str,
) -> Result<Seccomp, CriError> {
    let field = format!("{field}.seccomp");
    let Some(profile) = profile else {
        return Ok(match deprecated {
            "" => Seccomp::Unset,
            "runtime/default" | "docker/default" => Seccomp::RuntimeDefault,
            "unconfined" => Seccomp::Unconfined,
            other => match other.strip_prefix("localhost/") {
                Some(path) => Seccomp::Localhost(absolute(&field, path)?),
                None => {
                    return Err(CriError::invalid(
                        format!("{field}_profile_path"),
                        format!("{other:?} is no profile"),
                    ));
                }
            },
        });
    };
    Ok(match profile_type(&field, profile)? {
        ProfileType::RuntimeDefault => Seccomp::RuntimeDefault,
        ProfileType::Unconfined => Seccomp::Unconfined,
        ProfileType::Localhost => Seccomp::Localhost(absolute(&field, &profile.localhost_ref)?),
    })
}

fn apparmor(
    field: &str,
    profile: Option<&v1::SecurityProfile>,
    deprecated: &str,
) -> Result<AppArmor, CriError> {
    let field = format!("{field}.apparmor");
    // With the old prefix or without.
    let localhost = |name: &str| {
        AppArmor::Localhost(name.strip_prefix("localhost/").unwrap_or(name).to_owned())
    };
    let Some(profile) = profile else {
        return Ok(match deprecated {
            "" | "runtime/default" => AppArmor::RuntimeDefault,
            "unconfined" => AppArmor::Unconfined,
            other => localhost(other),
        });
    };
    Ok(match profile_type(&field, profile)? {
        ProfileType::RuntimeDefault => AppArmor::RuntimeDefault,
        ProfileType::Unconfined => AppArmor::Unconfined,
        ProfileType::Localhost => localhost(&profile.localhost_ref),
    })
}

fn profile_type(field: &str, profile: &v1::SecurityProfile) -> Result<ProfileType, CriError> {
    enumeration(&format!("{field}.profile_type"), profile.profile_type)
}

fn absolute(field: &str, path: &str) -> Result<PathBuf, CriError> {
    // Kubelet sends an absolute path, with or without the old prefix.
    let path = path.trim_start_matches("localhost/");
    if !path.starts_with('/') {
        return Err(CriError::invalid(
            format!("{field}.localhost_ref"),
            format!("{path:?} is not an absolute path"),
        ));
    }
    Ok(PathBuf::from(path))
}

/// Fields of old clients, which newer ones replace.
mod deprecated {
    #![expect(deprecated, reason = "old clients still send them")]
    use hull_proto_cri::v1;

    pub(super) fn sandbox(context: &v1::LinuxSandboxSecurityContext) -> &str {
        &context.seccomp_profile_path
    }

    pub(super) fn seccomp(context: &v1::LinuxContainerSecurityContext) -> &str {
        &context.seccomp_profile_path
    }

    pub(super) fn apparmor(context: &v1::LinuxContainerSecurityContext) -> &str {
        &context.apparmor_profile
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(kind: ProfileType, path: &str) -> Option<v1::SecurityProfile> {
        Some(v1::SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: path.into(),
        })
    }

    #[test]
    fn profiles_are_read_in_both_forms() {
        let read = |profile: Option<v1::SecurityProfile>, old| seccomp("f", profile.as_ref(), old);
        assert_eq!(read(None, "").unwrap(), Seccomp::Unset);
        assert_eq!(
            read(None, "runtime/default").unwrap(),
            Seccomp::RuntimeDefault
        );
        assert_eq!(
            read(Some(v1::SecurityProfile::default()), "unconfined").unwrap(),
            Seccomp::RuntimeDefault
        );
        assert_eq!(read(None, "unconfined").unwrap(), Seccomp::Unconfined);
        assert_eq!(
            read(None, "localhost//p.json").unwrap(),
            Seccomp::Localhost("/p.json".into())
        );
        assert_eq!(
            read(profile(ProfileType::Unconfined, ""), "").unwrap(),
            Seccomp::Unconfined
        );
        assert_eq!(
            read(profile(ProfileType::Localhost, "/p.json"), "").unwrap(),
            Seccomp::Localhost("/p.json".into())
        );
        let error = read(profile(ProfileType::Localhost, "p.json"), "").unwrap_err();
        assert!(error.to_string().starts_with("f.seccomp.localhost_ref"));
        assert!(read(None, "other").is_err());
    }

    #[test]
    fn namespaces_come_back_as_they_were_sent() {
        let sent = v1::NamespaceOption {
            network: v1::NamespaceMode::Pod.into(),
            pid: v1::NamespaceMode::Target.into(),
            ipc: v1::NamespaceMode::Node.into(),
            target_id: "abc".into(),
            userns_options: None,
        };
        let read = namespaces("f", Some(&sent)).unwrap();
        assert_eq!(read.ipc, NamespaceMode::Node);
        assert_eq!(namespace_option(&read), sent);
    }

    #[test]
    fn a_user_namespace_has_one_mapping_from_0_on() {
        let mapping = |container_id, host_id, length| v1::IdMapping {
            host_id,
            container_id,
            length,
        };
        let asked = |mode: v1::NamespaceMode, mappings: &[v1::IdMapping]| v1::NamespaceOption {
            userns_options: Some(v1::UserNamespace {
                mode: mode.into(),
                uids: mappings.to_vec(),
                gids: mappings.to_vec(),
            }),
            ..Default::default()
        };
        use v1::NamespaceMode::{Container, Node, Pod, Target};
        let good = asked(Pod, &[mapping(0, 1000, 100_000)]);
        let read = namespaces("f", Some(&good)).unwrap();
        assert_eq!(
            read.user_namespace.unwrap().uids,
            IdRange {
                host: 1000,
                length: 100_000
            }
        );
        assert_eq!(namespace_option(&read), good);
        let node = namespaces("f", Some(&asked(Node, &[]))).unwrap();
        assert_eq!(node.user_namespace, None);
        let one = mapping(0, 1000, 100_000);
        for (wrong, field) in [
            (asked(Pod, &[]), "uids"),
            (asked(Pod, &[one, mapping(0, 2000, 1)]), "uids"),
            (asked(Pod, &[mapping(1, 1000, 1)]), "uids[0].container_id"),
            (asked(Pod, &[mapping(0, 1000, 0)]), "uids[0].length"),
            (asked(Pod, &[mapping(0, 1, u32::MAX)]), "uids[0].length"),
            (asked(Node, &[one]), "mode"),
            (asked(Container, &[]), "mode"),
            (asked(Target, &[]), "mode"),
        ] {
            let error = namespaces("f", Some(&wrong)).unwrap_err().to_string();
            let expected = format!("f.namespace_options.userns_options.{field}");
            assert!(error.starts_with(&expected), "{error}");
        }
    }

    /// A restored container is compared with what is said of it.
    #[test]
    fn what_is_not_said_is_the_default() {
        let said = of_container("f", v1::LinuxContainerSecurityContext::default());
        assert_eq!(said.unwrap(), ContainerSecurity::default());
    }

    #[test]
    fn a_target_must_be_named() {
        let options = v1::NamespaceOption {
            pid: v1::NamespaceMode::Target.into(),
            ..Default::default()
        };
        let error = namespaces("f", Some(&options)).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("f.namespace_options.target_id"),
            "{error}"
        );
    }

    #[test]
    fn ids_must_fit() {
        for (value, fits) in [
            (0, true),
            (4_294_967_294, true),
            (4_294_967_295, false),
            (-1, false),
        ] {
            let context = v1::LinuxContainerSecurityContext {
                run_as_user: Some(v1::Int64Value { value }),
                ..Default::default()
            };
            let result = of_container("f", context);
            assert_eq!(result.is_ok(), fits, "{value}");
            if let Err(error) = result {
                assert!(error.to_string().starts_with("f.run_as_user"));
            }
        }
    }
}

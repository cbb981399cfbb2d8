//! What plugins want of a container, put into its specification.

use std::path::{Path, PathBuf};

use hull_proto_nri::{ContainerAdjustment, Mount};
use hull_spec::{
    resources::merge,
    spec::{ContainerSpec, MountFlag, MountPropagation, MountSource, MountSpec, Resources, Rlimit},
};

use crate::{limits::Refused, outcome::removal};

/// What every container has: it can't be removed.
const ALWAYS: [&str; 7] = [
    "/proc",
    "/dev",
    "/dev/pts",
    "/dev/shm",
    "/dev/mqueue",
    "/sys",
    "/sys/fs/cgroup",
];

/// Changes a specification as plugins want it. `limits` are the limits among that.
///
/// # Errors
/// For what can't be; the specification is of no use then.
pub(crate) fn apply(
    spec: &mut ContainerSpec,
    asked: &ContainerAdjustment,
    limits: &Resources,
) -> Result<(), Refused> {
    for (key, value) in &asked.annotations {
        match removal(key) {
            Some(key) => drop(spec.adjusted.annotations.remove(key)),
            None => drop(spec.adjusted.annotations.insert(key.clone(), value.clone())),
        }
    }
    for mount in &asked.mounts {
        let destination = mount.destination.as_str();
        let path = removal(destination).unwrap_or(destination);
        let at = |it: &MountSpec| it.container_path == Path::new(path);
        let replaced = spec.mounts.iter().position(at);
        spec.mounts.retain(|it| !at(it));
        if removal(destination).is_none() {
            // Where it was: later mounts may be below it.
            let place = replaced.unwrap_or(spec.mounts.len()).min(spec.mounts.len());
            spec.mounts.insert(place, bind(mount)?);
        } else if replaced.is_none() && ALWAYS.contains(&path) {
            let reason = "each container has it";
            return Err(Refused::new(format!("removal of mount {path}"), reason));
        }
    }
    for variable in &asked.env {
        let (key, set) = match removal(&variable.key) {
            Some(key) => (key, false),
            None => (variable.key.as_str(), true),
        };
        let wrong = |text: &str| text.contains('\0');
        if key.is_empty() || key.contains('=') || wrong(key) || wrong(&variable.value) {
            return Err(Refused::new(format!("env {key:?}"), "it is no variable"));
        }
        spec.env.retain(|(name, _)| name != key);
        spec.adjusted.unset_env.retain(|name| name != key);
        if set {
            spec.env.push((key.to_owned(), variable.value.clone()));
        } else {
            spec.adjusted.unset_env.push(key.to_owned());
        }
    }
    if !asked.args.is_empty() {
        spec.command.clone_from(&asked.args);
        spec.args.clear();
    }
    for limit in &asked.rlimits {
        if limit.soft > limit.hard {
            let reason = format!("{} is above the hard limit of {}", limit.soft, limit.hard);
            return Err(Refused::new(format!("rlimit {}", limit.type_), reason));
        }
        let rlimit = Rlimit {
            kind: limit.type_.clone(),
            soft: limit.soft,
            hard: limit.hard,
        };
        if !rlimit.is_known() {
            let field = format!("rlimit {:?}", limit.type_);
            return Err(Refused::new(field, "there is no such limit"));
        }
        let rlimits = &mut spec.adjusted.rlimits;
        rlimits.retain(|it| it.kind != rlimit.kind);
        rlimits.push(rlimit);
    }
    if *limits != Resources::default() {
        let now = spec.resources.take().unwrap_or_default();
        spec.resources = Some(merge(&now, limits));
    }
    if let Some(adj) = asked.linux.get_or_default().oom_score_adj.as_ref() {
        let limits = spec.resources.get_or_insert_default();
        limits.oom_score_adj = adj.value;
    }
    Ok(())
}

/// A path of the node in the container: all other kinds of mounts are the guest's affair.
fn bind(mount: &Mount) -> Result<MountSpec, Refused> {
    let at = &mount.destination;
    let refuse = |reason: String| Err(Refused::new(format!("mount {at}"), reason));
    let mut spec = MountSpec {
        container_path: PathBuf::from(at),
        source: MountSource::Host(PathBuf::from(&mount.source)),
        readonly: false,
        recursive_readonly: false,
        propagation: MountPropagation::Private,
        selinux_relabel: false,
        flags: Vec::new(),
        owners: None,
    };
    let mut is_bind = mount.type_ == "bind";
    for option in &mount.options {
        match option.as_str() {
            "bind" | "rbind" => is_bind = true,
            "ro" => spec.readonly = true,
            "rro" => (spec.readonly, spec.recursive_readonly) = (true, true),
            "rw" | "private" | "rprivate" => {}
            "slave" | "rslave" => spec.propagation = MountPropagation::HostToContainer,
            "shared" | "rshared" => spec.propagation = MountPropagation::Bidirectional,
            other => match MountFlag::of_option(other) {
                Some(flag) => spec.flags.push(flag),
                None => {
                    return refuse(format!(
                        "option {other:?} is not known to paths of the node"
                    ));
                }
            },
        }
    }
    if !is_bind {
        return refuse(format!(
            "type {:?} is none that a VM gets from its node",
            mount.type_
        ));
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_proto_nri::{KeyValue, POSIXRlimit};

    fn mount(destination: &str, options: &[&str]) -> Mount {
        Mount {
            destination: destination.into(),
            type_: "bind".into(),
            source: "/srv".into(),
            options: options.iter().map(|it| (*it).to_owned()).collect(),
            ..Mount::default()
        }
    }

    fn applied(spec: &ContainerSpec, asked: &ContainerAdjustment) -> Result<ContainerSpec, String> {
        let mut spec = spec.clone();
        let applied = apply(&mut spec, asked, &Resources::default());
        applied
            .map(|()| spec)
            .map_err(|refused| refused.to_string())
    }

    #[test]
    fn mounts_are_added_replaced_and_removed() {
        let asked = |mounts: Vec<Mount>| ContainerAdjustment {
            mounts,
            ..ContainerAdjustment::default()
        };
        let two = asked(vec![
            mount("/a", &["rbind", "ro"]),
            mount("/a/b", &["nosuid"]),
        ]);
        let spec = applied(&ContainerSpec::default(), &two).unwrap();
        assert!(spec.mounts[0].readonly && !spec.mounts[1].readonly);
        assert_eq!(spec.mounts[1].flags, [MountFlag::NoSuid]);
        let other = Mount {
            source: "/other".into(),
            ..mount("/a", &["rw"])
        };
        let changed = applied(&spec, &asked(vec![other, mount("-/a/b", &[])])).unwrap();
        let source = MountSource::Host("/other".into());
        assert_eq!(changed.mounts.len(), 1);
        assert_eq!(changed.mounts[0].source, source);
        let refused = applied(&spec, &asked(vec![mount("-/proc", &[])])).unwrap_err();
        assert_eq!(refused, "removal of mount /proc: each container has it");
        assert!(applied(&spec, &asked(vec![mount("-/gone", &[])])).is_ok());
        let tmpfs = Mount {
            type_: "tmpfs".into(),
            ..mount("/t", &[])
        };
        let refused = applied(&spec, &asked(vec![tmpfs])).unwrap_err();
        assert!(refused.starts_with("mount /t: type \"tmpfs\""), "{refused}");
        assert!(applied(&spec, &asked(vec![mount("/t", &["suid"])])).is_err());
    }

    #[test]
    fn variables_arguments_and_limits_are_those_of_the_plugins() {
        let variable = |key: &str, value: &str| KeyValue {
            key: key.into(),
            value: value.into(),
            ..KeyValue::default()
        };
        let limit = |kind: &str, soft, hard| POSIXRlimit {
            type_: kind.into(),
            soft,
            hard,
            ..POSIXRlimit::default()
        };
        let spec = ContainerSpec {
            command: vec!["sh".into()],
            args: vec!["-c".into()],
            env: vec![("A".into(), "1".into()), ("B".into(), "2".into())],
            ..ContainerSpec::default()
        };
        let asked = ContainerAdjustment {
            env: vec![variable("A", "3"), variable("-B", ""), variable("C", "4")],
            args: vec!["true".into()],
            rlimits: vec![limit("RLIMIT_NOFILE", 5, 6)],
            ..ContainerAdjustment::default()
        };
        let changed = applied(&spec, &asked).unwrap();
        let env = [("A", "3"), ("C", "4")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(
            (
                changed.env.as_slice(),
                changed.adjusted.unset_env.as_slice()
            ),
            (&env[..], &["B".to_owned()][..])
        );
        assert_eq!(
            (changed.command.as_slice(), changed.args.len()),
            (&["true".to_owned()][..], 0)
        );
        assert_eq!(changed.adjusted.rlimits[0].hard, 6);
        for wrong in [limit("RLIMIT_NOFILE", 7, 6), limit("RLIMIT_NONE", 1, 1)] {
            let asked = ContainerAdjustment {
                rlimits: vec![wrong],
                ..ContainerAdjustment::default()
            };
            assert!(applied(&spec, &asked).is_err());
        }
        for wrong in ["", "-", "A=B"] {
            let asked = ContainerAdjustment {
                env: vec![variable(wrong, "")],
                ..ContainerAdjustment::default()
            };
            assert!(applied(&spec, &asked).is_err(), "{wrong}");
        }
    }
}

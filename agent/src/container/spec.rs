//! Turns the host's OCI specification into the one that libcontainer gets.

use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{
    Capability, LinuxCapabilities, LinuxNamespace, LinuxNamespaceType, Process, RootBuilder, Spec,
    UserBuilder,
};

use super::{
    child::{Late, LateUser},
    user::User,
};

/// What the host's specification lacks or may not hold.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("read the container's OCI specification")]
    Parse(#[source] serde_json::Error),
    #[error("the OCI specification has no {0}")]
    Missing(&'static str),
    #[error("the working directory {0:?} is not absolute")]
    Cwd(PathBuf),
    #[error("complete the OCI specification")]
    Build(#[source] libcontainer::oci_spec::OciSpecError),
    #[error("no command")]
    NoCommand,
}

/// What the agent adds to a specification.
#[derive(Debug)]
pub(crate) struct Additions<'a> {
    pub(crate) rootfs: &'a Path,
    pub(crate) cgroup: PathBuf,
    pub(crate) user: &'a User,
    pub(crate) tty: bool,
    pub(crate) pid: PidNamespaceOf,
    /// The user namespace of the pod, as a file of /proc.
    pub(crate) user_namespace: Option<PathBuf>,
}

/// Which pid namespace the container is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PidNamespaceOf {
    /// A new one.
    Own,
    /// That of this process (in the guest's root namespace).
    Process(i32),
    /// The guest's.
    Guest,
}

/// Reads the host's JSON.
pub(crate) fn parse(json: &[u8]) -> Result<Spec, SpecError> {
    serde_json::from_slice(json).map_err(SpecError::Parse)
}

/// Completes `spec`.
pub(crate) fn complete(mut spec: Spec, add: Additions<'_>) -> Result<Spec, SpecError> {
    let readonly = spec.root().as_ref().and_then(|r| r.readonly());
    let root = RootBuilder::default()
        .path(add.rootfs)
        .readonly(readonly.unwrap_or(false))
        .build()
        .map_err(SpecError::Build)?;
    spec.set_root(Some(root));

    let process = spec.process_mut().as_mut();
    complete_process(process.ok_or(SpecError::Missing("process"))?, &add)?;

    let linux = spec.linux_mut().as_mut();
    let linux = linux.ok_or(SpecError::Missing("linux section"))?;
    linux.set_cgroups_path(Some(add.cgroup));
    let asked = linux.namespaces().clone().unwrap_or_default();
    linux.set_namespaces(Some(namespaces(asked, &add.pid, add.user_namespace)));
    Ok(spec)
}

fn complete_process(process: &mut Process, add: &Additions<'_>) -> Result<(), SpecError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(SpecError::NoCommand);
    }
    if !process.cwd().is_absolute() {
        return Err(SpecError::Cwd(process.cwd().clone()));
    }
    let umask = process.user().umask();
    let mut user = UserBuilder::default()
        .uid(add.user.uid)
        .gid(add.user.gid)
        .additional_gids(add.user.groups.clone());
    if let Some(umask) = umask {
        user = user.umask(umask);
    }
    process.set_user(user.build().map_err(SpecError::Build)?);
    process.set_terminal(Some(add.tty));
    let capabilities = process.capabilities().clone();
    process.set_capabilities(Some(explicit(
        &capabilities.unwrap_or_else(no_capabilities),
    )));
    // For libcontainer, Some(false) is as good as true.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    let mut env = process.env().clone().unwrap_or_default();
    // Otherwise libcontainer would ask this program's C library, which would
    // load plug-ins from the container.
    set_default(&mut env, "HOME", &add.user.home);
    process.set_env(Some(env));
    Ok(())
}

fn set_default(env: &mut Vec<String>, key: &str, value: &str) {
    let is_key = |entry: &String| entry.split_once('=').is_some_and(|(k, _)| k == key);
    if !env.iter().any(is_key) {
        env.push(format!("{key}={value}"));
    }
}

/// The pod's network, IPC and host name are the guest's own, so containers
/// share them by joining nothing.
fn namespaces(
    asked: Vec<LinuxNamespace>,
    pid: &PidNamespaceOf,
    user: Option<PathBuf>,
) -> Vec<LinuxNamespace> {
    let mut kept: Vec<_> = asked
        .into_iter()
        .filter(|ns| {
            matches!(
                ns.typ(),
                LinuxNamespaceType::Mount | LinuxNamespaceType::Cgroup
            )
        })
        .map(|mut ns| {
            ns.set_path(None);
            ns
        })
        .collect();
    if !kept.iter().any(|ns| ns.typ() == LinuxNamespaceType::Mount) {
        kept.push(namespace(LinuxNamespaceType::Mount, None));
    }
    if user.is_some() {
        kept.push(namespace(LinuxNamespaceType::User, user));
    }
    match pid {
        PidNamespaceOf::Own => kept.push(namespace(LinuxNamespaceType::Pid, None)),
        PidNamespaceOf::Process(pid) => kept.push(namespace(
            LinuxNamespaceType::Pid,
            Some(PathBuf::from(format!("/proc/{pid}/ns/pid"))),
        )),
        PidNamespaceOf::Guest => {}
    }
    kept
}

fn namespace(typ: LinuxNamespaceType, path: Option<PathBuf>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(typ);
    namespace.set_path(path);
    namespace
}

/// Returns the process of an exec: the container's with another command; and what is left to do
/// once it is in the container.
pub(crate) fn exec_process(
    container: &Spec,
    args: Vec<String>,
    tty: bool,
) -> Result<(Process, Late), SpecError> {
    if args.is_empty() {
        return Err(SpecError::NoCommand);
    }
    let process = container.process().as_ref();
    let mut process = process.ok_or(SpecError::Missing("process"))?.clone();
    process.set_args(Some(args));
    process.set_terminal(Some(tty));
    if tty {
        let mut env = process.env().clone().unwrap_or_default();
        set_default(&mut env, "TERM", "xterm");
        process.set_env(Some(env));
    }
    let mut late = Late {
        filter: container.linux().as_ref().and_then(|l| l.seccomp().clone()),
        filter_last: process.no_new_privileges() == Some(true),
        ..Late::default()
    };
    let real = process
        .capabilities()
        .clone()
        .unwrap_or_else(no_capabilities);
    if let Some(namespace) = user_namespace(container) {
        // libcontainer does not join it, so until the end the process is the guest's root.
        let user = process.user();
        late.user = Some(LateUser {
            namespace,
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
        });
        let mut root = UserBuilder::default().uid(0_u32).gid(0_u32);
        if let Some(umask) = user.umask() {
            root = root.umask(umask);
        }
        process.set_user(root.build().map_err(SpecError::Build)?);
        process.set_capabilities(Some(able_to_filter(&explicit(&no_capabilities()))));
        late.capabilities = Some(real);
    } else if late.filter.is_some() && !late.filter_last {
        process.set_capabilities(Some(able_to_filter(&real)));
        late.capabilities = Some(real);
    }
    Ok((process, late))
}

/// The container's user namespace, if it has one of its own.
fn user_namespace(container: &Spec) -> Option<PathBuf> {
    let namespaces = container.linux().as_ref()?.namespaces().as_ref()?;
    let user = namespaces
        .iter()
        .find(|ns| ns.typ() == LinuxNamespaceType::User)?;
    user.path().clone()
}

/// The default of oci-spec has some.
fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(None)
        .set_effective(None)
        .set_inheritable(None)
        .set_permitted(None)
        .set_ambient(None);
    none
}

/// Makes sets that are left out empty ones: libcontainer would leave the agent's.
fn explicit(capabilities: &LinuxCapabilities) -> LinuxCapabilities {
    let mut explicit = capabilities.clone();
    explicit
        .set_bounding(Some(capabilities.bounding().clone().unwrap_or_default()))
        .set_effective(Some(capabilities.effective().clone().unwrap_or_default()))
        .set_inheritable(Some(capabilities.inheritable().clone().unwrap_or_default()))
        .set_permitted(Some(capabilities.permitted().clone().unwrap_or_default()))
        .set_ambient(Some(capabilities.ambient().clone().unwrap_or_default()));
    explicit
}

/// Adds what loading a filter and then dropping the additions takes.
fn able_to_filter(real: &LinuxCapabilities) -> LinuxCapabilities {
    let more = [Capability::SysAdmin, Capability::Setpcap];
    let add = |set: &Option<std::collections::HashSet<Capability>>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(more);
        Some(set)
    };
    let mut able = real.clone();
    able.set_bounding(add(real.bounding()))
        .set_effective(add(real.effective()))
        .set_permitted(add(real.permitted()));
    able
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host_spec() -> Spec {
        let json = serde_json::json!({
            "ociVersion": "1.1.0",
            "root": {"path": "x", "readonly": true},
            "process": {
                "user": {"uid": 9, "gid": 9},
                "cwd": "/",
                "args": ["sh"],
                "env": ["PATH=/bin"],
                "noNewPrivileges": false,
                "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]}
            },
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"},
                    {"type": "network", "path": "/var/run/netns/x"}, {"type": "ipc"}, {"type": "uts"}
                ],
                "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}
            }
        });
        parse(json.to_string().as_bytes()).unwrap()
    }

    fn user() -> User {
        User {
            uid: 5,
            gid: 6,
            groups: vec![6, 7],
            home: "/home/five".to_owned(),
        }
    }

    fn completed(pid: PidNamespaceOf) -> Spec {
        complete_with(host_spec(), pid)
    }

    fn complete_with(spec: Spec, pid: PidNamespaceOf) -> Spec {
        let user = user();
        let add = Additions {
            rootfs: Path::new("/run/rootfs"),
            cgroup: PathBuf::from("/hull/c1"),
            user: &user,
            tty: false,
            pid,
            user_namespace: None,
        };
        complete(spec, add).unwrap()
    }

    fn kinds(spec: &Spec) -> Vec<(LinuxNamespaceType, bool)> {
        let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        namespaces
            .iter()
            .map(|n| (n.typ(), n.path().is_some()))
            .collect()
    }

    #[test]
    fn the_pods_namespaces_are_the_guests() {
        use LinuxNamespaceType::{Cgroup, Mount, Pid};
        assert_eq!(
            kinds(&completed(PidNamespaceOf::Own)),
            [(Mount, false), (Cgroup, false), (Pid, false)]
        );
        assert_eq!(
            kinds(&completed(PidNamespaceOf::Process(77))),
            [(Mount, false), (Cgroup, false), (Pid, true)]
        );
        assert_eq!(
            kinds(&completed(PidNamespaceOf::Guest)),
            [(Mount, false), (Cgroup, false)]
        );
    }

    #[test]
    fn root_user_home_and_cgroup_are_filled_in() {
        let spec = completed(PidNamespaceOf::Own);
        let process = spec.process().as_ref().unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (5, 6));
        assert_eq!(process.user().additional_gids(), &Some(vec![6, 7]));
        assert_eq!(process.no_new_privileges(), None);
        let env = process.env().as_ref().unwrap();
        assert!(env.contains(&"HOME=/home/five".to_owned()));
        let root = spec.root().as_ref().unwrap();
        assert_eq!(root.path(), Path::new("/run/rootfs"));
        assert_eq!(root.readonly(), Some(true));
    }

    #[test]
    fn every_set_of_capabilities_is_named() {
        let named = |spec: &Spec| {
            let process = spec.process().as_ref().unwrap();
            let sets = process.capabilities().clone().unwrap();
            [
                sets.bounding(),
                sets.effective(),
                sets.inheritable(),
                sets.permitted(),
                sets.ambient(),
            ]
            .map(|set| set.as_ref().map(|set| set.len()))
        };
        let some = named(&completed(PidNamespaceOf::Own));
        assert_eq!(some, [1, 1, 0, 1, 0].map(Some));
        let mut spec = host_spec();
        spec.process_mut().as_mut().unwrap().set_capabilities(None);
        assert_eq!(
            named(&complete_with(spec, PidNamespaceOf::Own)),
            [Some(0); 5]
        );
    }

    #[test]
    fn a_set_home_is_kept() {
        let mut env = vec!["HOME=/x".to_owned()];
        set_default(&mut env, "HOME", "/y");
        assert_eq!(env, ["HOME=/x"]);
    }

    #[test]
    fn an_exec_keeps_all_but_the_command() {
        let spec = completed(PidNamespaceOf::Own);
        let (process, late) = exec_process(&spec, vec!["id".to_owned()], true).unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["id"]);
        assert_eq!(process.user().uid(), 5);
        let env = process.env().as_ref().unwrap();
        assert!(env.contains(&"TERM=xterm".to_owned()));
        assert!(late.filter.is_some() && late.user.is_none() && !late.filter_last);
        let real = late.capabilities.unwrap();
        assert_eq!(real.effective().as_ref().unwrap().len(), 1);
        let able = process.capabilities().as_ref().unwrap();
        assert!(
            able.effective()
                .as_ref()
                .unwrap()
                .contains(&Capability::SysAdmin)
        );
        assert!(exec_process(&spec, Vec::new(), false).is_err());
    }
}

//! Turns the host's OCI specification into the one that a container is made by.

use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use oci_spec::runtime::{
    LinuxNamespace, LinuxNamespaceType, LinuxSeccomp, Process, RootBuilder, Spec, UserBuilder,
};

use super::user::User;

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
    Build(#[source] oci_spec::OciSpecError),
    #[error("the OCI specification has two namespaces of the type {0}")]
    Twice(LinuxNamespaceType),
    #[error("no command")]
    NoCommand,
    #[error("environment: {0:?} has no name, or a zero byte")]
    Environment(String),
}

/// What the agent adds to a specification.
#[derive(Debug)]
pub(crate) struct Additions<'a> {
    pub(crate) rootfs: &'a Path,
    pub(crate) user: &'a User,
    pub(crate) tty: bool,
    pub(crate) pid: PidNamespaceOf,
    /// Whether it is in the pod's user namespace.
    pub(crate) user_namespace: bool,
}

/// Which pid namespace the container is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PidNamespaceOf {
    /// A new one.
    Own,
    /// That of a process.
    Process,
    /// The guest's.
    Guest,
}

/// Reads the host's JSON.
pub(crate) fn parse(json: &[u8]) -> Result<Spec, SpecError> {
    serde_json::from_slice(json).map_err(SpecError::Parse)
}

/// Completes `spec`.
pub(crate) fn complete(mut spec: Spec, add: &Additions<'_>) -> Result<Spec, SpecError> {
    let readonly = spec.root().as_ref().and_then(|r| r.readonly());
    let root = RootBuilder::default()
        .path(add.rootfs)
        .readonly(readonly.unwrap_or(false))
        .build()
        .map_err(SpecError::Build)?;
    spec.set_root(Some(root));

    let process = spec.process_mut().as_mut();
    complete_process(process.ok_or(SpecError::Missing("process"))?, add)?;

    let linux = spec.linux_mut().as_mut();
    let linux = linux.ok_or(SpecError::Missing("linux section"))?;
    let asked = linux.namespaces().clone().unwrap_or_default();
    let twice = |(index, ns): &(usize, &LinuxNamespace)| {
        asked
            .iter()
            .take(*index)
            .any(|other| other.typ() == ns.typ())
    };
    if let Some((_, ns)) = asked.iter().enumerate().find(twice) {
        return Err(SpecError::Twice(ns.typ()));
    }
    linux.set_namespaces(Some(namespaces(&asked, &add.pid, add.user_namespace)));
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
    let mut env = environment(process.env().as_deref().unwrap_or_default())?;
    // As runc has it, one that is empty is none.
    env.retain(|entry| entry != "HOME=");
    set_default(&mut env, "HOME", &add.user.home);
    process.set_env(Some(env));
    Ok(())
}

/// The seccomp profile of a container.
pub(super) fn profile(spec: &Spec) -> Option<&LinuxSeccomp> {
    spec.linux().as_ref()?.seccomp().as_ref()
}

/// The AppArmor profile of a container's processes.
pub(super) fn apparmor_profile(spec: &Spec) -> Option<&str> {
    spec.process().as_ref()?.apparmor_profile().as_deref()
}

fn set_default(env: &mut Vec<String>, key: &str, value: &str) {
    let is_key = |entry: &String| entry.split_once('=').is_some_and(|(k, _)| k == key);
    if !env.iter().any(is_key) {
        env.push(format!("{key}={value}"));
    }
}

/// What a process gets of `asked`: of several values of one name the last, and nothing without a value,
/// as under other runtimes.
fn environment(asked: &[String]) -> Result<Vec<String>, SpecError> {
    let mut env: Vec<String> = Vec::with_capacity(asked.len());
    for entry in asked {
        let Some((name, _)) = entry.split_once('=') else {
            continue;
        };
        if name.is_empty() || entry.contains('\0') {
            return Err(SpecError::Environment(entry.clone()));
        }
        env.retain(|known| {
            let known = known.split_once('=');
            known.is_none_or(|(known, _)| known != name)
        });
        env.push(entry.clone());
    }
    Ok(env)
}

/// The pod's network, IPC and host name are the guest's own, so containers
/// share them by joining nothing. What is joined has a path, which nobody opens.
fn namespaces(asked: &[LinuxNamespace], pid: &PidNamespaceOf, user: bool) -> Vec<LinuxNamespace> {
    let cgroup = asked
        .iter()
        .any(|ns| ns.typ() == LinuxNamespaceType::Cgroup);
    let mut kept = vec![namespace(LinuxNamespaceType::Mount, false)];
    if cgroup {
        kept.push(namespace(LinuxNamespaceType::Cgroup, false));
    }
    if user {
        kept.push(namespace(LinuxNamespaceType::User, true));
    }
    match pid {
        PidNamespaceOf::Own => kept.push(namespace(LinuxNamespaceType::Pid, false)),
        PidNamespaceOf::Process => kept.push(namespace(LinuxNamespaceType::Pid, true)),
        PidNamespaceOf::Guest => {}
    }
    kept
}

fn namespace(typ: LinuxNamespaceType, joined: bool) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(typ);
    namespace.set_path(joined.then(PathBuf::new));
    namespace
}

/// Returns the process of an exec, the container's with another command, and what it joins of the
/// container.
pub(crate) fn exec_process(
    container: &Spec,
    args: Vec<String>,
    tty: bool,
) -> Result<(Process, CloneFlags), SpecError> {
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
    let linux = container.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    let joined = namespaces
        .unwrap_or_default()
        .iter()
        .map(|ns| match ns.typ() {
            LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
            LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
            LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
            _ => CloneFlags::empty(),
        });
    Ok((process, joined.collect()))
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
            user: &user,
            tty: false,
            pid,
            user_namespace: false,
        };
        complete(spec, &add).unwrap()
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
            kinds(&completed(PidNamespaceOf::Process)),
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
        let env = process.env().as_ref().unwrap();
        assert!(env.contains(&"HOME=/home/five".to_owned()));
        let root = spec.root().as_ref().unwrap();
        assert_eq!(root.path(), Path::new("/run/rootfs"));
        assert_eq!(root.readonly(), Some(true));
    }

    #[test]
    fn an_environment_is_one_of_names() {
        let env = |entries: &[&str]| {
            let entries: Vec<String> = entries.iter().map(|e| (*e).to_owned()).collect();
            environment(&entries).map_err(|e| e.to_string())
        };
        assert_eq!(
            env(&["A=1", "B=2", "D", "", "A=3=x", "C="]).unwrap(),
            ["B=2", "A=3=x", "C="]
        );
        for wrong in ["=x", "A=\0"] {
            let error = env(&["B=1", wrong]).unwrap_err();
            assert_eq!(
                error,
                format!("environment: {wrong:?} has no name, or a zero byte")
            );
        }
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
        let (process, joined) = exec_process(&spec, vec!["id".to_owned()], true).unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["id"]);
        assert_eq!(process.user().uid(), 5);
        let env = process.env().as_ref().unwrap();
        assert!(env.contains(&"TERM=xterm".to_owned()));
        let all = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWPID;
        assert_eq!(joined, all);
        assert!(exec_process(&spec, Vec::new(), false).is_err());
    }
}

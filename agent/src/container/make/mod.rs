//! How a process becomes a container's, from the helper's call to `execve`.
//!
//! ```text
//! helper, the guest's root: prepare ─ copies what is to be bound, enters the cgroup
//!   │                       join    ─ the pod's user and pid namespaces, or all of a container
//!   │ fork
//!   ▼
//! the process: Container::build     ─ mounts, devices, hidden paths; its root becomes "/"
//!              Process::settle      ─ session, terminal, limits, user, capabilities, filter
//!              (waits for the agent)
//!              Process::execute
//! ```
//! An exec has no root to build. Read in this order: this file, [`mounts`], [`root`] (how a path is found),
//! [`devices`], [`hide`], [`terminal`], [`label`], [`identity`], [`filter`], [`command`].
//!
//! The guest is one known kernel with cgroup v2, and the caller is its root: there is no other way than
//! the one here. Not here: network, IPC, host name and sysctls, which are the pod's; hooks and labels of
//! SELinux, which are refused.

mod command;
mod devices;
mod error;
mod filter;
mod hide;
mod identity;
mod label;
mod mounts;
mod options;
mod root;
mod terminal;

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{self as oci, LinuxNamespaceType, LinuxSeccomp, Spec};
use rustix::{
    mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount},
    process::{chdir, fchdir, pivot_root, setsid},
};

use self::{
    command::Command,
    devices::Devices,
    error::doing_to,
    filter::Filter,
    mounts::{Mounts, copy_of, put},
};
pub(super) use self::{
    error::{StepError, doing},
    label::Attributes,
    mounts::copy,
    root::{DEV, Kind, Root},
    terminal::Terminal,
};
use super::spec::profile;
use crate::{
    layout::CGROUP_ROOT,
    sys::{MountAttr, change_mount},
};

/// The ids of the guest that a pod's user namespace has.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// A container whose parts in the guest are held, to be built in namespaces of its own.
pub(super) struct Container {
    spec: Spec,
    mounts: Mounts,
    devices: Option<Devices>,
}

impl Container {
    /// Takes from the guest what the container is made of. The working directory becomes its root, which
    /// stays so in a copy of the mount namespace. `dir` is a directory of the guest's for nodes; `ids` is
    /// there for a container in a user namespace; `trees` are copies that were made of what mounts show, by
    /// index of the mount.
    pub(super) fn prepare(
        spec: Spec,
        dir: &Path,
        ids: Option<Ids>,
        trees: BTreeMap<usize, OwnedFd>,
    ) -> Result<Self, StepError> {
        check(&spec)?;
        let root = spec.root().as_ref();
        let root =
            root.ok_or_else(|| StepError::Refused("there is no root file system".to_owned()))?;
        chdir(root.path()).map_err(doing_to("go to the root file system", root.path()))?;
        let asked = spec.mounts().as_deref().unwrap_or_default();
        let mounts = Mounts::copy(asked, trees)?;
        let linux = spec.linux().as_ref();
        let wanted = linux.and_then(|linux| linux.devices().as_deref());
        let wanted = wanted.unwrap_or_default();
        let bound = asked.iter().find(|mount| {
            mount.destination() == Path::new(DEV) && mount.typ().as_deref() == Some("bind")
        });
        let devices = match bound.map(oci::Mount::source) {
            None => {
                let mut devices = Devices::new(wanted)?;
                if let Some(ids) = ids {
                    devices.hold(dir, |uid, gid| {
                        (ids.uid.saturating_add(uid), ids.gid.saturating_add(gid))
                    })?;
                }
                Some(devices)
            }
            Some(Some(source)) if source == Path::new(DEV) => {
                let mut devices = Devices::more(wanted)?;
                devices.hold(dir, |uid, gid| (uid, gid))?;
                Some(devices)
            }
            // A volume in its place has what it has.
            Some(_) => None,
        };
        Ok(Self {
            spec,
            mounts,
            devices,
        })
    }

    /// Builds the root and goes there, in namespaces that are new: the calling process is the
    /// container's first. Returns the terminal, if `with_terminal`.
    pub(super) fn build(self, with_terminal: bool) -> Result<Option<Terminal>, StepError> {
        let mut new = CloneFlags::CLONE_NEWNS;
        if self.has(LinuxNamespaceType::Cgroup) {
            new |= CloneFlags::CLONE_NEWCGROUP;
        }
        unshare(new).map_err(doing("make namespaces"))?;
        // Nothing that is mounted here is seen in the guest.
        mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .map_err(doing("part the mounts from the guest's"))?;
        let root = root_here().map_err(doing("mount the root file system"))?;
        self.mounts.place(&root)?;
        if let Some(devices) = self.devices {
            devices.make(&root)?;
        }
        let terminal = match with_terminal {
            true => Some(Terminal::of_container(&root)?),
            false => None,
        };
        let linux = self.spec.linux().as_ref();
        let paths = |paths: Option<&Option<Vec<String>>>| {
            paths
                .and_then(Option::as_deref)
                .unwrap_or_default()
                .to_vec()
        };
        hide::read_only(&root, &paths(linux.map(|linux| linux.readonly_paths())))?;
        let null = devices::null().map_err(doing("open /dev/null"))?;
        hide::mask(
            &root,
            &paths(linux.map(|linux| linux.masked_paths())),
            &null,
        )?;
        drop(null);
        enter()?;
        if let Some(cwd) = self.spec.process().as_ref().map(oci::Process::cwd) {
            // As other runtimes do; that it can't be made shows when the process goes there.
            let _ = root.find_or_make(cwd, Kind::Directory);
        }
        let mut attr = MountAttr::default();
        let read_only = self.spec.root().as_ref().and_then(oci::Root::readonly) == Some(true);
        if read_only {
            attr.add(options::RDONLY);
        }
        let asked = linux.and_then(|linux| linux.rootfs_propagation().as_deref());
        if let Some((propagation, _)) = asked.and_then(options::propagation) {
            attr.propagation = propagation;
        }
        if attr != MountAttr::default() {
            change_mount(&root, attr, false)
                .map_err(doing("set the flags of the root file system"))?;
        }
        Ok(terminal)
    }

    /// Its first process.
    pub(super) fn process(&self) -> Result<oci::Process, StepError> {
        let process = self.spec.process().clone();
        process.ok_or_else(|| StepError::Refused("there is no process".to_owned()))
    }

    /// Its seccomp profile.
    pub(super) fn profile(&self) -> Option<&LinuxSeccomp> {
        profile(&self.spec)
    }

    /// Whether it has a namespace of this kind that is new.
    pub(super) fn has(&self, kind: LinuxNamespaceType) -> bool {
        let linux = self.spec.linux().as_ref();
        let mut namespaces = linux
            .iter()
            .flat_map(|linux| linux.namespaces().iter().flatten());
        namespaces.any(|namespace| namespace.typ() == kind && namespace.path().is_none())
    }
}

/// Mounts the working directory on itself, and goes there: what a new mount namespace got from another
/// user namespace is locked, and can't become the root (pivot_root(2)).
fn root_here() -> io::Result<Root> {
    let here = Root::open(Path::new("."))?;
    let root = copy_of(&here, true)?;
    put(&root, &here)?;
    fchdir(&root)?;
    Ok(Root::from(root))
}

/// Makes the working directory the root of the calling process, and lets the guest's go.
fn enter() -> Result<(), StepError> {
    // The old one comes to lie on the new one, and is taken away from there (pivot_root(2)).
    pivot_root(".", ".").map_err(doing("change the root directory"))?;
    unmount(".", UnmountFlags::DETACH).map_err(doing("let the guest's mounts go"))?;
    chdir("/").map_err(doing("go to the root directory"))
}

/// Refuses what a specification asks for and nobody here does: it would be missed later.
fn check(spec: &Spec) -> Result<(), StepError> {
    let linux = spec.linux().as_ref();
    let process = spec.process().as_ref();
    let of_process = |asked: fn(&oci::Process) -> bool| process.is_some_and(asked);
    let of_linux = |asked: fn(&oci::Linux) -> bool| linux.is_some_and(asked);
    let asked = [
        (spec.hooks().is_some(), "hooks"),
        (
            of_linux(|linux| linux.sysctl().is_some()),
            "sysctls of a container's own",
        ),
        (
            of_process(|process| process.selinux_label().is_some())
                || of_linux(|linux| linux.mount_label().is_some()),
            "SELinux labels",
        ),
        (
            of_process(|process| process.scheduler().is_some()),
            "scheduling policies",
        ),
        (
            of_process(|process| process.io_priority().is_some()),
            "I/O priorities",
        ),
        (
            of_process(|process| process.exec_cpu_affinity().is_some()),
            "CPU affinities",
        ),
        (
            of_linux(|linux| linux.personality().is_some()),
            "personalities",
        ),
        (
            of_linux(|linux| linux.intel_rdt().is_some()),
            "cache allocations",
        ),
        (
            of_linux(|linux| linux.time_offsets().is_some()),
            "clocks of a container's own",
        ),
        (
            profile(spec).is_some_and(|profile| profile.listener_path().is_some()),
            "listeners of seccomp",
        ),
    ];
    match asked.iter().find(|(asked, _)| *asked) {
        Some((_, what)) => Err(StepError::Refused(format!("there are no {what} here"))),
        None => Ok(()),
    }
}

/// Moves the calling process to a cgroup of version 2, by its directory.
pub(super) fn enter_cgroup(path: &Path) -> Result<(), StepError> {
    let file = path.join("cgroup.procs");
    fs::write(&file, "0").map_err(doing_to("enter the cgroup", path))
}

/// Enters the cgroup of a container whose first process is `init`, as a command.
pub(super) fn enter_cgroup_beside(init: i32, path: &Path) -> Result<(), StepError> {
    match enter_cgroup(path) {
        // The container has divided it, so its processes are in cgroups below (cgroup v2, "No Internal Process
        // Constraint"): a command goes where the first one is.
        Err(error) if error.errno() == libc::EBUSY => {
            let text = fs::read_to_string(format!("/proc/{init}/cgroup"));
            let text = text.map_err(doing("read the cgroup of the first process"))?;
            match cgroup_below(path, &text) {
                Some(cgroup) => enter_cgroup(&cgroup),
                None => Err(error),
            }
        }
        entered => entered,
    }
}

/// Returns the cgroup that a process is in, by /proc/PID/cgroup, if it is below that at `path`.
fn cgroup_below(path: &Path, text: &str) -> Option<PathBuf> {
    let relative = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let cgroup = Path::new(CGROUP_ROOT).join(relative);
    cgroup.starts_with(path).then_some(cgroup)
}

/// Joins namespaces of the process behind `pidfd`. In a user namespace the caller becomes root.
pub(super) fn join(pidfd: &OwnedFd, namespaces: CloneFlags) -> Result<(), StepError> {
    setns(pidfd, namespaces).map_err(doing("join namespaces"))?;
    if namespaces.contains(CloneFlags::CLONE_NEWUSER) {
        identity::become_root().map_err(doing("become root of the user namespace"))?;
    }
    Ok(())
}

/// A process in its container, before its command.
pub(super) struct Process {
    process: oci::Process,
    command: Command,
    filter: Option<Filter>,
}

impl Process {
    /// Checks what is asked for.
    pub(super) fn new(
        process: oci::Process,
        profile: Option<&LinuxSeccomp>,
    ) -> Result<Self, StepError> {
        let empty = Vec::new();
        let args = process.args().as_ref().unwrap_or(&empty);
        let env = process.env().as_ref().unwrap_or(&empty);
        let command = Command::new(args, env)?;
        let filter = profile.map(Filter::new).transpose()?;
        Ok(Self {
            process,
            command,
            filter,
        })
    }

    /// Takes up the streams and gives all powers away that the command shall not have. `attributes` are there for
    /// one under an AppArmor profile.
    pub(super) fn settle(
        &self,
        streams: Streams,
        attributes: Option<&Attributes>,
    ) -> Result<(), StepError> {
        if let Some(profile) = self.process.apparmor_profile() {
            let attributes = attributes
                .ok_or_else(|| StepError::Refused("the guest's /proc is not held".to_owned()))?;
            attributes.confine(profile)?;
        }
        setsid().map_err(doing("begin a session"))?;
        streams.take()?;
        identity::limit(&self.process)?;
        let cwd = self.process.cwd();
        // Root may not go everywhere, such as on a share, nor may every user.
        let early = go(cwd);
        identity::become_user(&self.process, || match &self.filter {
            Some(filter) if !self.filtered_last() => filter.load(),
            _ => Ok(()),
        })?;
        if early.is_err() {
            go(cwd)?;
        }
        Ok(())
    }

    /// Executes the command; returns why that could not be.
    pub(super) fn execute(&self) -> StepError {
        crate::sys::default_signals();
        if self.filtered_last()
            && let Some(Err(error)) = self.filter.as_ref().map(Filter::load)
        {
            return error;
        }
        self.command.execute()
    }

    /// With `no_new_privs` a filter takes no powers, and what drops them need not be in it.
    fn filtered_last(&self) -> bool {
        self.process.no_new_privileges() == Some(true)
    }
}

/// Goes to a directory of the container's, which a link or a descriptor may have as another.
fn go(cwd: &Path) -> Result<(), StepError> {
    let went = || -> io::Result<()> {
        chdir(cwd)?;
        // A directory outside of the root has no path.
        match nix::unistd::getcwd() {
            Ok(path) if path.is_absolute() => Ok(()),
            Ok(_) => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            Err(e) => Err(e.into()),
        }
    };
    let gone = went().map_err(doing_to("go to the working directory", cwd));
    if gone.is_err() {
        chdir("/").map_err(doing("go to the root directory"))?;
    }
    gone
}

/// Standard input, output and error of a process.
pub(super) enum Streams {
    Pipes([OwnedFd; 3]),
    Terminal(Terminal),
}

impl Streams {
    fn take(self) -> Result<(), StepError> {
        match self {
            Self::Pipes([stdin, stdout, stderr]) => {
                let set = || -> rustix::io::Result<()> {
                    rustix::stdio::dup2_stdin(stdin)?;
                    rustix::stdio::dup2_stdout(stdout)?;
                    rustix::stdio::dup2_stderr(stderr)
                };
                set().map_err(doing("set the standard streams"))
            }
            Self::Terminal(terminal) => terminal.take(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_found_below_the_containers_alone() {
        let own = Path::new("/sys/fs/cgroup/hull/c1");
        let below = |text| cgroup_below(own, text);
        let init = own.join("init.scope");
        assert_eq!(below("1:name=x:/y\n0::/hull/c1/init.scope\n"), Some(init));
        assert_eq!(below("0::/hull/c10\n"), None);
        assert_eq!(below("0::/\n"), None);
        assert_eq!(below(""), None);
    }
}

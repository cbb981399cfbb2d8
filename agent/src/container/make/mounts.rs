//! The mounts of a container (OCI runtime specification, "Mounts").
//!
//! What is bound is copied in the guest's mount namespace, with the powers of the guest's root
//! ([`Mounts::copy`]); everything is put in its place in the container's ([`Mounts::place`]), each
//! target found by a descriptor.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::Mount;
use rustix::{
    fs::{CWD, Mode, OFlags, fstat, fstatfs, open},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
        move_mount, open_tree,
    },
};

use super::{
    error::{StepError, doing, doing_to},
    options::Options,
    root::{DEV, Kind, Root},
};
use crate::sys::{MountAttr, change_mount};

/// `linux/magic.h`.
pub(super) const PROC: i64 = 0x9fa0;
/// Files of /proc that something may be mounted on: what lxcfs makes, and what runc allows.
const OVER_PROC: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// Mounts in the order of the specification.
#[derive(Debug)]
pub(super) struct Mounts(Vec<Prepared>);

#[derive(Debug)]
struct Prepared {
    target: PathBuf,
    options: Options,
    what: What,
}

#[derive(Debug)]
enum What {
    /// A copy of a mount.
    Copy(OwnedFd),
    New {
        kind: String,
        source: String,
    },
}

impl Mounts {
    /// Reads `mounts`, and copies what is to be bound but for `trees`, which are copies, by index of the mount.
    pub(super) fn copy(
        mounts: &[Mount],
        mut trees: BTreeMap<usize, OwnedFd>,
    ) -> Result<Self, StepError> {
        let mounts = mounts.iter().enumerate();
        mounts
            .map(|(index, mount)| prepare(mount, trees.remove(&index)))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Mounts all below `root`, which belongs to the calling process's mount namespace.
    pub(super) fn place(self, root: &Root) -> Result<(), StepError> {
        self.0.into_iter().try_for_each(|mount| mount.place(root))
    }
}

fn prepare(mount: &Mount, tree: Option<OwnedFd>) -> Result<Prepared, StepError> {
    let target = mount.destination().clone();
    let options = Options::parse(mount.options().as_deref().unwrap_or_default());
    let kind = mount.typ().clone().unwrap_or_default();
    let source = mount.source().clone().unwrap_or_default();
    let bound = options.bind.or_else(|| (kind == "bind").then_some(false));
    let what = match (bound, tree) {
        (_, Some(tree)) => What::Copy(tree),
        (Some(all), None) => What::Copy(copy(CWD, &source, all).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound if source.starts_with(DEV) => {
                let (on, device) = (target.display(), source.display());
                StepError::Refused(format!("mount on {on}: the pod's VM has no {device}"))
            }
            _ => doing_to("bind", &source)(e),
        })?),
        (None, None) if kind.is_empty() || kind == "none" => {
            return Err(StepError::Refused(format!(
                "the mount on {} has no type",
                target.display()
            )));
        }
        (None, None) => What::New {
            // Version 2 is the only one here.
            kind: if kind == "cgroup" {
                "cgroup2".to_owned()
            } else {
                kind
            },
            source: source.to_string_lossy().into_owned(),
        },
    };
    let prepared = Prepared {
        target,
        options,
        what,
    };
    if let What::Copy(tree) = &prepared.what {
        prepared.change(tree)?;
    }
    Ok(prepared)
}

impl Prepared {
    /// Gives the mount its flags, while it is mounted nowhere.
    fn change(&self, tree: &OwnedFd) -> Result<(), StepError> {
        let options = &self.options;
        let change = |attr: MountAttr, all| {
            if attr == MountAttr::default() {
                return Ok(());
            }
            change_mount(tree, attr, all)
                .map_err(doing_to("set the flags of the mount on", &self.target))
        };
        change(options.own, false)?;
        change(options.all, true)?;
        // The agent's mounts do not follow the container's, unless that is asked for.
        let downstream = u64::from(MountPropagationFlags::DOWNSTREAM.bits());
        let (propagation, all) = options.propagation.unwrap_or((downstream, true));
        let propagation = MountAttr {
            propagation,
            ..MountAttr::default()
        };
        change(propagation, all)
    }

    fn place(self, root: &Root) -> Result<(), StepError> {
        let failed = |e: io::Error| self.failed(e);
        let kind = match &self.what {
            What::Copy(tree) => Kind::of(tree).map_err(failed)?,
            What::New { .. } => Kind::Directory,
        };
        let target = match &self.what {
            // Others are to be where they are looked for, and nowhere else.
            What::New {
                kind: of_kernel, ..
            } if ["proc", "sysfs"].contains(&of_kernel.as_str()) => {
                root.find_or_make_itself(&self.target, kind)
            }
            _ => root.find_or_make(&self.target, kind),
        };
        let target = target.map_err(failed)?;
        if root.is(&target).map_err(failed)? {
            // It would be there for nobody: the container's "/" is what it lies on.
            let on = self.target.display();
            return Err(StepError::Refused(format!(
                "nothing can be mounted on {on}: it is the container's root"
            )));
        }
        self.keep_off_proc(&target)?;
        let tree = match &self.what {
            What::New { kind, source } => &self.make(kind, source, &target)?,
            What::Copy(tree) => tree,
        };
        put(tree, &target).map_err(failed)
    }

    fn failed(&self, error: io::Error) -> StepError {
        let on = self.target.display();
        let step = match (&self.what, error.raw_os_error()) {
            (What::Copy(_), Some(libc::EISDIR)) => {
                return StepError::Refused(format!("mount a file on {on}: it is a directory"));
            }
            (_, Some(libc::ENOTDIR)) => {
                return StepError::Refused(format!(
                    "mount a directory on {on}: it, or something on the way, is a file"
                ));
            }
            (What::Copy(_), _) => format!("mount on {on}"),
            (What::New { kind, .. }, _) => format!("mount {kind} on {on}"),
        };
        doing(&step)(error)
    }

    /// What the kernel says of processes, and what is written there, must be the kernel's.
    fn keep_off_proc(&self, target: &OwnedFd) -> Result<(), StepError> {
        let is_proc = |file: &OwnedFd| fstatfs(file).map(|fs| fs.f_type == PROC);
        let failed = doing_to("look at", &self.target);
        let (on_proc, of_proc) = match &self.what {
            What::New { kind, .. } => (is_proc(target), Ok(kind == "proc")),
            What::Copy(tree) => (is_proc(target), is_proc(tree)),
        };
        let on_proc = match on_proc {
            Ok(on_proc) => on_proc || self.target == Path::new("/proc"),
            Err(e) => return Err(failed(e)),
        };
        let allowed = OVER_PROC.iter().any(|path| Path::new(path) == self.target);
        if on_proc && !allowed && !of_proc.unwrap_or(false) {
            let on = self.target.display();
            return Err(StepError::Refused(format!(
                "nothing can be mounted on {on}: it is the kernel's"
            )));
        }
        Ok(())
    }

    /// Makes a new file system that is mounted nowhere.
    fn make(&self, kind: &str, source: &str, target: &OwnedFd) -> Result<OwnedFd, StepError> {
        let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| self.failed(e.into()))?;
        let made = || -> io::Result<OwnedFd> {
            if !source.is_empty() {
                fsconfig_set_string(fs.as_fd(), "source", source)?;
            }
            for (name, value) in &self.options.data {
                match value {
                    Some(value) => fsconfig_set_string(fs.as_fd(), name.as_str(), value.as_str())?,
                    None => fsconfig_set_flag(fs.as_fd(), name.as_str())?,
                }
            }
            // As runc has it: what is there keeps its mode.
            if kind == "tmpfs" && !self.options.has("mode") {
                let mode = format!("{:o}", fstat(target)?.st_mode & 0o7777);
                fsconfig_set_string(fs.as_fd(), "mode", mode)?;
            }
            fsconfig_create(fs.as_fd())?;
            Ok(fsmount(
                fs.as_fd(),
                FsMountFlags::FSMOUNT_CLOEXEC,
                MountAttrFlags::empty(),
            )?)
        };
        let made = made().map_err(|e| match said(&fs) {
            Some(said) => {
                StepError::Refused(format!("mount {kind} on {}: {said}", self.target.display()))
            }
            None => self.failed(e),
        })?;
        self.change(&made)?;
        Ok(made)
    }
}

/// What a file system says of its failure, if anything (fsopen(2), "message retrieval").
fn said(fs: &OwnedFd) -> Option<String> {
    let mut buffer = [0; 256];
    let length = rustix::io::read(fs, &mut buffer).ok()?;
    let said = String::from_utf8_lossy(buffer.get(..length)?).into_owned();
    said.strip_prefix("e ").map(|said| said.trim().to_owned())
}

/// Mounts what is mounted nowhere on what is behind a descriptor.
pub(super) fn put(tree: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", target, "", flags)?)
}

/// Copies the mount of `path` below `from`, or of `from` itself if it is empty, with all below it if so
/// wanted; the copy is mounted nowhere (open_tree(2)).
pub(crate) fn copy(from: impl AsFd, path: &Path, all: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    if all {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(from, path, flags)?)
}

/// Copies the mount of what is behind a descriptor.
pub(super) fn copy_of(file: impl AsFd, all: bool) -> io::Result<OwnedFd> {
    copy(file, Path::new(""), all)
}

/// An empty directory that nothing can be made in, mounted nowhere.
pub(super) fn nothing() -> io::Result<OwnedFd> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(fs.as_fd())?;
    let flags = MountAttrFlags::MOUNT_ATTR_RDONLY;
    Ok(fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)?)
}

/// Opens `path` of the calling process, without following a link at its end.
pub(super) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

//! What can go wrong with a container.

use std::{io, path::PathBuf};

use super::{
    huge_pages::HugePageError, launch::LaunchError, limits::LimitError, process::StartFailure,
    rootfs::RootfsError, spec::SpecError, user::UserError,
};
use crate::{
    apparmor::AppArmorError,
    ident::{Id, IdError},
    tree::CopyError,
};

/// Why a request about a container failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    #[error(transparent)]
    BadId(#[from] IdError),
    #[error("no container {0}")]
    NotFound(Id),
    #[error("no process {exec:?} with streams in container {container}")]
    NoProcess { container: String, exec: String },
    #[error("container {0} exists with other settings")]
    Exists(Id),
    #[error("exec {0} exists with another command")]
    ExecExists(Id),
    #[error("no storage {0}")]
    NoStorage(String),
    #[error("container {id} is {state}, not {wanted}")]
    WrongState {
        id: Id,
        state: &'static str,
        wanted: &'static str,
    },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("assemble the root file system")]
    Rootfs(#[from] RootfsError),
    #[error("{action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("find {path:?} in the volume")]
    SubPath {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("fill the image's volume {path}")]
    Volume {
        path: PathBuf,
        #[source]
        source: CopyError,
    },
    #[error("the image's volume {0} is no directory in the image")]
    NoDirectory(PathBuf),
    #[error("use device {path} of the guest")]
    Device {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(transparent)]
    AppArmor(#[from] AppArmorError),
    #[error(transparent)]
    HugePages(#[from] HugePageError),
    #[error("id {0} is not in the pod's user namespace")]
    Unmapped(u32),
    #[error("the owners of the mount on {0} can't be mapped, but by the pod's user namespace")]
    Mapping(PathBuf),
    #[error("make the pod's pid namespace")]
    PodPid(#[source] io::Error),
    #[error("make standard streams")]
    Stdio(#[source] io::Error),
    #[error("make the container's first process")]
    Create(#[source] LaunchError),
    #[error("let container {id} start")]
    Notify {
        id: Id,
        #[source]
        source: io::Error,
    },
    #[error("start container {id}")]
    Start {
        id: Id,
        #[source]
        source: StartFailure,
    },
    #[error("exec in container {id}")]
    Exec {
        id: Id,
        #[source]
        source: StartFailure,
    },
    #[error("signal container {id}")]
    Signal {
        id: Id,
        #[source]
        source: io::Error,
    },
    #[error("have container {id} stand still, or go on")]
    Freeze {
        id: Id,
        #[source]
        source: io::Error,
    },
    #[error("processes of container {0} do not come to a stand")]
    Restless(Id),
    #[error("resize the terminal")]
    Resize(#[source] io::Error),
    #[error("container {0} does not end")]
    Unkillable(Id),
    #[error("change the limits of container {id}")]
    Update { id: Id, message: String },
}

//! Paths of the host in a pod: one file server process and one virtio-fs device for each pod that
//! mounts any, started with the first.
//!
//! ```text
//! absent ──start──▶ process ──attach, mount──▶ mounted ──add / remove──▶ shares of containers
//!    ▲                 │ failed                   │ VM gone: it ends by itself
//!    └─────────────────┴──────────────────────────┘
//! ```
//!
//! Nothing of it is recorded but which process it is, in the pod's run directory: attaching and
//! mounting may be repeated.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use hull_proto_vmm::{
    DeviceConfig, ErrorKind as VmErrorKind, FdIndex,
    fs::{
        Access, ErrorKind, MAX_STATE, Owner, Propagation, Request, Response, SEND_BUFFER, Share,
        VERSION,
    },
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

use hull_base::{
    beneath, clock,
    faults::{self, Point},
};
use hull_spec::{
    error::PodError,
    field::{Field, MountField},
    id::{ContainerId, PodId},
    spec::{ContainerSpec, MountPropagation, MountSource},
};
use hull_vm::{
    agent::client::Storage, cgroup::PodCgroup, error::VmError, process::Process, rundir::RunDir,
    running::RunningVm, slots,
};

use crate::ports::PodProcesses;

/// The name of the mount in the guest, and the device's tag.
pub(crate) const FILES_ID: &str = "host";
/// How long a server may take to listen.
const START: Duration = Duration::from_secs(30);
/// How long it may take for a request: a path may be on a network file system.
const CALL: Duration = Duration::from_secs(60);
/// How long a server may take to end after its VM.
const END: Duration = Duration::from_secs(2);

/// Why the file server does not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilesError {
    #[error("make the file server's socket")]
    Socket(#[source] io::Error),
    #[error("connect to the file server at {}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("speak with the file server")]
    Io(#[from] io::Error),
    #[error("speak with the file server")]
    Codec(#[from] hull_proto_vmm::CodecError),
    #[error("speak with the file server: it did not answer in {} s", CALL.as_secs())]
    Timeout,
    #[error("speak with the file server: it answered with something else")]
    Unexpected,
    #[error(
        "speak with the file server: it has contract version {theirs}, this is {}",
        VERSION
    )]
    Version { theirs: u32 },
    #[error("share paths of the host: {0}")]
    Refused(String),
    #[error("share paths of the host: the pod's file server is gone")]
    Gone,
}

impl From<FilesError> for PodError {
    fn from(error: FilesError) -> Self {
        match error {
            FilesError::Gone | FilesError::Timeout | FilesError::Connect { .. } => {
                Self::unavailable("share paths of the host", error)
            }
            other => Self::internal("share paths of the host", other),
        }
    }
}

/// By what a server is started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Host<'a> {
    pub processes: &'a dyn PodProcesses,
    /// The server's program.
    pub program: &'a Path,
}

/// Where a server is started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub host: Host<'a>,
    pub pod: &'a PodId,
    pub run: &'a RunDir,
    pub cgroup: Option<&'a PodCgroup>,
}

/// What a guest knows of the host's files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SavedFiles {
    /// All shares.
    pub owners: Vec<Owner>,
    /// What only the server reads.
    pub state: Vec<u8>,
}

/// The files of the host that one VM has.
#[derive(Debug, Default)]
pub(crate) struct HostFiles {
    server: Option<Server>,
}

#[derive(Debug)]
struct Server {
    process: Process,
    /// The VM's end of the FUSE socket, until it has it.
    vm_end: Option<OwnedFd>,
    mounted: bool,
}

impl HostFiles {
    /// Notes the server that an earlier daemon started.
    pub(crate) fn adopt(&mut self, process: Process) {
        self.server = Some(Server {
            process,
            vm_end: None,
            // Perhaps it is; mounting again has no effect then.
            mounted: false,
        });
    }

    /// The server, once there is one.
    pub(crate) fn process(&self) -> Option<Process> {
        self.server.as_ref().map(|server| server.process.clone())
    }

    /// Shares what a container mounts of the host, by a server that is started unless it runs; returns
    /// where each is, below the mount in the guest. By kubelet's id of the pod its own volumes are known.
    ///
    /// # Errors
    /// [`PodError::InvalidArgument`] with the field of a path that can't be shared. Nothing is
    /// shared then.
    pub(crate) async fn add(
        &mut self,
        host: Host<'_>,
        vm: &RunningVm,
        container: &ContainerId,
        pod_uid: &str,
        wanted: &[(usize, Share)],
    ) -> Result<Vec<String>, PodError> {
        self.ensure(host, vm).await?;
        let request = Request::Add {
            owner: container.to_string(),
            shares: wanted.iter().map(|(_, share)| share.clone()).collect(),
            uid: pod_uid.to_owned(),
        };
        let answer = self.ask(vm, &request).await;
        faults::point(Point::PathsShared);
        match answer? {
            Response::Added { places, .. } if places.len() == wanted.len() => Ok(places),
            // Of an older server.
            Response::Added { places, .. } if places.is_empty() => {
                let own = 0..wanted.len();
                Ok(own.map(|number| format!("{container}/{number}")).collect())
            }
            Response::Error {
                kind: ErrorKind::NotFound | ErrorKind::Special,
                share: Some(at),
                message,
            } => {
                let index = wanted.get(at).map_or(0, |(index, _)| *index);
                let field = Field::Mount(index, MountField::HostPath);
                Err(PodError::invalid(field, message))
            }
            Response::Error { message, .. } => Err(FilesError::Refused(message).into()),
            _ => Err(FilesError::Unexpected.into()),
        }
    }

    /// Ends what a container had, as the guest calls it; it is no error when that is nothing.
    ///
    /// # Errors
    /// When the server does not answer.
    pub(crate) async fn remove(&mut self, vm: &RunningVm, owner: String) -> Result<(), PodError> {
        if !self.server.as_ref().is_some_and(|s| s.process.is_alive()) {
            return Ok(());
        }
        let answer = self.ask(vm, &Request::Remove { owner }).await;
        faults::point(Point::PathsUnshared);
        match answer? {
            Response::Ok => Ok(()),
            Response::Error { message, .. } => Err(FilesError::Refused(message).into()),
            _ => Err(FilesError::Unexpected.into()),
        }
    }

    /// What the guest knows of all shares, for a checkpoint. The VM stands still.
    ///
    /// # Errors
    /// When the server is gone, does not answer, or is of an earlier version that can't tell.
    pub(crate) async fn save(&self, vm: &RunningVm) -> Result<SavedFiles, PodError> {
        match talk(&vm.run, &Request::Save, &[]).await? {
            (Response::Saved { owners, .. }, state) => Ok(SavedFiles { owners, state }),
            (Response::Error { message, .. }, _) => Err(FilesError::Refused(message).into()),
            _ => Err(FilesError::Unexpected.into()),
        }
    }

    /// Starts a server with which a guest goes on that had another; returns the socket for its VM.
    ///
    /// # Errors
    /// When it can't go on; [`HostFiles::end`] ends what was started.
    pub(crate) async fn resume(
        &mut self,
        place: Place<'_>,
        pod_uid: &str,
        saved: &SavedFiles,
    ) -> Result<OwnedFd, PodError> {
        let server = self.server.insert(start(place)?);
        server.greet(place.run).await?;
        let vm_end = server.vm_end.take().ok_or(FilesError::Unexpected)?;
        server.mounted = true;
        let request = Request::Resume {
            owners: saved.owners.clone(),
            uid: pod_uid.to_owned(),
            bytes: saved.state.len() as u64,
        };
        match talk(place.run, &request, &saved.state).await?.0 {
            Response::Resumed { lost } => {
                if lost > 0 {
                    tracing::warn!(pod = %place.pod, lost, "files of the host are not there any more");
                }
                Ok(vm_end)
            }
            Response::Error {
                kind: ErrorKind::NotFound | ErrorKind::Special,
                message,
                ..
            } => Err(PodError::precondition("share paths of the host", message)),
            Response::Error { message, .. } => Err(FilesError::Refused(message).into()),
            _ => Err(FilesError::Unexpected.into()),
        }
    }

    /// Waits for the server to end, which it does when its VM is gone, and kills it otherwise.
    ///
    /// # Errors
    /// [`VmError::Unkillable`]: it is tried again when this is repeated.
    pub(crate) async fn end(&mut self) -> Result<(), VmError> {
        if let Some(server) = &self.server {
            server.process.end(END).await?;
            self.server = None;
        }
        Ok(())
    }

    /// Sees to it that the server runs and the guest has mounted it.
    async fn ensure(&mut self, host: Host<'_>, vm: &RunningVm) -> Result<(), PodError> {
        let server = match &mut self.server {
            Some(server) if server.mounted => {
                // What the guest has open went with a server that ended: another one would know
                // nothing of it.
                let alive = server.process.is_alive();
                return if alive {
                    Ok(())
                } else {
                    Err(FilesError::Gone.into())
                };
            }
            Some(server) if server.process.is_alive() => server,
            // Whether there is a device of an earlier one, the VM tells.
            other => other.insert(start(Place {
                host,
                pod: &vm.pod,
                run: &vm.run,
                cgroup: vm.cgroup.as_ref(),
            })?),
        };
        let was_attached = server.vm_end.is_none();
        let Err(error) = server.mount(vm).await else {
            return Ok(());
        };
        if was_attached {
            // An earlier daemon's, with shares in use.
            return Err(error);
        }
        server.process.kill();
        let attached = server.vm_end.is_none();
        let undo = self.undo(vm, attached).await;
        Err(error.after_undo(undo))
    }

    async fn undo(&mut self, vm: &RunningVm, attached: bool) -> Result<(), PodError> {
        self.end().await?;
        if attached {
            vm.control.detach(slots::FILES).await?;
        }
        Ok(())
    }

    async fn ask(&self, vm: &RunningVm, request: &Request) -> Result<Response, FilesError> {
        ask(&vm.run, request).await
    }
}

/// The device of a guest that speaks with a server by the socket that is sent with it.
pub(crate) fn device(socket: FdIndex) -> DeviceConfig {
    DeviceConfig::Fs {
        tag: FILES_ID.into(),
        socket,
    }
}

/// Starts a server, with one end of a new socket.
fn start(place: Place<'_>) -> Result<Server, PodError> {
    let Place {
        host,
        pod,
        run,
        cgroup,
    } = place;
    let (vm_end, server_end) = socket_pair().map_err(FilesError::Socket)?;
    let process = host
        .processes
        .spawn_file_server(host.program, pod, run, cgroup, server_end)?;
    Ok(Server {
        process,
        vm_end: Some(vm_end),
        mounted: false,
    })
}

fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    for end in [&pair.0, &pair.1] {
        setsockopt(end, sockopt::SndBufForce, &SEND_BUFFER)?;
    }
    Ok(pair)
}

impl Server {
    async fn mount(&mut self, vm: &RunningVm) -> Result<(), PodError> {
        self.greet(&vm.run).await?;
        if let Some(vm_end) = &self.vm_end {
            let fd = vm_end.try_clone().map_err(FilesError::Socket)?;
            let device = device(FdIndex(0));
            match vm.control.attach(slots::FILES, device, vec![fd]).await {
                Ok(()) => {}
                Err(VmError::Refused {
                    kind: VmErrorKind::Busy,
                    ..
                }) => return Err(FilesError::Gone.into()),
                Err(error) => return Err(error.into()),
            }
            // When the VM closes its own, the server is to notice.
            self.vm_end = None;
        }
        let storage = Storage {
            id: FILES_ID,
            slot: slots::FILES,
            fstype: "virtiofs",
            ..Storage::default()
        };
        vm.agent.attach_storage(storage).await?;
        self.mounted = true;
        Ok(())
    }

    /// Waits until the server listens, and shakes hands.
    async fn greet(&self, run: &RunDir) -> Result<(), FilesError> {
        let path = run.files_socket();
        let connected = self.process.connect(&path, clock::after(START)).await;
        let stream = connected.map_err(|source| FilesError::Connect { path, source })?;
        let hello = Request::Hello { version: VERSION };
        match exchange(stream, &hello, &[]).await?.0 {
            Response::Hello { version, .. } if version == VERSION => Ok(()),
            Response::Hello { version, .. } => Err(FilesError::Version { theirs: version }),
            _ => Err(FilesError::Unexpected),
        }
    }
}

async fn ask(run: &RunDir, request: &Request) -> Result<Response, FilesError> {
    talk(run, request, &[]).await.map(|(answer, _)| answer)
}

/// Asks with bytes that follow the request; returns those that follow the answer, too.
async fn talk(
    run: &RunDir,
    request: &Request,
    more: &[u8],
) -> Result<(Response, Vec<u8>), FilesError> {
    let path = run.files_socket();
    let connected = beneath::connect(&path).await;
    let stream = connected.map_err(|source| FilesError::Connect { path, source })?;
    exchange(stream, request, more).await
}

async fn exchange(
    mut stream: UnixStream,
    request: &Request,
    more: &[u8],
) -> Result<(Response, Vec<u8>), FilesError> {
    let exchange = async {
        stream.write_all(&hull_proto_vmm::encode(request)?).await?;
        stream.write_all(more).await?;
        let mut prefix = [0_u8; 4];
        stream.read_exact(&mut prefix).await?;
        let mut body = vec![0_u8; hull_proto_vmm::body_length(prefix)?];
        stream.read_exact(&mut body).await?;
        let answer = hull_proto_vmm::decode(&body)?;
        let mut rest = Vec::new();
        if let Response::Saved { bytes, .. } = &answer {
            let mut limited = stream.take((*bytes).min(MAX_STATE));
            if limited.read_to_end(&mut rest).await? as u64 != *bytes {
                return Err(FilesError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok((answer, rest))
    };
    let answer = timeout(CALL, exchange).await;
    answer.unwrap_or(Err(FilesError::Timeout))
}

/// What a container mounts of the host, each with its position among all its mounts; but for those
/// that the guest keeps, and devices.
pub(crate) fn shares(
    spec: &ContainerSpec,
    is_local: impl Fn(usize) -> bool,
) -> impl Iterator<Item = (usize, Share)> {
    let mounts = spec.mounts.iter().enumerate();
    mounts.filter_map(move |(index, mount)| {
        let MountSource::Host(path) = &mount.source else {
            return None;
        };
        let share = Share {
            path: path.clone(),
            access: match (mount.readonly, mount.recursive_readonly) {
                (_, true) => Access::RecursiveReadOnly,
                (true, false) => Access::ReadOnly,
                (false, false) => Access::ReadWrite,
            },
            propagation: match mount.propagation {
                MountPropagation::Private => Propagation::Private,
                // What goes the other way is refused.
                MountPropagation::HostToContainer | MountPropagation::Bidirectional => {
                    Propagation::Slave
                }
            },
        };
        let is_shared = !is_local(index) && mount.of_devices().is_none();
        is_shared.then_some((index, share))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_spec::{config::PodsConfig, spec::MountSpec};

    fn mount(source: MountSource, readonly: bool, recursive: bool) -> MountSpec {
        MountSpec {
            container_path: "/x".into(),
            source,
            readonly,
            recursive_readonly: recursive,
            propagation: MountPropagation::HostToContainer,
            selinux_relabel: false,
            flags: Vec::new(),
            owners: None,
        }
    }

    #[test]
    fn shares_keep_their_place_among_the_mounts() {
        let host = |path: &str| MountSource::Host(path.into());
        let image = MountSource::Image {
            image: hull_spec::spec::ImageRequest::default(),
            sub_path: String::new(),
        };
        let spec = ContainerSpec {
            mounts: vec![
                mount(image, true, false),
                mount(host("/a"), true, false),
                mount(host("/b"), true, true),
                mount(host("/c"), false, false),
                mount(host("/dev"), true, false),
            ],
            ..ContainerSpec::default()
        };
        let shares: Vec<_> = shares(&spec, |index| index == 3).collect();
        let found: Vec<_> = shares.iter().map(|(i, s)| (*i, s.access)).collect();
        let expected = [(1, Access::ReadOnly), (2, Access::RecursiveReadOnly)];
        assert_eq!(found, expected);
        assert_eq!(shares[0].1.propagation, Propagation::Slave);
    }

    #[tokio::test]
    async fn an_answer_that_is_none_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let config = PodsConfig::new(dir.path(), dir.path(), dir.path());
        let pod = PodId::try_from("a".repeat(64)).unwrap();
        let run = RunDir::of(&config, &pod);
        std::fs::create_dir_all(run.path()).unwrap();
        let hello = Request::Hello { version: VERSION };
        assert!(matches!(
            ask(&run, &hello).await,
            Err(FilesError::Connect { .. })
        ));
        let listener = tokio::net::UnixListener::bind(run.files_socket()).unwrap();
        tokio::spawn(async move {
            for answer in [&u32::MAX.to_le_bytes()[..], &[2, 0, 0, 0, b'{', b'}'], &[]] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut buffer = [0_u8; 256];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(answer).await;
            }
        });
        for _ in 0..2 {
            assert!(matches!(ask(&run, &hello).await, Err(FilesError::Codec(_))));
        }
        assert!(matches!(ask(&run, &hello).await, Err(FilesError::Io(_))));
    }
}

//! The calls of the agent.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hull_proto_agent::{
    APPARMOR, RPC_PORT, VERSION,
    agent::{
        AdjustClockRequest, AttachDeviceRequest, AttachStorageRequest, ConfigureRequest,
        CreateRequest, DeleteRequest, DetachDeviceRequest, DetachStorageRequest, Directory, Empty,
        EventsRequest, ExecRequest, HelloRequest, ProcessesRequest, ResizeTtyRequest,
        SignalRequest, StartRequest, StatsResponse, UpdateNetworkRequest, UpdateRequest,
        WakeRequest,
    },
    not_executed,
    rpc::AgentClient,
};
use oci_spec::runtime::LinuxResources;
use protobuf::Message;
use tokio::time::{Instant, sleep, timeout};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context::Context,
    proto::MESSAGE_LENGTH_MAX,
};

use hull_base::{
    clock,
    faults::{self, Point},
    metrics,
    panics::{Panic, caught},
    printable::printable,
    stages::stage,
};
use hull_spec::{
    info::{ContainerUser, GuestInfo},
    signal::Signal,
    stats::Processes,
};

use crate::agent::{
    connect,
    error::GuestError,
    fault::Fault,
    names::Names,
    wire::{EventStream, Window, Wire},
};

/// How long the agent may take for what only changes a setting or sends a signal.
const QUICK: Duration = Duration::from_secs(10);
/// Longest request, bytes: a message of ttrpc less what goes around it, which are names.
const REQUEST_MAX: u64 = MESSAGE_LENGTH_MAX as u64 - 1024;
/// Pause before the agent is greeted again, when the connection was lost.
const PAUSE: Duration = Duration::from_millis(50);
/// Longest message of the agent that is shown.
const MESSAGE_MAX: usize = 2048;
/// Longest version or release name of the guest that is kept.
const NAME_MAX: usize = 128;
/// Most groups that a process has (NGROUPS_MAX of limits.h).
const GROUPS_MAX: usize = 65_536;

/// The agent of one guest. Clones share its connection.
#[derive(Clone)]
pub struct Agent {
    vsock: Arc<PathBuf>,
    connection: Arc<Mutex<Connection>>,
    timeout: Duration,
    fault: Fault,
    names: Names,
}

/// A connection that was greeted.
#[derive(Clone)]
struct Connection {
    client: AgentClient,
    /// Room for its events.
    window: Window,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("vsock", &self.vsock)
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// Connects once the agent listens, and shakes hands. Each call may take `timeout`.
    ///
    /// # Errors
    /// When the agent does not listen before `deadline`, or has another contract version.
    pub async fn connect(
        vsock: &Path,
        timeout: Duration,
        deadline: Instant,
    ) -> Result<(Self, GuestInfo), GuestError> {
        let fault = Fault::default();
        let (connection, info) = greet(vsock, timeout, deadline, &fault).await?;
        let agent = Self {
            vsock: Arc::new(vsock.to_owned()),
            connection: Arc::new(Mutex::new(connection)),
            timeout,
            fault,
            names: Names::default(),
        };
        Ok((agent, info))
    }

    /// Replaces a connection that was lost.
    ///
    /// # Errors
    /// As [`Agent::connect`].
    pub(crate) async fn reconnect(&self, deadline: Instant) -> Result<(), GuestError> {
        let (connection, _) = greet(&self.vsock, self.timeout, deadline, &self.fault).await?;
        let mut current = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *current = connection;
        Ok(())
    }

    /// Notes that the guest has a container under another name, from before it was this pod's.
    pub fn note_name(&self, container: &str, guest: &str) {
        self.names.note(container, guest);
    }

    /// What the guest calls containers.
    /// What the guest calls a container.
    #[must_use]
    pub fn name_in_guest(&self, container: &str) -> String {
        self.names.tell(container)
    }

    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    /// The socket that stands for the guest's vsock.
    pub(crate) fn vsock(&self) -> &Path {
        &self.vsock
    }

    /// Runs work that reads what the guest sends. A panic in it ends this guest's VM.
    ///
    /// # Errors
    /// [`Panic`].
    pub fn guard<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> impl Future<Output = Result<T, Panic>> {
        // Boxed by it here, not in the future that is returned.
        let work = caught(work);
        async move {
            let ended = work.await;
            ended.inspect_err(|panic| self.fault().tell(panic))
        }
    }

    /// The fault of this guest, which ends its VM.
    pub(crate) fn fault(&self) -> &Fault {
        &self.fault
    }

    /// Makes the guest, a clone, another one than all others: see [`super::configure`].
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn wake(&self, request: WakeRequest) -> Result<(), GuestError> {
        let client = self.client();
        let call = client.wake(Context::default(), &request);
        self.done(Point::GuestChanged, "wake a clone", &request, call)
            .await
    }

    /// Has all containers stand still, and returns when they do.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn freeze(&self) -> Result<(), GuestError> {
        let (client, empty) = (self.client(), Empty::new());
        let call = client.freeze(Context::default(), &empty);
        const CALL: &str = "have the guest's containers stand still";
        self.done_quickly(Point::GuestFrozen, CALL, &empty, call)
            .await
    }

    /// Lets containers go on that [`Agent::freeze`] stopped.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn thaw(&self) -> Result<(), GuestError> {
        let (client, empty) = (self.client(), Empty::new());
        let call = client.thaw(Context::default(), &empty);
        const CALL: &str = "let the guest's containers go on";
        self.done_quickly(Point::GuestThawed, CALL, &empty, call)
            .await
    }

    /// Tells the agent about its pod: see [`super::configure`].
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn configure(&self, request: ConfigureRequest) -> Result<(), GuestError> {
        let client = self.client();
        let call = client.configure(Context::default(), &request);
        self.done(
            Point::GuestConfigured,
            "configure the guest",
            &request,
            call,
        )
        .await
    }

    /// Sets the guest's clock `by_ns` forward, or back, and returns its CLOCK_REALTIME then.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub(crate) async fn adjust_clock(&self, by_ns: i64) -> Result<u64, GuestError> {
        let request = AdjustClockRequest {
            by_ns,
            ..AdjustClockRequest::default()
        };
        let client = self.client();
        let call = client.adjust_clock(Context::default(), &request);
        let answer = ask("set the guest's clock", QUICK, &request, call).await?;
        Ok(answer.realtime_ns)
    }

    /// Tells the agent of a changed network: see [`super::configure`].
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn update_network(&self, request: UpdateNetworkRequest) -> Result<(), GuestError> {
        let client = self.client();
        let call = client.update_network(Context::default(), &request);
        self.done(
            Point::GuestChanged,
            "change the guest's network",
            &request,
            call,
        )
        .await
    }

    /// Has the guest's driver take the device behind a slot, which is no disk; no effect when it has it already.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn attach_device(&self, slot: u8) -> Result<(), GuestError> {
        let client = self.client();
        let request = AttachDeviceRequest {
            slot: slot.into(),
            ..AttachDeviceRequest::default()
        };
        let call = client.attach_device(Context::default(), &request);
        self.done(
            Point::GuestChanged,
            "bring up a device in the guest",
            &request,
            call,
        )
        .await
    }

    /// Has the guest's driver let go of the network device behind a slot; no effect when there is none.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn detach_link(&self, slot: u8) -> Result<(), GuestError> {
        let client = self.client();
        let request = DetachDeviceRequest {
            slot: slot.into(),
            ..DetachDeviceRequest::default()
        };
        let call = client.detach_device(Context::default(), &request);
        self.done(
            Point::GuestChanged,
            "release a network device in the guest",
            &request,
            call,
        )
        .await
    }

    /// Mounts a disk, which other calls name by its id.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn attach_storage(&self, storage: Storage<'_>) -> Result<(), GuestError> {
        let request = AttachStorageRequest {
            id: storage.id.into(),
            slot: storage.slot.into(),
            fstype: storage.fstype.into(),
            readonly: storage.readonly,
            scratch: storage.scratch,
            options: storage
                .volume
                .and_then(|volume| volume.option)
                .map(|(name, bytes)| format!("{name}={bytes}"))
                .into_iter()
                .collect(),
            volume: storage
                .volume
                .map(|volume| Directory {
                    mode: volume.mode,
                    uid: volume.uid,
                    gid: volume.gid,
                    ..Directory::default()
                })
                .into(),
            ..AttachStorageRequest::default()
        };
        let client = self.client();
        let call = client.attach_storage(Context::default(), &request);
        self.done(
            Point::StorageMounted,
            "mount a disk in the guest",
            &request,
            call,
        )
        .await
    }

    /// Unmounts the disk with this id.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn detach_storage(&self, id: &str) -> Result<(), GuestError> {
        self.unmount(DetachStorageRequest {
            id: id.into(),
            ..DetachStorageRequest::default()
        })
        .await
    }

    /// Unmounts whatever disk is behind a slot; no effect when there is none.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn vacate(&self, slot: u8) -> Result<(), GuestError> {
        self.unmount(DetachStorageRequest {
            slot: slot.into(),
            ..DetachStorageRequest::default()
        })
        .await
    }

    async fn unmount(&self, request: DetachStorageRequest) -> Result<(), GuestError> {
        let client = self.client();
        let call = client.detach_storage(Context::default(), &request);
        self.done(
            Point::StorageUnmounted,
            "unmount a disk in the guest",
            &request,
            call,
        )
        .await
    }

    /// Has the agent update its copies of volumes to what the volumes are now.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn refresh_volumes(&self) -> Result<(), GuestError> {
        let (client, empty) = (self.client(), Empty::new());
        let call = client.refresh_volumes(Context::default(), &empty);
        self.done(
            Point::GuestChanged,
            "update volumes in the guest",
            &empty,
            call,
        )
        .await
    }

    /// Creates a container, and returns the user of its first process.
    ///
    /// # Errors
    /// When the agent refuses or does not answer, or the user is none that can be.
    pub async fn create(&self, mut request: CreateRequest) -> Result<ContainerUser, GuestError> {
        const CALL: &str = "create the container in the guest";
        request.pid_target = self.names.tell(&request.pid_target);
        let client = self.client();
        let response = self
            .ask(
                Point::GuestCreated,
                CALL,
                &request,
                client.create(Context::default(), &request),
            )
            .await?;
        if response.groups.len() > GROUPS_MAX {
            return Err(GuestError::Invalid {
                call: CALL,
                reason: "it has more groups than a process can have",
            });
        }
        Ok(ContainerUser {
            uid: response.uid,
            gid: response.gid,
            groups: response.groups,
        })
    }

    /// Starts a container's first process.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn start(&self, container: &str) -> Result<(), GuestError> {
        let request = StartRequest {
            container_id: self.names.tell(container),
            ..StartRequest::default()
        };
        let client = self.client();
        let call = client.start(Context::default(), &request);
        self.done(
            Point::GuestStarted,
            "start the container in the guest",
            &request,
            call,
        )
        .await
    }

    /// Sends a signal to processes of a container.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn signal(
        &self,
        container: &str,
        signal: Signal,
        target: SignalTarget,
    ) -> Result<(), GuestError> {
        let (exec_id, all, once) = match target {
            SignalTarget::Init(once) => (String::new(), false, once),
            SignalTarget::All => (String::new(), true, ""),
            SignalTarget::Exec(id) => (id, true, ""),
        };
        let request = SignalRequest {
            container_id: self.names.tell(container),
            exec_id,
            signal: signal.number(),
            all,
            once: once.into(),
            ..SignalRequest::default()
        };
        let client = self.client();
        let call = client.signal(Context::default(), &request);
        self.done_quickly(
            Point::GuestSignalled,
            "signal the container in the guest",
            &request,
            call,
        )
        .await
    }

    /// Kills a container's processes and removes it; no effect when it is absent.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn delete(&self, container: &str) -> Result<(), GuestError> {
        let request = DeleteRequest {
            container_id: self.names.tell(container),
            force: true,
            ..DeleteRequest::default()
        };
        let client = self.client();
        let call = client.delete(Context::default(), &request);
        match self
            .ask(
                Point::GuestDeleted,
                "delete the container in the guest",
                &request,
                call,
            )
            .await
        {
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }

    /// Runs a command in a container. The agent kills the command when all its streams are lost.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn exec(&self, exec: Exec<'_>) -> Result<(), GuestError> {
        let timeout_ms = exec.timeout.map_or(0, |t| {
            u64::try_from(t.as_millis()).unwrap_or(u64::MAX).max(1)
        });
        let request = ExecRequest {
            container_id: self.names.tell(exec.container),
            exec_id: exec.id.into(),
            args: exec.args,
            tty: exec.tty,
            stdin: exec.stdin,
            timeout_ms,
            kill_on_detach: true,
            ..ExecRequest::default()
        };
        let client = self.client();
        let call = client.exec(Context::default(), &request);
        self.done(
            Point::GuestExecuted,
            "run a command in the container",
            &request,
            call,
        )
        .await
    }

    /// Changes the limits of a container.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn update(
        &self,
        container: &str,
        limits: &LinuxResources,
        oom_score_adj: i64,
    ) -> Result<(), GuestError> {
        const CALL: &str = "change the container's limits in the guest";
        let resources = serde_json::to_vec(limits).map_err(|_| GuestError::Invalid {
            call: CALL,
            reason: "the limits can't be encoded",
        })?;
        let request = UpdateRequest {
            container_id: self.names.tell(container),
            resources,
            oom_score_adj: i32::try_from(oom_score_adj).ok().filter(|adj| *adj != 0),
            ..UpdateRequest::default()
        };
        let client = self.client();
        let call = client.update(Context::default(), &request);
        self.done_quickly(Point::GuestChanged, CALL, &request, call)
            .await
    }

    /// Sets the size of the terminal of an exec, or of the container (`exec` is empty).
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn resize(
        &self,
        container: &str,
        exec: &str,
        columns: u16,
        rows: u16,
    ) -> Result<(), GuestError> {
        let request = ResizeTtyRequest {
            container_id: self.names.tell(container),
            exec_id: exec.into(),
            rows: rows.into(),
            columns: columns.into(),
            ..ResizeTtyRequest::default()
        };
        let client = self.client();
        let call = client.resize_tty(Context::default(), &request);
        self.done_quickly(Point::GuestChanged, "resize the terminal", &request, call)
            .await
    }

    /// Subscribes to the events after the one with this number: see [`super::events`].
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub(crate) async fn events(&self, since_seq: u64) -> Result<EventStream, GuestError> {
        let request = EventsRequest {
            since_seq,
            ..EventsRequest::default()
        };
        let Connection { client, window } = self.connection();
        let call = client.events(Context::default(), &request);
        let events = self.ask(
            Point::GuestFollowed,
            "follow the guest's events",
            &request,
            call,
        );
        Ok(EventStream::new(events.await?, window))
    }

    /// All counters, as the guest tells them, within this time: see [`super::stats`].
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn stats(&self, limit: Duration) -> Result<StatsResponse, GuestError> {
        let (client, request) = (self.client(), super::stats::request());
        let call = client.stats(Context::default(), &request);
        // Counting changes nothing: there is no point.
        let mut told = ask("count what the guest uses", limit, &request, call).await?;
        for container in &mut told.containers {
            self.names.hear(&mut container.container_id);
        }
        Ok(told)
    }

    /// The processes of a container, within this time.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn processes(
        &self,
        container: &str,
        limit: Duration,
    ) -> Result<Processes, GuestError> {
        let request = ProcessesRequest {
            container_id: self.names.tell(container),
            ..ProcessesRequest::default()
        };
        let client = self.client();
        let call = client.processes(Context::default(), &request);
        // Looking changes nothing: there is no point.
        let told = ask("look at the container's processes", limit, &request, call).await?;
        Ok(super::processes::checked(&told))
    }

    /// Powers the guest off, which may end the connection before the answer.
    pub async fn shutdown(&self, timeout: Duration) {
        let (client, empty) = (self.client(), Empty::new());
        let call = client.shutdown(Context::default(), &empty);
        if let Err(error) = ask("shut the guest down", timeout, &empty, call).await {
            tracing::debug!(%error, "guest did not confirm its shutdown");
        }
        faults::point(Point::GuestShutDown);
    }

    fn client(&self) -> AgentClient {
        self.connection().client
    }

    fn connection(&self) -> Connection {
        let connection = self.connection.lock();
        connection.unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn ask<T>(
        &self,
        point: Point,
        call: &'static str,
        request: &impl Message,
        future: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, GuestError> {
        let answer = ask(call, self.timeout, request, future).await;
        faults::point(point);
        answer
    }

    async fn done<T>(
        &self,
        point: Point,
        call: &'static str,
        request: &impl Message,
        future: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<(), GuestError> {
        self.ask(point, call, request, future).await.map(drop)
    }

    async fn done_quickly<T>(
        &self,
        point: Point,
        call: &'static str,
        request: &impl Message,
        future: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<(), GuestError> {
        let answer = ask(call, self.timeout.min(QUICK), request, future).await;
        faults::point(point);
        answer.map(drop)
    }
}

/// A disk for the guest to mount, or its memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Storage<'a> {
    /// Names the mount in other calls.
    pub id: &'a str,
    /// The slot of the disk; not looked at when it is memory.
    pub slot: u8,
    /// The type of its file system, as in mount(2); empty: a device that is not mounted.
    pub fstype: &'a str,
    /// Whether nothing can be written.
    pub readonly: bool,
    /// Whether it is the pod's disk for writable layers.
    pub scratch: bool,
    /// Set when it is a volume that containers share.
    pub volume: Option<Volume>,
}

/// A volume in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Volume {
    /// A number of bytes that its file system is mounted with, by the option's name.
    pub option: Option<(&'static str, u64)>,
    /// The mode of its directory, which is set when the directory is made.
    pub mode: u32,
    /// The owner of its directory.
    pub uid: u32,
    /// The group of its directory.
    pub gid: u32,
}

/// Which processes of a container get a signal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignalTarget {
    /// The first process. A signal that has a name here is sent once, however often this is called
    /// with that name.
    Init(&'static str),
    /// All processes of the container.
    All,
    /// An exec's process, and all that it started.
    Exec(String),
}

/// A command to run in a container.
#[derive(Debug)]
pub struct Exec<'a> {
    /// Id of the container.
    pub container: &'a str,
    /// Id of the exec, which nothing else in the container has.
    pub id: &'a str,
    /// The program and its arguments.
    pub args: Vec<String>,
    /// After this time the agent kills it; none: never.
    pub timeout: Option<Duration>,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether it has an input.
    pub stdin: bool,
}

async fn greet(
    vsock: &Path,
    limit: Duration,
    deadline: Instant,
    fault: &Fault,
) -> Result<(Connection, GuestInfo), GuestError> {
    const CALL: &str = "greet the guest's agent";
    let request = HelloRequest {
        version: VERSION,
        ..HelloRequest::default()
    };
    let (connection, response) = loop {
        let stream = connect::dial_until(vsock, RPC_PORT, deadline).await?;
        let (wire, window) = Wire::new(stream, fault.clone());
        let client = AgentClient::new(Client::new(Socket::new(wire)));
        let call = client.hello(Context::default(), &request);
        match ask(CALL, limit, &request, call).await {
            Ok(response) => break (Connection { client, window }, response),
            // A connection that is lost says no more of the guest than one that is refused.
            Err(GuestError::Lost { .. }) if clock::after(PAUSE) < deadline => sleep(PAUSE).await,
            Err(error) => return Err(error),
        }
    };
    faults::point(Point::AgentGreeted);
    if response.version != VERSION {
        return Err(GuestError::Invalid {
            call: CALL,
            reason: "it has another contract version",
        });
    }
    let info = GuestInfo {
        kernel_release: printable(&response.kernel_release, NAME_MAX),
        agent_version: printable(&response.agent_version, NAME_MAX),
        kernel_ns: response.kernel_ns,
        ready_ns: response.ready_ns,
        apparmor: response.features.iter().any(|feature| feature == APPARMOR),
    };
    Ok((connection, info))
}

/// Sends a request that fits into a message, and waits for an answer. The time limit is kept here alone: the
/// agent goes on with a call that its caller no longer waits for, and the caller may repeat it.
pub(crate) async fn ask<T>(
    call: &'static str,
    limit: Duration,
    request: &impl Message,
    future: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, GuestError> {
    let asked = send(call, limit, request, future);
    stage(format!("agent: {call}"), asked).await
}

async fn send<T>(
    call: &'static str,
    limit: Duration,
    request: &impl Message,
    future: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, GuestError> {
    let bytes = request.compute_size();
    if bytes > REQUEST_MAX {
        return Err(GuestError::TooLarge {
            call,
            bytes,
            most: REQUEST_MAX,
        });
    }
    let begun = Instant::now();
    let answer = timeout(limit, future).await;
    let result = match &answer {
        Ok(Ok(_)) => "ok",
        Ok(Err(ttrpc::Error::RpcStatus(_))) => "refused",
        Ok(Err(_)) | Err(_) => "unanswered",
    };
    metrics::AGENT.observe(&[call, result], begun.elapsed());
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(ttrpc::Error::RpcStatus(status))) => {
            let message = printable(status.message(), MESSAGE_MAX);
            Err(match not_executed::exit_code(&status) {
                Some(exit_code) => GuestError::NotExecuted {
                    call,
                    exit_code,
                    message,
                },
                None => GuestError::Refused {
                    call,
                    code: status.code(),
                    message,
                },
            })
        }
        Ok(Err(error)) => Err(GuestError::Lost {
            call,
            reason: match error {
                // Without the crate's own "ttrpc err".
                ttrpc::Error::Socket(reason) | ttrpc::Error::Others(reason) => {
                    printable(&reason, MESSAGE_MAX)
                }
                other => other.to_string(),
            },
        }),
        Err(_) => Err(GuestError::Timeout {
            call,
            seconds: limit.as_secs(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use hull_spec::error::{ErrorKind, PodError};
    use tokio::io::{AsyncReadExt, duplex};

    use super::*;

    /// A request that takes so many bytes.
    fn request(bytes: u64) -> CreateRequest {
        let mut request = CreateRequest {
            spec: vec![b' '; usize::try_from(bytes).unwrap()],
            ..CreateRequest::default()
        };
        let more = usize::try_from(request.compute_size() - bytes).unwrap();
        request.spec.truncate(request.spec.len() - more);
        assert_eq!(request.compute_size(), bytes);
        request
    }

    #[tokio::test]
    async fn a_request_that_does_not_fit_is_refused_and_the_largest_that_fits_is_sent() {
        let (ours, mut guest) = duplex(64 << 10);
        let (wire, _window) = Wire::new(ours, Fault::default());
        let client = AgentClient::new(Client::new(Socket::new(wire)));
        let ask = async |bytes| {
            let request = request(bytes);
            let call = client.create(Context::default(), &request);
            ask("create it", Duration::from_secs(5), &request, call).await
        };
        let error = PodError::from(ask(REQUEST_MAX + 1).await.unwrap_err());
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!(
            error.to_string(),
            "create it: the request takes 4193281 bytes, of which the guest's agent reads 4193280"
        );
        // It went nowhere, and the connection is as it was.
        let received = async {
            let mut received = 0;
            let mut piece = vec![0; 64 << 10];
            while received < REQUEST_MAX as usize {
                received += guest.read(&mut piece).await.unwrap();
            }
            drop(guest);
        };
        let (answer, ()) = tokio::join!(ask(REQUEST_MAX), received);
        assert!(matches!(answer, Err(GuestError::Lost { .. })), "{answer:?}");
    }
}

//! The start of a sandbox, in stages. Each stage is a type that has what was made until then, and can
//! undo all of it by value; what they share is one [`Context`].
//!
//! ```text
//! check ─▶ Recorded ─▶ Prepared ──▶ Assembled ─▶ Booted ─▶ ready
//!          record      directories, network,      VM and    scratch mount and
//!          on disk     cgroup       VMM, scratch  agent     guest configured
//!                                   (side by side)
//! ```
//!
//! The record comes first, so that a daemon that is killed at any point finds what it has to undo.
//! When undoing fails, the record stays, and with it the name: the sandbox is then not ready, and
//! stopping it tries again.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::{fd::OwnedFd, unix::net::UnixListener},
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use error_reporter::Report;
use rustix::fs::OFlags;

use hull_base::{
    beneath, blocking,
    faults::{self, Point},
    host,
    printable::one_line,
    stages::{Call, Kept, stage},
};
use hull_network::{GuestNetwork, NetworkError, PodNetwork, PodNetworkRequest, RequestError};
use hull_proto_agent::MEMORY_PORT;
use hull_proto_vmm::{DeviceConfig, FdIndex, MAX_QUEUE_PAIRS, Pluggable, RestoreConfig, VmConfig};
use hull_spec::{
    error::PodError,
    field::Field,
    info::{BootTimes, GuestInfo},
    size::VmSize,
};
use hull_vm::{
    agent::{
        client::{Agent, Storage},
        configure,
    },
    cgroup::{self, PodCgroup},
    client::{CALL_TIMEOUT, VmClient},
    error::VmError,
    process::Process,
    rundir::{DataDir, RunDir},
    slots,
};

use super::{
    SPAWN, cmdline, make_dir,
    restore::{Checkpoint, sent_with},
    teardown, template,
};
use crate::{
    node::Node,
    ports::network_error,
    record::{SandboxRecord, VmRecord},
    starts::Turn,
    storage::{
        host_files::{self, Host, HostFiles, Place, SavedFiles},
        scratch,
    },
    templates::{Cold, Template},
};
use tokio::{sync::Mutex, time::timeout};

/// The name of the scratch disk's mount in the guest.
pub(crate) const SCRATCH_ID: &str = "scratch";
/// The part of the longest boot after which a guest is taken for hung, and others have their turn.
const HUNG: u32 = 4;
/// How much of a console that tells about a failed boot is shown, in bytes.
const CONSOLE_TAIL: u64 = 1024;
/// Most characters of it that are shown.
const LINE_MAX: usize = 160;
/// How long a VMM that has started may take to tell what it measured of that.
const PHASES_LIMIT: Duration = Duration::from_millis(250);
/// Most parts of its start that it is listened to.
const PHASES_MAX: usize = 16;
/// Those that are known, and the names of their stages.
const PHASES: [(&str, &str); 6] = [
    ("state", "vmm: state"),
    ("memory", "vmm: memory"),
    ("kvm", "vmm: kvm"),
    ("vcpus", "vmm: vcpus"),
    ("kernel_load", "vmm: kernel"),
    ("devices", "vmm: devices"),
];

/// A sandbox that is up.
#[derive(Debug)]
pub(crate) struct Up {
    pub record: SandboxRecord,
    pub vm: VmClient,
    pub agent: Agent,
    pub times: BootTimes,
    /// What the guest was told of its network.
    pub network: GuestNetwork,
}

impl Stage for Up {
    const REACHED: Point = Point::SandboxUp;
}

/// A sandbox that could not be brought up.
#[derive(Debug)]
pub(crate) struct Failed {
    pub error: PodError,
    /// Its record, when not everything could be undone.
    pub left: Option<SandboxRecord>,
}

/// What could not be undone.
struct Left {
    record: SandboxRecord,
    error: PodError,
}

/// Brings a sandbox up, or leaves nothing. Its turn ends with that, or when its guest boots for so
/// long that it must be hung.
pub(crate) async fn bring_up(
    node: &Arc<Node>,
    mut record: SandboxRecord,
    checkpoint: Option<Arc<Checkpoint>>,
    files: &Arc<Mutex<HostFiles>>,
    turn: Turn,
) -> Result<Up, Failed> {
    let restored = checkpoint.is_some();
    let size = check(node, &mut record, checkpoint.as_deref()).map_err(untouched)?;
    let kept = Kept::default();
    let context = Context {
        node,
        run: RunDir::of(&node.config, &record.id),
        data: DataDir::of(&node.config, &record.id),
        record,
        size,
        template: None,
        checkpoint,
        files: Arc::clone(files),
    };
    let mut up = kept.of(in_stages(context, turn)).await?;
    let (stages, total_us) = kept.stages();
    (up.times.stages, up.times.total_us) = (stages.into(), total_us);
    if !restored {
        let namespace = &up.record.spec.metadata.namespace;
        template::provide(node, namespace, size);
    }
    Ok(up)
}

async fn in_stages(context: Context<'_>, mut turn: Turn) -> Result<Up, Failed> {
    let node = context.node;
    let recorded = reach(Recorded::new(context)).await?;
    let prepared = reach(recorded.prepare()).await?;
    let assembled = reach(prepared.assemble()).await?;
    let cgroup = assembled.context.record.cgroup.as_ref();
    turn.keep(cgroup.and_then(|cgroup| cgroup.millicpus(&node.config.cgroup_root)));
    let mut boot = pin!(async { reach(reach(assembled.boot()).await?.configure()).await });
    let longest = node.config.boot_timeout / HUNG;
    match timeout(longest, &mut boot).await {
        Ok(up) => up,
        Err(_) => {
            drop(turn);
            boot.await
        }
    }
}

/// A stage, and where tests have the daemon killed when it is complete.
trait Stage {
    const REACHED: Point;
}

async fn reach<S: Stage>(stage: impl Future<Output = Result<S, Failed>>) -> Result<S, Failed> {
    let stage = stage.await?;
    faults::point(S::REACHED);
    Ok(stage)
}

fn untouched(error: PodError) -> Failed {
    Failed { error, left: None }
}

fn failed(error: PodError, undo: Result<(), Left>) -> Failed {
    match undo {
        Ok(()) => untouched(error),
        Err(left) => Failed {
            error: error.after_undo(Err(left.error)),
            left: Some(left.record),
        },
    }
}

/// What can be known to fail before anything is made. Plans the cgroup, whose limits are the VM's.
fn check(
    node: &Node,
    record: &mut SandboxRecord,
    checkpoint: Option<&Checkpoint>,
) -> Result<VmSize, PodError> {
    let config = &node.config;
    let spec = &record.spec;
    for (what, path) in [
        ("the VMM", &config.vmm),
        ("the guest's kernel", &config.kernel),
        ("the guest's root", &config.guest_root),
    ] {
        if !path.is_file() {
            return Err(PodError::precondition(
                format!("find {what}"),
                format!("{} is not a file", path.display()),
            ));
        }
    }
    let root = &config.cgroup_root;
    let mut cgroup = PodCgroup::plan(root, &spec.cgroup_parent, &record.id)?;
    let mut room = cgroup::room(root, cgroup.as_ref());
    if !room.holds(spec) {
        tracing::warn!(
            parent = spec.cgroup_parent,
            "its cgroup has no room for a VM, which is beside it: an overhead in the pod's RuntimeClass makes room"
        );
        cgroup = PodCgroup::plan(root, "", &record.id)?;
        room = cgroup::room(root, cgroup.as_ref());
    }
    let size = match checkpoint {
        Some(checkpoint) => checkpoint.size(room)?,
        None => VmSize::of(spec, config, host::cpus(), room),
    };
    record.cgroup = cgroup;
    size.check_memory(host::available_mib())?;
    Ok(size)
}

/// What all stages work with.
struct Context<'a> {
    node: &'a Arc<Node>,
    record: SandboxRecord,
    run: RunDir,
    data: DataDir,
    size: VmSize,
    /// What its VM is a clone of.
    template: Option<Arc<Template>>,
    /// What it goes on from.
    checkpoint: Option<Arc<Checkpoint>>,
    /// The files of the host that its VM has, if it goes on with some.
    files: Arc<Mutex<HostFiles>>,
}

impl Context<'_> {
    async fn save(&self) -> Result<(), PodError> {
        Ok(self.node.records.put_sandbox(&self.record).await?)
    }

    async fn spawn_vmm(&self) -> Result<(Process, VmClient, Spawned), PodError> {
        let Self {
            node, record, run, ..
        } = self;
        let begin = Instant::now();
        let cgroup = record.cgroup.as_ref();
        let vmm =
            node.processes
                .spawn_vmm(&node.config.vmm, &record.id, record.user, run, cgroup)?;
        let deadline = tokio::time::Instant::now() + SPAWN;
        let connected =
            VmClient::connect(&run.control_socket(), &run.exit_report(), deadline, &vmm).await;
        match connected {
            Ok((vm, _)) => {
                let stage = Call::current();
                let end = Instant::now();
                Ok((vmm, vm, Spawned { stage, begin, end }))
            }
            Err(error) => Err(PodError::from(error).after_undo(kill(&vmm).await)),
        }
    }

    fn left(self, error: PodError) -> Left {
        Left {
            record: self.record,
            error,
        }
    }
}

/// The record is on disk, with a plan of the network.
struct Recorded<'a>(Context<'a>);

impl Stage for Recorded<'_> {
    const REACHED: Point = Point::SandboxPlanned;
}

impl<'a> Recorded<'a> {
    async fn new(mut context: Context<'a>) -> Result<Self, Failed> {
        let Context {
            node, record, size, ..
        } = &mut context;
        let request = network_request(record, size.vcpus);
        // Nothing is made yet: what fails here is the node's configuration.
        let plan = node
            .network
            .plan(&request)
            .await
            .map_err(|error| match error {
                NetworkError::Request(error) => {
                    let field = match error {
                        RequestError::Argument { .. } => Field::PodMetadata,
                        _ => Field::PodAnnotations,
                    };
                    PodError::invalid(field, error.to_string())
                }
                error => {
                    let why = Report::new(network_error(error)).to_string();
                    PodError::precondition("run the sandbox", why)
                }
            });
        record.network = Some(plan.map_err(untouched)?);
        let saved = context.save().await;
        let recorded = Self(context);
        match saved {
            Ok(()) => Ok(recorded),
            // What was not written in whole may be there all the same: the next daemon would find two
            // sandboxes of one name, when the caller asks again.
            Err(error) => Err(failed(error, recorded.undo().await)),
        }
    }

    async fn prepare(self) -> Result<Prepared<'a>, Failed> {
        let Context {
            node,
            record,
            run,
            data,
            ..
        } = &self.0;
        let made = make_dir(run.path())
            .and_then(|()| make_dir(data.path()))
            .map(|()| faults::point(Point::DirectoriesMade))
            .map_err(|source| PodError::internal("make the pod's directories", source))
            .and_then(|()| match &record.cgroup {
                Some(cgroup) => cgroup.make(&node.config.cgroup_root),
                None => Ok(()),
            });
        let prepared = Prepared(self.0);
        match made {
            Ok(()) => Ok(prepared),
            Err(error) => Err(failed(error, prepared.undo(Ok(())).await)),
        }
    }

    async fn undo(self) -> Result<(), Left> {
        let Context { node, record, .. } = &self.0;
        match node.records.delete_sandbox(&record.id, Vec::new()).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.0.left(error.into())),
        }
    }
}

/// The directories and the cgroup are there.
struct Prepared<'a>(Context<'a>);

impl Stage for Prepared<'_> {
    const REACHED: Point = Point::SandboxPrepared;
}

impl<'a> Prepared<'a> {
    /// Network, VMM process and scratch disk take their time side by side.
    async fn assemble(self) -> Result<Assembled<'a>, Failed> {
        let (network, vmm, scratch) = tokio::join!(
            stage("network", self.network()),
            stage("spawn", self.0.spawn_vmm()),
            stage("scratch", self.scratch()),
        );
        match (network, vmm, scratch) {
            (Ok(network), Ok((vmm, vm, spawned)), Ok(scratch)) => {
                let mut context = self.0;
                let record = &mut context.record;
                record.network = Some(network.record.clone());
                record.ips = network.record.ips.clone();
                record.seen_ips = Some(network.guest.ips());
                let parts = Parts {
                    network,
                    vmm,
                    vm,
                    spawned,
                    scratch,
                };
                Ok(Assembled { context, parts })
            }
            (network, vmm, scratch) => {
                // The failure that is told is that of the first in this order.
                let mut error = None;
                let mut left = Ok(());
                match network {
                    Ok(network) => {
                        let down = self.0.node.network.teardown(&network.record).await;
                        left = down.map_err(network_error);
                    }
                    Err(NetworkError::Undo { failure, undo }) => {
                        error = Some(network_error(*failure));
                        left = Err(network_error(*undo));
                    }
                    Err(other) => error = Some(network_error(other)),
                }
                match vmm {
                    Ok((vmm, ..)) => left = left.and(kill(&vmm).await),
                    Err(other) => error = error.or(Some(other)),
                }
                if let Err(other) = scratch {
                    error = error.or(Some(other));
                }
                let undo = self.undo(left).await;
                // One of the three failed, or this arm were not taken.
                let error = error.unwrap_or_else(|| {
                    PodError::precondition("assemble the sandbox", "a part is missing")
                });
                Err(failed(error, undo))
            }
        }
    }

    async fn network(&self) -> Result<PodNetwork, NetworkError> {
        let Some(plan) = self.0.record.network.clone() else {
            return Err(NetworkError::List(io::ErrorKind::NotFound.into()));
        };
        self.0.node.network.setup(plan).await
    }

    async fn scratch(&self) -> Result<File, PodError> {
        let (config, path) = (self.0.node.config.clone(), self.0.data.scratch());
        let from = self.0.checkpoint.as_ref();
        let from = from.map(|checkpoint| Arc::clone(&checkpoint.scratch));
        let disk = blocking(move || match from {
            Some(from) => scratch::copy_new(&from, &path),
            None => scratch::create(&config, &path),
        });
        let disk = disk.await?;
        faults::point(Point::ScratchMade);
        Ok(disk)
    }

    /// Undoes this stage; the record stays when something later could not be undone.
    async fn undo(self, later: Result<(), PodError>) -> Result<(), Left> {
        let dirs = teardown::directories(&self.0.run, &self.0.data).await;
        let cgroup = match &self.0.record.cgroup {
            Some(cgroup) => cgroup.remove().await,
            None => Ok(()),
        };
        match later.and(dirs).and(cgroup) {
            Ok(()) => Recorded(self.0).undo().await,
            Err(error) => Err(self.0.left(error)),
        }
    }
}

/// What a VM is put together from.
struct Parts {
    network: PodNetwork,
    vmm: Process,
    vm: VmClient,
    spawned: Spawned,
    scratch: File,
}

/// The stage in which a VMM was started.
struct Spawned {
    stage: Call,
    begin: Instant,
    end: Instant,
}

/// Network, VMM process and scratch disk are there.
struct Assembled<'a> {
    context: Context<'a>,
    parts: Parts,
}

impl Stage for Assembled<'_> {
    const REACHED: Point = Point::SandboxAssembled;
}

impl<'a> Assembled<'a> {
    async fn boot(mut self) -> Result<Booted<'a>, Failed> {
        let started = match self.record_vm().await {
            Ok(()) => self.start().await,
            Err(error) => Err(error),
        };
        match started {
            Ok((agent, guest)) => Ok(Booted {
                context: self.context,
                parts: self.parts,
                agent,
                guest,
            }),
            Err(error) => Err(failed(error, self.undo().await)),
        }
    }

    /// From here on a daemon that is killed leaves a VM that runs: it must find it.
    async fn record_vm(&mut self) -> Result<(), PodError> {
        self.context.record.vm = Some(VmRecord {
            process: self.parts.vmm.identity(),
            size: self.context.size,
        });
        self.context.save().await
    }

    /// Starts the VM: a clone if it can be one, else one that boots.
    async fn start(&mut self) -> Result<(Agent, GuestInfo), PodError> {
        if let Some(checkpoint) = self.context.checkpoint.clone() {
            stage("vm", self.restore_pod(&checkpoint)).await?;
            return stage("agent", self.wake_pod(&checkpoint)).await;
        }
        let Context {
            node, record, size, ..
        } = &self.context;
        let (node, id) = (*node, record.id.clone());
        let namespace = &record.spec.metadata.namespace;
        let Some(template) = template::template(node, &id, namespace, *size) else {
            return self.start_new().await;
        };
        let longest = node.config.boot_timeout / HUNG;
        let cloned = timeout(longest, self.start_clone(&template)).await;
        let (why, error) = match cloned {
            Ok(Ok(up)) => {
                self.context.template = Some(template);
                return Ok(up);
            }
            Ok(Err(failed)) => failed,
            Err(_) => {
                let limit = format!("it is not up after {} s", longest.as_secs_f32());
                (Cold::Late, PodError::precondition("start a clone", limit))
            }
        };
        node.templates.discard(&template);
        self.boot_instead(why, &error).await
    }

    /// Starts a VM that boots in the place of a clone.
    async fn boot_instead(
        &mut self,
        why: Cold,
        error: &PodError,
    ) -> Result<(Agent, GuestInfo), PodError> {
        let Context { node, record, .. } = &self.context;
        let details = Report::new(error).to_string();
        node.templates.boots(&record.id, why, &details);
        self.replace_vmm().await?;
        self.start_new().await
    }

    /// Starts a VM that boots.
    async fn start_new(&mut self) -> Result<(Agent, GuestInfo), PodError> {
        let vm = async {
            let begin = Instant::now();
            let listener = self.listen()?;
            let (vm_config, fds) = self.vm_config(&listener)?;
            self.parts.vm.configure(vm_config, fds).await?;
            self.parts.vm.start().await?;
            self.tell_phases(begin).await;
            Ok::<_, PodError>(())
        };
        stage("vm", vm).await?;
        let agent = async {
            let begin = Instant::now();
            let (agent, guest) = self.greet().await?;
            // Its word, but no longer than we have waited.
            let waited = begin.elapsed();
            let kernel = Duration::from_nanos(guest.kernel_ns).min(waited);
            let ready = Duration::from_nanos(guest.ready_ns).clamp(kernel, waited);
            let stage = Call::current();
            stage.measured("guest: kernel", begin, kernel);
            stage.measured("guest: agent", begin + kernel, ready - kernel);
            Ok((agent, guest))
        };
        stage("agent", agent).await
    }

    /// Adds what the VMM measured of its own start. It does one after the other, and tells how long each took.
    async fn tell_phases(&self, begin: Instant) {
        // The guest boots meanwhile.
        let Ok(metrics) = self.parts.vm.metrics(PHASES_LIMIT).await else {
            return;
        };
        let (stage, end) = (Call::current(), Instant::now());
        let spawn = &self.parts.spawned;
        let mut at = begin;
        for (told, ns) in metrics.start_ns.iter().take(PHASES_MAX) {
            let took = Duration::from_nanos(*ns);
            if told == "jail" {
                // The last that it did before it answered.
                let took = took.min(spawn.end - spawn.begin);
                spawn.stage.measured("vmm: jail", spawn.end - took, took);
            } else if let Some((_, name)) = PHASES.iter().find(|(known, _)| known == told) {
                let took = took.min(end - at);
                stage.measured(*name, at, took);
                at += took;
            }
        }
    }

    /// Starts a VM that is a clone; with the error goes of what kind it is.
    async fn start_clone(
        &mut self,
        template: &Template,
    ) -> Result<(Agent, GuestInfo), (Cold, PodError)> {
        let restored = stage("vm", self.restore(template)).await;
        restored.map_err(|error| (Cold::Refused, error))?;
        let woken = stage("agent", self.wake()).await;
        woken.map_err(|error| (Cold::Lost, error))
    }

    /// Has a new VMM, because what the old one has is not known.
    async fn replace_vmm(&mut self) -> Result<(), PodError> {
        kill(&self.parts.vmm).await?;
        let run = self.context.run.path();
        beneath::Directory::open(run)
            .and_then(|run| run.clear())
            .map_err(|e| PodError::internal(format!("clear {}", run.display()), e))?;
        let (vmm, vm, spawned) = stage("spawn", self.context.spawn_vmm()).await?;
        self.parts.vmm = vmm;
        self.parts.vm = vm;
        self.parts.spawned = spawned;
        self.record_vm().await
    }

    /// Listens where the daemon dials the guest.
    fn listen(&self) -> Result<UnixListener, PodError> {
        let vsock = self.context.run.vsock_socket();
        UnixListener::bind(&vsock)
            .map_err(|e| PodError::internal(format!("listen on {}", vsock.display()), e))
    }

    /// Waits for the agent.
    async fn greet(&self) -> Result<(Agent, GuestInfo), PodError> {
        let (vm, run) = (&self.parts.vm, &self.context.run);
        let vsock = run.vsock_socket();
        let config = &self.context.node.config;
        let begin = Instant::now();
        let deadline = tokio::time::Instant::now() + config.boot_timeout;
        let greeted = tokio::select! {
            greeted = Agent::connect(&vsock, config.agent_timeout, deadline) => greeted,
            () = vm.gone() => {
                let report = format!("{}{}", vm.report(), console_tail(run));
                let action = "boot the guest";
                return Err(VmError::Gone { action, report }.into());
            }
        };
        // A guest that boots too slowly looks like one that hangs up.
        let waited = begin.elapsed().as_secs_f32();
        let limit = config.boot_timeout.as_secs_f32();
        greeted.map_err(|error| match PodError::from(error) {
            PodError::Unavailable { action, source } => PodError::Unavailable {
                action: format!(
                    "{action} ({waited:.1} s of at most {limit} s){}",
                    console_tail(run)
                ),
                source,
            },
            other => other,
        })
    }

    /// Makes the VM a clone with all of its devices, and lets it go on.
    async fn restore(&self, template: &Template) -> Result<(), PodError> {
        let begin = Instant::now();
        let duplicate = |e| PodError::internal("duplicate a file descriptor", e);
        let mut fds = Vec::from(template.files().map_err(duplicate)?);
        let mut send = |fd: OwnedFd| {
            fds.push(fd);
            FdIndex(fds.len() as u32 - 1)
        };
        let serial = self.console()?.map(|file| send(file.into()));
        let devices = self.base_devices(&self.listen()?, &mut send)?;
        let config = RestoreConfig {
            label: template.label.clone(),
            state: FdIndex(0),
            memory: FdIndex(1),
            written: template.written(),
            pluggable: self.pluggable(),
            serial,
            devices,
        };
        let vm = &self.parts.vm;
        vm.restore(config, fds).await?;
        let mut fds: Vec<OwnedFd> = Vec::new();
        let own = self.own_devices(&mut |fd: OwnedFd| {
            fds.push(fd);
            FdIndex(fds.len() as u32 - 1)
        })?;
        for (slot, device) in own {
            self.attach(slot, device, &fds).await?;
        }
        vm.start().await?;
        self.tell_phases(begin).await;
        Ok(())
    }

    /// Makes the VM the one of a checkpoint, whose guest is in no network, and lets it go on.
    async fn restore_pod(&self, checkpoint: &Arc<Checkpoint>) -> Result<(), PodError> {
        let begin = Instant::now();
        let files = checkpoint.files();
        let files = files.map_err(|e| PodError::internal("duplicate a file descriptor", e))?;
        let mut fds = Vec::from(files);
        let mut send = |fd: OwnedFd| {
            fds.push(fd);
            FdIndex(fds.len() as u32 - 1)
        };
        let serial = self.console()?.map(|file| send(file.into()));
        let mut devices = self.base_devices(&self.listen()?, &mut send)?;
        devices.append(&mut self.disk_and_memory(&mut send)?);
        devices.append(&mut checkpoint.devices(&mut send)?);
        let (from, data) = (Arc::clone(checkpoint), self.context.data.path().to_owned());
        let volumes = stage("volumes", blocking(move || from.make_volumes(&data))).await?;
        for (slot, name, disk) in volumes {
            let disk = disk.disk(&name);
            let (device, fds) = disk.map_err(|e| PodError::internal("share a disk", e))?;
            devices.push((slot, sent_with(device, fds, &mut send)));
        }
        if let Some(shares) = &checkpoint.shares {
            let socket = stage("files", self.resume_files(shares)).await?;
            devices.push((slots::FILES, host_files::device(send(socket))));
        }
        let config = RestoreConfig {
            label: checkpoint.manifest.id.clone(),
            state: FdIndex(0),
            memory: FdIndex(1),
            // What it is going to write is not known.
            written: Vec::new(),
            pluggable: self.pluggable(),
            serial,
            devices,
        };
        self.parts.vm.restore(config, fds).await?;
        self.parts.vm.start().await?;
        self.tell_phases(begin).await;
        Ok(())
    }

    /// Starts the file server that goes on with what the guest had; returns the VM's end of its socket.
    async fn resume_files(&self, shares: &SavedFiles) -> Result<OwnedFd, PodError> {
        let Context {
            node, record, run, ..
        } = &self.context;
        let place = Place {
            host: Host {
                processes: &*node.processes,
                program: &node.config.file_server,
            },
            pod: &record.id,
            run,
            cgroup: record.cgroup.as_ref(),
        };
        let uid = &record.spec.metadata.uid;
        self.context
            .files
            .lock()
            .await
            .resume(place, uid, shares)
            .await
    }

    /// Makes the guest of a checkpoint another one than all others, and gives it the pod's cards in place of
    /// those that it had. Its containers stand still.
    async fn wake_pod(&self, checkpoint: &Checkpoint) -> Result<(Agent, GuestInfo), PodError> {
        let (agent, guest) = self.greet().await?;
        agent.wake(configure::wake(true)).await?;
        let vm = &self.parts.vm;
        for slot in checkpoint.cards() {
            agent.detach_link(slot).await?;
            vm.detach(slot).await?;
        }
        let mut fds: Vec<OwnedFd> = Vec::new();
        let cards = self.cards(&mut |fd: OwnedFd| {
            fds.push(fd);
            FdIndex(fds.len() as u32 - 1)
        })?;
        for (slot, device) in cards {
            self.attach(slot, device, &fds).await?;
            agent.attach_device(slot).await?;
        }
        Ok((agent, guest))
    }

    /// Puts a device behind a slot; it has all descriptors of those that are attached with it, and uses its own.
    async fn attach(
        &self,
        slot: u8,
        device: DeviceConfig,
        fds: &[OwnedFd],
    ) -> Result<(), PodError> {
        let fds: io::Result<Vec<_>> = fds.iter().map(OwnedFd::try_clone).collect();
        let fds = fds.map_err(|e| PodError::internal("duplicate a file descriptor", e))?;
        Ok(self.parts.vm.attach(slot, device, fds).await?)
    }

    /// Memory that the guest may have beside that of its start.
    fn pluggable(&self) -> Option<Pluggable> {
        let mib = self.context.size.pluggable_mib;
        (mib > 0).then_some(Pluggable {
            mib,
            port: MEMORY_PORT,
        })
    }

    /// Makes a clone another guest than its template and all other clones, before it does anything else;
    /// then its driver takes the cards, which the template did not have.
    async fn wake(&self) -> Result<(Agent, GuestInfo), PodError> {
        let (agent, guest) = self.greet().await?;
        agent.wake(configure::wake(false)).await?;
        for (number, _) in (0..).zip(&self.parts.network.links) {
            agent.attach_device(slots::net(number)).await?;
        }
        if self.pluggable().is_some() {
            agent.attach_device(slots::MEMORY).await?;
        }
        Ok((agent, guest))
    }

    fn vm_config(&self, listener: &UnixListener) -> Result<(VmConfig, Vec<OwnedFd>), PodError> {
        let Context { node, size, .. } = &self.context;
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut send = |fd: OwnedFd| {
            fds.push(fd);
            FdIndex(fds.len() as u32 - 1)
        };
        let serial = self.console()?.map(|file| send(file.into()));
        let mut devices = self.base_devices(listener, &mut send)?;
        devices.append(&mut self.own_devices(&mut send)?);
        let vm_config = VmConfig {
            vcpus: size.vcpus,
            boot_vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            pluggable: self.pluggable(),
            kernel: send(template::open(&node.config.kernel)?.into()),
            initrd: None,
            cmdline: cmdline(&node.config),
            serial,
            devices,
        };
        Ok((vm_config, fds))
    }

    /// The file of the guest's console, if there is to be one.
    fn console(&self) -> Result<Option<File>, PodError> {
        if !self.context.node.config.serial_console {
            return Ok(None);
        }
        let path = self.context.run.console();
        let file = beneath::split(&path)
            .and_then(|(run, name)| run.replace(name, OFlags::WRONLY, 0o600))
            .map_err(|e| PodError::internal(format!("create {}", path.display()), e))?;
        Ok(Some(file))
    }

    /// What a template has too.
    fn base_devices(
        &self,
        listener: &UnixListener,
        send: &mut impl FnMut(OwnedFd) -> FdIndex,
    ) -> Result<Vec<(u8, DeviceConfig)>, PodError> {
        let listener = listener
            .try_clone()
            .map_err(|e| PodError::internal("duplicate a file descriptor", e))?;
        let root = template::open(&self.context.node.config.guest_root)?;
        template::base_devices(listener, root, send)
    }

    /// What is the pod's alone: its scratch disk, its cards, and what memory it gets later.
    fn own_devices(
        &self,
        send: &mut impl FnMut(OwnedFd) -> FdIndex,
    ) -> Result<Vec<(u8, DeviceConfig)>, PodError> {
        let mut devices = self.disk_and_memory(send)?;
        devices.append(&mut self.cards(send)?);
        Ok(devices)
    }

    fn disk_and_memory(
        &self,
        send: &mut impl FnMut(OwnedFd) -> FdIndex,
    ) -> Result<Vec<(u8, DeviceConfig)>, PodError> {
        let failed = |e| PodError::internal("duplicate the scratch disk", e);
        let scratch = self.parts.scratch.try_clone().map_err(failed)?;
        let length = scratch.metadata().map_err(failed)?.len();
        let scratch = template::disk("scratch", false, send(scratch.into()), length);
        let mut devices = vec![(slots::SCRATCH, scratch)];
        if self.pluggable().is_some() {
            devices.push((slots::MEMORY, DeviceConfig::Memory));
        }
        Ok(devices)
    }

    fn cards(
        &self,
        send: &mut impl FnMut(OwnedFd) -> FdIndex,
    ) -> Result<Vec<(u8, DeviceConfig)>, PodError> {
        let mut devices = Vec::new();
        for (number, link) in (0..).zip(&self.parts.network.links) {
            let taps: io::Result<Vec<_>> = link.taps.iter().map(OwnedFd::try_clone).collect();
            let taps = taps.map_err(|e| PodError::internal("duplicate the tap", e))?;
            let net = DeviceConfig::Net {
                taps: taps.into_iter().map(&mut *send).collect(),
                mac: link.mac,
                mtu: Some(link.mtu).filter(|mtu| *mtu > 0),
            };
            devices.push((slots::net(number), net));
        }
        Ok(devices)
    }

    async fn undo(self) -> Result<(), Left> {
        let Parts { network, vmm, .. } = &self.parts;
        let node = self.context.node;
        let (vm, down) = tokio::join!(kill(vmm), node.network.teardown(&network.record));
        let down = down.map_err(network_error);
        // It ends with its VM.
        let files = self.context.files.lock().await.end().await;
        let files = files.map_err(PodError::from);
        Prepared(self.context).undo(vm.and(files).and(down)).await
    }
}

/// The VM runs and its agent answers.
struct Booted<'a> {
    context: Context<'a>,
    parts: Parts,
    agent: Agent,
    guest: GuestInfo,
}

impl Stage for Booted<'_> {
    const REACHED: Point = Point::SandboxBooted;
}

impl Booted<'_> {
    async fn configure(mut self) -> Result<Up, Failed> {
        let mut configured = stage("configure", self.tell_guest()).await;
        let template = self.context.template.take();
        let cloned = template.is_some() && configured.is_ok();
        if let Some(template) = template {
            let templates = &self.context.node.templates;
            match configured {
                Ok(()) => {
                    templates.cloned();
                    template.learn(self.parts.vmm.identity().pid).await;
                }
                // Whether that is the clone's fault or the pod's is seen by one that boots.
                Err(error) => {
                    self = self.boot_instead(&error).await?;
                    configured = stage("configure", self.tell_guest()).await;
                    if configured.is_ok() {
                        self.context.node.templates.discard(&template);
                    }
                }
            }
        }
        let Self {
            mut context,
            parts,
            agent,
            guest,
        } = self;
        if let Err(error) = configured {
            let undo = Assembled { context, parts }.undo().await;
            return Err(failed(error, undo));
        }
        context.record.guest = Some(guest);
        Ok(Up {
            record: context.record,
            vm: parts.vm,
            agent,
            times: BootTimes {
                cloned,
                ..BootTimes::default()
            },
            network: parts.network.guest,
        })
    }

    /// The same with a VM that boots, since the clone failed.
    async fn boot_instead(self, error: &PodError) -> Result<Self, Failed> {
        let Self { context, parts, .. } = self;
        let mut assembled = Assembled { context, parts };
        match assembled.boot_instead(Cold::Lost, error).await {
            Ok((agent, guest)) => Ok(Self {
                context: assembled.context,
                parts: assembled.parts,
                agent,
                guest,
            }),
            Err(error) => Err(failed(error, assembled.undo().await)),
        }
    }

    /// Lets the guest have the memory that it may have.
    async fn bound_memory(&self) -> Result<(), PodError> {
        let VmSize {
            least_mib,
            most_mib,
            ..
        } = self.context.size;
        if most_mib > 0 {
            let vm = &self.parts.vm;
            vm.plug(least_mib, most_mib, CALL_TIMEOUT).await?;
        }
        Ok(())
    }

    /// Tells the guest what it is to be, and gives it its scratch disk.
    async fn tell_guest(&self) -> Result<(), PodError> {
        self.bound_memory().await?;
        let (record, network) = (&self.context.record, &self.parts.network);
        let resolv_conf = configure::resolv_conf(
            record.spec.dns.as_ref(),
            &network.dns,
            // A host without the file has no resolver to hand on.
            || fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        );
        let mut request = configure::request(
            &record.id,
            &record.spec,
            &network.guest,
            &record.ips,
            resolv_conf,
        );
        request.memory_grows = self.context.size.grows();
        let scratch = Storage {
            id: SCRATCH_ID,
            slot: slots::SCRATCH,
            fstype: "ext4",
            scratch: true,
            ..Storage::default()
        };
        let agent = &self.agent;
        tokio::try_join!(agent.attach_storage(scratch), agent.configure(request))?;
        Ok(())
    }
}

async fn kill(vmm: &Process) -> Result<(), PodError> {
    Ok(vmm.end(Duration::ZERO).await?)
}

/// What a pod's network is to be; its VM has so many vCPUs.
fn network_request(record: &SandboxRecord, vcpus: u8) -> PodNetworkRequest {
    let spec = &record.spec;
    PodNetworkRequest {
        pod_id: record.id.to_string(),
        namespace: spec.metadata.namespace.clone(),
        name: spec.metadata.name.clone(),
        uid: spec.metadata.uid.clone(),
        port_mappings: spec
            .port_mappings
            .iter()
            .filter(|mapping| mapping.host_port > 0)
            .map(|mapping| hull_network::PortMapping {
                protocol: mapping.protocol.clone(),
                container_port: mapping.container_port,
                host_port: mapping.host_port,
                host_ip: mapping.host_ip.clone(),
            })
            .collect(),
        annotations: spec.annotations.clone(),
        dns: spec
            .dns
            .clone()
            .map_or_else(Default::default, |dns| hull_network::Dns {
                nameservers: dns.servers,
                search: dns.searches,
                options: dns.options,
                ..hull_network::Dns::default()
            }),
        queues: vcpus.min(MAX_QUEUE_PAIRS as u8),
    }
}

/// The last line of a guest's console, when there is one.
fn console_tail(run: &RunDir) -> String {
    let read = || -> io::Result<String> {
        let path = run.console();
        let (run, name) = beneath::split(&path)?;
        let mut file = run.file(name, OFlags::RDONLY)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(CONSOLE_TAIL)))?;
        let mut bytes = Vec::new();
        file.take(CONSOLE_TAIL).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let tail = read().unwrap_or_default();
    match tail.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) => format!("; its console ends with: {}", one_line(line, LINE_MAX)),
        None => String::new(),
    }
}

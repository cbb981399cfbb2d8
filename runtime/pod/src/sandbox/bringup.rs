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
};
use hull_network::{GuestNetwork, NetworkError, PodNetwork, PodNetworkRequest, RequestError};
use hull_proto_vmm::{DeviceConfig, FdIndex, MAX_QUEUE_PAIRS, RestoreConfig, VmConfig};
use hull_spec::{
    error::PodError,
    field::Field,
    info::{BootTimes, GuestInfo},
    size::VmSize,
    spec::SandboxSpec,
};
use hull_vm::{
    agent::{
        client::{Agent, Storage},
        configure,
    },
    cgroup::PodCgroup,
    client::VmClient,
    error::VmError,
    process::Process,
    rundir::{DataDir, RunDir},
    slots,
};

use super::{CMDLINE, SPAWN, make_dir, teardown, template};
use crate::{
    node::Node,
    ports::network_error,
    record::{SandboxRecord, VmRecord},
    starts::Turn,
    storage::scratch,
    templates::{Cold, Template},
};
use tokio::time::timeout;

/// The name of the scratch disk's mount in the guest.
pub(crate) const SCRATCH_ID: &str = "scratch";
/// The part of the longest boot after which a guest is taken for hung, and others have their turn.
const HUNG: u32 = 4;
/// How much of a console that tells about a failed boot is shown, in bytes.
const CONSOLE_TAIL: u64 = 1024;
/// Most characters of it that are shown.
const LINE_MAX: usize = 160;

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
    record: SandboxRecord,
    mut turn: Turn,
) -> Result<Up, Failed> {
    let begin = Instant::now();
    let size = check(node, &record.spec).map_err(untouched)?;
    let context = Context {
        node,
        run: RunDir::of(&node.config, &record.id),
        data: DataDir::of(&node.config, &record.id),
        record,
        size,
        times: BootTimes::default(),
        template: None,
    };
    let recorded = reach(Recorded::new(context)).await?;
    let prepared = reach(recorded.prepare()).await?;
    let assembled = reach(prepared.assemble()).await?;
    let cgroup = assembled.context.record.cgroup.as_ref();
    turn.keep(cgroup.and_then(|cgroup| cgroup.millicpus(&node.config.cgroup_root)));
    let mut up = {
        let mut boot = pin!(async { reach(reach(assembled.boot()).await?.configure()).await });
        let longest = node.config.boot_timeout / HUNG;
        match timeout(longest, &mut boot).await {
            Ok(up) => up?,
            Err(_) => {
                drop(turn);
                boot.await?
            }
        }
    };
    up.times.total_us = micros(begin);
    template::provide(node, &up.record.spec.metadata.namespace, size);
    Ok(up)
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

/// What can be known to fail before anything is made.
fn check(node: &Node, spec: &SandboxSpec) -> Result<VmSize, PodError> {
    let config = &node.config;
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
    let size = VmSize::of(spec, config, host::cpus());
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
    times: BootTimes,
    /// What its VM is a clone of.
    template: Option<Arc<Template>>,
}

impl Context<'_> {
    async fn save(&self) -> Result<(), PodError> {
        Ok(self.node.records.put_sandbox(&self.record).await?)
    }

    async fn spawn_vmm(&self) -> Result<(Process, VmClient), PodError> {
        let Self {
            node, record, run, ..
        } = self;
        let cgroup = record.cgroup.as_ref();
        let vmm =
            node.processes
                .spawn_vmm(&node.config.vmm, &record.id, record.user, run, cgroup)?;
        let deadline = tokio::time::Instant::now() + SPAWN;
        let connected =
            VmClient::connect(&run.control_socket(), &run.exit_report(), deadline, &vmm).await;
        match connected {
            Ok((vm, _)) => Ok((vmm, vm)),
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
        let (root, parent) = (&node.config.cgroup_root, &record.spec.cgroup_parent);
        record.cgroup = PodCgroup::plan(root, parent, &record.id).map_err(untouched)?;
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
    async fn assemble(mut self) -> Result<Assembled<'a>, Failed> {
        let mut times = self.0.times;
        let (network, vmm, scratch) = tokio::join!(
            timed(&mut times.network_us, self.network()),
            timed(&mut times.spawn_us, self.0.spawn_vmm()),
            timed(&mut times.scratch_us, self.scratch()),
        );
        self.0.times = times;
        match (network, vmm, scratch) {
            (Ok(network), Ok((vmm, vm)), Ok(scratch)) => {
                let mut context = self.0;
                let record = &mut context.record;
                record.network = Some(network.record.clone());
                record.ips = network.record.ips.clone();
                record.seen_ips = Some(network.guest.ips());
                let parts = Parts {
                    network,
                    vmm,
                    vm,
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
                    Ok((vmm, _)) => left = left.and(kill(&vmm).await),
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
        let disk = blocking(move || scratch::create(&config, &path)).await?;
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
    scratch: File,
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
        let begin = Instant::now();
        let listener = self.listen()?;
        let (vm_config, fds) = self.vm_config(&listener)?;
        self.parts.vm.configure(vm_config, fds).await?;
        self.parts.vm.start().await?;
        self.context.times.vm_us = micros(begin);

        let begin = Instant::now();
        let greeted = self.greet().await;
        self.context.times.agent_us = micros(begin);
        greeted
    }

    /// Starts a VM that is a clone; with the error goes of what kind it is.
    async fn start_clone(
        &mut self,
        template: &Template,
    ) -> Result<(Agent, GuestInfo), (Cold, PodError)> {
        let begin = Instant::now();
        let restored = self.restore(template).await;
        restored.map_err(|error| (Cold::Refused, error))?;
        self.context.times.vm_us = micros(begin);

        let begin = Instant::now();
        let woken = self.wake().await;
        self.context.times.agent_us = micros(begin);
        woken.map_err(|error| (Cold::Lost, error))
    }

    /// Has a new VMM, because what the old one has is not known.
    async fn replace_vmm(&mut self) -> Result<(), PodError> {
        kill(&self.parts.vmm).await?;
        let run = self.context.run.path();
        beneath::Directory::open(run)
            .and_then(|run| run.clear())
            .map_err(|e| PodError::internal(format!("clear {}", run.display()), e))?;
        let (vmm, vm) = self.context.spawn_vmm().await?;
        self.parts.vmm = vmm;
        self.parts.vm = vm;
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
            // Each has all descriptors, and uses its own.
            let fds: io::Result<Vec<_>> = fds.iter().map(OwnedFd::try_clone).collect();
            vm.attach(slot, device, fds.map_err(duplicate)?).await?;
        }
        Ok(vm.start().await?)
    }

    /// Makes a clone another guest than its template and all other clones, before it does anything else;
    /// then its driver takes the cards, which the template did not have.
    async fn wake(&self) -> Result<(Agent, GuestInfo), PodError> {
        let (agent, guest) = self.greet().await?;
        agent.wake(configure::wake()).await?;
        for (number, _) in (0..).zip(&self.parts.network.links) {
            agent.attach_link(slots::net(number)).await?;
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
            kernel: send(template::open(&node.config.kernel)?.into()),
            initrd: None,
            cmdline: CMDLINE.into(),
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

    /// What is the pod's alone: its scratch disk and its cards.
    fn own_devices(
        &self,
        send: &mut impl FnMut(OwnedFd) -> FdIndex,
    ) -> Result<Vec<(u8, DeviceConfig)>, PodError> {
        let scratch = self.parts.scratch.try_clone();
        let scratch = scratch.map_err(|e| PodError::internal("duplicate the scratch disk", e))?;
        let length = self.context.node.config.scratch_bytes;
        let scratch = template::disk("scratch", false, send(scratch.into()), length);
        let mut devices = vec![(slots::SCRATCH, scratch)];
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
        Prepared(self.context).undo(vm.and(down)).await
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
        let begin = Instant::now();
        let mut configured = self.tell_guest().await;
        let template = self.context.template.take();
        self.context.times.cloned = template.is_some() && configured.is_ok();
        if let Some(template) = template {
            let templates = &self.context.node.templates;
            match configured {
                Ok(()) => templates.cloned(),
                // Whether that is the clone's fault or the pod's is seen by one that boots.
                Err(error) => {
                    self = self.boot_instead(&error).await?;
                    configured = self.tell_guest().await;
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
        context.times.configure_us = micros(begin);
        context.record.guest = Some(guest);
        Ok(Up {
            record: context.record,
            vm: parts.vm,
            agent,
            times: context.times,
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

    /// Tells the guest what it is to be, and gives it its scratch disk.
    async fn tell_guest(&self) -> Result<(), PodError> {
        let (record, network) = (&self.context.record, &self.parts.network);
        let resolv_conf = configure::resolv_conf(
            record.spec.dns.as_ref(),
            &network.dns,
            // A host without the file has no resolver to hand on.
            || fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        );
        let request = configure::request(
            &record.id,
            &record.spec,
            &network.guest,
            &record.ips,
            resolv_conf,
        );
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

async fn timed<T>(micros_taken: &mut u64, work: impl Future<Output = T>) -> T {
    let begin = Instant::now();
    let result = work.await;
    *micros_taken = micros(begin);
    result
}

fn micros(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX)
}
